"""`evaluate`: measure trained checkpoints, one or several side by side, by named suites.

Everything that a user can have got wrong is found before the first compilation. A measurement that
fails leaves a row that says so; the others are still made and kept, and the command exits with 1.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from ttt import mixers
from ttt.config import to_dict
from ttt.dataloader import token_store
from ttt.entry import hydra_entry
from ttt.errors import UserError
from ttt.evaluation import resources, result, suite
from ttt.evaluation.long_decoding import LongDecoding
from ttt.evaluation.loss_by_context import LossByContext
from ttt.evaluation.needles import Needles
from ttt.evaluation.resources import LoadedModels
from ttt.evaluation.result import Row
from ttt.evaluation.suite import AbstractSuite
from ttt.infra import distributed
from ttt.infra.mesh import device_mesh
from ttt.infra.record import RunRecord, write_whole
from ttt.knobs import Config
from ttt.model import trained
from ttt.model.trained import TrainedModel

logger = logging.getLogger(__name__)

SUITES: dict[str, type[AbstractSuite]] = {
    suite.name: suite for suite in (LossByContext, Needles, LongDecoding)
}
"""Name -> suite: a new one is entered here, and in `ttt.knobs.SUITES`."""


def run(config: Config) -> int | None:
    """Measure what `config.evaluation` asks for; 1 if a measurement failed.

    Leaves `<suite>.csv`, `<suite>.json` and pictures in a record of its own: under the run's
    `eval/`, or, of several runs, in the folder `evaluation-<name>`.
    """
    if config.backend.distributed:
        raise UserError(
            "backend.distributed=true: evaluation runs in one process, on all its devices; set it "
            "to false"
        )
    distributed.start(config.backend)
    runs = trained.load(config)
    about = [trained.describe(run) for run in runs]
    for run, known in zip(runs, about, strict=True):
        logger.info("%s", _sentence(run, known))
    models = LoadedModels(device_mesh())
    suites = [SUITES[name](config, runs, models) for name in config.evaluation.suites]
    record = RunRecord(folder_of(config, runs))
    devices = [device.device_kind for device in jax.devices()]
    record.start(to_dict(config), devices=devices, data=fingerprints(config, runs[0]))
    record.note(restored={"runs": about})

    def save(which: AbstractSuite, rows: Sequence[Row]) -> None:
        result.save(record.folder, which.name, rows, {**which.notes(), "runs": about})
        for name, text in which.files().items():
            write_whole(record.folder / name, text)

    status = "failed"
    try:
        rows = suite.measure(suites, runs, saved=save)
        failed = [row for own in rows.values() for row in own if row.failed]
        title = ", ".join(f"{run.name} (step {run.step})" for run in runs)
        for which in suites:
            show(which, rows[which.name], record.folder, title)
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


def folder_of(config: Config, runs: Sequence[TrainedModel]) -> Path:
    """Where the results go, beside the training's own record and never over it."""
    name = config.evaluation.name
    root = Path(config.deploy_paths.experiments) / config.training.exp_folder
    if len(runs) == 1:
        return root / runs[0].name / "eval" / f"{name}-{runs[0].step}"
    return root / f"evaluation-{name}" / "eval"


def fingerprints(config: Config, run: TrainedModel) -> dict[str, str]:
    """What tells the held-out text from other text."""
    split = config.evaluation.split
    if config.training.dummy_dataset:
        return {split: "random tokens"}
    return {split: token_store.fingerprint(resources.store_folder(config, run), split)}


def show(which: AbstractSuite, rows: Sequence[Row], folder: Path, title: str) -> None:
    """Its table to stdout, its pictures into the record."""
    table = suite.frame(rows, which.keys)
    Console().print(which.table(table))
    for picture in which.draw(table[table.value.notna()], folder, title):
        logger.info("picture: %s", picture)
    logger.info("numbers: %s", folder / f"{which.name}.csv")


def _sentence(run: TrainedModel, known: Mapping[str, Any]) -> str:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[str(known["compute_dtype"])]
    return (
        f"{run.name}: step {run.step}, {mixers.LABELS[run.method]}, "
        f"{known['parameters'] / 1e6:.2f}M parameters, trained at {known['seq_length']} tokens; "
        f"matrix products in {dtype}, losses and means in float32"
    )


main = hydra_entry(run)

if __name__ == "__main__":
    main()
