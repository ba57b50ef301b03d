"""The light runtime modes: a count model in the network's place, and beside it as a yardstick.

`token_stats` counts what the network would have been trained on; `simulate` carries a count model
that never counts from one checkpoint to the next. `ttt.train.train_light` is what runs them.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from ttt.core.batch import Batch
from ttt.core.tree import nested
from ttt.dataloader import lm_dataset
from ttt.dataloader.lm_dataset import HeldOut, Source
from ttt.errors import UserError
from ttt.infra import checkpoint
from ttt.infra.checkpoint import Checkpoints, RestoreAccount
from ttt.infra.progress import Progress
from ttt.knobs import Config
from ttt.model.loop import Score, Scores
from ttt.training.count_model import CountModel
from ttt.training.run import TrainingRun
from ttt.training.start import Parent, StartPoint, find_checkpoint, start_loss

logger = logging.getLogger(__name__)

_COUNTED_AT_ONCE = (1 << 20, 1 << 23)
"""Tokens: the least and the most."""
_BESIDE_A_PARENT = 4_000_000


class CountState(NamedTuple):
    """All that a step changes."""

    model: CountModel
    step: int
    """Batches counted (or, simulated, passed over)."""


def on_the_cpu(config: Config) -> Config:
    """`config` without a wish for an accelerator, which counting would hold and not use."""
    if config.backend.platform != "auto":
        return config
    return replace(config, backend=replace(config.backend, platform="cpu"))


def find_start(
    config: Config, evaluation: HeldOut, checkpoints: Checkpoints, own: int | None
) -> StartPoint:
    """The run's own step `own`, else what `load_part` says, else nothing counted."""
    training, source = config.training, find_checkpoint(config, checkpoints, own)
    if source is None:
        return StartPoint(CountState(CountModel.empty(config.model.vocab_size), 0), None, None)
    if own is not None:
        return restore(config, *source, "all")._replace(continues=True)
    start = restore(config, *source, training.load_part)
    if training.runtime_mode == "simulate":
        return start
    loss = _start_loss(config, start.state.model, evaluation)
    return start._replace(parent=Parent(loss, training.seq_length, False, True, ""))


def warm_loss(config: Config, start: StartPoint, evaluation: HeldOut) -> float | None:
    """The loss before the first step: the parent's counts are the child's, so it is the parent's.

    None: there is no parent.
    """
    return _start_loss(config, start.state.model, evaluation) if start.parent else None


def _start_loss(config: Config, model: CountModel, evaluation: HeldOut) -> float:
    context = config.training.seq_length
    return start_loss(config, evaluation, scorer(config), model, context, learn=False)


def restore(config: Config, source: Checkpoints, step: int, part: str) -> StartPoint:
    """Counts from a checkpoint; with `part` "all", its step and the loader's position too."""
    folder, vocab_size = source.find(step), config.model.vocab_size
    arrays = checkpoint.read_flat(folder, "model_weights")
    model = CountModel.from_arrays(nested(arrays)["count_model"])
    if model.vocab_size != vocab_size:
        raise UserError(
            f"{folder} has counted tokens of a vocabulary of {model.vocab_size}, and "
            f"model.vocab_size={vocab_size}: counts of other tokens are of no use; set it to "
            f"{model.vocab_size}, or start from another run"
        )
    account = RestoreAccount(tuple(arrays), initialised=(), cast=(), unused=())
    message = {"from": str(folder), "part": part, **asdict(account)}
    if part == "all":
        return StartPoint(CountState(model, step), source.loader_state(step), message)
    return StartPoint(CountState(model, 0), None, message)


def make_step(
    run: TrainingRun,
) -> Callable[[CountState, Batch], tuple[CountState, dict[str, float]]]:
    """(state, batch) -> the counts with the batch, and its loss (nats per token) before that."""
    config, score = run.config, scorer(run.config)
    logger.info(
        "%s: a count model in the network's place, %s tokens per step",
        config.training.exp_name,
        f"{config.training.global_batch_size * config.training.seq_length:,}",
    )

    def step(state: CountState, batch: Batch) -> tuple[CountState, dict[str, float]]:
        with run.spent("step"):
            loss = float(np.mean(score(state.model, batch).loss))
            return CountState(state.model.plus(*_arrays(batch)), state.step + 1), {"loss": loss}

    return step


def as_items(state: CountState) -> dict[str, Any]:
    """The array items of a checkpoint: the counts, and in the optimizer's place the steps."""
    counts = {"count_model": state.model.arrays()}
    return {"model_weights": counts, "opt_state": {"count": np.asarray(state.step)}}


def scorer(config: Config) -> Score:
    """(count model, batch, learn=…) -> losses as the network's: over chunks of `mini_batch_size`.

    learn: of no consequence; a count model does not learn while it reads.
    """

    def score(model: CountModel, batch: Batch, *, learn: bool = True) -> Scores:
        del learn
        inputs, targets, mask = _arrays(batch)
        nll, count = model.nll(inputs, targets), mask.astype(np.float64)
        chunks = (len(nll), -1, config.model.mini_batch_size)
        sums, counts = ((x.reshape(chunks)).sum(axis=2) for x in (nll * count, count))
        return Scores(np.mean(sums / np.maximum(counts, 1), axis=1), nll, count)

    return score


def count(config: Config, source: Source) -> CountModel:
    """The count model of what the run was trained on, in order, up to `count_model_tokens`.

    Whole sequences, at least one, as often as training read them. A run that took over a parent's
    parameters has the parent's tokens behind it too, so at least `_BESIDE_A_PARENT` are counted
    there, or an epoch.
    """
    training = config.training
    left = training.total_steps * training.global_batch_size
    if training.load_part == "params":
        epoch = len(source) // training.global_batch_size * training.global_batch_size
        left = max(left, min(epoch, _BESIDE_A_PARENT // training.seq_length))
    left = min(left, max(1, training.count_model_tokens // training.seq_length))
    batches = lm_dataset.train_batches(
        source,
        global_batch_size=training.global_batch_size,
        seed=training.data_seed,
        bos_token_id=config.model.bos_token_id,
        threads=2,  # which read ahead less of what is not wanted any more
    )
    model, parts = CountModel.empty(config.model.vocab_size), []
    number = -(-left // training.global_batch_size)
    with Progress(number, "count pairs of tokens") as progress:
        for done in range(1, number + 1):
            parts.append([array[:left] for array in _arrays(next(batches))])
            left -= len(parts[-1][0])
            # To grow a table costs as much as the table is large: the larger, the more at once.
            waiting = len(parts) * training.global_batch_size * training.seq_length
            enough = np.clip(len(model.tables[-1].keys), *_COUNTED_AT_ONCE)
            if done == number or waiting >= enough:
                model = model.plus(*map(np.concatenate, zip(*parts, strict=True)))
                parts = []
            progress.update(done)
    return model


def log_comparison(loss: float, count_loss: float, tokens: int) -> None:
    """Log how a trained model with the token loss `loss` stands against the count model's."""
    if loss < count_loss:
        logger.info(
            f"count model of {tokens:,} tokens: {count_loss:.3f} nats per token; this model is "
            f"{count_loss - loss:.3f} below"
        )
        return
    logger.warning(
        f"this model does not beat a count of token pairs: {loss:.3f} nats per token, and counts "
        f"of {tokens:,} tokens of the same data reach {count_loss:.3f}. It was trained too little, "
        "or something is wrong"
    )


def _arrays(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inputs, targets, mask = map(np.asarray, batch)
    return inputs, targets, mask
