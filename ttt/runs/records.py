"""What planned runs have left on disk: whether they are done, and what they say of themselves."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ttt.config import differences, to_dict
from ttt.infra.record import RunRecord, StoredRun
from ttt.runs import compose, matching
from ttt.runs.plan import Plan, PlannedRun


def compared(root: Path, run: PlannedRun) -> tuple[str, Mapping[str, tuple[Any, Any]]]:
    """The status of a planned run's record below `root`, and settings as (on disk, planned).

    The status is `absent` or the record's own: running, finished, failed, interrupted. The settings
    are those that differ, the number of steps too: a run of another length is another run.
    """
    record = RunRecord(root / run.name)
    if not (record.folder / "run.json").exists():
        return "absent", {}
    stored, planned = record.settings(), to_dict(compose.config_of(run))
    changed = differences(stored, planned)
    steps = (stored["training"]["total_steps"], planned["training"]["total_steps"])
    if steps[0] != steps[1]:
        changed["training.total_steps"] = steps
    return record.run()["status"], changed


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
