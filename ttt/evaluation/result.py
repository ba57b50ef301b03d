"""What every suite gives: rows of one schema, kept as CSV and JSON. No JAX.

The columns of `<suite>.csv` are those of `Row`, with the suite's own keys (position, task, depth,
…) between `measure` and `value`. An empty cell is "not known" or "has no such key".
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Key = str | int | float | bool


@dataclass(frozen=True)
class Row:
    """One number, what it is of, and how far it can be trusted."""

    suite: str
    run: str
    method: str
    """`fa`, `swa`, `e2e`, or `token_stats` of a count model."""
    step: int
    """Outer steps behind the checkpoint."""
    context: int
    """Tokens per sequence."""
    measure: str
    keys: Mapping[str, Key] = field(default_factory=dict)
    value: float | None = None
    low: float | None = None
    high: float | None = None
    """Bounds of the 95 % interval."""
    n: int = 0
    """Independent samples (sequences, prompts) behind the value."""
    unit: str = ""
    failed: str = ""
    """Why there is no value."""

    def checked(self) -> "Row":
        """Itself, or a failed row where the value is no finite number."""
        if self.failed or self.value is None or math.isfinite(self.value):
            return self
        return replace(
            self, value=None, low=None, high=None, failed=f"not a finite number: {self.value}"
        )

    def flat(self) -> dict[str, Any]:
        """Column -> value, the keys in their place."""
        columns = dict(vars(self))
        flat = {}
        for name, value in columns.items():
            flat |= value if name == "keys" else {name: value}
        return flat


_AFTER_KEYS = ("value", "low", "high", "n", "unit", "failed")


def columns(rows: Sequence[Row]) -> list[str]:
    """Columns of a table of `rows`, the union of their keys in order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row.flat())
    return [name for name in names if name not in _AFTER_KEYS] + list(_AFTER_KEYS)


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.flat() for row in rows)
    return text.getvalue()


def to_json(rows: Sequence[Row], notes: Mapping[str, Any]) -> str:
    """The rows and what there is to know about them, as a JSON object."""
    found = {"notes": dict(notes), "rows": [row.flat() for row in rows]}
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def save(folder: Path, suite: str, rows: Sequence[Row], notes: Mapping[str, Any]) -> None:
    """Write `<suite>.csv` and `<suite>.json`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{suite}.csv", to_csv(rows))
    write_whole(folder / f"{suite}.json", to_json(rows, notes))


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename, so that readers and crashes meet the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
