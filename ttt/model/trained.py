"""Checkpoints to be evaluated: each with the settings it was trained with, at any context."""

import dataclasses
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from ttt import mixers
from ttt.config import with_stored
from ttt.errors import UserError
from ttt.infra import checkpoint, step_folders
from ttt.infra.checkpoint import Checkpoints
from ttt.knobs import Config, ModelConfig, TrainingConfig
from ttt.model import published
from ttt.model.transformer import MetaModel

logger = logging.getLogger(__name__)

_FULL_ATTENTION_BLOCK = 1024
"""Queries at once where a run with full attention states no block: a whole context's scores would
not fit long contexts."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained model as it lies in its checkpoint, in host memory."""

    name: str
    step: int
    training: TrainingConfig
    model: MetaModel
    """Leaves are NumPy arrays."""
    folder: Path | None = None
    """Of its checkpoint; None: the model is not on disk."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer whose ids it reads; None: unknown."""

    @property
    def config(self) -> ModelConfig:
        """The network as it was trained, but for the dtype that the evaluation asks for."""
        return self.model.config

    @property
    def method(self) -> str:
        """Its label: `fa`, `swa`, `hybrid`, … or `e2e`."""
        return method_of(self.config, self.training)

    @property
    def learns(self) -> bool:
        """Whether it goes on learning while it reads."""
        return learns(self.training)

    @property
    def window(self) -> int | None:
        """Tokens that a query sees directly; None: all before it."""
        return mixers.window(self.config)

    def modes(self, without_learning: bool) -> tuple[bool, ...]:
        """Learning on, and off where that is another thing."""
        return (True, False) if self.learns and without_learning else (True,)

    @property
    def one_chunk(self) -> bool:
        """Whether its chunk is the whole sequence, so that a sequence may have any length."""
        return mixers.windows_apart(self.config)

    def check_context(self, context: int, key: str) -> None:
        """Raise a UserError that names `key` unless `context` tokens are whole chunks."""
        chunk = self.config.mini_batch_size
        if self.whole_chunks(context) != context:
            raise UserError(
                f"{key}={context}: {self.name} reads in chunks of {chunk} tokens; give a multiple"
            )

    def whole_chunks(self, tokens: int) -> int:
        """The smallest context with room for `tokens` that this run can have."""
        chunk = self.config.mini_batch_size
        return tokens if self.one_chunk else -(-tokens // chunk) * chunk

    def at(self, context: int, weights: MetaModel | None = None) -> MetaModel:
        """The model for sequences of `context` tokens: full attention has one chunk.

        weights: the same parameters where they lie elsewhere, such as on devices.
        """
        weights = self.model if weights is None else weights
        if not self.one_chunk:
            return weights
        block = self.config.attention_block or _FULL_ATTENTION_BLOCK
        config = replace(
            self.config, mini_batch_size=context, attention_block=math.gcd(context, block)
        )
        return weights.with_config(config)


def learns(training: TrainingConfig) -> bool:
    """Whether a model trained so goes on learning while it reads."""
    return training.train_mode == "meta"


def method_of(model: ModelConfig, training: TrainingConfig) -> str:
    """A label of `ttt.mixers`; or `token_stats`, the count model in place of any of them."""
    if training.runtime_mode == "token_stats":
        return "token_stats"
    return mixers.method(model.seq_modeling_block, model.layer_types, training.train_mode)


def load(config: Config) -> list[TrainedModel]:
    """The runs that `config.evaluation` asks for.

    Raises a UserError for a run or step that is not there (naming those that are), parameters that
    do not fit the settings, and weights that are no finite numbers.
    """
    names = config.evaluation.runs or (config.training.exp_name,)
    return [load_one(config, name, config.evaluation.step) for name in names]


def load_one(config: Config, name: str, step: int = -1) -> TrainedModel:
    """One run of `training.exp_folder`, with the settings in its checkpoint's manifest."""
    root, folder = config.deploy_paths.checkpoint, config.training.exp_folder
    checkpoints = Checkpoints(step_folders.run_folder(root, folder, name))
    if checkpoints.latest() is None:
        raise UserError(
            f"no checkpoint of {name} in {checkpoints.folder}; {_others(checkpoints)}. Train it "
            "first, or name one of these (training.exp_name=NAME or evaluation.runs=[NAME,…])"
        )
    step_folder = checkpoints.find(step)
    checkpoint.check_mode(step_folder, "jax")
    manifest = step_folders.read_manifest(step_folder)
    if not manifest:
        logger.info("%s has no manifest: its settings are those of the command line", step_folder)
    own = with_stored(config, manifest.get("config", {}))
    model = own.model
    if config.evaluation.compute_dtype != "model":
        model = replace(model, compute_dtype=config.evaluation.compute_dtype)
    weights, account = published.load_model(model, step_folder)
    if account.unused:
        raise UserError(
            f"{step_folder} has parameters that the model has not: {', '.join(account.unused)}. "
            "Choose the experiment that trained it"
        )
    training = replace(
        own.training, eval_batch_size=config.evaluation.batch_size, inner_remat_freq=1
    )
    number, known = int(step_folder.name), manifest.get("tokenizer")
    return TrainedModel(name, number, training, weights, step_folder, known)


def _others(checkpoints: Checkpoints) -> str:
    siblings = checkpoints.folder.parent
    names = sorted(
        path.name for path in siblings.glob("*") if Checkpoints(path).latest() is not None
    )
    return f"there are {', '.join(names)}" if names else f"{siblings} has none at all"


def describe(run: TrainedModel) -> dict[str, Any]:
    """What a result says of its run."""
    config = run.config
    return {
        "run": run.name,
        "step": run.step,
        "method": run.method,
        "seq_length": run.training.seq_length,
        "window": run.window,
        "chunk": config.mini_batch_size,
        "parameters": sum(int(leaf.size) for leaf in jax.tree.leaves(run.model)),
        "compute_dtype": config.compute_dtype,
        "inner": dataclasses.asdict(run.training.optimizer_inner) if run.learns else None,
    }
