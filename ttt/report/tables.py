"""The report as text: CSV of all columns, tables for a terminal, and the page to read. No JAX."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from ttt.figures import NONE, count, duration, is_unknown, nats, short, whole
from ttt.infra.plan_manifest import MATCHINGS
from ttt.report.compare import REFERENCE, Estimate
from ttt.report.frame import COLUMNS, rows_of
from ttt.report.pictures import Picture
from ttt.report.reading import Report
from ttt.report.verdict import LEAST_SAVED, MOST_ABOVE, Verdict

STEP_0 = (
    "Losses before the first step are of the first batches of the evaluation alone "
    "(`training.eval_start_batches`), learning where the run learns; those of parent and child on "
    "the same tokens are at the parent's context."
)

# A table: header -> the text of a row's cell; the first headers, so many as is said, are of names.
Cells = Mapping[str, Callable[[Any], str]]
_TRAINED: Cells = {
    "run": lambda r: r.name,
    "status": lambda r: r.status,
    "stage": lambda r: _text(r.stage),
    "method": lambda r: _text(r.method),
    "mode": lambda r: f"{r.runtime_mode}, {_text(r.train_mode)}" if r.runtime_mode else NONE,
    "context": lambda r: short(r.context) if r.context else NONE,
    "batch": lambda r: whole(r.batch),
    "steps": lambda r: f"{whole(r.steps)}/{whole(r.steps_asked)}",
    "tokens": lambda r: count(r.tokens),
    "parameters": lambda r: count(r.parameters),
    "first → final loss": lambda r: f"{nats(r.first_loss)} → {nats(r.final_loss)}",
    "validation": lambda r: nats(r.validation_loss),
    "not learning": lambda r: nats(r.validation_loss_without_learning),
    "count model": lambda r: nats(r.count_model_loss),
    "device time": lambda r: duration(r.device_hours),
    "wall-clock": lambda r: duration(r.wall_hours),
    "tokens/s": lambda r: whole(r.tokens_per_second),
}
_STARTED: Cells = {
    "run": lambda r: r.name,
    "experiment": lambda r: _text(r.experiment),
    "parent": lambda r: _text(r.parent),
    "restore": lambda r: restore(r),
    "checkpoint": lambda r: f"step {Path(r.checkpoint).name}" if r.checkpoint else NONE,
    "devices": lambda r: _text(r.devices),
    "commit": lambda r: _commit(r.commit) if r.commit else NONE,
    "step-0 loss": lambda r: nats(r.start_loss),
    "parent, same tokens": lambda r: nats(r.parent_loss),
    "warm, same tokens": lambda r: nats(r.warm_loss),
    "compiling": lambda r: duration(r.compile_hours),
    "evaluating": lambda r: duration(r.evaluation_hours),
}
_COMPARED: Cells = {
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
    "count model": lambda c: nats(c.count_model_loss),
    "to be trusted": lambda c: (
        "no: see the list"
        if c.problems
        else "no better than counts"
        if c.without_merit
        else "not in time: MIXED DEVICES"
        if c.mixed
        else "yes"
    ),
}
_STAGES: Cells = {
    "path": lambda s: s.path,
    "stage": lambda s: f"{s.number} {s.stage}",
    "steps": lambda s: whole(s.steps),
    "tokens": lambda s: count(s.tokens),
    "step time": lambda s: duration(s.step_hours),
    "s per 1K tokens": lambda s: (
        f"{3600 * s.step_hours / s.tokens * 1024:.3g}"
        if s.step_hours > 0 and s.tokens > 0
        else NONE
    ),
    "step-0 loss": lambda s: nats(s.start_loss),
    "warm / parent, same tokens": lambda s: f"{nats(s.warm_loss)} / {nats(s.parent_loss)}",
    "training loss": lambda s: f"{nats(s.first_loss)} → {nats(s.final_loss)}",
    "validation": lambda s: nats(s.validation_loss),
    "next starts from": lambda s: nats(s.next_start_loss),
    "seeds": lambda s: str(s.seeds),
}
_REACHED: Cells = {
    "path": lambda r: r.path,
    "how it is known": lambda r: r.said,
    "step time": lambda r: duration(r.hours),
    f"of {REFERENCE}'s": lambda r: NONE if is_unknown(r.of_reference) else f"{r.of_reference:.2f}",
}


def restore(run: Any) -> str:
    """`restored / initialised / not attempted`, with counts of parameters by name."""
    if run.restore is None or run.restored is None:
        return _text(run.restore)
    more = {name: getattr(run, name) for name in ("narrowed", "moved", "cast", "unused")}
    counts = [f"{run.restored} restored", f"{run.initialised} initialised"]
    return ", ".join(counts + [f"{number} {name}" for name, number in more.items() if number])


def _text(value: Any) -> str:
    return NONE if value is None else str(value)


def _commit(commit: str) -> str:
    return commit[:8] + commit[40:]


def _estimate(estimate: Estimate | None, form: str) -> str:
    if not estimate:
        return NONE
    if estimate.low is None:
        return f"{estimate.mean:{form}}"
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _filled(table: pd.DataFrame, cells: Cells) -> pd.DataFrame:
    """The texts of a table."""
    rows = rows_of(table)
    return pd.DataFrame({header: [text(row) for row in rows] for header, text in cells.items()})


def _tables(report: Report) -> dict[str, list[tuple[str, pd.DataFrame, int]]]:
    """By matching ("": of none): titles, texts, and how many columns hold names."""
    compared, stages = report.comparisons, report.stages
    found = {}
    for matching in compared["matching"].unique() if len(compared) else ():
        named = MATCHINGS.get(matching, matching)
        own = compared[compared["matching"] == matching]
        of_stages = stages[stages["matching"] == matching]
        contexts = [context for context in own["context"] if context]
        context = short(contexts[0]) if contexts else NONE
        found[matching] = [
            (f"{named}, context {context}", _filled(own, _COMPARED), 2),
            (f"stages, {named} (means over seeds)", _filled(of_stages, _STAGES), 2),
        ]
    title = f"time to reach {REFERENCE}'s loss"
    reached = [(title, _filled(report.reaches, _REACHED), 2)] if len(report.reaches) else []
    found[""] = [
        *reached,
        ("runs (losses in nats per token)", _filled(report.runs, _TRAINED), 5),
        ("where they started, and on what", _filled(report.runs, _STARTED), 7),
    ]
    return found


# ---- outputs ---------------------------------------------------------------------------


def to_csv(reports: Sequence[Report]) -> str:
    """One row per run, every column; several texts in a cell stand in lines of their own."""
    runs = pd.concat([report.runs[list(COLUMNS)] for report in reports])
    texts = ["missing", "faults", "notes"]
    runs[texts] = runs[texts].map("\n".join)
    return runs.to_csv(index=False, lineterminator="\n")


def to_terminal(report: Report, width: int | None) -> str:
    """Tables and verdict, for a terminal of so many columns; None: no row is broken."""
    found = _tables(report)
    *reached, trained, started = found.pop("")
    parts = [f"{report.folder}"]
    for title, table, _ in [trained, started, *chain(*found.values()), *reached]:
        named = table.set_index(table.columns[0]).rename_axis(index=None, columns=table.columns[0])
        parts.append(f"{title}\n{named.to_string(line_width=width)}")
    lines = [_gate(report.verdict), *(f"  {line}" for line in report.verdict.evidence)]
    for verdict in report.verdicts:
        lines += [f"{verdict.path}: {verdict.answer}{_aside(verdict)}"]
        lines += [f"  {line}" for line in verdict.evidence]
    lines += [f"does not beat the count model: {line}" for line in report.without_merit]
    lines += [f"{NONE}: no value; --format csv and json say why, under `missing`"]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def notes(report: Report) -> list[str]:
    """What is missing, broken or worth knowing."""
    runs = rows_of(report.runs)
    return [
        *(f"broken: {fault}" for fault in report.faults),
        *(f"missing: {what}" for what in report.missing),
        *(f"{run.name}: {note}" for run in runs for note in run.notes),
    ]


def to_markdown(report: Report, pictures: Sequence[Picture] = ()) -> str:
    """The page; `pictures` lie beside it."""
    runs = report.runs
    states = ", ".join(
        f"{n} {state}" for state, n in runs["status"].value_counts(sort=False).items()
    )
    devices = sorted(runs["devices"].dropna().unique())
    commits = sorted(runs["commit"].dropna().map(_commit).unique())
    parts = [
        f"# Report on `{report.folder.name}`",
        f"{len(runs)} runs ({states}); devices: {', '.join(devices) or 'unknown'}; "
        f"commits: {', '.join(commits) or 'unknown'}. Losses are in nats per token, means over "
        "all scored tokens; intervals are 95 %, Student's t over seeds, differences paired by "
        "seed. Device time is devices × time of steps, waiting for data and saving. "
        f"{NONE}: unknown, with the reason in `runs.csv` and `report.json` under `missing`.",
        "## Verdict",
        f"**{_gate(report.verdict)}**",
        _bullets(report.verdict.evidence),
        *(
            f"**{v.path}: {v.answer}**{_aside(v)}\n\n{_bullets(v.evidence)}"
            for v in report.verdicts
        ),
    ]
    if report.without_merit:
        parts += ["Models that do **not** beat their count model:", _bullets(report.without_merit)]
    found = _tables(report)
    general = found.pop("")
    parts += [picture.markdown() for picture in pictures if picture.matching not in found]
    for matching, (compared, stages) in found.items():
        own = report.comparisons[report.comparisons["matching"] == matching]
        parts += [_section(*compared), _problems(own)]
        parts += [picture.markdown() for picture in pictures if picture.matching == matching]
        parts += [_section(*stages), STEP_0]
    parts += [_section(*table) for table in general]
    if listed := notes(report):
        parts += ["## Missing, broken, worth knowing", _bullets(listed)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, table: pd.DataFrame, names: int) -> str:
    """A table with its heading, as GitHub reads it; the first columns, of names, to the left."""
    rule = [":---" if i < names else "---:" for i in range(len(table.columns))]
    rows = [list(table.columns), rule, *table.values.tolist()]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return f"## {title[0].upper()}{title[1:]}\n\n" + "\n".join(lines)


def _gate(verdict: Verdict) -> str:
    return (
        f"The gate (at least {LEAST_SAVED:.0%} less training wall-clock at no more than "
        f"{MOST_ABOVE} nats above {REFERENCE}) {verdict.answer}."
    )


def _aside(verdict: Verdict) -> str:
    return "" if verdict.candidate else " (no TTT-E2E: beside the gate)"


def _problems(comparisons: pd.DataFrame) -> str:
    lines = []
    for c in rows_of(comparisons):
        if c.mixed:
            listed = "; ".join(c.devices)
            lines.append(f"**MIXED DEVICES** in {c.path}: {listed}. Times do not compare.")
        lines += [f"{c.path}: {problem}" for problem in c.problems]
    return _bullets(lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
