"""What every run holds and does, whatever it trains: data, record, lock, checkpoints, stopping."""

import logging
import shlex
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
from jaxtyping import PyTree

from ttt.config import to_dict
from ttt.dataloader import first_use, lm_dataset, text, token_store
from ttt.dataloader.lm_dataset import HeldOut, Source
from ttt.dataloader.text import AbstractTokenizer
from ttt.errors import RunError, Stopped, UserError
from ttt.infra import checkpoint, distributed, step_folders
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.lock import RunLock
from ttt.infra.preemption import StopRequest
from ttt.infra.progress import Spent
from ttt.infra.record import RunRecord, disk_fault, masked_arguments
from ttt.infra.tracking import Tracker
from ttt.knobs import Config
from ttt.training.start import (
    StartPoint,
    changed_settings,
    check_optimizer,
    check_parent,
    listed,
    parents_checkpoints,
    tokenizer_file,
)

logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """Both splits, of the one for evaluation the stretches to read, and what tells them apart."""

    train: Source
    evaluation: HeldOut
    fingerprints: dict[str, str]
    tokenizer: AbstractTokenizer | None
    """That of the store; None: it names none, or the tokens are random."""


class Origin(NamedTuple):
    """What every checkpoint of a run, and of the runs that start from it, says of its text."""

    tokenizer: AbstractTokenizer | None
    """Whose ids the model reads; None: unknown."""
    provenance: dict[str, Any] | None
    """Of the imported weights that it all began with; None: it began with random ones."""

    @classmethod
    def of(cls, data: Data, folder: Path | None) -> "Origin":
        """Of a run on `data` that starts from the checkpoint in `folder`, if any."""
        if folder is None:
            return cls(data.tokenizer, None)
        before = step_folders.read_manifest(folder)
        own = data.tokenizer or text.checkpoint_tokenizer(folder, before)
        return cls(own, before.get("provenance"))


@dataclass(frozen=True)
class TrainingRun:
    """What a run holds while it works."""

    config: Config
    data: Data
    checkpoints: Checkpoints
    own_step: int | None
    """Its checkpoint to go on from; None: it has none."""
    record: RunRecord
    tracker: Tracker
    lock: RunLock
    stop: StopRequest
    spent: Spent
    as_items: Callable[[Any], dict[str, PyTree]]
    """A state as the array items of a checkpoint."""
    origin: Origin


def open_data(config: Config) -> Data:
    """Both splits of the dataset, checked; the built-in corpus is made on first use."""
    training, model = config.training, config.model
    name = training.dataset_name
    root = config.deploy_paths.data.get(name, "")

    def make_store() -> None:
        if Path(root).exists():
            return
        logger.info("making the dataset %s in %s", name, root)
        first_use.ensure(name, root, tokenizer_file=tokenizer_file(config))

    if name in first_use.DATASETS and not training.dummy_dataset:
        distributed.first_does(make_store)
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
    fingerprints = {
        split: "random tokens" if training.dummy_dataset else token_store.fingerprint(root, split)
        for split in (training.data_split, training.eval_split)
    }
    most = max(training.eval_batches, training.eval_start_batches) * training.eval_batch_size
    stretches = HeldOut.drawn(
        evaluation,
        model.bos_token_id,
        seed=config.evaluation.seed,
        count=most if training.eval_batches else 0,
    )
    tokenizer = None
    if not training.dummy_dataset and token_store.read_attributes(root).get("tokenizer"):
        tokenizer = text.store_tokenizer(root)
    return Data(train, stretches, fingerprints, tokenizer)


def open_batches(run: TrainingRun) -> grain.DatasetIterator:
    """The training batches from the first, this process's share of each."""
    return lm_dataset.train_batches(
        run.data.train,
        global_batch_size=run.config.training.global_batch_size,
        seed=run.config.training.data_seed,
        bos_token_id=run.config.model.bos_token_id,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


# ---- from its lock to its end ---------------------------------------------------------------


@contextmanager
def opened(
    config: Config, data: Data, as_items: Callable[[Any], dict[str, PyTree]]
) -> Generator[TrainingRun]:
    """The run with its folders locked and its own checkpoint found; nothing is written yet.

    Raises UserError where it cannot go on from what lies there, or not start from its parent.
    """
    training, paths = config.training, config.deploy_paths
    first = distributed.is_first()
    checkpoints = Checkpoints(
        step_folders.run_folder(paths.checkpoint, training.exp_folder, training.exp_name),
        keep=training.keep_checkpoints,
        milestone_freq=training.save_milestone_freq,
    )
    record = RunRecord(
        Path(paths.experiments) / training.exp_folder / training.exp_name, active=first
    )
    lock = RunLock(record.folder, checkpoints.folder, active=first)
    with ExitStack() as held:
        distributed.first_does(lambda: held.enter_context(lock))
        own = checkpoints.newest_good()
        distributed.first_does(lambda: check_continues(config, data, checkpoints, record, own))
        folder = None if own is None else checkpoints.find(own)
        if own is None and training.load_part != "none":
            distributed.first_does(lambda: check_parent(config, data.fingerprints))
            folder = parents_checkpoints(config).find(training.resume_step)
            if not training.dummy_dataset:
                known = step_folders.read_manifest(folder).get("tokenizer")
                root = config.deploy_paths.data[training.dataset_name]
                text.check_store(root, known, training.resume_exp_name)
        origin = Origin.of(data, folder)
        parts = (Tracker(record), lock, StopRequest(), Spent(), as_items, origin)
        yield TrainingRun(config, data, checkpoints, own, record, *parts)


def check_continues(
    config: Config, data: Data, checkpoints: Checkpoints, record: RunRecord, step: int | None
) -> None:
    """Refuse to go on with another run's numbers, and to write over a finished run's record."""
    name = config.training.exp_name
    if step is None:
        if (record.folder / "run.json").exists() and record.run()["status"] == "finished":
            raise UserError(
                f"{record.folder} records a finished run, but {checkpoints.folder} has no "
                "checkpoint of it: choose another training.exp_name, or move the record away."
            )
        return
    checkpoint.check_mode(checkpoints.find(step), config.training.runtime_mode)
    if not (checkpoints.find(step) / "opt_state").is_dir():
        raise UserError(
            f"training.exp_name={name}: {checkpoints.folder} holds imported weights, which stay as "
            "they are; give the run a name of its own and start from them "
            f"(training.load_part=params training.resume_exp_name={name})"
        )
    if step > config.training.total_steps:
        raise UserError(
            f"training.total_steps={config.training.total_steps}: {name} has a checkpoint of step "
            f"{step} already. Choose another training.exp_name, or at least {step} steps."
        )
    manifest = checkpoints.manifest(step)
    check_optimizer(config, manifest)
    changed = changed_settings(manifest, config, data.fingerprints)
    if changed and not config.training.allow_config_change:
        raise UserError(
            f"{name} has a checkpoint of step {step} in {checkpoints.folder}, trained with other "
            f"settings:\n{listed(changed)}\n"
            "Choose another training.exp_name for a new run, undo the change, or set "
            "training.allow_config_change=true to continue all the same. In a sweep, put "
            "what varies into the name, with the quotes: "
            "'training.exp_name=NAME-${training.model_seed}'."
        )


def is_over(run: TrainingRun, step: int, measured: bool) -> bool:
    """Whether all of the run's steps were taken and `measured`; if so, say where things are."""
    training = run.config.training
    if not distributed.from_first(step >= training.total_steps and measured):
        return False
    if run.record.active and run.record.run()["status"] != "finished":
        run.record.finish("finished")  # it was killed between its last two writes
    logger.info(
        "%s is finished at step %d: record in %s, checkpoint in %s. To go on, raise "
        "training.total_steps; to start anew, choose another training.exp_name.",
        training.exp_name,
        step,
        run.record.folder,
        run.checkpoints.find(step),
    )
    return True


@contextmanager
def attempt(run: TrainingRun, start: StartPoint) -> Generator[None]:
    """The work from `start` on; whatever happens, the record is closed with what became of it."""
    distributed.first_does(run.lock.make)
    if run.own_step is not None:
        run.checkpoints.put_aside_after(run.own_step)
    devices = [device.device_kind for device in jax.devices()]
    run.record.start(to_dict(run.config), devices=devices, data=run.data.fingerprints)
    run.record.truncate_after(int(start.state.step))
    if start.account is not None:
        run.record.note(restored=start.account)
    if run.origin.provenance is not None:
        run.record.note(provenance=run.origin.provenance)
    training = run.config.training
    if training.log_wandb and run.record.active:
        run.tracker.mirror(
            entity=training.wandb_entity,
            project=training.wandb_project,
            name=training.exp_name,
            config=to_dict(run.config),
            key=training.wandb_key,
        )
    status = "failed"
    with run.stop:
        try:
            yield
            distributed.wait_for_all()  # the others would take one that leaves early for dead
            status = "finished"
        except (KeyboardInterrupt, Stopped):
            status = "interrupted"
            raise
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if not distributed.is_loss_of_peer(error):
                raise
            raise RunError(
                f"another process of the run ended or cannot be reached ({str(error)[:200]}): its "
                "own log says why. Start the same commands again; they go on from the last "
                "checkpoint."
            ) from error
        except OSError as error:
            if not (fault := disk_fault(error)):
                raise
            raise RunError(
                f"the run ended because of the disk: {fault}\n{what_is_safe(run)} Make room or "
                "mend the disk, then start the same command again: it goes on from there."
            ) from error
        finally:
            close(run, status)
    logger.info("checkpoint: %s", run.checkpoints.find())


def close(run: TrainingRun, status: str) -> None:
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


# ---- saving and stopping --------------------------------------------------------------------


def save(run: TrainingRun, state: Any, batches: grain.DatasetIterator) -> None:
    """Start to write a checkpoint from which the run goes on bit for bit."""
    with run.spent("save"):
        run.lock.check()
        run.record.sync()  # the steps up to a checkpoint are in the record, or it has a gap
        run.checkpoints.save(
            int(state.step),
            **run.as_items(state),
            loader_state=batches.get_state(),
            manifest={
                "config": to_dict(run.config),
                "data": run.data.fingerprints,
                "provenance": run.origin.provenance,
                **text.about_tokenizer(run.origin.tokenizer),
            },
            files=text.tokenizer_files(run.origin.tokenizer),
        )


def what_is_safe(run: TrainingRun) -> str:
    """The latest checkpoint, in a sentence, after a save that is under way."""
    try:
        run.checkpoints.wait()
    except RunError as error:
        logger.error("%s", error)
    step = run.checkpoints.latest()
    if step is None:
        return "There is no checkpoint yet."
    return f"The latest checkpoint, of step {step}, is whole."


def stop_if_asked(run: TrainingRun, step: int) -> None:
    """Raise Stopped if any process was asked to stop; all of them call it at the same point."""
    if distributed.any_process(run.stop.signal_number is not None)[0]:
        raise stopped(run, step)


def stopped(run: TrainingRun, step: int) -> Stopped:
    """The end of a run that was asked to stop after `step`, once that step is on disk."""
    with run.spent("save"):
        run.checkpoints.wait()
    # One process may have been asked a moment before the others, and all must leave alike.
    run.stop.signal_number = distributed.largest(run.stop.signal_number or 0)
    if not distributed.is_first():
        number = run.stop.signal_number
        return Stopped(f"process {jax.process_index()} stopped with the run", number)
    training, saved = run.config.training, run.checkpoints.latest()
    where = "the start" if saved is None else f"its checkpoint {run.checkpoints.find(saved)}"
    command = shlex.join([Path(sys.argv[0]).name, *masked_arguments(sys.argv[1:])])
    return Stopped(
        f"{training.exp_name} stopped after step {step} of {training.total_steps}, as "
        f"{run.stop.name} asked. The same command goes on from {where}:\n  {command}",
        run.stop.signal_number,
    )
