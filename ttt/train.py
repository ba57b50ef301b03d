"""`train`: train, extend or continue a language model, then measure what it has learned.

The order matters: everything that a user can have got wrong is found before the first compilation.
"""

import logging
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console

from ttt import mixers
from ttt.config import experiments
from ttt.entry import hydra_entry
from ttt.errors import UserError
from ttt.evaluation import result
from ttt.evaluation.loss_by_position import LearningComparison, PositionLoss
from ttt.evaluation.result import Row
from ttt.evaluation.sample import write_sample
from ttt.figures import short
from ttt.infra import distributed
from ttt.infra.mesh import check_divides
from ttt.infra.progress import Progress
from ttt.infra.record import RunRecord, masked_arguments, write_whole
from ttt.knobs import Config
from ttt.model import loop
from ttt.model.loop import Evaluator, Score
from ttt.model.trained import learns, method_of
from ttt.model.transformer import MetaModel
from ttt.training import light
from ttt.training.run import (
    TrainingRun,
    attempt,
    is_over,
    open_batches,
    open_data,
    opened,
    save,
    stop_if_asked,
)
from ttt.training.start import (
    Parent,
    StartPoint,
    as_items,
    eval_batches,
    find_start,
    token_loss,
    warm_loss,
)
from ttt.training.step import fit_memory, make_step, speed
from ttt.training.steps import take_steps

logger = logging.getLogger(__name__)

DESTROYS = 0.05
"""Nats by which learning may raise the loss before the first step without a warning."""


def run(config: Config) -> None:
    """Train as `config` says, from where the last call stopped; evaluate; say where things are."""
    if config.training.runtime_mode == "jax":
        train_network(config)
    else:
        train_light(light.on_the_cpu(config))


def train_network(config: Config) -> None:
    """The network of `config.model`, on all devices."""
    distributed.start(config.backend)
    data, layout = open_data(config), loop.lay_out(config)
    check_divides(layout.mesh, config.training.global_batch_size // config.training.accum_steps)
    config = fit_memory(config)
    training = config.training
    evaluator = Evaluator(training, layout)
    window = mixers.window(config.model) or training.seq_length
    with opened(config, data, as_items) as run:
        start = find_start(
            config, data.train, data.evaluation, run.checkpoints, run.own_step, layout
        )
        step = int(start.state.step)
        if is_over(run, step, summary_path(run.record, step).exists()):
            return
        with attempt(run, start):
            if not start.continues:
                warm = partial(warm_loss, config, start, data.evaluation, layout)
                evaluate_start(run, start, evaluator, warm, learning=learns(training))
            state = take_steps(
                run,
                start,
                step=make_step(run, layout),
                held_out_loss=lambda state: score(run, state, evaluator).loss,
                speed=partial(speed, config),
            )
            evaluate(run, state, evaluator, window, learning=learns(training))
            if training.sample_tokens and not training.dummy_dataset and jax.process_count() == 1:
                show_sample(run, state.model)
    if distributed.is_first():
        show_next(training.seq_length)


def train_light(config: Config) -> None:
    """A count model in the network's place, or nothing at all (`runtime_mode=simulate`)."""
    distributed.start(config.backend)
    data, training = open_data(config), config.training
    simulated, scores = training.runtime_mode == "simulate", light.scorer(config)
    with opened(config, data, light.as_items) as run:
        start = light.find_start(config, data.evaluation, run.checkpoints, run.own_step)
        step = start.state.step
        if is_over(run, step, simulated or summary_path(run.record, step).exists()):
            return
        with attempt(run, start):
            if simulated:
                simulate(run, start)
                return
            if not start.continues:
                warm = partial(light.warm_loss, config, start, data.evaluation)
                evaluate_start(run, start, scores, warm, learning=False)
            state = take_steps(
                run,
                start,
                step=light.make_step(run),
                held_out_loss=lambda state: score(run, state, scores).loss,
            )
            evaluate(run, state, scores, training.seq_length, learning=False)


def simulate(run: TrainingRun, start: StartPoint) -> None:
    """Leave what a run leaves at `total_steps`, without a step and what it would have measured."""
    training, state = run.config.training, start.state
    if state.step >= training.total_steps:
        return
    batches = open_batches(run)
    batches.set_state({"next_index": training.total_steps})
    tokens = training.total_steps * training.global_batch_size * training.seq_length
    run.tracker.log(training.total_steps, {"tokens": tokens})
    save(run, state._replace(step=training.total_steps), batches)
    run.checkpoints.wait()
    logger.info("simulated: no step was computed, and no loss is recorded")


# ---- evaluation --------------------------------------------------------------------------


def evaluate_start(
    run: TrainingRun,
    start: StartPoint,
    scores: Score,
    warm_loss: Callable[[], float | None],
    *,
    learning: bool,
) -> None:
    """What the model can do before its first step, and whether that is what its parent could."""
    parent, step = start.parent, int(start.state.step)
    most = run.config.training.eval_start_batches
    with run.spent("evaluation"):
        loss = score(run, start.state, scores, batches=most).loss
        still = None
        if learning:
            still = score(run, start.state, scores, learn=False, batches=most).loss
        warm = warm_loss()
    run.spent.take("evaluation")
    split = {"split": run.config.training.eval_split}
    figures: dict[str, Any] = {"loss": loss, "loss_without_learning": still, "warm_loss": warm}
    figures |= split
    shown = parent or Parent(None, 0, False, False, "it has no parent to be compared with")
    figures |= {"parent_loss": shown.loss, "context": shown.context or None}
    figures |= {"preserving": shown.preserving, "why": shown.why}
    if still is not None and loss > still + DESTROYS:
        logger.warning(
            "before the first step, learning while reading makes the loss worse: %.4f, and %.4f "
            "without. The inner rate %g destroys what these weights can do; lower "
            "training.optimizer_inner.lr (a pretrained model without post-norms takes about 0.3)",
            loss,
            still,
            run.config.training.optimizer_inner.lr,
        )
    if parent is not None:
        log_start(parent, warm)
    run.record.note(start=figures)
    if not run.record.logged(step, "start_loss"):  # an attempt before this one may have
        still_too = {} if still is None else {"start_loss_without_learning": still}
        run.tracker.log(step, {"start_loss": loss, **still_too, **split})


def log_start(parent: Parent, warm: float | None) -> None:
    """The child's loss beside its parent's, in a sentence."""
    if parent.loss is None or warm is None:
        level = logging.INFO if parent.preserving else logging.WARNING
        logger.log(level, "the start was not compared with the parent: %s", parent.why)
        return
    same = "as it must" if parent.preserving else f"not the same function ({parent.why})"
    logger.info(
        "before the first step: loss %.5f, the parent's %.5f on the same %d-token sequences (%s)",
        warm,
        parent.loss,
        parent.context,
        same,
    )


def score(
    run: TrainingRun, state: Any, scores: Score, *, learn: bool = True, batches: int | None = None
) -> PositionLoss:
    """The evaluation's text, or its first `eval_batches`; raises Stopped if asked to.

    batches: in place of `eval_batches`.
    """
    training = run.config.training
    available = -(-len(run.data.evaluation) // training.eval_batch_size)
    most = training.eval_batches if batches is None else batches
    total = min(most or available, available)

    def on_progress(batch: int, loss: float) -> None:
        progress.update(batch, loss=loss)
        stop_if_asked(run, int(state.step))

    what = "evaluate" if learn else "evaluate without learning"
    with Progress(total, what, quiet=not distributed.is_first()) as progress:
        return PositionLoss.measure(
            scores,
            state.model,
            run.data.evaluation,
            batch_size=training.eval_batch_size,
            most=most,
            learn=learn,
            on_progress=on_progress,
        )


def evaluate(run: TrainingRun, state: Any, scores: Score, window: int, *, learning: bool) -> None:
    """Loss by position, `learning` and not where both exist: table, picture, record.

    window: tokens that attention sees at once.
    """
    config, training, step = run.config, run.config.training, int(state.step)
    with run.spent("evaluation"):
        read = score(run, state, scores)
        still = score(run, state, scores, learn=False) if learning else None
    if not distributed.is_first():  # one process draws and writes
        return
    text = {"split": training.eval_split}
    per_token = run.data.evaluation.source.bytes_per_token
    comparison = LearningComparison(read, still, window, per_token)
    summary = {**text, "evaluation_seed": config.evaluation.seed, **comparison.summary()}
    if training.runtime_mode == "jax" and training.count_model_tokens:
        with run.spent("evaluation"):
            counts = light.count(config, run.data.train)
            batches = eval_batches(config, run.data.evaluation, training.eval_batches)
            loss = token_loss(light.scorer(config), counts, batches, learn=False)
        light.log_comparison(read.loss, loss, counts.tokens)
        summary |= {"count_model_loss": loss, "count_model_tokens": counts.tokens}
    picture = run.record.folder / f"loss_by_position-{step}.png"
    title = f"{training.exp_name}, step {step}"
    comparison.draw(picture, title=title, points=min(32, training.seq_length))
    if not run.record.logged(step, "final_eval_loss"):
        run.tracker.log(step, {"final_eval_loss": read.loss, **text})
    method = method_of(config.model, training)
    like = Row("loss_by_position", training.exp_name, method, step, training.seq_length, "loss")
    rows = comparison.rows(like, text)
    csv = summary_path(run.record, step).with_suffix(".csv")
    write_whole(csv, result.to_csv(rows))
    # The summary comes last: where it is, the run is finished.
    path = run.record.save_arrays("loss_by_position", step, comparison.arrays(), summary)
    Console().print(comparison.table(training.eval_split))
    if still is not None:
        logger.info(
            "learning while reading lowers the held-out loss by %.3f nats per token in the last "
            "half of the sequence",
            summary["gain_last_half"],
        )
    logger.info("picture: %s\nnumbers: %s", picture, path)


def show_sample(run: TrainingRun, model: MetaModel) -> None:
    """Print what the model writes after a held-out document, if the store names its tokenizer."""
    with run.spent("sample"):
        try:
            sample = write_sample(run.config, model)
        except UserError as error:
            logger.info("no sample was written: %s", error)
            return
    console = Console(highlight=False, markup=False)
    console.rule(f"written by the model after {sample.read:,} tokens of a held-out document")
    console.print(sample.text, soft_wrap=True)
    console.rule(f"{sample.known} of these {sample.lines} lines occur in the training text")
    path = run.record.folder / f"sample-{run.config.training.total_steps}.txt"
    write_whole(path, sample.text + "\n")


def show_next(length: int) -> None:
    """Print the commands that a user may want next, as far as the command line tells them.

    length: tokens of the run's sequences.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode == RunMode.MULTIRUN:
        return
    settings = shlex.join(word for word in masked_arguments(sys.argv[1:]) if "=" in word)
    lines = [
        f"uv run generate {settings} generate.prompt_file=FILE   # read a text of yours, write on",
        f"uv run evaluate {settings}   # loss by context, needles, long decoding",
    ]
    experiment = HydraConfig.get().runtime.choices.get("experiment") or ""
    extension = experiment.replace("/pretrain/pretrain-", "/extension/ext-")
    longer = re.compile(rf"{re.escape(extension)}-(\d+)K")
    contexts = [1024 * int(match[1]) for name in experiments() if (match := longer.fullmatch(name))]
    if further := [context for context in contexts if context > length]:
        name = f"{extension}-{short(min(further))}"
        lines.append(f"uv run train +experiment={name}   # on to longer contexts")
    Console(highlight=False, markup=False).print("next:", *lines, sep="\n  ", soft_wrap=True)


def summary_path(record: RunRecord, step: int) -> Path:
    """Where `evaluate` leaves its figures."""
    return record.folder / "eval" / f"loss_by_position-{step}.json"


main = hydra_entry(run)

if __name__ == "__main__":
    main()
