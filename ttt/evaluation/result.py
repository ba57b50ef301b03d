"""What every suite gives: rows of one schema, kept as CSV and JSON. No JAX.

The columns of `<suite>.csv` are those of `Row`, with the suite's own keys (position, task, depth,
…) between `measure` and `value`. An empty cell is "not known" or "has no such key".
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.table import Table

from ttt.infra.record import write_whole

Key = str | int | float | bool


@dataclass(frozen=True)
class Row:
    """One number, what it is of, and how far it can be trusted."""

    suite: str
    run: str
    method: str
    """`fa`, `swa`, `hybrid`, `e2e`, or `token_stats` of a count model."""
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
    """Independent samples (documents, sequences, prompts) behind the value."""
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
        flat: dict[str, Any] = {}
        for name, value in vars(self).items():
            flat |= value if name == "keys" else {name: value}
        return flat


def estimate(interval: Iterable[Any]) -> dict[str, float | None]:
    """A value and the bounds of its interval as fields of a row; a bound that is NaN is unknown."""
    value, *bounds = map(float, interval)
    low, high = (None if math.isnan(bound) else bound for bound in bounds)
    return {"value": value, "low": low, "high": high}


def bits_per_byte(loss: Any, bytes_per_token: float) -> Any:
    """Nats per token as bits per byte of the text, in which vocabularies compare."""
    return loss / (math.log(2) * bytes_per_token)


def log_edges(length: int) -> Int[np.ndarray, " edges"]:
    """Borders of bins that widen with position: 0, 16, 23, 32, 45, 64, … , length.

    Two to every doubling, and the same for every length but for the last, so that bins of several
    contexts can be compared.
    """
    grid = np.round(16 * 2 ** np.arange(0, 40, 0.5)).astype(int)
    return np.concatenate([[0], grid[grid < length], [length]])


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header."""
    last = ["value", "low", "high", "n", "unit", "failed"]
    names = dict.fromkeys(name for row in rows for name in row.flat())
    text = io.StringIO()
    columns = [*(name for name in names if name not in last), *last]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.flat() for row in rows)
    return text.getvalue()


def save(folder: Path, suite: str, rows: Sequence[Row], notes: Mapping[str, Any]) -> None:
    """Write `<suite>.csv` and `<suite>.json`, each whole or not at all."""
    known = {"notes": dict(notes), "rows": [row.flat() for row in rows]}
    write_whole(folder / f"{suite}.csv", to_csv(rows))
    write_whole(folder / f"{suite}.json", json.dumps(known, indent=1, allow_nan=False) + "\n")


def printed(
    title: str, columns: Mapping[str, Sequence[str]], *, names: int = 1, caption: str = ""
) -> Table:
    """A table for a terminal; the first `names` columns hold names, the others numbers."""
    width = max(map(len, caption.splitlines()), default=None)  # or it is broken
    table = Table(title=title, caption=caption or None, min_width=width)
    for i, column in enumerate(columns):
        if i < names:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table
