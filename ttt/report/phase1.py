"""The report on an experiment folder, written. No JAX.

<out>/runs.csv       one row per run, every column
report.json    all numbers, those of the pictures included
report.md      the report to read
*.png, *.svg   its pictures
"""

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ttt.errors import UserError
from ttt.infra.record import write_whole
from ttt.report import pictures, tables
from ttt.report.frame import COLUMNS
from ttt.report.reading import Report, read, read_all

__all__ = ["Report", "check_out", "read", "read_all", "save", "to_json", "write"]


def write(
    experiments_root: str | Path,
    exp_folder: str,
    out: str | Path | None = None,
    checkpoint_root: str | Path | None = None,
) -> list[Path]:
    """Write the report into `out` (none: `<exp_folder>/report`); returns the paths.

    Each file is whole or not there; an earlier report is replaced, and a picture of it that can no
    longer be drawn is removed. A UserError if `out` holds anything but an earlier report.
    """
    report = read(experiments_root, exp_folder, checkpoint_root)
    return save(report, Path(out) if out else report.folder / "report")


def save(report: Report, out: Path) -> list[Path]:
    """Write a report that was read into `out`; see `write`."""
    check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    texts = {"runs.csv": tables.to_csv([report]), "report.json": to_json(report)}
    for name, text in texts.items():
        write_whole(out / name, text)
    drawn = pictures.draw_all(report, out)
    write_whole(out / "report.md", tables.to_markdown(report, drawn))
    found = [path for picture in drawn for path in picture.paths]
    return [*(out / name for name in texts), out / "report.md", *found]


def check_out(out: Path) -> None:
    """Raise a UserError unless `out` is new, empty, or holds an earlier report."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: must be a folder or not exist; name another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / "report.json").exists():
        raise UserError(
            f"{out} holds files but no report.json, so it is no earlier report: name another --out"
        )


def to_text(reports: Sequence[Report], form: str, *, one: bool) -> str:
    """All reports in a format: table, json, csv or markdown; one: JSON is no list of the only."""
    if form == "json":
        return to_json(reports[0] if one else reports)
    if form == "csv":
        return tables.to_csv(reports)
    if form == "markdown":
        return "\n".join(map(tables.to_markdown, reports))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return "\n\n".join(tables.to_terminal(report, width) for report in reports)


def to_json(report: Report | Sequence[Report]) -> str:
    """All of it, as one JSON object, or a list of them; NaN and the infinities are null."""
    return json.dumps(_plain(report), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, Report):
        value = {f.name: getattr(value, f.name) for f in fields(value)} | {"faults": value.faults}
        value["runs"] = value["runs"][list(COLUMNS)]
    elif is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    elif isinstance(value, pd.DataFrame):
        value = value.to_dict("records")
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    elif isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
