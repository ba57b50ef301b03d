"""The loop over training steps, whatever a step does: logs, evaluations, checkpoints, stopping."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import grain

from ttt.core.batch import Batch
from ttt.dataloader import lm_dataset
from ttt.errors import RunError, Stopped
from ttt.infra import distributed
from ttt.infra.progress import Progress
from ttt.infra.record import RunRecord
from ttt.training.run import TrainingRun, open_batches, save, stopped, what_is_safe
from ttt.training.start import StartPoint

logger = logging.getLogger(__name__)


def take_steps(
    run: TrainingRun,
    start: StartPoint,
    *,
    step: Callable[[Any, Batch], tuple[Any, dict[str, Any]]],
    held_out_loss: Callable[[Any], float],
    speed: Callable[[float], dict[str, float]] = lambda seconds: {},
) -> Any:
    """The state at `total_steps`.

    step: (state, this process's batch) -> the next state, and metrics with `loss`. It adds its
        seconds to `run.spent`.
    held_out_loss: of a state; raises Stopped if the run was asked to stop.
    speed: seconds of a step -> what to log of them.
    """
    training, spent = run.config.training, run.spent
    state, first = start.state, int(start.state.step)
    if first >= training.total_steps:
        return state
    batches = open_batches(run)
    if start.loader_state is not None:
        batches.set_state(start.loader_state)

    def evaluate(state: Any, number: int) -> None:
        if is_due(number, training.eval_every_steps):
            evaluate_on_the_way(run, state, batches, held_out_loss)

    cut_short = run.record.logged(first, "loss") and not run.record.logged(first, "eval_loss")
    if distributed.from_first(cut_short):
        evaluate(state, first)
    bad_steps = distributed.from_first(bad_steps_before(run.record))
    saved = time.monotonic()
    tokens = training.global_batch_size * training.seq_length
    quiet = not distributed.is_first()
    with Progress(training.total_steps, "train", start=first, quiet=quiet) as progress:
        for number in range(first + 1, training.total_steps + 1):
            with spent("data_wait"):
                batch = next(batches)
            state, metrics = step(state, batch)
            bad_steps = 0 if is_good(metrics) else bad_steps + 1
            if bad_steps:
                metrics["bad_samples"] = samples(run, batches)
            seconds = spent.take()
            busy = seconds["data_wait"] + seconds["step"]
            metrics |= {"tokens_per_second": tokens / busy, **speed(busy)}
            metrics |= {f"{what}_seconds": seconds[what] for what in seconds if what != "compile"}
            run.tracker.log(number, metrics)
            progress.update(number, loss=metrics["loss"], tokens=tokens, mfu=metrics.get("mfu"))
            check_numbers(run, number, metrics, bad_steps)
            minutes = (time.monotonic() - saved) / 60
            stop, late = distributed.any_process(
                run.stop.signal_number is not None,
                0 < training.save_every_minutes <= minutes,
            )
            last = number == training.total_steps
            if is_due(number, training.save_every_steps) or last or stop or late:
                save(run, state, batches)
                saved = time.monotonic()
            if stop:
                raise stopped(run, number)
            run.checkpoints.check()
            if not last:
                evaluate(state, number)
    with spent("save"):
        run.checkpoints.wait()
    return state


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


def evaluate_on_the_way(
    run: TrainingRun,
    state: Any,
    batches: grain.DatasetIterator,
    held_out_loss: Callable[[Any], float],
) -> None:
    """Log the held-out loss of a state; asked to stop meanwhile, save the state first."""
    step = int(state.step)
    try:
        with run.spent("evaluation"):
            loss = held_out_loss(state)
    except Stopped:
        if distributed.from_first(run.checkpoints.latest() != step):
            save(run, state, batches)
        raise stopped(run, step) from None
    seconds = run.spent.take("evaluation")["evaluation"]
    split = run.config.training.eval_split
    run.tracker.log(step, {"eval_loss": loss, "split": split, "evaluation_seconds": seconds})


# ---- steps whose numbers are not finite -----------------------------------------------------


def is_good(metrics: dict[str, Any]) -> bool:
    """Whether a step was taken; the compiled step leaves the state alone where this is false."""
    norm = metrics.get("gradient_norm", 0.0)  # counts have none
    return math.isfinite(metrics["loss"]) and math.isfinite(norm)


def bad_steps_before(record: RunRecord) -> int:
    """How many of the last logged steps, without a gap, were not taken."""
    count = 0
    for row in [row for row in record.metrics() if "loss" in row][::-1]:
        if is_good(row):
            break
        count += 1
    return count


def check_numbers(run: TrainingRun, step: int, metrics: dict[str, Any], bad_steps: int) -> None:
    """Warn of a step that was not taken; a RunError if there were too many in a row."""
    if not bad_steps:
        return
    allowed = run.config.training.skip_bad_steps
    message = (
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']} on samples "
        f"{metrics['bad_samples']}"
    )
    if bad_steps <= allowed:
        logger.warning("%s; left out (%d of at most %d in a row)", message, bad_steps, allowed)
        return
    raise RunError(
        f"{message}; no update was made of it.\n{what_is_safe(run)} The samples are in the record "
        "as bad_samples: look at them, lower the learning rate, or leave such steps out with "
        "training.skip_bad_steps=K, up to K in a row."
    )


def samples(run: TrainingRun, batches: grain.DatasetIterator) -> list[int]:
    """The samples of the batch that came last."""
    return lm_dataset.samples_of_batch(
        run.data.train,
        batches.get_state()["next_index"] - 1,
        global_batch_size=run.config.training.global_batch_size,
        seed=run.config.training.data_seed,
    )
