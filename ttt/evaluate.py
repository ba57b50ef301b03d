"""`evaluate`: measure trained checkpoints, one or several side by side, by named suites.

Everything that a user can have got wrong is found before the first compilation. A measurement that
fails leaves a row that says so; the others are still made and kept, and the command exits with 1.
"""

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console

from ttt import mixers
from ttt.config import to_dict
from ttt.dataloader import token_store
from ttt.entry import hydra_entry
from ttt.errors import UserError
from ttt.evaluation import held_out, result, suite
from ttt.evaluation.machine import Machine
from ttt.evaluation.result import Row
from ttt.evaluation.suite import AbstractSuite, Job, Told
from ttt.evaluation.suites import SUITES
from ttt.infra import distributed
from ttt.infra.mesh import device_mesh
from ttt.infra.progress import Progress
from ttt.infra.record import RunRecord
from ttt.knobs import Config
from ttt.model import trained
from ttt.model.trained import TrainedModel

logger = logging.getLogger(__name__)


def run(config: Config) -> int | None:
    """Measure what `config.evaluation` asks for; 1 if a measurement failed.

    Leaves `<suite>.csv`, `<suite>.json` and pictures in a record of its own: under the run's
    `eval/`, or, of several runs, in the folder `evaluation-<name>`.
    """
    asked = config.evaluation
    if config.backend.distributed:
        raise UserError(
            "backend.distributed=true: evaluation runs in one process, on all its devices; set it "
            "to false"
        )
    distributed.start(config.backend)
    subjects = trained.load(config)
    for subject in subjects:
        logger.info("%s", _told(subject))
    machine = Machine(device_mesh())
    suites = [SUITES[name](config, subjects, machine) for name in asked.suites]
    record = RunRecord(folder_of(config, subjects))
    devices = [device.device_kind for device in jax.devices()]
    record.start(to_dict(config), devices=devices, data=fingerprints(config))
    record.restored({"runs": [trained.describe(subject) for subject in subjects]})
    status = "failed"
    try:
        rows = suite.measure(
            suites,
            subjects,
            progress=_progress,
            saved=lambda which, rows: save(record, which, rows, subjects),
        )
        failed = [row for found in rows.values() for row in found if row.failed]
        show(record, suites, rows, subjects)
        status = "failed" if failed else "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        record.finish(status)
    for row in failed:
        what = " ".join([str(row.context), *(f"{k}={v}" for k, v in row.keys.items())])
        logger.error("failed: %s of %s at %s: %s", row.suite, row.run, what, row.failed)
    return 1 if failed else None


def folder_of(config: Config, subjects: Sequence[TrainedModel]) -> Path:
    """Where the results go, beside the training's own record and never over it."""
    asked = config.evaluation
    root = Path(config.deploy_paths.experiments) / config.training.exp_folder
    if len(subjects) == 1:
        return root / subjects[0].name / "eval" / f"{asked.name}-{subjects[0].step}"
    return root / f"evaluation-{asked.name}" / "eval"


def fingerprints(config: Config) -> dict[str, str]:
    """What tells the held-out text from other text."""
    if config.training.dummy_dataset:
        return {config.evaluation.split: "random tokens"}
    split = config.evaluation.split
    return {split: token_store.fingerprint(held_out.root_of(config), split)}


def save(
    record: RunRecord, which: AbstractSuite, rows: Sequence[Row], subjects: Sequence[TrainedModel]
) -> None:
    """Keep what is known so far."""
    notes = {**which.notes(), "runs": [trained.describe(subject) for subject in subjects]}
    result.save(record.folder, which.name, rows, notes)
    for name, text in which.files().items():
        result.write_whole(record.folder / name, text)


def show(
    record: RunRecord,
    suites: Sequence[AbstractSuite],
    rows: dict[str, list[Row]],
    subjects: Sequence[TrainedModel],
) -> None:
    """Tables to stdout, pictures into the record."""
    console = Console()
    title = ", ".join(f"{subject.name} (step {subject.step})" for subject in subjects)
    for which in suites:
        found = rows[which.name]
        console.print(which.table(found))
        for picture in which.draw(found, record.folder, title):
            logger.info("picture: %s", picture)
        logger.info("numbers: %s", record.folder / f"{which.name}.csv")


def _told(subject: TrainedModel) -> str:
    parts = trained.describe(subject)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[str(parts["compute_dtype"])]
    return (
        f"{subject.name}: step {subject.step}, {mixers.LABELS[subject.method]}, "
        f"{parts['parameters'] / 1e6:.2f}M parameters, trained at {parts['seq_length']} tokens; "
        f"matrix products in {dtype}, losses and means in float32"
    )


@contextmanager
def _progress(which: AbstractSuite, subject: TrainedModel, job: Job) -> Generator[Told]:
    """A line of progress for each job."""
    with Progress(job.steps, f"{which.name} {subject.name} {job}") as progress:
        yield progress.update


main = hydra_entry(run)

if __name__ == "__main__":
    main()
