"""Results of timings as a Markdown table, as one line of JSON, and as a picture."""

import json
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ttt.bench.timing import Result

# A CVD-safe palette (Okabe and Ito), and marks for print; variants take them in their order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "os^Dv<>"
LABELS = {
    "train_step": "training step",
    "gradient": "loss and gradient",
    "prefill": "prefill",
    "evaluate": "evaluation",
    "decode": "decoding, steps included",
    "decode_between_steps": "decoding between steps",
}
RIVALS = ("e2e", "fa")
"""Variants of which the first gets cheaper than the second as the context grows."""
_COLUMNS = (
    *("variant", "call", "context", "batch", "median s", "min – max s", "s/1K (ms/token)"),
    *("tokens/s", "TFLOP/s", "MFU", "temp MB", "compile s"),
)


def table(results: Sequence[Result]) -> str:
    """One row per result, columns aligned."""
    rows = [_COLUMNS, *map(_cells, results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        f"| {' | '.join(_padded(cell, i, widths[i]) for i, cell in enumerate(row))} |"
        for row in (rows[0], rule, *rows[1:])
    ]
    reasons = [
        f"\n{r.variant}, {r.call}, {r.context}: {r.failed}" for r in results if r.failed is not None
    ]
    found = crossings(results)
    said = [f"\n{_said(call, found[call])}" for call in found]
    return "\n".join([*lines, *said, *reasons]) + "\n"


def crossings(results: Sequence[Result]) -> dict[str, float]:
    """Call -> the context from which on the first of `RIVALS` is cheaper than the second.

    Between two contexts both are taken for straight lines in log-log, as the picture has them.
    0 where it is cheaper at every context, infinity where it is dearer at the longest. Calls that
    do not have both at two contexts or more are left out.
    """
    found = {}
    for call in dict.fromkeys(r.call for r in results):
        ours, theirs = (
            {
                r.context: r.s_per_1k_tokens
                for r in results
                if r.call == call and r.variant == v and r.seconds
            }
            for v in RIVALS
        )
        both = sorted(ours.keys() & theirs.keys())
        if len(both) < 2:
            continue
        x = np.log(both)
        lead = np.array([math.log(ours[n] / theirs[n]) for n in both])
        dearer = np.flatnonzero(lead > 0)
        if not len(dearer):
            found[call] = 0.0
        elif dearer[-1] == len(both) - 1:
            found[call] = math.inf
        else:
            i = dearer[-1]
            share = lead[i] / (lead[i] - lead[i + 1])
            found[call] = float(np.exp(x[i] + share * (x[i + 1] - x[i])))
    return found


def _said(call: str, crossing: float) -> str:
    ours, theirs = RIVALS
    if crossing == 0:
        return f"{LABELS[call]}: {ours} is cheaper than {theirs} at every context measured"
    if math.isinf(crossing):
        return f"{LABELS[call]}: {ours} is dearer than {theirs} at the longest context measured"
    return f"{LABELS[call]}: {ours} is cheaper than {theirs} from about {crossing:,.0f} tokens on"


def _padded(cell: str, column: int, width: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _cells(result: Result) -> list[str]:
    cells = [result.variant, result.call, f"{result.context:,}", str(result.sequences)]
    if result.failed is not None:
        return [*cells, "failed", *[""] * (len(_COLUMNS) - len(cells) - 1)]
    return [
        *cells,
        f"{result.median:.4g}",
        f"{min(result.seconds):.4g} – {max(result.seconds):.4g}",
        f"{result.s_per_1k_tokens:.3g}",
        f"{result.tokens_per_s:,.0f}",
        _or_dash(result.flops and result.flops / result.median / 1e12, ".3g"),
        _or_dash(result.mfu, ".1%"),
        _or_dash(result.temp_mb, ",.0f"),
        _or_dash(result.compile_s, ".1f"),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def summary(results: Sequence[Result]) -> str:
    """One JSON object on one line: variant -> `step_s`, `temp_mb` and `compile_s`, or `failed`.

    Where there are several calls or contexts, the key is `variant/call/context`.
    """
    one = len({(r.call, r.context) for r in results}) == 1
    return json.dumps(
        {r.variant if one else f"{r.variant}/{r.call}/{r.context}": _figures(r) for r in results}
    )


def _figures(result: Result) -> dict[str, Any]:
    if result.failed is not None:
        return {"failed": result.failed}
    figures = {"step_s": result.median, "temp_mb": result.temp_mb, "compile_s": result.compile_s}
    return {name: x if x is None else float(f"{x:.4g}") for name, x in figures.items()}


def draw(results: Sequence[Result], path: Path, *, title: str) -> None:
    """Save the picture: latency against context, a panel per call, a line per variant.

    Points are medians, bars reach from the fastest call to the slowest.
    """
    import matplotlib  # costs a second, and most imports of this module do without

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    calls = list(dict.fromkeys(r.call for r in results))
    variants = list(dict.fromkeys(r.variant for r in results))
    contexts = sorted({r.context for r in results})
    figure, panels = plt.subplots(
        *(1, len(calls)), figsize=(1.5 + 3.2 * len(calls), 3.8), squeeze=False, layout="constrained"
    )
    for axes, call in zip(panels[0], calls, strict=True):
        for variant, colour, mark in zip(variants, cycle(COLOURS), cycle(MARKS)):
            there = [r for r in results if (r.call, r.variant) == (call, variant) and r.seconds]
            x, y, bars = _curve(sorted(there, key=lambda r: r.context))
            style = {"color": colour, "marker": mark, "ms": 5, "lw": 1.6, "capsize": 2}
            axes.errorbar(x, y, bars, label=variant, **style)
        crossing = crossings([r for r in results if r.call == call]).get(call, 0)
        if 0 < crossing < math.inf:
            axes.axvline(crossing, color="0.5", lw=1, ls=":")
            axes.annotate(
                f" {RIVALS[0]} cheaper\n from {crossing:,.0f}",
                *((crossing, 0.02), ("data", "axes fraction")),
                fontsize=7,
                color="0.3",
            )
        axes.set_title(LABELS[call], fontsize=10, loc="left")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [_short(n) for n in contexts])
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
        axes.grid(axis="y", which="both", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("context (tokens)")
    panels[0][0].set_ylabel("seconds per 1K tokens (milliseconds per token)")
    panels[0][0].legend(frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curve(results: Sequence[Result]) -> tuple[list[int], list[float], list[list[float]]]:
    """Contexts, median latencies, and how far the fastest and the slowest lie below and above."""
    scale = [r.s_per_1k_tokens / r.median for r in results]
    below = [(r.median - min(r.seconds)) * s for r, s in zip(results, scale, strict=True)]
    above = [(max(r.seconds) - r.median) * s for r, s in zip(results, scale, strict=True)]
    return [r.context for r in results], [r.s_per_1k_tokens for r in results], [below, above]


def _short(tokens: int) -> str:
    """8192 -> 8K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
