"""The evaluations of imported models' runs as files: rows, and one page with the runs' report.

No JAX.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ttt.figures import NONE, count, known, markdown_table, whole
from ttt.infra.record import write_whole
from ttt.report import frame, phase1, tables

COST = ("parameters", "tokens", "tokens_per_second", "step_hours", "evaluation_hours", "devices")
"""Of a run's training (`frame.COLUMNS`), in each of its rows."""
Rows = Sequence[Mapping[str, Any]]


def with_cost(rows: Rows, folder: Path) -> Rows:
    """Each row with what the training of its run took, where a record says so."""
    if not folder.is_dir():
        return rows
    costs = frame.read(folder, None).set_index("name")[list(COST)].to_dict("index")
    return [{**row, **costs.get(row["run"], {})} for row in rows]


def write(
    rows: Rows,
    folder: Path,
    checkpoint_root: str | None,
    out_json: Path | None = None,
    out_csv: Path | None = None,
) -> Path:
    """Rows as JSON and CSV, and the page; each file whole or not there. Returns the page.

    All are `<folder>_external_eval.*` beside the experiment folder unless paths are given.
    """
    rows = with_cost(rows, folder)
    out = folder.with_name(f"{folder.name}_external_eval")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    content = json.dumps({"rows": list(rows)}, indent=1, default=str) + "\n"
    page = out.with_suffix(".md")
    for path, what in (
        (out_csv or out.with_suffix(".csv"), text.getvalue()),
        (out_json or out.with_suffix(".json"), content),
        (page, _page(rows, folder, checkpoint_root)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, what)
    return page


def to_markdown(rows: Rows) -> str:
    """A table with a line per run, dataset and mode: loss by context, recall, decoding, cost."""
    table = pd.DataFrame(list(rows))
    if "measure" not in table:
        return "Nothing was evaluated."
    lines, headers = [], {}
    keys = ["run", "dataset", "learning"]
    for names, own in table.groupby(keys, sort=False, dropna=False):
        run, dataset, learning = list(names)  # ty: ignore[invalid-argument-type]
        cells = {}
        for row in own.to_dict("records"):
            if title := _title(row):
                cells[title] = known(row["value"], ".4f" if "loss" in title else ".2f")
        cost = own.iloc[0]
        cells["parameters"] = count(cost.get("parameters"))
        cells["training tokens"] = count(cost.get("tokens"))
        cells["training tokens/s"] = whole(cost.get("tokens_per_second"))
        headers |= dict.fromkeys(cells)
        lines.append([str(run), str(dataset), "yes" if learning is True else "no", cells])
    rows_of_text = [
        [*names, *(cells.get(title, NONE) for title in headers)] for *names, cells in lines
    ]
    return markdown_table([*keys, *headers], rows_of_text, 3)


def _title(row: Mapping[str, Any]) -> str:
    """The column of a number that the page shows; empty: of none."""
    context = f"at {row['context']:,}"
    if row["measure"] == "loss" and row["suite"] == "loss_by_context":
        return f"loss {context}"
    if (
        row["suite"] == "long_decoding"
        and row["measure"] == "log_loss"
        and row["text"] == "written"
    ):
        return f"log-loss {row['half']}, penalty {row['repetition_penalty']:g}"
    everywhere = row.get("depth") == "all" and row.get("reach") == "all"
    if row["suite"] == "needles" and row["measure"] == "accuracy" and everywhere:
        return f"{row['task']} {context}"
    return ""


def _page(rows: Rows, folder: Path, checkpoint_root: str | None) -> str:
    """What was evaluated, then the report on the runs."""
    parts = [
        f"# Imported models: `{folder.name}`",
        "Losses in nats per token on held-out text, recall as the share of right answers; "
        f"`learning`: whether the model learned while it read. {NONE}: not measured.",
        to_markdown(rows),
    ]
    if failed := [f"- {row['run']}: {row['failed']}" for row in rows if row.get("failed")]:
        parts.append("Failed:\n\n" + "\n".join(failed))
    report = phase1.read(folder.parent, folder.name, checkpoint_root)
    return "\n\n".join([*parts, tables.to_markdown(report)])
