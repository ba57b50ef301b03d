"""What a suite of measurements is, and how suites run: failures are kept, not thrown."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from ttt import figures
from ttt.evaluation.resources import LoadedModels
from ttt.evaluation.result import Key, Row
from ttt.infra.progress import Progress
from ttt.knobs import Config
from ttt.model.trained import TrainedModel

logger = logging.getLogger(__name__)

OnProgress = Callable[[int], None]
"""Called with the number of a job's steps that are done."""


@dataclass(frozen=True)
class Job:
    """One measurement of one run, which may fail without the others."""

    context: int
    keys: Mapping[str, Key]
    """What tells its rows from those of other jobs."""
    steps: int
    """What `work` reports as progress."""
    work: Callable[[OnProgress], list[Row]]

    def __str__(self) -> str:
        """For progress and messages."""
        return " ".join([str(self.context), *(f"{k}={v}" for k, v in self.keys.items())])


@dataclass(frozen=True, eq=False)
class Reader:
    """A run as it reads: learning, or not. One line of a table, one curve of a picture."""

    run: TrainedModel
    learning: bool
    number: int
    """Of the run, which gives the curve its colour."""

    @property
    def label(self) -> str:
        """Its name in tables and pictures."""
        return f"{self.run.name}, not learning" if self._is_off else self.run.name

    @property
    def style(self) -> dict[str, Any]:
        """How its curve looks."""
        return figures.style(self.number, learns=not self._is_off)

    @property
    def _is_off(self) -> bool:
        return self.run.learns and not self.learning

    def own(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Its lines of a table of rows."""
        return rows[(rows.run == self.run.name) & (rows.learning == self.learning)]


class AbstractSuite(ABC):
    """Measurements of one kind, of all runs."""

    name: str
    keys: tuple[str, ...]
    """Columns of its rows that tables and pictures are made from."""

    def __init__(self, config: Config, runs: Sequence[TrainedModel], models: LoadedModels):
        """Check what users can have got wrong, before anything is compiled; raises UserError."""
        self.config, self.runs, self.models = config, list(runs), models
        modes = config.evaluation.without_learning
        self.readers = [
            Reader(run, learn and run.learns, number)
            for number, run in enumerate(runs)
            for learn in run.modes(modes)
        ]

    @abstractmethod
    def jobs(self, run: TrainedModel) -> Iterator[Job]:
        """What to measure of a run."""

    @abstractmethod
    def notes(self) -> dict[str, Any]:
        """What a reader of the rows should know: data, settings, sources."""

    @abstractmethod
    def table(self, rows: pd.DataFrame) -> Table:
        """The figures for a terminal; rows as in `frame`, failed ones too."""

    @abstractmethod
    def draw(self, rows: pd.DataFrame, folder: Path, title: str) -> list[Path]:
        """Save the pictures of rows that have values; returns where."""

    def comparisons(self) -> list[Row]:
        """Rows that several jobs together give; called when all are done."""
        return []

    def files(self) -> dict[str, str]:
        """More files to keep beside the rows: name -> text."""
        return {}

    def readers_of(self, run: TrainedModel) -> list[Reader]:
        """The run learning, and not learning where that is another thing."""
        return [reader for reader in self.readers if reader.run is run]

    def row(self, run: TrainedModel, context: int, measure: str, **fields: Any) -> Row:
        """A row of this suite."""
        return Row(self.name, run.name, run.method, run.step, context, measure, **fields)

    def plot(self, axes: Any, x: pd.Series, rows: pd.DataFrame, *, band: float) -> None:
        """A curve for each reader of its rows' values over x [rows], with their intervals."""
        for reader in self.readers:
            own = reader.own(rows)
            plot(axes, x[own.index], own, band=band, label=reader.label, **reader.style)
        figures.tidy(axes)

    def mark_windows(self, axes: Any, least: int, most: int) -> None:
        """Lines at the attention windows that lie between two numbers of tokens."""
        for window in {run.window for run in self.runs if run.window}:
            if least < window < most:
                figures.mark(axes, window, "window")


def measure(
    suites: Sequence[AbstractSuite],
    runs: Iterable[TrainedModel],
    *,
    saved: Callable[[AbstractSuite, Sequence[Row]], None],
) -> dict[str, list[Row]]:
    """Do every job of every run; returns rows by suite, with one for each job that failed.

    saved: called with all rows of a suite after each job, so that an end by force loses one job.
    """
    rows: dict[str, list[Row]] = {suite.name: [] for suite in suites}
    for run, suite in product(runs, suites):
        for job in suite.jobs(run):
            with Progress(job.steps, f"{suite.name} {run.name} {job}") as progress:
                try:
                    done = [row.checked() for row in job.work(progress.update)]
                except Exception as error:
                    logger.exception("%s of %s at %s failed", suite.name, run.name, job)
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    done = [suite.row(run, job.context, "failed", keys=job.keys, failed=reason)]
            rows[suite.name] += done
            saved(suite, rows[suite.name])
    for suite in suites:
        rows[suite.name] += [row.checked() for row in suite.comparisons()]
        saved(suite, rows[suite.name])
    return rows


def plot(axes: Any, x: pd.Series, rows: pd.DataFrame, *, band: float, **style: Any) -> None:
    """A curve of the rows' values over x, and their intervals as a band of that opacity."""
    if len(rows):
        axes.plot(x, rows.value, **style)
        low, high = rows.low.astype(float), rows.high.astype(float)  # all unknown: no numbers
        axes.fill_between(x, low, high, color=style["color"], alpha=band, lw=0)


def frame(rows: Sequence[Row], keys: Sequence[str]) -> pd.DataFrame:
    """A line for each row, with a column for each of `keys` whether a row has it or not."""
    table = pd.DataFrame([row.flat() for row in rows])
    return table.reindex(columns=list(dict.fromkeys([*table, *keys])))
