"""What planned runs have left on disk: whether they are done, and what they say of themselves."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ttt.config import differences, to_dict
from ttt.infra.record import RunRecord, StoredRun
from ttt.runs import compose, matching
from ttt.runs.plan import Plan, PlannedRun


class Found(NamedTuple):
    """A record on disk, beside what the plan asks for."""

    status: str
    """`absent`, or the record's own: running, finished, failed, interrupted."""
    changed: Mapping[str, tuple[Any, Any]]
    """Settings that differ, as (on disk, planned)."""


def find(root: Path, run: PlannedRun) -> Found:
    """What is in the folder of a planned run, below `root`.

    Its number of steps counts as a setting here: a finished run of another length is another run.
    """
    record = RunRecord(root / run.name)
    if not (record.folder / "run.json").exists():
        return Found("absent", {})
    stored, planned = record.settings(), to_dict(compose.config_of(run))
    changed = differences(stored, planned)
    steps = (stored["training"]["total_steps"], planned["training"]["total_steps"])
    if steps[0] != steps[1]:
        changed["training.total_steps"] = steps
    return Found(record.run()["status"], changed)


def evidence(folder: Path) -> StoredRun:
    """What the gates look at; raises RecordError if it cannot be read."""
    record = RunRecord(folder)
    return StoredRun(folder, record.run(), record.settings(), record.metrics())


def measure(runs: Iterable[PlannedRun], root: Path) -> dict[str, dict[str, Any]]:
    """Seconds per token of each kind of stage, from the records of finished runs."""
    measured: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        rows = RunRecord(root / run.name).metrics()
        seconds = matching.step_seconds_per_token(rows, run.tokens_per_step)
        measured.setdefault(run.kind, {})[run.name] = seconds
    return matching.pooled(measured)


def entries(plan: Plan) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The plan's runs and paths as its manifest has them."""
    runs = [{**asdict(run), "tokens": run.tokens, "command": run.command} for run in plan.runs]
    return runs, [asdict(path) for path in plan.paths]
