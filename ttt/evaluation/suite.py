"""What a suite of measurements is, and how suites run: failures are kept, not thrown."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ttt.evaluation.machine import Machine
from ttt.evaluation.result import Key, Row
from ttt.knobs import Config
from ttt.model.trained import TrainedModel

logger = logging.getLogger(__name__)

Told = Callable[[int], None]
"""Hears of a job's progress: how many of its steps are done."""


@dataclass(frozen=True)
class Job:
    """One measurement of one run, which may fail without the others."""

    context: int
    keys: Mapping[str, Key]
    """What tells its rows from those of other jobs."""
    steps: int
    """What `work` tells the progress of."""
    work: Callable[[Told], list[Row]]

    def __str__(self) -> str:
        """For progress and messages."""
        return " ".join([str(self.context), *(f"{k}={v}" for k, v in self.keys.items())])


class AbstractSuite(ABC):
    """Measurements of one kind, of all runs.

    What users can have got wrong raises a UserError when it is made, before anything is compiled.
    """

    name: str

    @abstractmethod
    def __init__(self, config: Config, runs: Sequence[TrainedModel], machine: Machine):
        """Check and prepare."""

    @abstractmethod
    def jobs(self, run: TrainedModel) -> Iterator[Job]:
        """What to measure of a run."""

    @abstractmethod
    def notes(self) -> dict[str, Any]:
        """What a reader of the rows should know: data, settings, sources."""

    @abstractmethod
    def table(self, rows: Sequence[Row]) -> Table:
        """The figures for a terminal."""

    @abstractmethod
    def draw(self, rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
        """Save the pictures; returns where."""

    def comparisons(self) -> list[Row]:
        """Rows that several jobs together give; called when all are done."""
        return []

    def files(self) -> dict[str, str]:
        """More files to keep beside the rows: name -> text."""
        return {}

    def row(self, run: TrainedModel, context: int, measure: str, **fields: Any) -> Row:
        """A row of this suite."""
        return Row(self.name, run.name, run.method, run.step, context, measure, **fields)


def measure(
    suites: Sequence[AbstractSuite],
    runs: Iterable[TrainedModel],
    *,
    progress: Callable[[AbstractSuite, TrainedModel, Job], AbstractContextManager[Told]],
    saved: Callable[[AbstractSuite, Sequence[Row]], None],
) -> dict[str, list[Row]]:
    """Do every job of every run; returns rows by suite, failed ones included.

    saved: called with all rows of a suite after each job, so that an end by force loses one job.
    """
    rows: dict[str, list[Row]] = {suite.name: [] for suite in suites}
    for run in runs:
        for suite in suites:
            for job in suite.jobs(run):
                with progress(suite, run, job) as told:
                    rows[suite.name] += attempt(suite, run, job, told)
                saved(suite, rows[suite.name])
    for suite in suites:
        rows[suite.name] += [row.checked() for row in suite.comparisons()]
        saved(suite, rows[suite.name])
    return rows


def attempt(suite: AbstractSuite, run: TrainedModel, job: Job, told: Told) -> list[Row]:
    """The job's rows, or one that says why there are none."""
    try:
        return [row.checked() for row in job.work(told)]
    except Exception as error:
        logger.exception("%s of %s at %s failed", *(suite.name, run.name, job))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [suite.row(run, job.context, "failed", keys=job.keys, failed=reason)]
