"""Where training starts: the run's own checkpoint, a parent's parameters, or fresh weights.

A start from a parent is accounted for parameter by parameter, and by what the parent could do: its
loss on the tokens on which the child must be able to do the same.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt import mixers
from ttt.config import differences, to_dict, upgraded, with_stored
from ttt.core import tree
from ttt.core.batch import Batch
from ttt.dataloader.lm_dataset import HeldOut, Source
from ttt.dataloader.text import TOKENIZER_FILE
from ttt.errors import UserError
from ttt.globs import matches
from ttt.infra import checkpoint, step_folders
from ttt.infra.checkpoint import CheckpointError, Checkpoints
from ttt.infra.mesh import Layout
from ttt.knobs import Config, ModelConfig
from ttt.model import loop, published
from ttt.model.loop import Evaluator, Score, TrainState
from ttt.model.trained import TrainedModel
from ttt.model.transformer import MetaModel
from ttt.training import warm_start

logger = logging.getLogger(__name__)

# What a model computes beside its weights; a change here changes the function, not the shapes.
_FUNCTION = (
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "qk_norm",
    "attention_bias",
    "pre_norm",
    "post_norm",
    "tie_word_embeddings",
    "compute_dtype",
    "bos_token_id",
)
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
CALIBRATION_SEQUENCES = 8
"""Training sequences on which the units of an MLP are weighed before some are taken away."""


@dataclass(frozen=True)
class Parent:
    """What a start from a parent must be measured against."""

    loss: float | None
    """Of the parent, in its own way (learning if it learns), in nats per token; None: unknown."""
    context: int
    """Tokens of the sequences behind `loss`: as many as both see in the same way."""
    learns: bool
    preserving: bool
    """Whether the child is meant to compute the same function of them."""
    why: str
    """Why there is no loss, or why the function is another one; else empty."""


class StartPoint(NamedTuple):
    """Where training starts."""

    state: Any
    """`TrainState`, or what takes its place in a light mode."""
    loader_state: dict[str, Any] | None
    """None: the first batch."""
    account: dict[str, Any] | None
    """What was taken from a checkpoint."""
    parent: Parent | None = None
    """None: fresh weights, or the run's own checkpoint."""
    continues: bool = False
    """Whether it is the run's own checkpoint."""


def find_start(
    config: Config,
    train: Source,
    evaluation: HeldOut,
    checkpoints: Checkpoints,
    own: int | None,
    layout: Layout,
) -> StartPoint:
    """The run's own checkpoint `own`, else what `load_part` says, else fresh weights."""
    source = find_checkpoint(config, checkpoints, own)
    if source is None:
        # Each device makes its own part. Random numbers do not depend on where they are drawn.
        shardings = layout.shardings(jax.eval_shape(lambda: loop.init_state(config)))
        fresh = jax.jit(lambda: loop.init_state(config), out_shardings=shardings)()
        return StartPoint(fresh, None, None)
    if own is not None:
        return restore_all(config, *source, layout)._replace(continues=True)
    if config.training.load_part == "all":
        whole = restore_all(config, *source, layout)
        return whole._replace(parent=Parent(None, 0, False, True, "the same model, with all state"))
    folder = source[0].find(source[1])
    return restore_parameters(config, train, evaluation, folder, layout)


def find_checkpoint(
    config: Config, checkpoints: Checkpoints, own: int | None
) -> tuple[Checkpoints, int] | None:
    """What to start from: the run's own step `own`, else the parent's good step, if it has one."""
    training = config.training
    if own is not None:
        logger.info("continuing %s from its checkpoint of step %d", training.exp_name, own)
        return checkpoints, own
    if training.load_part == "none":
        return None
    parent = parents_checkpoints(config)
    step = parent.find_good(training.resume_step)
    logger.info("starting from %s (%s)", parent.find(step), training.load_part)
    return parent, step


def parents_checkpoints(config: Config) -> Checkpoints:
    """Those of the run that `resume_exp_name` names."""
    training, root = config.training, config.deploy_paths.checkpoint
    return Checkpoints(
        step_folders.run_folder(root, training.resume_exp_folder, training.resume_exp_name)
    )


def tokenizer_file(config: Config) -> Path | None:
    """The one in the checkpoint that the run goes on or starts from; None: there is none."""
    training, root = config.training, config.deploy_paths.checkpoint
    own = Checkpoints(step_folders.run_folder(root, training.exp_folder, training.exp_name))
    sources = [own] if training.load_part == "none" else [own, parents_checkpoints(config)]
    for source in sources:
        if source.latest() is not None:
            return source.find() / TOKENIZER_FILE
    return None


def check_parent(config: Config, data: Mapping[str, str]) -> None:
    """Refuse a parent that is not there, of another runtime mode, or done with all the steps.

    And a branch (`check_branch`) that would not go on as its parent. data: split -> fingerprint.
    """
    training = config.training
    step_folder = parents_checkpoints(config).find(training.resume_step)
    checkpoint.check_mode(step_folder, training.runtime_mode)
    if training.load_part == "all" and int(step_folder.name) >= training.total_steps:
        raise UserError(
            f"training.total_steps={training.total_steps}: {step_folder} has taken as many steps "
            "already, and with training.load_part=all they count; raise it, or take the "
            "parameters alone (training.load_part=params)"
        )
    if training.load_part == "all":
        manifest = checkpoint.read_json(step_folder, "manifest")
        check_optimizer(config, manifest)
        if training.optimizer_outer.schedule == "wsd":
            check_branch(config, step_folder, manifest, data)


def check_optimizer(config: Config, manifest: Mapping[str, Any]) -> None:
    """Refuse the state of another outer optimizer."""
    was = manifest["config"]["training"]["optimizer_outer"]["optimizer_type"]
    own = config.training.optimizer_outer.optimizer_type
    if was != own:
        raise UserError(
            f"training.optimizer_outer.optimizer_type={own}: the checkpoint holds the state of "
            f"{was}, which {own} cannot use; set it to {was}, or, in a new run, take the "
            "parameters alone (training.load_part=params)"
        )


# In what a branch may differ from its parent: where it starts, and its decay.
_OWN_OF_BRANCH = (
    "training.load_part",
    "training.resume_*",
    "training.model_seed",
    "training.prime_init",
    "training.optimizer_outer.lr_*",
    "training.optimizer_outer.init_lr",
    "training.optimizer_outer.end_lr",
)


def check_branch(
    config: Config, step_folder: Path, manifest: Mapping[str, Any], data: Mapping[str, str]
) -> None:
    """Refuse a branch that does not equal one straight run with its decay.

    step_folder, manifest: of the parent's checkpoint. data: split -> fingerprint.
    """
    trained = upgraded(manifest["config"])["training"]
    was = trained["optimizer_outer"]
    training, step = config.training, int(step_folder.name)
    own = training.optimizer_outer
    if was["schedule"] != "wsd":
        raise UserError(
            f"training.optimizer_outer.schedule=wsd: {step_folder} was trained with schedule="
            f"{was['schedule']}, which has no stable part to go on from; take the parameters alone "
            "(training.load_part=params), or train a parent with schedule=wsd"
        )
    first, last = was["lr_warmup_steps"], was["lr_decay_start"]
    if not first <= step <= last:
        raise UserError(
            f"training.resume_step={training.resume_step}: {step_folder} is not of its run's "
            f"stable part, steps {first} to {last}; set training.resume_step to a step in it"
        )
    first, last = own.lr_warmup_steps, own.lr_decay_start
    if not first <= step <= last:
        raise UserError(
            f"lr_warmup_steps={first}, lr_decay_start={last} of training.optimizer_outer: a branch "
            f"from step {step} begins in the stable part of its own schedule too; set them to at "
            f"most and at least {step}"
        )
    own_settings = list(_OWN_OF_BRANCH)
    if max(trained["ilr_warmup_steps"], training.ilr_warmup_steps) <= step:  # both are over
        own_settings.append("training.ilr_warmup_steps")
    changed = changed_settings(manifest, config, data)
    changed = {k: v for k, v in changed.items() if not any(matches(g, k) for g in own_settings)}
    if changed and not training.allow_config_change:
        raise UserError(
            f"{step_folder} was trained with other settings, and a branch goes on as its parent "
            f"would have:\n{listed(changed)}\n"
            "Undo the change, take the parameters alone (training.load_part=params), or set "
            "training.allow_config_change=true to branch all the same."
        )


def changed_settings(
    manifest: Mapping[str, Any], config: Config, data: Mapping[str, str]
) -> dict[str, tuple[Any, Any]]:
    """What changes a run's numbers and is not as in a checkpoint's manifest, as (its, own).

    data: split -> fingerprint.
    """
    stored = manifest["data"]
    return differences(manifest["config"], to_dict(config)) | {
        f"data ({split})": (stored.get(split), fingerprint)
        for split, fingerprint in data.items()
        if stored.get(split) != fingerprint
    }


def listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """`changed_settings` for a message, a line for each."""
    return "\n".join(f"  {key}: {was} -> {now}" for key, (was, now) in changed.items())


def as_items(state: TrainState) -> dict[str, Any]:
    """The array items of a checkpoint, in the published layout."""
    return {
        "model_weights": published.to_stored(state.model),
        "opt_state": published.to_stored(state.opt_state),
    }


def restore_all(config: Config, source: Checkpoints, step: int, layout: Layout) -> StartPoint:
    """Parameters, optimizer state, step and position exactly as they were saved.

    Where they lay then does not matter: every device reads what it is to hold now.
    """
    like = jax.eval_shape(lambda: loop.init_state(config))
    shapes = jax.eval_shape(as_items, like)
    stored = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        layout.shardings(shapes),
    )
    items = source.restore(step, stored)
    model = published.from_stored(like.model, items["model_weights"])
    opt_state = published.from_stored(like.opt_state, items["opt_state"])
    state = layout.place(TrainState(model, opt_state, jnp.asarray(step, jnp.int32)))
    names = list(tree.named_leaves(items["model_weights"]))
    account = {"from": str(source.find(step)), "part": "all", "restored": names, "initialised": []}
    return StartPoint(state, source.loader_state(step), account)


def restore_parameters(
    config: Config, train: Source, evaluation: HeldOut, step_folder: Path, layout: Layout
) -> StartPoint:
    """Parameters by published name, the rest begun anew; every parameter is accounted for.

    The parent stays in host memory; every leaf goes straight to the devices that are to hold it.
    """
    stored = checkpoint.read_flat(step_folder, "model_weights")
    parent = stored_run(config, step_folder, stored)
    narrowed: dict[str, np.ndarray] = {}
    if parent is not None:
        check_heads(parent.config, config.model, step_folder)
        narrowed = narrow(config, parent, train)
    like = jax.eval_shape(lambda: loop.init_state(config).model)
    try:
        model, account = published.take(
            like, stored | narrowed, step_folder, may_initialise=published.NEW_IN_META
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_width_remedy(parent, config.model)}") from error
    account = replace(account, narrowed=tuple(narrowed))
    measured = measure_parent(config, parent, account, evaluation, layout)
    new = [
        name
        for name in tree.named_leaves(like)
        if published.published_name(name) in account.initialised
    ]
    taken = {name: x for name, x in tree.named_leaves(model).items() if name not in new}
    model = tree.with_leaves(like, layout.place(taken) | fresh_leaves(config, new, layout))
    if account.initialised:
        model, initialised, moved = warm_start.begin(model, config.training.prime_init)
        account = replace(account, initialised=initialised, moved=moved)
    logger.info("%s", account)
    message = {"from": str(step_folder), "part": "params", **dataclasses.asdict(account)}
    if parent is not None:
        message["changed"] = changes(parent, config)
    return StartPoint(loop.start_from(model, config.training, layout), None, message, measured)


def fresh_leaves(config: Config, names: list[str], layout: Layout) -> dict[str, jax.Array]:
    """These leaves of a fresh model, each device making its own part; no other leaf is made."""

    def make() -> dict[str, jax.Array]:
        leaves = tree.named_leaves(loop.init_state(config).model)
        return {name: leaves[name] for name in names}

    return jax.jit(make, out_shardings=layout.shardings(jax.eval_shape(make)))() if names else {}


# ---- the parent ------------------------------------------------------------------------


def stored_run(
    config: Config, step_folder: Path, stored: dict[str, np.ndarray]
) -> TrainedModel | None:
    """The parent as it was trained; None for a checkpoint that does not say how that was."""
    try:
        settings = checkpoint.read_json(step_folder, "manifest")["config"]
    except (CheckpointError, KeyError):
        return None
    own = with_stored(config, settings)
    shapes = jax.eval_shape(lambda: MetaModel(own.model, key=jax.random.key(0)))
    model, _ = published.take(shapes, stored, step_folder)
    training = replace(
        own.training, eval_batch_size=config.training.eval_batch_size, inner_remat_freq=1
    )
    return TrainedModel(own.training.exp_name, int(step_folder.name), training, model)


def check_heads(parent: ModelConfig, own: ModelConfig, step_folder: Path) -> None:
    """Refuse a cut into other heads: the shapes may fit, and the function be destroyed."""
    for key in _HEADS:
        was, now = getattr(parent, key), getattr(own, key)
        if was != now:
            raise UserError(
                f"model.{key}={now}: {step_folder} was trained with {was}, and its weights mean "
                f"nothing in other heads; set model.{key}={was}"
            )


def changes(parent: TrainedModel, config: Config) -> dict[str, list[Any]]:
    """Settings of the function that differ, as [parent's, own].

    Mixers of one family are one function of as many tokens as each of them sees.
    """
    model, training = config.model, config.training
    both_learn = parent.learns and training.train_mode == "meta"
    keys = (*_FUNCTION, "mini_batch_size") if both_learn else _FUNCTION
    pairs = {f"model.{key}": [getattr(parent.config, key), getattr(model, key)] for key in keys}
    if families(parent.config) != families(model):
        both = (parent.config, model)
        pairs["model.layer_types"] = [list(mixers.layer_types(part)) for part in both]
    if both_learn:
        inner = (parent.training, training)
        pairs["training.optimizer_inner"] = [dataclasses.asdict(t.optimizer_inner) for t in inner]
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def families(model: ModelConfig) -> list[str]:
    """Of every layer's mixer."""
    return [mixer.family for mixer in mixers.layers(model)]


def common_context(parent: TrainedModel, config: Config) -> int:
    """Tokens of a sequence that both models see in the same way, in whole chunks of both."""
    models = (parent.config, config.model)
    windows = [[mixer.window for mixer in mixers.layers(model)] for model in models]
    length = min(parent.training.seq_length, config.training.seq_length)
    if windows[0] != windows[1]:
        length = min([length, *(w for layers in windows for w in layers if w is not None)])
    chunk = math.lcm(*(m.mini_batch_size for m in models if not mixers.windows_apart(m)))
    return length // chunk * chunk


def measure_parent(
    config: Config,
    parent: TrainedModel | None,
    account: checkpoint.RestoreAccount,
    evaluation: HeldOut,
    layout: Layout,
) -> Parent:
    """The parent's loss on the tokens that both models see in the same way."""
    if parent is None:
        return Parent(None, 0, False, False, "the parent's checkpoint has no manifest")
    context = common_context(parent, config)
    changed = changes(parent, config)
    reasons = [f"{key}: {was} -> {now}" for key, (was, now) in changed.items()]
    if account.narrowed:
        reasons.append("its MLPs were narrowed")
    if account.initialised and config.training.prime_init not in warm_start.PRESERVING:
        reasons.append(f"training.prime_init={config.training.prime_init}")
    why = "; ".join(reasons)
    if not context:
        return Parent(None, 0, False, False, "no whole chunk that both see in the same way")
    logger.info("scoring the parent on %d tokens of each start sequence", context)
    evaluator, model = Evaluator(parent.training, layout), layout.place(parent.at(context))
    loss = start_loss(config, evaluation, evaluator, model, context, learn=parent.learns)
    return Parent(loss, context, parent.learns, not reasons, why)


def eval_batches(
    config: Config, evaluation: HeldOut, most: int, context: int | None = None
) -> Iterator[Batch]:
    """The first batches, at most `most` (0: all); of each stretch the first `context` tokens."""
    batches = evaluation.batches(config.training.eval_batch_size, most=most)
    return (jax.tree.map(lambda x: x[:, :context], batch) for batch in batches)


def start_loss(
    config: Config, evaluation: HeldOut, score: Score, model: Any, context: int, *, learn: bool
) -> float:
    """Token loss before the first step, on the first `context` tokens of the sequences."""
    batches = eval_batches(config, evaluation, config.training.eval_start_batches, context)
    return token_loss(score, model, batches, learn=learn)


def token_loss(score: Score, model: Any, batches: Iterable[Batch], *, learn: bool) -> float:
    """Mean over all targets that count, in nats: the same number whatever the chunks are."""
    nll = count = 0.0
    for batch in batches:
        scores = score(model, batch, learn=learn)
        nll += float(np.sum(scores.token_nll * scores.loss_mask, dtype=np.float64))
        count += float(np.sum(scores.loss_mask, dtype=np.float64))
    return nll / count if count else math.nan


def warm_loss(
    config: Config, start: StartPoint, evaluation: HeldOut, layout: Layout
) -> float | None:
    """The child's loss at step 0 on the tokens of `start.parent`, learning only if that learned."""
    parent = start.parent
    if parent is None or parent.loss is None:
        return None
    training = replace(config.training, inner_remat_freq=1)
    own = TrainedModel(training.exp_name, 0, training, start.state.model)
    evaluator, model = Evaluator(training, layout), own.at(parent.context)
    return start_loss(config, evaluation, evaluator, model, parent.context, learn=parent.learns)


# ---- MLPs of another width -------------------------------------------------------------


def narrow(config: Config, parent: TrainedModel, train: Source) -> dict[str, np.ndarray]:
    """The parent's MLPs at this model's width, by published name; empty if none is to change."""
    was, own = parent.config, config.model
    wider = not was.prime and was.intermediate_size > own.intermediate_size
    if not (wider and own.prime and own.width_policy == "narrow"):
        return {}
    count = min(len(train), CALIBRATION_SEQUENCES)
    length = min(parent.training.seq_length, config.training.seq_length)
    ids = np.stack([train[index][:length] for index in range(count)])
    logger.info(
        "narrowing the parent's MLPs from %d to %d units by what they do on %d tokens",
        was.intermediate_size,
        own.intermediate_size,
        ids.size,
    )
    return warm_start.narrow(parent.at(length), ids, own.intermediate_size)


def _width_remedy(parent: TrainedModel | None, own: ModelConfig) -> str:
    if parent is None or parent.config.intermediate_size == own.intermediate_size:
        return ""
    return (
        f" Its MLPs have width {parent.config.intermediate_size}, these {own.intermediate_size}: "
        "keep the parent's width (model.width_policy=full), or, from a wider parent without prime "
        "MLPs, ask for its most important units (model.width_policy=narrow)."
    )
