"""The pictures of a report, PNG and SVG; one that cannot be drawn says why instead. No JAX."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ttt import figures
from ttt.infra.plan_manifest import label
from ttt.report.compare import REFERENCE
from ttt.report.frame import rows_of
from ttt.report.phase1 import Report
from ttt.report.verdict import LEAST_SAVED, MOST_ABOVE

SUFFIXES = (".png", ".svg")
_GATE = "#009E73"


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn, or why it was not."""

    name: str
    caption: str
    matching: str
    """Of the paths in it; empty: of all."""
    paths: tuple[Path, ...] = ()
    why: str = ""

    def markdown(self) -> str:
        """For the page beside it."""
        if self.paths:
            return f"![{self.caption}]({self.name}.png)\n\n*{self.caption}*"
        return f"*Not drawn: {self.name}. {self.why}*"


def draw_all(report: Report, folder: Path) -> list[Picture]:
    """Draw what the report has the numbers for; remove what an earlier one drew from others."""
    compared = rows_of(report.comparisons)
    ways = dict.fromkeys(f"{c.path}: {c.way}" for c in compared)
    caption = (
        f"Held-out loss against {REFERENCE}'s, and the training time saved. Open points: not to be "
        f"relied on, for the reasons below. {'; '.join(ways)}."
    )
    for matching in ("tokens", "wall_clock"):
        own = [c for c in compared if c.matching == matching]
        drawn = [REFERENCE, *(c.path for c in own if c.delta)]
        caption += _absent(own, drawn, f" ({label(matching)})")

    def one(name: str, caption: str, matching: str, draw: Callable[[Path], list[Path]]) -> Picture:
        if paths := draw(folder / name):
            return Picture(name, caption, matching, tuple(paths))
        for suffix in SUFFIXES:
            (folder / name).with_suffix(suffix).unlink(missing_ok=True)
        texts = [*report.missing, *(text for c in compared for text in c.problems)]
        reasons = list(dict.fromkeys(texts))
        why = "; ".join(reasons[:6]) or "no path has the numbers for it"
        more = f"; and {len(reasons) - 6} more" if len(reasons) > 6 else ""
        return Picture(name, caption, matching, why=f"Missing: {why}{more}")

    pictures = [one("gate", caption, "", lambda path: _gate(compared, path))]
    for matching in dict.fromkeys(c.matching for c in compared) or ("tokens",):
        own = [c for c in compared if c.matching == matching]
        costs = [curve for curve in report.costs if curve.matching == matching]
        positions = [curve for curve in report.positions if curve.matching == matching]
        cost = f"Loss and cost, {label(matching)}.{_absent(own, [c.path for c in costs])}"
        position = f"Held-out loss by token position, {label(matching)}."
        position += _absent(own, [c.path for c in positions])
        pictures += [
            one(f"loss_against_cost_{matching}", cost, matching, partial(_costs, costs)),
            one(f"loss_by_position_{matching}", position, matching, partial(_positions, positions)),
        ]
    return pictures


def _absent(own: Sequence[Any], drawn: Sequence[str], where: str = "") -> str:
    """Which paths are not in a picture, and why, to go on with its caption."""
    absent = [c for c in own if c.path not in drawn]
    reasons = [f"{c.path}: {c.problems[0] if c.problems else 'no numbers'}" for c in absent]
    return f" Not in it{where}: {'; '.join(reasons)}." if reasons else ""


# ---- the gate --------------------------------------------------------------------------


def _gate(compared: Sequence[Any], path: Path) -> list[Path]:
    """Left: loss and time against B1, token-matched. Right: loss where the time is the same."""
    points = [c for c in compared if c.delta and c.matching == "tokens" and c.saving]
    bars = [c for c in compared if c.delta and c.matching == "wall_clock"]
    if not points and not bars:
        return []
    figure, axes = figures.panels([4.8] * bool(points) + [3.2] * bool(bars))
    if points:
        _gate_points(axes[0], points)
    if bars:
        _gate_bars(axes[-1], bars)
    if points:
        figure.draw_without_rendering()  # names keep clear of each other where the axes come to lie
        named = [(100 * c.saving.mean, c.delta.mean, c.path) for c in points]
        named = [(0.0, 0.0, REFERENCE), *named]
        figures.name_points(axes[0], [(*at, figures.path_colour(at[2])) for at in named])
    return figures.finish(figure, path, "the warm-start gate (means and 95 % intervals)", SUFFIXES)


def _gate_points(axes: Any, points: Sequence[Any]) -> None:
    for c in points:
        at = 100 * c.saving.mean, c.delta.mean
        axes.errorbar(*at, xerr=_error(c.saving, 100), yerr=_error(c.delta), **_point(c))
    figures.tidy(axes, "both")
    x0, x1 = axes.get_xlim()
    y0, y1 = axes.get_ylim()
    x0, x1 = min(x0, 0) - 2, max(x1, 100 * LEAST_SAVED + 12) + 4
    y0, y1 = min(y0, -MOST_ABOVE), max(y1, 3 * MOST_ABOVE)
    axes.set(xlim=(x0, x1), ylim=(y0, y1 + 0.06 * (y1 - y0)))
    axes.fill_between([100 * LEAST_SAVED, x1], y0, MOST_ABOVE, color=_GATE, alpha=0.13, lw=0)
    axes.text(x1, y0, "passes the gate ", color=_GATE, fontsize=8, ha="right", va="bottom")
    axes.axhline(0, color="0.4", lw=1)
    axes.plot(0, 0, "s", color=figures.PATH_COLOURS[REFERENCE], ms=6, zorder=3)
    axes.set_xlabel(f"training time of {REFERENCE} saved (%, steps)")
    axes.set_ylabel(f"held-out loss minus {REFERENCE}'s (nats per token)")
    figures.subtitle(axes, "token-matched")


def _gate_bars(axes: Any, bars: Sequence[Any]) -> None:
    for row, c in enumerate(bars):
        axes.errorbar(c.delta.mean, row, xerr=_error(c.delta), **_point(c))
    axes.set_yticks(range(len(bars)), [c.path for c in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.axvline(0, color="0.4", lw=1)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    figures.tidy(axes, "x")
    axes.set_xlabel(f"held-out loss minus {REFERENCE}'s (nats per token)")
    axes.set_xlim(axes.get_xlim())
    axes.axvspan(axes.get_xlim()[0], MOST_ABOVE, color=_GATE, alpha=0.13, lw=0)
    figures.subtitle(axes, "wall-clock-matched")


def _point(comparison: Any) -> dict[str, Any]:
    """How it looks; open where its numbers, or its times, cannot be relied on."""
    tint = figures.path_colour(comparison.path)
    spoiled = comparison.problems or comparison.mixed
    look = {"fmt": "o", "ms": 6, "lw": 1.4, "capsize": 2.5, "zorder": 3}
    return look | {"color": tint, "mfc": "white" if spoiled else tint}


def _error(estimate: Any, scale: float = 1.0) -> list[list[float]] | None:
    """Lengths of both bars; None where there is no interval."""
    if estimate.low is None:
        return None
    below, above = estimate.mean - estimate.low, estimate.high - estimate.mean
    return [[scale * below], [scale * above]]


# ---- curves ----------------------------------------------------------------------------


def _costs(curves: Sequence[Any], path: Path) -> list[Path]:
    """Smoothed training loss, and held-out loss at the ends of stages, against hours and tokens."""
    if not curves:
        return []
    figure, panels = figures.panels([4.2] * 2, sharey=True)
    looks = figures.path_styles([curve.path for curve in curves])
    short = max(hours for curve in curves for _, hours, _ in curve.ends) < 1
    scale, unit = (60, "device-minutes") if short else (1, "device-hours")
    for axes, name in zip(panels, ("hours", "tokens"), strict=True):
        for curve in curves:
            x, look = scale * curve.hours if name == "hours" else curve.tokens, looks[curve.path]
            axes.plot(x.ravel(), curve.loss.ravel(), lw=1, alpha=0.45, **look)
            point = {"fmt": "o", "capsize": 2, "elinewidth": 1, "zorder": 3, "color": look["color"]}
            for tokens, hours, e in curve.ends:
                at = scale * hours if name == "hours" else tokens
                size, fill = (5.5, look["color"]) if e is curve.ends[-1][2] else (3.5, "white")
                axes.errorbar(at, e.mean, yerr=_error(e), ms=size, mfc=fill, **point)
        figures.tidy(axes)
        axes.set_xlim(left=0)
    low = min(np.nanmin(curve.loss) for curve in curves)
    ends = [e.mean for curve in curves for _, _, e in curve.ends]
    bounds = [e.low for curve in curves for _, _, e in curve.ends[-1:] if e.low is not None]
    low, high = min(low, *ends, *bounds), max(ends)
    shown = high + 0.8 * (high - low + 0.05)  # what the first steps lose would flatten all else
    for axes, what in zip(panels, (f"{unit} of training", "trained tokens"), strict=True):
        axes.set_ylim(low - 0.06 * (shown - low), shown)
        axes.set_xlabel(what)
    panels[1].xaxis.set_major_formatter(lambda value, _: figures.count(value))
    panels[0].set_ylabel("loss (nats per token)")
    figures.subtitle(panels[0], "lines: training loss, smoothed, mean over seeds")
    points = "points: held-out loss at each stage's end (filled: the last), 95 % bars"
    figures.subtitle(panels[1], points)
    ends = [(curve.ends[-1][2].mean, curve.path, looks[curve.path]["color"]) for curve in curves]
    return _finish(figure, panels, ends, path, f"loss against cost, {label(curves[0].matching)}")


def _positions(curves: Sequence[Any], path: Path) -> list[Path]:
    """Held-out loss by position, and what it is less than B1's, with bands."""
    if not curves:
        return []
    differ = [curve for curve in curves if curve.difference is not None]
    figure, panels = figures.panels([4.2] * (2 if differ else 1))
    looks = figures.path_styles([curve.path for curve in curves])
    for curve in curves:
        start, stop = np.maximum(curve.edges[:-1], 8.0), curve.edges[1:]
        middle = np.sqrt(start * stop)
        panels[0].plot(middle, curve.loss.value, lw=1.6, **looks[curve.path])
        if curve.difference is not None:
            value, low, high = curve.difference
            panels[1].plot(middle, value, lw=1.6, **looks[curve.path])
            tint = looks[curve.path]["color"]
            panels[1].fill_between(middle, low, high, color=tint, alpha=0.12, lw=0)
    context = max(curve.context for curve in curves)
    for axes in panels:
        figures.tidy(axes)
        figures.log_tokens(axes, [16 * 4**i for i in range(10) if 16 * 4**i <= context])
        axes.set_xlabel("token position")
    panels[0].set_ylabel("held-out loss (nats per token)")
    figures.subtitle(panels[0], "mean over seeds, learning while reading where the model learns")
    ends = []
    if differ:
        panels[1].axhline(0, color="0.4", lw=1)
        panels[1].set_ylabel(f"minus {REFERENCE}'s (nats per token)")
        over = "; ".join(dict.fromkeys(c.over for c in differ if c.over))
        bands = f" with 95 % bands over {over}" if over else ""
        figures.subtitle(panels[1], f"difference{bands}")
        ends = [(0.0, REFERENCE, figures.PATH_COLOURS[REFERENCE])]
    ends += [
        (float((curve.difference or curve.loss).value[-1]), curve.path, looks[curve.path]["color"])
        for curve in (differ or curves)
    ]
    title = f"held-out loss by token position, {label(curves[0].matching)}"
    return _finish(figure, panels, ends, path, title)


def _finish(
    figure: Any, panels: Any, ends: list[tuple[float, str, str]], path: Path, title: str
) -> list[Path]:
    """Name the curves at their ends in the last panel, and save."""
    figures.leave_room(figure, [text for _, text, _ in ends])
    figures.label_ends(panels[-1], ends)
    for text in panels[-1].texts:
        text.set_in_layout(False)
    return figures.finish(figure, path, title, SUFFIXES)
