"""`train`: train, extend or continue a language model, then measure what it has learned.

The order matters: everything that a user can have got wrong is found before the first compilation.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from ttt.bench import costs, here, plan
from ttt.config import Config, differences, to_dict
from ttt.core import compiling, tree
from ttt.core.batch import Batch
from ttt.dataloader import lm_dataset, text, token_store
from ttt.dataloader.lm_dataset import Source
from ttt.entry import hydra_entry
from ttt.errors import UserError
from ttt.evaluation import result
from ttt.evaluation.loss_by_position import Comparison, PositionLoss
from ttt.evaluation.result import Row
from ttt.evaluation.runs import method_of
from ttt.infra import checkpoint, distributed
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.mesh import check_divides, data_mesh, replicate, shard_batch
from ttt.infra.progress import Progress
from ttt.infra.record import RunRecord
from ttt.infra.tracking import CompositeTracker, RecordTracker, Tracker, WandbTracker
from ttt.model import loop, published
from ttt.model.loop import Evaluator, TrainState

logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """Both splits, and what tells them from other data."""

    train: Source
    evaluation: Source
    fingerprints: dict[str, str]


class Start(NamedTuple):
    """Where training starts."""

    state: TrainState
    loader_state: dict[str, Any] | None
    """None: the first batch."""
    account: dict[str, Any] | None
    """What was taken from a checkpoint."""


def run(config: Config) -> None:
    """Train as `config` says, from where the last call stopped; evaluate; say where things are."""
    distributed.start(config.backend)
    data = open_data(config)
    mesh = data_mesh()
    check_divides(mesh, config.training.global_batch_size // config.training.accum_steps)
    config = fit_memory(config)
    training, paths = config.training, config.deploy_paths
    evaluator = Evaluator(training, mesh)
    checkpoints = Checkpoints(
        checkpoint.run_folder(paths.checkpoint, training.exp_folder, training.exp_name),
        keep=training.keep_checkpoints,
        milestone_freq=training.save_milestone_freq,
    )
    record = RunRecord(Path(paths.experiments) / training.exp_folder / training.exp_name)
    check_continues(config, data, checkpoints, record)
    start = find_start(config, checkpoints, mesh)
    step = int(start.state.step)
    if step >= training.total_steps and summary_path(record, step).exists():
        logger.info(
            "%s is finished at step %d: evaluation in %s, checkpoint in %s. To go on, raise "
            "training.total_steps; to start anew, choose another training.exp_name.",
            *(training.exp_name, step, record.folder, checkpoints.find(step)),
        )
        return
    record.start(
        to_dict(config), devices=[d.device_kind for d in jax.devices()], data=data.fingerprints
    )
    record.truncate_after(step)
    if start.account is not None:
        record.restored(start.account)
    tracker = make_tracker(config, record)
    status = "failed"
    try:
        state = train(config, start, data, evaluator, checkpoints, tracker, mesh)
        evaluate(config, state, data, evaluator, record, tracker)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        tracker.finish(status)
    logger.info("checkpoint: %s", checkpoints.find())


# ---- before the first compilation ------------------------------------------------------


def open_data(config: Config) -> Data:
    """Both splits of the dataset, checked; the built-in corpus is made on first use."""
    training, model = config.training, config.model
    name = training.dataset_name
    root = config.deploy_paths.data.get(name, "")
    if name == "builtin" and not training.dummy_dataset and not Path(root).exists():
        logger.info("making the built-in corpus (the standard library's source) in %s", root)
        text.ensure_builtin(root)
    train, evaluation = (
        lm_dataset.open_source(
            root,
            split,
            seq_length=training.seq_length,
            vocab_size=model.vocab_size,
            bos_token_id=model.bos_token_id,
            dummy=training.dummy_dataset,
            remedy=token_store.remedy(name, root),
        )
        for split in (training.data_split, training.eval_split)
    )
    splits = {training.data_split, training.eval_split}
    dummy = dict.fromkeys(splits, "random tokens")
    return Data(
        train,
        evaluation,
        dummy if training.dummy_dataset else {s: token_store.fingerprint(root, s) for s in splits},
    )


def check_continues(
    config: Config, data: Data, checkpoints: Checkpoints, record: RunRecord
) -> None:
    """Refuse to go on with another run's numbers, and to write over a finished run's record."""
    name = config.training.exp_name
    ways_out = (
        "Choose another training.exp_name for a new run, undo the change, or set "
        "training.allow_config_change=true to continue all the same."
    )
    step = checkpoints.latest()
    if step is None:
        if (record.folder / "run.json").exists() and record.run()["status"] == "finished":
            raise UserError(
                f"{record.folder} records a finished run, but {checkpoints.folder} has no "
                "checkpoint of it: choose another training.exp_name, or move the record away."
            )
        return
    manifest = checkpoints.manifest(step)
    changed = differences(manifest["config"], to_dict(config))
    changed |= {
        f"data ({split})": (manifest["data"].get(split), found)
        for split, found in data.fingerprints.items()
        if manifest["data"].get(split) != found
    }
    if step > config.training.total_steps:
        raise UserError(
            f"training.total_steps={config.training.total_steps}: {name} has a checkpoint of step "
            f"{step} already. Choose another training.exp_name, or at least {step} steps."
        )
    if changed and not config.training.allow_config_change:
        listed = "\n".join(f"  {key}: {was} -> {now}" for key, (was, now) in changed.items())
        raise UserError(
            f"{name} has a checkpoint of step {step} in {checkpoints.folder}, trained with other "
            f"settings:\n{listed}\n{ways_out}"
        )


def fit_memory(config: Config) -> Config:
    """`config` with every `auto` chosen for this machine's memory; a UserError if nothing fits."""
    fitted = plan.fit(config, here.machine(config))
    logger.info("%s", fitted.describe())
    if not fitted.fits:
        logger.warning("it may not fit. %s", plan.advice(config, fitted))
    return fitted.config


def find_start(config: Config, checkpoints: Checkpoints, mesh: Mesh) -> Start:
    """The run's own latest checkpoint, else what `load_part` says, else fresh weights."""
    training = config.training
    own = checkpoints.latest()
    if own is not None:
        logger.info("continuing %s from its checkpoint of step %d", training.exp_name, own)
        return restore_all(config, checkpoints, own, mesh)
    if training.load_part == "none":
        return Start(replicate(mesh, jax.jit(lambda: loop.init_state(config))()), None, None)
    folder = checkpoint.run_folder(
        config.deploy_paths.checkpoint, training.resume_exp_folder, training.resume_exp_name
    )
    parent = Checkpoints(folder)
    step_folder = parent.find(training.resume_step)
    logger.info("starting from %s (%s)", step_folder, training.load_part)
    if training.load_part == "all":
        return restore_all(config, parent, int(step_folder.name), mesh)
    return restore_parameters(config, step_folder, mesh)


def restore_all(config: Config, source: Checkpoints, step: int, mesh: Mesh) -> Start:
    """Parameters, optimizer state, step and position exactly as they were saved."""
    whole = NamedSharding(mesh, PartitionSpec())
    like = jax.eval_shape(lambda: loop.init_state(config))
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(as_items, like),
    )
    items = source.restore(step, stored)
    model = published.from_stored(like.model, items["model_weights"])
    opt_state = published.from_stored(like.opt_state, items["opt_state"])
    state = TrainState(model, opt_state, replicate(mesh, jnp.asarray(step, jnp.int32)))
    names = list(tree.named_leaves(items["model_weights"]))
    account = {"from": str(source.find(step)), "part": "all", "restored": names, "initialised": []}
    return Start(state, source.loader_state(step), account)


def restore_parameters(config: Config, step_folder: Path, mesh: Mesh) -> Start:
    """Parameters by published name, the rest fresh; every parameter is accounted for."""
    fresh = loop.init_state(config).model
    model, account = published.load_parameters(
        fresh, step_folder, may_initialise=published.NEW_IN_META
    )
    logger.info("%s", account)
    state = loop.start_from(model, config.training)
    account = {"from": str(step_folder), "part": "params", **dataclasses.asdict(account)}
    return Start(replicate(mesh, state), None, account)


def as_items(state: TrainState) -> dict[str, Any]:
    """The array items of a checkpoint, in the published layout."""
    return {
        "model_weights": published.to_stored(state.model),
        "opt_state": published.to_stored(state.opt_state),
    }


def make_tracker(config: Config, record: RunRecord) -> Tracker:
    """The run record, mirrored to W&B if asked for."""
    training = config.training
    if not training.log_wandb:
        return RecordTracker(record)
    mirror = WandbTracker(
        entity=training.wandb_entity,
        project=training.wandb_project,
        name=training.exp_name,
        run_id=record.run()["id"],
        folder=record.folder,
        config=to_dict(config),
        key=training.wandb_key,
    )
    return CompositeTracker(RecordTracker(record), mirror)


# ---- training ----------------------------------------------------------------------------


def train(
    config: Config,
    start: Start,
    data: Data,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    tracker: Tracker,
    mesh: Mesh,
) -> TrainState:
    """From `start` to `total_steps`, with logs, evaluations and checkpoints on the way."""
    training = config.training
    state, first = start.state, int(start.state.step)
    if first >= training.total_steps:
        return state
    batches = lm_dataset.train_batches(
        data.train,
        global_batch_size=training.global_batch_size,
        seed=training.data_seed,
        bos_token_id=config.model.bos_token_id,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    if start.loader_state is not None:
        batches.set_state(start.loader_state)
    compiled = None
    clock = time.monotonic()
    with Progress(training.total_steps, "train", start=first) as progress:
        for step in range(first + 1, training.total_steps + 1):
            waited = time.monotonic()
            batch = place(next(batches), training.accum_steps, mesh)
            waited = time.monotonic() - waited
            if compiled is None:
                compiled = compile_step(config, state, batch)
                clock = time.monotonic()
            state, metrics = compiled(state, batch)
            metrics = {name: float(value) for name, value in metrics._asdict().items()}
            now = time.monotonic()
            tokens = training.global_batch_size * training.seq_length
            speed = measure_speed(config, now - clock)
            metrics |= {
                "tokens_per_second": tokens / (now - clock),
                "data_wait_seconds": waited,
                **speed,
            }
            clock = now
            if due(step, training.eval_every_steps) and step < training.total_steps:
                metrics["eval_loss"] = score(config, state, data, evaluator, learn=True).loss
                clock = time.monotonic()
            tracker.log(step, metrics)
            progress.update(step, loss=metrics["loss"], tokens=tokens, mfu=speed.get("mfu"))
            if due(step, training.save_every_steps) or step == training.total_steps:
                save(config, state, batches, data, checkpoints)
                clock = time.monotonic()
    return state


def measure_speed(config: Config, seconds: float) -> dict[str, float]:
    """Model TFLOP/s of a device, and MFU if its peak is known, of a step that took so long."""
    kind = jax.local_devices()[0].device_kind
    return costs.speed(config.model, config.training, seconds, jax.device_count(), kind)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


def place(batch: Batch, accum_steps: int, mesh: Mesh) -> Batch:
    """A host's [B, T] as microbatches [accum, B/accum, T], divided over the devices."""
    parts = jax.tree.map(lambda x: x.reshape(accum_steps, -1, x.shape[-1]), batch)
    return shard_batch(mesh, parts, batch_axis=1)


def compile_step(config: Config, state: TrainState, batch: Batch) -> jax.stages.Compiled:
    """The training step for these shapes, with a word on what it takes."""
    parameters = tree.count(state.model)
    logger.info(
        "%s: %.2fM parameters, %s mode, %s tokens per step; compiling the training step …",
        *(config.training.exp_name, parameters / 1e6, config.training.train_mode),
        f"{batch.inputs.size:,}",
    )
    began = time.monotonic()
    step = jax.jit(
        loop.make_train_step(config.training),
        donate_argnums=0,
        compiler_options=compiling.options(),
    )
    compiled = step.lower(state, batch).compile()
    logger.info("compiled in %.0f s", time.monotonic() - began)
    if memory := compiled.memory_analysis():  # not every backend tells
        predicted = plan.predict(config, here.machine(config)).total
        actual = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        logger.info(
            "a step needs %.0f MB beside the %.0f MB of its state; %.0f MB were predicted in all, "
            "%+.0f %% of what XLA reserves",
            memory.temp_size_in_bytes / 1e6,
            memory.argument_size_in_bytes / 1e6,
            predicted / 1e6,
            100 * (predicted / actual - 1),
        )
    return compiled


def save(
    config: Config,
    state: TrainState,
    batches: grain.DatasetIterator,
    data: Data,
    checkpoints: Checkpoints,
) -> None:
    """A checkpoint from which the run goes on bit for bit."""
    checkpoints.save(
        int(state.step),
        **as_items(state),
        loader_state=batches.get_state(),
        manifest={"config": to_dict(config), "data": data.fingerprints},
    )


# ---- evaluation --------------------------------------------------------------------------


def score(
    config: Config, state: TrainState, data: Data, evaluator: Evaluator, *, learn: bool
) -> PositionLoss:
    """The evaluation split, or `eval_batches` of it, in order."""
    training = config.training
    batches = lm_dataset.eval_batches(
        data.evaluation,
        batch_size=training.eval_batch_size,
        max_batches=training.eval_batches,
        bos_token_id=config.model.bos_token_id,
    )
    available = -(-len(data.evaluation) // training.eval_batch_size)
    total = min(training.eval_batches or available, available)
    with Progress(total, f"evaluate{'' if learn else ' without learning'}") as progress:
        return PositionLoss.measure(
            evaluator,
            state.model,
            batches,
            learn=learn,
            told=lambda batch, loss: progress.update(batch, loss=loss),
        )


def evaluate(
    config: Config,
    state: TrainState,
    data: Data,
    evaluator: Evaluator,
    record: RunRecord,
    tracker: Tracker,
) -> None:
    """Loss by position with and without learning: table, picture, record."""
    training, step = config.training, int(state.step)
    learning = score(config, state, data, evaluator, learn=True)
    meta = training.train_mode == "meta"
    still = score(config, state, data, evaluator, learn=False) if meta else None
    sliding = config.model.seq_modeling_block == "SWA"
    window = config.model.sliding_window_size if sliding else training.seq_length
    comparison = Comparison(learning, still, window)
    summary = comparison.summary()
    picture = record.folder / f"loss_by_position-{step}.png"
    comparison.draw(
        picture,
        title=f"{training.exp_name}, step {step}",
        points=min(32, training.seq_length),
    )
    path = record.save_arrays("loss_by_position", step, comparison.arrays(), summary)
    method = method_of(config.model, training)
    like = Row("loss_by_position", training.exp_name, method, step, training.seq_length, "loss")
    rows = comparison.rows(like, resamples=1000, seed=0)
    result.write_whole(path.with_suffix(".csv"), result.to_csv(rows))
    tracker.log(step, {"final_eval_loss": learning.loss})
    Console().print(comparison.table())
    if still is not None:
        logger.info(
            "learning while reading lowers the held-out loss by %.3f nats per token in the last "
            "half of the sequence",
            summary["gain_last_half"],
        )
    logger.info("picture: %s\nnumbers: %s", picture, path)


def summary_path(record: RunRecord, step: int) -> Path:
    """Where `evaluate` leaves its figures."""
    return record.folder / "eval" / f"loss_by_position-{step}.json"


main = hydra_entry(run)

if __name__ == "__main__":
    main()
