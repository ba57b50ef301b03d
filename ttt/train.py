"""`train`: train, extend or continue a language model, then measure what it has learned.

The order matters: everything that a user can have got wrong is found before the first compilation.
"""

import logging
import math
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import jax
from jaxtyping import PyTree
from rich.console import Console

from ttt.config import differences, to_dict
from ttt.core.batch import Batch
from ttt.dataloader import lm_dataset, text, token_store
from ttt.dataloader.lm_dataset import Source
from ttt.entry import hydra_entry
from ttt.errors import RunError, Stopped, UserError
from ttt.evaluation import result
from ttt.evaluation.loss_by_position import LearningComparison, PositionLoss
from ttt.evaluation.result import Row
from ttt.infra import checkpoint, distributed
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.lock import RunLock
from ttt.infra.preemption import StopRequest
from ttt.infra.progress import Progress, Spent
from ttt.infra.record import RunRecord, disk_fault, masked_arguments
from ttt.infra.tracking import CompositeTracker, RecordTracker, Tracker, WandbTracker
from ttt.knobs import Config
from ttt.model.loop import Scores, TrainState
from ttt.model.trained import method_of
from ttt.training import light
from ttt.training.light import CountLearner, CountState
from ttt.training.network import Network
from ttt.training.start import Parent, Start, check_parent, token_loss

logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """Both splits, and what tells them from other data."""

    train: Source
    evaluation: Source
    fingerprints: dict[str, str]


State = TrainState | CountState


class Learner(Protocol):
    """What the runtime modes do each in their own way; all else is the same run.

    Its states have `step`, the steps taken, and `model`, what `score` takes.
    """

    @property
    def learns(self) -> bool:
        """Whether it goes on learning while it is evaluated."""
        ...

    @property
    def window(self) -> int:
        """Tokens that attention sees at once."""
        ...

    def find_start(
        self, train: Source, evaluation: Source, checkpoints: Checkpoints, own: int | None
    ) -> Start:
        """The run's own step `own`, else what `load_part` says, else anew."""
        ...

    def warm_loss(self, start: Start, evaluation: Source) -> float | None:
        """The loss before the first step on the tokens of `start.parent`; None: there are none."""
        ...

    def place(self, batch: Batch) -> Any:
        """A batch of the loader as a step takes it."""
        ...

    def compile(self, state: Any, batch: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
        """The step: (state, batch) -> the next state, and metrics (a NamedTuple) with `loss`."""
        ...

    def items(self, state: Any) -> dict[str, PyTree]:
        """The array items of a checkpoint: `model_weights` and `opt_state`."""
        ...

    def score(self, model: Any, batch: Batch, *, learn: bool = True) -> Scores:
        """The losses of a batch of the loader."""
        ...

    def speed(self, seconds: float) -> dict[str, float]:
        """What to log of a step that took so long."""
        ...


@dataclass(frozen=True)
class Run:
    """What a run holds while it works."""

    config: Config
    data: Data
    learner: Learner
    checkpoints: Checkpoints
    record: RunRecord
    tracker: Tracker
    lock: RunLock
    stop: StopRequest
    spent: Spent


def run(config: Config) -> None:
    """Train as `config` says, from where the last call stopped; evaluate; say where things are."""
    if light.is_asked_for(config):
        config = light.on_the_cpu(config)
    distributed.start(config.backend)
    data = open_data(config)
    learner = CountLearner(config) if light.is_asked_for(config) else Network.of(config)
    config = learner.config
    training, paths = config.training, config.deploy_paths
    checkpoints = Checkpoints(
        checkpoint.run_folder(paths.checkpoint, training.exp_folder, training.exp_name),
        keep=training.keep_checkpoints,
        milestone_freq=training.save_milestone_freq,
    )
    first = distributed.is_first()
    record = RunRecord(
        Path(paths.experiments) / training.exp_folder / training.exp_name, active=first
    )
    lock = RunLock(record.folder, checkpoints.folder, active=first)
    with ExitStack() as held:
        distributed.first_does(lambda: held.enter_context(lock))
        own = checkpoints.newest_good()
        check_continues(config, data, checkpoints, record, own)
        if own is None and training.load_part != "none":
            check_parent(config)
        start = learner.find_start(data.train, data.evaluation, checkpoints, own)
        step = int(start.state.step)
        simulated = training.runtime_mode == "simulate"
        done = simulated or summary_path(record, step).exists()
        over = step >= training.total_steps and done
        if distributed.from_first(over):
            if first and record.run()["status"] != "finished":  # killed between its last two writes
                record.finish("finished")
            logger.info(
                "%s is finished at step %d: record in %s, checkpoint in %s. To go on, raise "
                "training.total_steps; to start anew, choose another training.exp_name.",
                *(training.exp_name, step, record.folder, checkpoints.find(step)),
            )
            return
        distributed.first_does(lock.make)
        if own is not None:
            checkpoints.put_aside_after(own)
        record.start(
            to_dict(config), devices=[d.device_kind for d in jax.devices()], data=data.fingerprints
        )
        record.truncate_after(step)
        if start.account is not None:
            record.restored(start.account)
        tracker = make_tracker(config, record)
        with StopRequest() as stop:
            parts = (data, learner, checkpoints, record, tracker, lock, stop, Spent())
            work(Run(config, *parts), start)


def work(run: Run, start: Start) -> None:
    """Train and evaluate; whatever happens, close the record with what became of it."""
    status = "failed"
    try:
        if run.config.training.runtime_mode == "simulate":
            simulate(run, start)
        else:
            if not start.continues:
                evaluate_start(run, start)
            evaluate(run, train(run, start))
        distributed.wait_for_all()  # who leaves early would take the others for dead
        status = "finished"
    except (KeyboardInterrupt, Stopped):
        status = "interrupted"
        raise
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if not distributed.is_loss_of_peer(error):
            raise
        raise RunError(
            f"another process of the run ended or cannot be reached ({str(error)[:200]}): its own "
            "log says why. Start the same commands again; they go on from the last checkpoint."
        ) from error
    except OSError as error:
        if not (fault := disk_fault(error)):
            raise
        raise RunError(
            f"the run ended because of the disk: {fault}\n{what_is_safe(run)} Make room or mend "
            "the disk, then start the same command again: it goes on from there."
        ) from error
    finally:
        close(run, status)
    logger.info("checkpoint: %s", run.checkpoints.find())


def what_is_safe(run: Run) -> str:
    """The latest checkpoint, in a sentence, after a save that is under way."""
    try:
        run.checkpoints.wait()
    except RunError as error:
        logger.error("%s", error)
    step = run.checkpoints.latest()
    if step is None:
        return "There is no checkpoint yet."
    return f"The latest checkpoint, of step {step}, is whole."


def close(run: Run, status: str) -> None:
    """Let a save that is under way finish, and the record say how this attempt ended.

    Raises nothing that would hide why it ended.
    """
    what_is_safe(run)
    try:
        run.record.spent(run.spent.total)
        run.tracker.finish(status)
    except OSError as error:
        logger.error("the run record could not be closed: %s", error)
    logger.info("seconds: %s", run.spent)


# ---- before the first compilation ------------------------------------------------------


def open_data(config: Config) -> Data:
    """Both splits of the dataset, checked; the built-in corpus is made on first use."""
    training, model = config.training, config.model
    name = training.dataset_name
    root = config.deploy_paths.data.get(name, "")

    def make_builtin() -> None:
        if not Path(root).exists():
            logger.info("making the built-in corpus (the standard library's source) in %s", root)
            text.ensure_builtin(root)

    if name == "builtin" and not training.dummy_dataset:
        distributed.first_does(make_builtin)
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
    config: Config, data: Data, checkpoints: Checkpoints, record: RunRecord, step: int | None
) -> None:
    """Refuse to go on with another run's numbers, and to write over a finished run's record."""
    name = config.training.exp_name
    if step is not None:
        checkpoint.check_mode(checkpoints.find(step), config.training.runtime_mode)
    ways_out = (
        "Choose another training.exp_name for a new run, undo the change, or set "
        "training.allow_config_change=true to continue all the same. In a sweep, put what varies "
        "into the name, with the quotes: 'training.exp_name=NAME-${training.model_seed}'."
    )
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


def make_tracker(config: Config, record: RunRecord) -> Tracker:
    """The run record, mirrored to W&B if asked for."""
    training = config.training
    if not training.log_wandb or not record.active:
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


def simulate(run: Run, start: Start) -> None:
    """Leave what a run leaves at `total_steps`, without a step and what it would have measured."""
    training = run.config.training
    state: Any = start.state
    if state.step >= training.total_steps:
        return
    batches = open_batches(run.config, run.data)
    batches.set_state({"next_index": training.total_steps})
    tokens = training.total_steps * training.global_batch_size * training.seq_length
    run.tracker.log(training.total_steps, {"tokens": tokens})
    save(run, state._replace(step=training.total_steps), batches)
    run.checkpoints.wait()
    logger.info("simulated: no step was computed, and no loss is recorded")


def open_batches(config: Config, data: Data) -> grain.DatasetIterator:
    """The training batches from the first, this process' share of each."""
    return lm_dataset.train_batches(
        data.train,
        global_batch_size=config.training.global_batch_size,
        seed=config.training.data_seed,
        bos_token_id=config.model.bos_token_id,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def train(run: Run, start: Start) -> State:
    """From `start` to `total_steps`, with logs, evaluations and checkpoints on the way."""
    config, training, spent = run.config, run.config.training, run.spent
    state, first = start.state, int(start.state.step)
    if first >= training.total_steps:
        return state
    batches = open_batches(config, run.data)
    if start.loader_state is not None:
        batches.set_state(start.loader_state)
    left = run.record.logged(first, "loss") and not run.record.logged(first, "eval_loss")
    if distributed.from_first(left):
        evaluate_on_the_way(run, state, batches, first)  # if due, the last attempt left before
    compiled = None
    bad_steps = distributed.from_first(bad_steps_before(run.record))
    saved = time.monotonic()
    tokens = training.global_batch_size * training.seq_length
    quiet = not distributed.is_first()
    with Progress(training.total_steps, "train", start=first, quiet=quiet) as progress:
        for step in range(first + 1, training.total_steps + 1):
            with spent("data_wait"):
                batch = run.learner.place(next(batches))
            if compiled is None:
                with spent("compile"):
                    compiled = run.learner.compile(state, batch)
                if asked_to_stop(run):
                    raise stopped(run, step - 1)
            with spent("step"):
                state, measured = compiled(state, batch)
                metrics: dict[str, Any] = {k: float(v) for k, v in measured._asdict().items()}
            bad_steps = 0 if is_good(metrics) else bad_steps + 1
            if bad_steps:
                metrics["bad_samples"] = samples(config, run.data, batches)
            seconds = spent.take()
            busy = seconds["data_wait"] + seconds["step"]
            speed = run.learner.speed(busy)
            metrics |= {"tokens_per_second": tokens / busy, **speed}
            metrics |= {f"{what}_seconds": seconds[what] for what in seconds if what != "compile"}
            run.tracker.log(step, metrics)
            progress.update(step, loss=metrics["loss"], tokens=tokens, mfu=speed.get("mfu"))
            check_numbers(run, step, metrics, bad_steps)
            minutes = (time.monotonic() - saved) / 60
            stop, late = distributed.any_process(
                run.stop.signal_number is not None,
                0 < training.save_every_minutes <= minutes,
            )
            last = step == training.total_steps
            if due(step, training.save_every_steps) or last or stop or late:
                save(run, state, batches)
                saved = time.monotonic()
            if stop:
                raise stopped(run, step)
            run.checkpoints.check()
            if not last:
                evaluate_on_the_way(run, state, batches, step)
    with spent("save"):
        run.checkpoints.wait()
    return state


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


def check_numbers(run: Run, step: int, metrics: dict[str, Any], bad_steps: int) -> None:
    """Tell of a step that was not taken; a RunError if there were too many in a row."""
    if not bad_steps:
        return
    allowed = run.config.training.skip_bad_steps
    told = (
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']} on samples "
        f"{metrics['bad_samples']}"
    )
    if bad_steps <= allowed:
        logger.warning("%s; left out (%d of at most %d in a row)", told, bad_steps, allowed)
        return
    raise RunError(
        f"{told}; no update was made of it.\n{what_is_safe(run)} The samples are in the record as "
        "bad_samples: look at them, lower the learning rate, or leave such steps out with "
        "training.skip_bad_steps=K, up to K in a row."
    )


def samples(config: Config, data: Data, batches: grain.DatasetIterator) -> list[int]:
    """The samples of the batch that came last."""
    return lm_dataset.samples_of_batch(
        data.train,
        batches.get_state()["next_index"] - 1,
        global_batch_size=config.training.global_batch_size,
        seed=config.training.data_seed,
    )


def asked_to_stop(run: Run) -> bool:
    """Whether any process was; all of them ask at the same point."""
    return distributed.any_process(run.stop.signal_number is not None)[0]


def stopped(run: Run, step: int) -> Stopped:
    """The end of a run that was asked to stop after `step`, once that step is on disk."""
    with run.spent("save"):
        run.checkpoints.wait()
    # One process may have been asked a moment before the others, and all must leave alike.
    run.stop.signal_number = distributed.largest(run.stop.signal_number or 0)
    if not distributed.is_first():
        number = run.stop.signal_number
        return Stopped(f"process {jax.process_index()} stopped with the run", number)
    training = run.config.training
    there = run.checkpoints.latest()
    where = f"its checkpoint {run.checkpoints.find()}" if there is not None else "the start"
    command = shlex.join([Path(sys.argv[0]).name, *masked_arguments(sys.argv[1:])])
    return Stopped(
        f"{training.exp_name} stopped after step {step} of {training.total_steps}, as "
        f"{run.stop.name} asked. The same command goes on from {where}:\n  {command}",
        run.stop.signal_number,
    )


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


def save(run: Run, state: State, batches: grain.DatasetIterator) -> None:
    """Start to write a checkpoint from which the run goes on bit for bit."""
    with run.spent("save"):
        run.lock.check()
        run.record.sync()  # the steps up to a checkpoint are in the record, or it has a gap
        run.checkpoints.save(
            int(state.step),
            **run.learner.items(state),
            loader_state=batches.get_state(),
            manifest={"config": to_dict(run.config), "data": run.data.fingerprints},
        )


# ---- evaluation --------------------------------------------------------------------------


def evaluate_on_the_way(run: Run, state: State, batches: grain.DatasetIterator, step: int) -> None:
    """Log the held-out loss if an evaluation is due after `step`."""
    if not due(step, run.config.training.eval_every_steps):
        return
    try:
        with run.spent("evaluation"):
            loss = score(run, state, learn=True).loss
    except Stopped:
        if distributed.from_first(run.checkpoints.latest() != step):
            save(run, state, batches)
        raise stopped(run, step) from None
    seconds = run.spent.take("evaluation")["evaluation"]
    run.tracker.log(step, {"eval_loss": loss, "evaluation_seconds": seconds})


def evaluate_start(run: Run, start: Start) -> None:
    """What the model can do before its first step, and whether that is what its parent could."""
    learner, parent, step = run.learner, start.parent, int(start.state.step)
    first = run.config.training.eval_start_batches
    with run.spent("evaluation"):
        loss = score(run, start.state, learn=True, batches=first).token_loss
        still = None
        if learner.learns:
            still = score(run, start.state, learn=False, batches=first).token_loss
        warm = learner.warm_loss(start, run.data.evaluation)
    run.spent.take("evaluation")
    figures: dict[str, Any] = {"loss": loss, "loss_without_learning": still, "warm_loss": warm}
    told = parent or Parent(None, 0, False, False, "it has no parent to be compared with")
    figures |= {"parent_loss": told.loss, "context": told.context or None}
    figures |= {"preserving": told.preserving, "why": told.why}
    if parent is not None:
        tell_start(parent, warm)
    run.record.started(figures)
    if not run.record.logged(step, "start_loss"):  # an attempt before this one may have
        still_too = {} if still is None else {"start_loss_without_learning": still}
        run.tracker.log(step, {"start_loss": loss, **still_too})


def tell_start(parent: Parent, warm: float | None) -> None:
    """The child's loss beside its parent's, in a sentence."""
    if parent.loss is None or warm is None:
        level = logging.INFO if parent.preserving else logging.WARNING
        logger.log(level, "the start was not compared with the parent: %s", parent.why)
        return
    same = "as it must" if parent.preserving else f"not the same function ({parent.why})"
    logger.info(
        "before the first step: loss %.5f, the parent's %.5f on the same %d-token sequences (%s)",
        *(warm, parent.loss, parent.context, same),
    )


def score(run: Run, state: State, *, learn: bool, batches: int | None = None) -> PositionLoss:
    """The evaluation split, or its first `eval_batches`, in order; raises Stopped if asked to.

    batches: in place of `eval_batches`.
    """
    training = run.config.training
    available = -(-len(run.data.evaluation) // training.eval_batch_size)
    most = training.eval_batches if batches is None else batches
    total = min(most or available, available)

    def on_progress(batch: int, loss: float) -> None:
        progress.update(batch, loss=loss)
        if asked_to_stop(run):
            raise stopped(run, int(state.step))

    what = "evaluate" if learn else "evaluate without learning"
    with Progress(total, what, quiet=not distributed.is_first()) as progress:
        return PositionLoss.measure(
            run.learner.score,
            state.model,
            eval_batches(run, most),
            learn=learn,
            on_progress=on_progress,
        )


def eval_batches(run: Run, most: int) -> grain.DatasetIterator:
    """The first batches of the evaluation split, at most `most` (0: all)."""
    return lm_dataset.eval_batches(
        run.data.evaluation,
        batch_size=run.config.training.eval_batch_size,
        max_batches=most,
        bos_token_id=run.config.model.bos_token_id,
    )


def evaluate(run: Run, state: State) -> None:
    """Loss by position with and without learning: table, picture, record."""
    config, training, step = run.config, run.config.training, int(state.step)
    with run.spent("evaluation"):
        learning = score(run, state, learn=True)
        still = score(run, state, learn=False) if run.learner.learns else None
    if not distributed.is_first():  # one process draws and writes
        return
    comparison = LearningComparison(learning, still, run.learner.window)
    summary = comparison.summary()
    if training.runtime_mode == "jax" and training.count_model_tokens:
        with run.spent("evaluation"):
            counts = light.count(config, run.data.train)
            batches = eval_batches(run, training.eval_batches)
            loss = token_loss(CountLearner(config).score, counts, batches, learn=False)
        light.tell(learning.token_loss, loss, counts.tokens)
        summary |= {"count_model_loss": loss, "count_model_tokens": counts.tokens}
    picture = run.record.folder / f"loss_by_position-{step}.png"
    comparison.draw(
        picture,
        title=f"{training.exp_name}, step {step}",
        points=min(32, training.seq_length),
    )
    if not run.record.logged(step, "final_eval_loss"):
        run.tracker.log(step, {"final_eval_loss": learning.loss})
    method = method_of(config.model, training)
    like = Row("loss_by_position", training.exp_name, method, step, training.seq_length, "loss")
    rows = comparison.rows(like, resamples=1000, seed=0)
    csv = summary_path(run.record, step).with_suffix(".csv")
    result.write_whole(csv, result.to_csv(rows))
    # The summary comes last: where it is, the run is finished.
    path = run.record.save_arrays("loss_by_position", step, comparison.arrays(), summary)
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
