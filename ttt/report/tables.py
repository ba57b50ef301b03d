"""The report as text and as a folder. No JAX.

<out>/runs.csv       one row per run, every column
report.json    all numbers, those of the pictures included
report.md      the page to read
*.png, *.svg   its pictures
"""

import json
import math
import shutil
import string
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from ttt.errors import RunError, UserError
from ttt.figures import NONE, count, duration, known, markdown_table, nats, short, whole
from ttt.infra.plan_manifest import label
from ttt.infra.record import write_whole
from ttt.report import phase1, pictures
from ttt.report.compare import REFERENCE
from ttt.report.frame import COLUMNS, rows_of
from ttt.report.phase1 import Report
from ttt.report.pictures import Picture
from ttt.report.verdict import LEAST_SAVED, MOST_ABOVE, Verdict

_ASIDE = " (no TTT-E2E: beside the gate)"
STEP_0 = (
    "Losses before the first step are of the first batches of the evaluation alone "
    "(`training.eval_start_batches`), learning where the run learns; those of parent and child on "
    "the same tokens are at the parent's context."
)

# Tables: each column's header and the text of its cell, with fields of the row (`run`: all of it)
# and formats of Python or of `_FORMATS`.
_TRAINED = """
run: {name} | status: {status} | stage: {stage} | method: {method} | mode: {run:mode}
context: {context:short} | batch: {batch:whole} | steps: {steps:whole}/{steps_asked:whole}
tokens: {tokens:count} | parameters: {parameters:count}
first → final loss: {first_loss:nats} → {final_loss:nats} | validation: {validation_loss:nats}
not learning: {validation_loss_without_learning:nats} | bits per byte: {bits_per_byte:nats}
count model: {count_model_loss:nats} | split: {split}
device time: {device_hours:time} | wall-clock: {wall_hours:time}
s per step: {run:seconds} | tokens/s: {tokens_per_second:whole}
"""
_STARTED = """
run: {name} | experiment: {experiment} | parent: {parent} | restore: {run:restore}
checkpoint: {checkpoint:step} | devices: {devices} | commit: {commit:commit}
step-0 loss: {start_loss:nats} | parent, same tokens: {parent_loss:nats}
warm, same tokens: {warm_loss:nats} | compiling: {compile_hours:time}
evaluating: {evaluation_hours:time}
"""
_COMPARED = """
path: {path} | methods: {way} | validation loss: {loss:.4f} | minus B1's: {delta:+.4f}
step time saved: {saving:.1%} | seeds: {run:seeds} | documents: {run:documents}
tokens: {tokens:count} | step time: {step_hours:time} | device time: {device_hours:time}
parameters: {parameters:count} | count model: {count_model_loss:nats} | to be trusted: {run:trust}
"""
_STAGES = """
path: {path} | stage: {number} {stage} | steps: {steps:whole} | tokens: {tokens:count}
step time: {step_hours:time} | s per 1K tokens: {run:pace} | step-0 loss: {start_loss:nats}
warm / parent, same tokens: {warm_loss:nats} / {parent_loss:nats}
training loss: {first_loss:nats} → {final_loss:nats} | validation: {validation_loss:nats}
next starts from: {next_start_loss:nats} | seeds: {seeds}
"""
_REACHED = """
path: {path} | how it is known: {said} | step time: {hours:time} | of B1's: {of_reference:.2f}
"""


def restore(run: Any) -> str:
    """`restored / initialised / not attempted`, with counts of parameters by name."""
    if run.restore is None or run.restored is None:
        return run.restore or NONE
    more = {name: getattr(run, name) for name in ("narrowed", "moved", "cast", "unused")}
    counts = [f"{run.restored} restored", f"{run.initialised} initialised"]
    return ", ".join(counts + [f"{number} {name}" for name, number in more.items() if number])


def _mode(run: Any) -> str:
    return f"{run.runtime_mode}, {run.train_mode or NONE}" if run.runtime_mode else NONE


def _trust(c: Any) -> str:
    if c.problems:
        return "no: see the list"
    if c.without_merit:
        return "no better than counts"
    return "not in time: MIXED DEVICES" if c.mixed else "yes"


def _pace(stage: Any) -> str:
    timed = stage.step_hours > 0 and stage.tokens > 0
    return f"{3600 * stage.step_hours / stage.tokens * 1024:.3g}" if timed else NONE


def _seconds(run: Any) -> str:
    low, high = run.step_seconds_low, run.step_seconds_high
    bounds = "" if low is None else f" [{low:.3g}, {high:.3g}]"
    return known(run.step_seconds, ".3g") + bounds


def _documents(c: Any) -> str:
    counts = {estimate.documents for estimate in (c.loss, c.delta) if estimate} - {0}
    return " and ".join(map(str, sorted(counts))) or NONE


def _commit(commit: str | None) -> str:
    return commit[:8] + commit[40:] if commit else NONE


_FORMATS = {
    "count": count,
    "nats": nats,
    "time": duration,
    "whole": whole,
    "short": lambda tokens: short(tokens) if tokens else NONE,
    "step": lambda checkpoint: f"step {Path(checkpoint).name}" if checkpoint else NONE,
    "seeds": lambda c: f"{c.loss.n if c.loss else 0} of {len(c.seeds)}",
    "commit": _commit,
    "mode": _mode,
    "pace": _pace,
    "restore": restore,
    "seconds": _seconds,
    "documents": _documents,
    "trust": _trust,
}


class _Cell(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        text = _FORMATS.get(format_spec)
        return text(value) if text else known(value, format_spec)


def _filled(table: pd.DataFrame, columns: str) -> pd.DataFrame:
    """The texts of a table."""
    cells = [c.split(": ", 1) for line in columns.split("\n") if line for c in line.split(" | ")]
    rows = [row._asdict() | {"run": row} for row in rows_of(table)]
    return pd.DataFrame(
        {header: [_Cell().vformat(text, (), row) for row in rows] for header, text in cells}
    )


def _tables(report: Report) -> dict[str, list[tuple[str, pd.DataFrame, int]]]:
    """By matching ("": of none): titles, texts, and how many columns hold names."""
    compared, stages = report.comparisons, report.stages
    tables = {}
    for matching in compared["matching"].unique() if len(compared) else ():
        named = label(matching)
        own = compared[compared["matching"] == matching]
        of_stages = stages[stages["matching"] == matching]
        contexts = [context for context in own["context"] if context]
        context = short(contexts[0]) if contexts else NONE
        tables[matching] = [
            (f"{named}, context {context}", _filled(own, _COMPARED), 2),
            (f"stages, {named} (means over seeds)", _filled(of_stages, _STAGES), 2),
        ]
    title = f"time to reach {REFERENCE}'s loss"
    reached = [(title, _filled(report.reaches, _REACHED), 2)] if len(report.reaches) else []
    tables[""] = [
        *reached,
        ("runs (losses in nats per token)", _filled(report.runs, _TRAINED), 5),
        ("where they started, and on what", _filled(report.runs, _STARTED), 7),
    ]
    return tables


# ---- texts -----------------------------------------------------------------------------


def to_text(reports: Sequence[Report], form: str, *, one: bool) -> str:
    """All reports in a format: table, json, csv or markdown; one: JSON is no list of the only."""
    if form == "json":
        return to_json(reports[0] if one else reports)
    if form == "csv":
        return to_csv(reports)
    if form == "markdown":
        return "\n".join(map(to_markdown, reports))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return "\n\n".join(to_terminal(report, width) for report in reports)


def to_csv(reports: Sequence[Report]) -> str:
    """One row per run, every column; several texts in a cell stand in lines of their own."""
    runs = pd.concat([report.runs[list(COLUMNS)] for report in reports])
    texts = ["missing", "faults", "notes"]
    runs[texts] = runs[texts].map("\n".join)
    return runs.to_csv(index=False, lineterminator="\n")


def to_json(report: Report | Sequence[Report]) -> str:
    """All of it, as one JSON object, or a list of them; NaN and the infinities are null."""
    return json.dumps(_plain(report), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, Report):
        runs = value.runs[list(COLUMNS)]
        value = vars(value) | {"runs": runs, "faults": value.faults}
    elif isinstance(value, pd.DataFrame):
        value = value.to_dict("records")
    elif isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    elif isinstance(value, SimpleNamespace | Verdict):
        value = vars(value)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def to_terminal(report: Report, width: int | None) -> str:
    """Tables and verdict, for a terminal of so many columns; None: no row is broken."""
    tables = _tables(report)
    *reached, trained, started = tables.pop("")
    parts = [f"{report.folder}"]
    for title, table, _ in [trained, started, *chain(*tables.values()), *reached]:
        named = table.set_index(table.columns[0]).rename_axis(index=None, columns=table.columns[0])
        parts.append(f"{title}\n{named.to_string(line_width=width)}")
    lines = []
    for answer, evidence in _answers(report):
        lines += [answer, *(f"  {line}" for line in evidence)]
    lines += [f"does not beat the count model: {line}" for line in report.without_merit]
    lines += several_splits(report)
    lines += [f"{NONE}: no value; --format csv and json say why, under `missing`"]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def to_markdown(report: Report, drawn: Sequence[Picture] = ()) -> str:
    """The page; the pictures lie beside it."""
    runs = report.runs
    counts = runs["status"].value_counts(sort=False).items()
    devices = ", ".join(sorted(runs["devices"].dropna().unique()))
    commits = ", ".join(sorted(runs["commit"].dropna().map(_commit).unique()))
    parts = [
        f"# Report on `{report.folder.name}`",
        f"{len(runs)} runs ({', '.join(f'{n} {state}' for state, n in counts)}); devices: "
        f"{devices or 'unknown'}; commits: {commits or 'unknown'}. Losses are in nats per token, "
        "means over all scored tokens; differences are paired by seed. Intervals are 95 %, "
        "Student's t over seeds, and of losses over seeds and documents where the column "
        "`documents` has a number. Device time is devices × time of steps, waiting for data and "
        "saving. "
        f"{NONE}: unknown, with the reason in `runs.csv` and `report.json` under `missing`.",
        "## Verdict",
    ]
    for answer, evidence in _answers(report):
        mark, aside = answer.partition(_ASIDE)[:2]
        parts.append(f"**{mark}**{aside}\n\n{_bullets(evidence)}")
    if report.without_merit:
        parts += ["Models that do **not** beat their count model:", _bullets(report.without_merit)]
    tables = _tables(report)
    general = tables.pop("")
    parts += [picture.markdown() for picture in drawn if picture.matching not in tables]
    for matching, (compared, stages) in tables.items():
        problems = []
        for c in rows_of(report.comparisons[report.comparisons["matching"] == matching]):
            if c.mixed:
                mixed = f"**MIXED DEVICES** in {c.path}: {'; '.join(c.devices)}."
                problems.append(f"{mixed} Times do not compare.")
            problems += [f"{c.path}: {problem}" for problem in c.problems]
        parts += [_section(*compared), _bullets(problems)]
        parts += [picture.markdown() for picture in drawn if picture.matching == matching]
        parts += [_section(*stages), STEP_0]
    parts += [_section(*table) for table in general]
    if listed := notes(report):
        parts += ["## Missing, broken, worth knowing", _bullets(listed)]
    return "\n\n".join(part for part in parts if part) + "\n"


def notes(report: Report) -> list[str]:
    """What is missing, broken or worth knowing."""
    lines = [*several_splits(report), *(f"broken: {fault}" for fault in report.faults)]
    lines += [f"missing: {what}" for what in report.missing]
    return lines + [f"{r.name}: {note}" for r in rows_of(report.runs) for note in r.notes]


def several_splits(report: Report) -> list[str]:
    """That runs were evaluated on different splits, if they were."""
    known = report.runs[report.runs["validation_loss"].notna()]
    names = known.groupby("split")["name"].agg(", ".join)
    if len(names) < 2:
        return []
    listed = "; ".join(f"{split}: {runs}" for split, runs in names.items())
    return [f"losses of different splits do not compare: {listed}"]


def _answers(report: Report) -> list[tuple[str, Sequence[str]]]:
    """The verdict on the whole and on every path: answer and evidence."""
    gate = (
        f"The gate (at least {LEAST_SAVED:.0%} less training wall-clock at no more than "
        f"{MOST_ABOVE} nats above {REFERENCE}) {report.verdict.answer}."
    )
    own = [(f"{v.path}: {v.answer}{'' if v.candidate else _ASIDE}", v) for v in report.verdicts]
    return [(text, v.evidence) for text, v in [(gate, report.verdict), *own]]


def _section(title: str, table: pd.DataFrame, names: int) -> str:
    """A table with its heading, as GitHub reads it."""
    rows = [[cell.replace("|", "/") for cell in row] for row in table.values.tolist()]
    return f"## {title[0].upper()}{title[1:]}\n\n{markdown_table(table.columns, rows, names)}"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


# ---- files -----------------------------------------------------------------------------


def write(
    experiments_root: str | Path,
    exp_folder: str,
    out: str | Path | None = None,
    checkpoint_root: str | Path | None = None,
) -> list[Path]:
    """Write the report into `out` (none: `<exp_folder>/report`); returns the paths."""
    report = phase1.read(experiments_root, exp_folder, checkpoint_root)
    return save(report, Path(out) if out else report.folder / "report")


@contextmanager
def reporting(
    folder: Path, checkpoint_root: str | Path | None, say: Callable[[str], None]
) -> Generator[None]:
    """Write the report on an experiment folder when the block has run it, and say where it is.

    Also where a run failed: the failure counts, whatever there is to report yet.
    """

    def report() -> None:
        written = write(folder.parent, folder.name, checkpoint_root=checkpoint_root)
        say(f"report: {next(path for path in written if path.suffix == '.md')}")

    try:
        yield
    except RunError:
        with suppress(UserError):
            report()
        raise
    report()


def save(report: Report, out: Path) -> list[Path]:
    """Write a report into `out`; returns the paths.

    Each file is whole or not there; an earlier report is replaced, and a picture of it that can no
    longer be drawn is removed. A UserError if `out` holds anything but an earlier report.
    """
    check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "runs.csv", to_csv([report]))
    write_whole(out / "report.json", to_json(report))
    drawn = pictures.draw_all(report, out)
    write_whole(out / "report.md", to_markdown(report, drawn))
    paths = [out / name for name in ("runs.csv", "report.json", "report.md")]
    return paths + [path for picture in drawn for path in picture.paths]


def check_out(out: Path) -> None:
    """Raise a UserError unless `out` is new, empty, or holds an earlier report."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: must be a folder or not exist; name another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / "report.json").exists():
        raise UserError(
            f"{out} holds files but no report.json, so it is no earlier report: name another --out"
        )
