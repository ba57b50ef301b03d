"""Timings as a Markdown table, as one line of JSON, and as a picture."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ttt import figures
from ttt.bench.timing import Timing

LABELS = {
    "train_step": "training step",
    "gradient": "loss and gradient",
    "prefill": "prefill",
    "evaluate": "evaluation",
    "decode": "decoding, steps included",
    "decode_between_steps": "decoding between steps",
}
_NAMES = ("variant", "call")
_NUMBERS = ("context", "batch", "median s", "min – max s", "s/1K (ms/token)", "tokens/s", "TFLOP/s")
_COLUMNS = (*_NAMES, *_NUMBERS, "MFU", "temp MB", "compile s")


def table(timings: Sequence[Timing]) -> str:
    """One row per timing, columns aligned, and below it crossings and failures in words."""
    lines = [figures.markdown_table(_COLUMNS, map(_cells, timings), len(_NAMES), aligned=True)]
    for (call, ours, theirs), tokens in crossings(timings).items():
        lines.append(f"\n{LABELS[call]}: {_sentence(ours, theirs, tokens)}")
    lines += [f"\n{t.variant}, {t.call}, {t.context}: {t.failed}" for t in timings if t.failed]
    return "\n".join(lines) + "\n"


def crossings(timings: Sequence[Timing]) -> dict[tuple[str, str, str], float]:
    """(call, variant that learns, variant whose state grows) -> where the first gets cheaper.

    That is the context from which on it stays cheaper. Between two contexts both are taken for
    straight lines in log-log, as the picture has them. 0 where it is cheaper at every context,
    infinity where it is dearer at the longest. Left out: calls without both at two contexts.
    """
    latency: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for t in timings:
        if t.seconds:
            latency[t.call, t.variant][t.context] = t.s_per_1k_tokens
    calls = dict.fromkeys(t.call for t in timings)
    learning = dict.fromkeys(t.variant for t in timings if t.learns)
    growing = dict.fromkeys(t.variant for t in timings if t.grows and not t.learns)
    result = {}
    for call, ours, theirs in product(calls, learning, growing):
        tokens = _crossing(latency[call, ours], latency[call, theirs])
        if tokens is not None:
            result[call, ours, theirs] = tokens
    return result


def _crossing(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    both = sorted(ours.keys() & theirs.keys())
    if len(both) < 2:
        return None
    x = np.log(both)
    lead = np.array([math.log(ours[n] / theirs[n]) for n in both])
    dearer = np.flatnonzero(lead > 0)
    if not len(dearer):
        return 0.0
    i = dearer[-1]
    if i == len(both) - 1:
        return math.inf
    share = lead[i] / (lead[i] - lead[i + 1])
    return float(np.exp(x[i] + share * (x[i + 1] - x[i])))


def _sentence(ours: str, theirs: str, crossing: float) -> str:
    if crossing == 0:
        return f"{ours} is cheaper than {theirs} at every context measured"
    if math.isinf(crossing):
        return f"{ours} is dearer than {theirs} at the longest context measured"
    return f"{ours} is cheaper than {theirs} from about {crossing:,.0f} tokens on"


def _cells(timing: Timing) -> list[str]:
    cells = [timing.variant, timing.call, f"{timing.context:,}", str(timing.sequences)]
    if timing.failed is not None:
        return [*cells, "failed", *[""] * (len(_COLUMNS) - len(cells) - 1)]
    return [
        *cells,
        f"{timing.median:.4g}",
        f"{min(timing.seconds):.4g} – {max(timing.seconds):.4g}",
        f"{timing.s_per_1k_tokens:.3g}",
        f"{timing.tokens_per_s:,.0f}",
        figures.known(timing.flops and timing.flops / timing.median / 1e12, ".3g"),
        figures.known(timing.mfu, ".1%"),
        figures.known(timing.temp_mb, ",.0f"),
        figures.known(timing.compile_s, ".1f"),
    ]


def summary(timings: Sequence[Timing]) -> str:
    """One JSON object on one line: variant -> `step_s`, `temp_mb` and `compile_s`, or `failed`.

    Where there are several calls or contexts, the key is `variant/call/context`.
    """
    one = len({(t.call, t.context) for t in timings}) == 1
    return json.dumps(
        {t.variant if one else f"{t.variant}/{t.call}/{t.context}": _figures(t) for t in timings}
    )


def _figures(timing: Timing) -> dict[str, Any]:
    if timing.failed is not None:
        return {"failed": timing.failed}
    values = {"step_s": timing.median, "temp_mb": timing.temp_mb, "compile_s": timing.compile_s}
    return {name: x if x is None else float(f"{x:.4g}") for name, x in values.items()}


def draw(timings: Sequence[Timing], path: Path, *, title: str) -> None:
    """Save the picture: latency against context, a panel per call, a line per variant.

    Points are medians, bars reach from the fastest call to the slowest.
    """
    from matplotlib.ticker import LogLocator

    calls = list(dict.fromkeys(t.call for t in timings))
    figure, panels = figures.grid(1, len(calls), (1.5 + 3.2 * len(calls), 4.2))
    for axes, call in zip(panels[0], calls, strict=True):
        _draw_call(axes, timings, call)
        axes.set_title(LABELS[call], fontsize=10, loc="left")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
        figures.tidy(axes)
        axes.grid(axis="y", which="minor", color="0.92")
        axes.set_xlabel("context (tokens)")
    panels[0][0].set_ylabel("seconds per 1K tokens (milliseconds per token)")
    figures.legend_below(figure, panels[0][0])
    figures.finish(figure, path, title)


def _draw_call(axes: Any, timings: Sequence[Timing], call: str) -> None:
    for number, variant in enumerate(dict.fromkeys(t.variant for t in timings)):
        own = [t for t in timings if (t.call, t.variant) == (call, variant) and t.seconds]
        own.sort(key=lambda t: t.context)
        fastest, median, slowest = (
            np.array([t.per_1k_tokens(of(t.seconds)) for t in own]) for of in (min, np.median, max)
        )
        axes.errorbar(
            [t.context for t in own],
            median,
            [median - fastest, slowest - median],
            label=variant,
            capsize=2,
            **figures.style(number),
        )
    axes.set_yscale("log")
    figures.log_tokens(axes, sorted({t.context for t in timings}))
    inside = {k: n for k, n in crossings(timings).items() if k[0] == call and 0 < n < math.inf}
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** (0.13 * len(inside)))  # room for the words below
    for row, ((_, ours, theirs), tokens) in enumerate(inside.items()):
        axes.axvline(tokens, color="0.5", lw=1, ls=":")
        axes.annotate(
            f"{ours} below {theirs} \nfrom {tokens:,.0f} ",
            (tokens, 1 - 0.1 * row),  # left of the line, above all curves
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            fontsize=7,
            color="0.3",
        )
