"""The report as text: CSV of all columns, tables for a terminal, and the page to read. No JAX."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ttt.figures import short
from ttt.report.comparisons import REFERENCE, Comparison, Reach, Stage
from ttt.report.manifest import MATCHED
from ttt.report.pictures import Picture
from ttt.report.reading import Report
from ttt.report.records import COLUMNS, Run
from ttt.report.verdict import LEAST_SAVED, MOST_ABOVE, Verdict

NONE = "–"
"""A cell without a value; `runs.csv` and `report.json` have the reason, in `missing`."""


STEP_0 = (
    "Losses before the first step are of the first batches of the evaluation alone "
    "(`training.eval_start_batches`), learning where the run learns; those of parent and child on "
    "the same tokens are at the parent's context."
)


@dataclass(frozen=True)
class Grid:
    """A table of texts, for a terminal or a page."""

    title: str
    columns: dict[str, list[str]]
    left: int = 1
    """So many columns hold names, the others numbers."""

    def rich(self, width: int) -> list[Table]:
        """For a terminal: as many tables as its width takes, each with the first column."""
        names = list(self.columns)
        sizes = [max(map(len, (name, *cells))) + 3 for name, cells in self.columns.items()]
        parts, used = [[names[0]]], sizes[0] + 1
        for name, size in zip(names[1:], sizes[1:], strict=True):
            if used + size > width and len(parts[-1]) > 1:
                parts.append([names[0]])
                used = sizes[0] + 1
            parts[-1].append(name)
            used += size
        return [self._part(part, first=part is parts[0]) for part in parts]

    def _part(self, names: Sequence[str], *, first: bool) -> Table:
        title = self.title if first else f"{self.title}, continued"
        table = Table(title=title, title_justify="left")
        numbers = list(self.columns)[self.left :]
        for name in names:
            table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
        for row in zip(*(self.columns[name] for name in names), strict=True):
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """For a page."""
        rule = [":---" if i < self.left else "---:" for i in range(len(self.columns))]
        rows = [list(self.columns), rule, *zip(*self.columns.values(), strict=True)]
        return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in row)} |" for row in rows)


# ---- cells -----------------------------------------------------------------------------


def loss(value: float | None) -> str:
    """Four digits behind the point: the gate is one in the second."""
    return NONE if value is None else f"{value:.4f}"


def whole(value: float | None) -> str:
    """With thousands set apart."""
    return NONE if value is None else f"{value:,.0f}"


def duration(hours: float | None) -> str:
    """Hours in the unit that suits them, three significant digits: `41 s`, `3.2 min`, `12.5 h`."""
    if hours is None:
        return NONE
    size, unit = next(x for x in _UNITS if hours * x[0] >= 1 or x is _UNITS[-1])
    value = hours * size
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


_UNITS = ((1, "h"), (60, "min"), (3600, "s"))


def count(value: float | None) -> str:
    """1234567 -> 1.23M."""
    if value is None:
        return NONE
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def text(value: Any) -> str:
    """As it is."""
    return NONE if value is None else str(value)


def restore(run: Run) -> str:
    """`restored / initialised / not attempted`, with counts of parameters by name."""
    if run.restore is None or run.restored is None:
        return text(run.restore)
    extra = {name: getattr(run, name) for name in ("narrowed", "moved", "cast", "unused")}
    counts = [f"{run.restored} restored", f"{run.initialised} initialised"]
    return ", ".join(counts + [f"{number} {name}" for name, number in extra.items() if number])


def _column(run: Run) -> str:
    return f"{whole(run.steps)}/{whole(run.steps_asked)}"


def _mode(run: Run) -> str:
    return NONE if run.runtime_mode is None else f"{run.runtime_mode}, {text(run.train_mode)}"


# ---- tables ----------------------------------------------------------------------------


def _grid[T](
    title: str, items: Iterable[T], columns: dict[str, Callable[[T], str]], left: int
) -> Grid:
    items = list(items)
    return Grid(
        title, {name: [cell(item) for item in items] for name, cell in columns.items()}, left
    )


def run_grids(runs: Sequence[Run]) -> list[Grid]:
    """What was trained, and what it started from."""
    trained: dict[str, Callable[[Run], str]] = {
        "run": lambda r: r.name,
        "status": lambda r: r.status,
        "stage": lambda r: text(r.stage),
        "method": lambda r: text(r.method),
        "mode": _mode,
        "context": lambda r: NONE if r.context is None else short(r.context),
        "batch": lambda r: whole(r.batch),
        "steps": _column,
        "tokens": lambda r: count(r.tokens),
        "parameters": lambda r: count(r.parameters),
        "first → final loss": lambda r: f"{loss(r.first_loss)} → {loss(r.final_loss)}",
        "validation": lambda r: loss(r.validation_loss),
        "not learning": lambda r: loss(r.validation_loss_without_learning),
        "count model": lambda r: loss(r.count_model_loss),
        "device time": lambda r: duration(r.device_hours),
        "tokens/s": lambda r: whole(r.tokens_per_second),
    }
    started: dict[str, Callable[[Run], str]] = {
        "run": lambda r: r.name,
        "experiment": lambda r: text(r.experiment),
        "parent": lambda r: text(r.parent),
        "restore": restore,
        "checkpoint": lambda r: NONE if r.checkpoint is None else f"step {Path(r.checkpoint).name}",
        "devices": lambda r: text(r.devices),
        "commit": lambda r: NONE if r.commit is None else r.commit[:8] + r.commit[40:],
        "step-0 loss": lambda r: loss(r.start_loss),
        "parent, same tokens": lambda r: loss(r.parent_loss),
        "warm, same tokens": lambda r: loss(r.warm_loss),
        "compiling": lambda r: duration(r.compile_hours),
        "evaluating": lambda r: duration(r.evaluation_hours),
    }
    return [
        _grid("runs (losses in nats per token)", runs, trained, 5),
        _grid("where they started, and on what", runs, started, 7),
    ]


def comparison_grid(comparisons: Sequence[Comparison], matching: str) -> Grid:
    """Every path against B1."""
    columns: dict[str, Callable[[Comparison], str]] = {
        "path": lambda c: c.path,
        "methods": lambda c: c.way,
        "validation loss": lambda c: _estimate(c.loss, ".4f"),
        f"minus {REFERENCE}'s": lambda c: _estimate(c.delta, "+.4f"),
        "step time saved": lambda c: _estimate(c.saving, ".1%"),
        "seeds": lambda c: f"{c.loss.n if c.loss else 0} of {len(c.seeds)}",
        "tokens": lambda c: count(c.tokens),
        "step time": lambda c: duration(c.step_hours),
        "device time": lambda c: duration(c.device_hours),
        "parameters": lambda c: count(c.parameters),
        "count model": lambda c: loss(c.count_model_loss),
        "to be trusted": lambda c: _trust(c),
    }
    chosen = [c for c in comparisons if c.matching == matching]
    context = next((c.context for c in chosen if c.context), None)
    title = f"{MATCHED.get(matching, matching)}, context {short(context) if context else NONE}"
    return _grid(title, chosen, columns, 2)


def _trust(comparison: Comparison) -> str:
    if comparison.problems:
        return "no: see the list"
    if comparison.without_merit:
        return "no better than counts"
    return "not in time: MIXED DEVICES" if comparison.mixed else "yes"


def stage_grid(stages: Sequence[Stage], matching: str) -> Grid:
    """Step-0 loss -> final loss, and what the next stage starts from."""
    columns: dict[str, Callable[[Stage], str]] = {
        "path": lambda s: s.path,
        "stage": lambda s: f"{s.number} {s.stage}",
        "steps": lambda s: whole(s.steps),
        "tokens": lambda s: count(s.tokens),
        "step time": lambda s: duration(s.step_hours),
        "s per 1K tokens": _pace,
        "step-0 loss": lambda s: loss(s.start_loss),
        "warm / parent, same tokens": lambda s: f"{loss(s.warm_loss)} / {loss(s.parent_loss)}",
        "training loss": lambda s: f"{loss(s.first_loss)} → {loss(s.final_loss)}",
        "validation": lambda s: loss(s.validation_loss),
        "next starts from": lambda s: loss(s.next_start_loss),
        "seeds": lambda s: str(s.seeds),
    }
    chosen = [stage for stage in stages if stage.matching == matching]
    return _grid(
        f"stages, {MATCHED.get(matching, matching)} (means over seeds)", chosen, columns, 2
    )


def _pace(stage: Stage) -> str:
    """Seconds of steps per 1024 tokens."""
    if not stage.step_hours or not stage.tokens:
        return NONE
    return f"{3600 * stage.step_hours / stage.tokens * 1024:.3g}"


def reach_grid(report: Report) -> Grid:
    """Training time to the loss of B1."""
    columns: dict[str, Callable[[Reach], str]] = {
        "path": lambda r: r.path,
        "how it is known": lambda r: r.said,
        "step time": lambda r: duration(r.hours),
        f"of {REFERENCE}'s": lambda r: NONE if r.of_reference is None else f"{r.of_reference:.2f}",
    }
    return _grid(f"time to reach {REFERENCE}'s loss", report.reaches, columns, 2)


def _estimate(estimate: Any, form: str) -> str:
    if estimate is None:
        return NONE
    if estimate.low is None:
        return f"{estimate.mean:{form}}"
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _matchings(report: Report) -> list[str]:
    return list(dict.fromkeys(c.matching for c in report.comparisons))


# ---- outputs ---------------------------------------------------------------------------


def to_csv(report: Report) -> str:
    """One row per run, every column; several texts in a cell stand in lines of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in report.runs:
        cells = run.flat().values()
        writer.writerow("\n".join(c) if isinstance(c, tuple) else c for c in cells)
    return out.getvalue()


def to_terminal(report: Report, width: int) -> Group:
    """Tables and verdict, for a console of so many columns."""
    grids = run_grids(report.runs)
    for matching in _matchings(report):
        grids += [
            comparison_grid(report.comparisons, matching),
            stage_grid(report.stages, matching),
        ]
    grids += [reach_grid(report)] if report.reaches else []
    lines = [_gate(report.verdict), *(f"  {line}" for line in report.verdict.evidence)]
    for verdict in report.verdicts:
        lines += [f"{verdict.path}: {verdict.answer}{_aside(verdict)}"]
        lines += [f"  {line}" for line in verdict.evidence]
    lines += [f"does not beat the count model: {line}" for line in report.without_merit]
    lines += [f"{NONE}: no value; --format csv and json say why, under `missing`"]
    shown = (table for grid in grids for table in grid.rich(width))
    return Group(*shown, Text("\n".join(lines)))


def notes(report: Report) -> list[str]:
    """What is missing, broken or worth knowing."""
    return [
        *(f"broken: {fault}" for fault in report.faults),
        *(f"missing: {what}" for what in report.missing),
        *(f"{run.name}: {note}" for run in report.runs for note in run.notes),
    ]


def to_markdown(report: Report, pictures: Sequence[Picture] = ()) -> str:
    """The page; `pictures` lie beside it."""
    runs, states = report.runs, [run.status for run in report.runs]
    told_states = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    devices = sorted({run.devices for run in runs if run.devices})
    commits = sorted({run.commit[:8] + run.commit[40:] for run in runs if run.commit})
    parts = [
        f"# Report on `{report.folder.name}`",
        f"{len(runs)} runs ({told_states}); devices: {', '.join(devices) or 'unknown'}; "
        f"commits: {', '.join(commits) or 'unknown'}. Losses are in nats per token, means over "
        "all scored tokens; intervals are 95 %, Student's t over seeds, differences paired by "
        "seed. Device time is devices × time of steps, waiting for data and saving. "
        f"{NONE}: unknown, with the reason in `runs.csv` and `report.json` under `missing`.",
        "## Verdict",
        f"**{_gate(report.verdict)}**",
        _bullets(report.verdict.evidence),
        *_verdicts(report.verdicts),
    ]
    if report.without_merit:
        parts += ["Models that do **not** beat their count model:", _bullets(report.without_merit)]
    matchings = _matchings(report)
    parts += [picture.markdown() for picture in pictures if picture.matching not in matchings]
    for matching in matchings:
        own = [c for c in report.comparisons if c.matching == matching]
        parts += [*_section(comparison_grid(own, matching)), *_problems(own)]
        parts += [picture.markdown() for picture in pictures if picture.matching == matching]
        parts += [*_section(stage_grid(report.stages, matching)), STEP_0]
    if report.reaches:
        parts += _section(reach_grid(report))
    for grid in run_grids(runs):
        parts += _section(grid)
    if found := notes(report):
        parts += ["## Missing, broken, worth knowing", _bullets(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(grid: Grid) -> list[str]:
    return [f"## {grid.title[0].upper()}{grid.title[1:]}", grid.markdown()]


def _gate(verdict: Verdict) -> str:
    return (
        f"The gate (at least {LEAST_SAVED:.0%} less training wall-clock at no more than "
        f"{MOST_ABOVE} nats above {REFERENCE}) {verdict.answer}."
    )


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    return [f"**{v.path}: {v.answer}**{_aside(v)}\n\n{_bullets(v.evidence)}" for v in verdicts]


def _aside(verdict: Verdict) -> str:
    return "" if verdict.candidate else " (no TTT-E2E: beside the gate)"


def _problems(comparisons: Sequence[Comparison]) -> list[str]:
    found = []
    for c in comparisons:
        if c.mixed:
            found.append(
                f"**MIXED DEVICES** in {c.path}: {'; '.join(c.devices)}. Times do not compare."
            )
        found += [f"{c.path}: {problem}" for problem in c.problems]
    return [_bullets(found)] if found else []


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
