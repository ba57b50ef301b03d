"""The light runtime modes: a count model in the network's place, and beside it as a yardstick.

`token_stats` counts what the network would have been trained on; `simulate` carries a count model
that never counts from one checkpoint to the next. Either is a learner in the loop of `ttt.train`.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ttt.core.batch import Batch
from ttt.core.tree import nested
from ttt.dataloader import lm_dataset
from ttt.dataloader.lm_dataset import Source
from ttt.errors import UserError
from ttt.infra import checkpoint
from ttt.infra.checkpoint import Checkpoints, RestoreAccount
from ttt.infra.progress import Progress
from ttt.knobs import Config
from ttt.model.loop import Scores
from ttt.training.count_model import CountModel
from ttt.training.start import Parent, Start, parents_checkpoints, start_batches, token_loss

logger = logging.getLogger(__name__)


class CountState(NamedTuple):
    """All that a step changes."""

    model: CountModel
    step: int
    """Batches counted (or, simulated, passed over)."""


class CountMetrics(NamedTuple):
    """Of one batch."""

    loss: float
    """As the network's: of the batch before it is counted, in nats per token."""


def is_asked_for(config: Config) -> bool:
    """Whether a light mode is to take the network's place."""
    return config.training.runtime_mode != "jax"


def on_the_cpu(config: Config) -> Config:
    """`config` without a wish for an accelerator, which counting would hold and not use."""
    if config.backend.platform != "auto":
        return config
    return replace(config, backend=replace(config.backend, platform="cpu"))


@dataclass(frozen=True)
class CountLearner:
    """The learner of `runtime_mode=token_stats`, and of `simulate`, where no step is taken."""

    config: Config

    @property
    def learns(self) -> bool:
        """Not while it is evaluated."""
        return False

    @property
    def window(self) -> int:
        """All of the sequence: there is no attention to end."""
        return self.config.training.seq_length

    def find_start(
        self, train: Source, evaluation: Source, checkpoints: Checkpoints, own: int | None
    ) -> Start:
        """The run's own step `own`, else what `load_part` says, else nothing counted."""
        training = self.config.training
        if own is not None:
            logger.info("continuing %s from its checkpoint of step %d", training.exp_name, own)
            return self._restore(checkpoints, own, "all")._replace(continues=True)
        if training.load_part == "none":
            nothing = CountModel.empty(self.config.model.vocab_size)
            return Start(CountState(nothing, 0), None, None)
        parent = parents_checkpoints(self.config)
        step = parent.find_good(training.resume_step)
        logger.info("starting from %s (%s)", parent.find(step), training.load_part)
        start = self._restore(parent, step, training.load_part)
        if training.runtime_mode == "simulate":
            return start
        loss = self._start_loss(start.state.model, evaluation)
        return start._replace(parent=Parent(loss, training.seq_length, False, True, ""))

    def warm_loss(self, start: Start, evaluation: Source) -> float | None:
        """The parent's counts are the child's, so it must be the parent's loss."""
        return self._start_loss(start.state.model, evaluation) if start.parent else None

    def _start_loss(self, model: CountModel, evaluation: Source) -> float:
        batches = start_batches(self.config, evaluation, self.config.training.seq_length)
        return token_loss(self.score, model, batches, learn=False)

    def _restore(self, source: Checkpoints, step: int, part: str) -> Start:
        folder, vocab_size = source.find(step), self.config.model.vocab_size
        arrays = checkpoint.read_flat(folder, "model_weights")
        model = CountModel.from_arrays(nested(arrays)["count_model"])
        if model.vocab_size != vocab_size:
            raise UserError(
                f"{folder} has counted tokens of a vocabulary of {model.vocab_size}, and "
                f"model.vocab_size={vocab_size}: counts of other tokens are of no use; set it to "
                f"{model.vocab_size}, or start from another run"
            )
        account = RestoreAccount(tuple(arrays), initialised=(), cast=(), unused=())
        told = {"from": str(folder), "part": part, **asdict(account)}
        if part == "all":
            return Start(CountState(model, step), source.loader_state(step), told)
        return Start(CountState(model, 0), None, told)

    def place(self, batch: Batch) -> Batch:
        """As it is."""
        return batch

    def compile(
        self, state: CountState, batch: Batch
    ) -> Callable[[CountState, Batch], tuple[CountState, CountMetrics]]:
        """Nothing to compile: the step itself."""
        logger.info(
            "%s: a count model in the network's place, %s tokens per step",
            *(self.config.training.exp_name, f"{batch.inputs.size:,}"),
        )
        return self._step

    def _step(self, state: CountState, batch: Batch) -> tuple[CountState, CountMetrics]:
        loss = float(np.mean(self.score(state.model, batch).loss))
        return CountState(state.model.plus(*_arrays(batch)), state.step + 1), CountMetrics(loss)

    def items(self, state: CountState) -> dict[str, Any]:
        """The counts, and in the optimizer's place the steps."""
        counts = {"count_model": state.model.arrays()}
        return {"model_weights": counts, "opt_state": {"count": np.asarray(state.step)}}

    def score(self, model: CountModel, batch: Batch, *, learn: bool = True) -> Scores:
        """Losses as the network's are: over chunks of `mini_batch_size`, which it has no use for.

        learn: of no consequence; it does not learn while it reads.
        """
        del learn
        inputs, targets, mask = _arrays(batch)
        nll, count = model.nll(inputs, targets), mask.astype(np.float64)
        chunks = (len(nll), -1, self.config.model.mini_batch_size)
        sums, counts = ((x.reshape(chunks)).sum(axis=2) for x in (nll * count, count))
        return Scores(np.mean(sums / np.maximum(counts, 1), axis=1), nll, count)

    def speed(self, seconds: float) -> dict[str, float]:
        """None: counting is not arithmetic."""
        return {}


def count(config: Config, source: Source) -> CountModel:
    """The count model of the first `count_model_tokens` of the training order, or of one epoch.

    Whole sequences, at least one. How far training itself went does not matter: a run that goes on
    from a parent has the parent's tokens behind it, and the yardstick is the same for all.
    """
    training = config.training
    epoch = len(source) // training.global_batch_size * training.global_batch_size
    left = min(max(1, training.count_model_tokens // training.seq_length), epoch)
    batches = lm_dataset.train_batches(
        source,
        global_batch_size=training.global_batch_size,
        seed=training.data_seed,
        bos_token_id=config.model.bos_token_id,
        threads=2,  # which read ahead less of what is not wanted any more
    )
    parts = []
    number = -(-left // training.global_batch_size)
    with Progress(number, "read for the count model") as progress:
        for done in range(1, number + 1):
            parts.append([array[:left] for array in _arrays(next(batches))])
            left -= len(parts[-1][0])
            progress.update(done)
    inputs, targets, mask = map(np.concatenate, zip(*parts, strict=True))
    return CountModel.empty(config.model.vocab_size).plus(inputs, targets, mask)


def tell(loss: float, count_loss: float, tokens: int) -> None:
    """Say how a trained model with the token loss `loss` stands against the count model's."""
    if loss < count_loss:
        logger.info(
            "count model of %s tokens: %.3f nats per token; this model is %.3f below",
            *(f"{tokens:,}", count_loss, count_loss - loss),
        )
        return
    logger.warning(
        "THIS MODEL DOES NOT BEAT A COUNT OF TOKEN PAIRS: %.3f nats per token, and a count model "
        "of %s tokens of the same data has %.3f. It was trained too little, or something is wrong",
        *(loss, f"{tokens:,}", count_loss),
    )


def _arrays(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inputs, targets, mask = map(np.asarray, batch)
    return inputs, targets, mask
