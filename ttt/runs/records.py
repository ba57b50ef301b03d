"""What planned runs have left on disk: whether they are done, and what they say of themselves."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ttt.config import differences, to_dict
from ttt.errors import UserError
from ttt.infra.record import RunRecord
from ttt.runs import compose, matching
from ttt.runs.gates import Evidence
from ttt.runs.plan import PlannedRun as Run

_TAIL_BYTES = 1 << 16


class Found(NamedTuple):
    """A record on disk, beside what the plan asks for."""

    status: str
    """`absent`, or the record's own: running, finished, failed, interrupted."""
    changed: Mapping[str, tuple[Any, Any]]
    """Settings that differ, as (on disk, planned)."""


def find(root: Path, run: Run) -> Found:
    """What is in the folder of a planned run, below `root`.

    Its number of steps counts as a setting here: a finished run of another length is another run.
    """
    folder = root / run.name
    if not (folder / "run.json").exists():
        return Found("absent", {})
    stored, planned = settings(folder), to_dict(compose.config_of(run))
    changed = differences(stored, planned)
    steps = (stored["training"]["total_steps"], planned["training"]["total_steps"])
    if steps[0] != steps[1]:
        changed["training.total_steps"] = steps
    return Found(RunRecord(folder).run()["status"], changed)


def settings(folder: Path) -> dict[str, Any]:
    """The content of a record's `config.yaml`."""
    path = folder / "config.yaml"
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        return {**content, "training": {**content["training"]}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); move the run's folder away") from error


def evidence(folder: Path) -> Evidence:
    """All that the gates look at."""
    record = RunRecord(folder)
    return Evidence(settings(folder), record.run()["attempts"], record.metrics())


def progress(folder: Path) -> tuple[int, float | None]:
    """(last logged step, its loss if it has one) of a run that may not have begun.

    Asked for twice a second, so it reads the end of `metrics.jsonl` alone.
    """
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0, None
    for line in reversed(lines):
        with suppress(ValueError):  # cut off, at either end
            row = json.loads(line)
            if "loss" in row or "tokens" in row:
                return row["step"], float(row["loss"]) if "loss" in row else None
    return 0, None


def measure(runs: Iterable[Run], root: Path) -> dict[str, dict[str, Any]]:
    """Seconds per token of each kind of stage, from the records of finished runs."""
    measured: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        rows = RunRecord(root / run.name).metrics()
        seconds = matching.step_seconds_per_token(rows, run.tokens_per_step)
        measured.setdefault(run.kind, {})[run.name] = seconds
    return matching.pooled(measured)
