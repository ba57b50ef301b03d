"""What the pictures of all suites share: colours, the way axes look, saving."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# A CVD-safe palette (Okabe and Ito), taken by runs in their order, and marks for print. One mark
# more than colours, so that a colour that comes again has another mark.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "os^Dv<>P"


def pyplot() -> ModuleType:
    """The plotting library, without a display; it costs a second, so it is imported when used."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt


def style(index: int, *, learns: bool = True) -> dict[str, Any]:
    """How the curve of the run with this number looks; dashed and open where learning is off."""
    colour = COLOURS[index % len(COLOURS)]
    return {
        "color": colour,
        "marker": MARKS[index % len(MARKS)],
        "ms": 4,
        "lw": 1.6,
        "ls": "-" if learns else "--",
        "mfc": colour if learns else "white",
    }


def tidy(axes: Any) -> None:
    """A quiet frame and grid."""
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def log_tokens(axes: Any, ticks: Sequence[int]) -> None:
    """A logarithmic axis of tokens with `ticks` at round numbers."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [short(n) for n in ticks])
    axes.minorticks_off()


def mark(axes: Any, tokens: int, text: str) -> None:
    """A dotted line that says what is at so many tokens."""
    axes.axvline(tokens, color="0.6", lw=1, ls=":")
    axes.annotate(
        f" {text}", (tokens, 0.01), xycoords=("data", "axes fraction"), color="0.4", fontsize=7
    )


def legend_below(figure: Any, axes: Any) -> None:
    """One legend for all panels, that of `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        frameon=False,
        fontsize=8,
    )


def short(tokens: int) -> str:
    """8192 -> 8K."""
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else str(tokens)


def label_ends(axes: Any, ends: Sequence[tuple[float, str, str]], size: float = 8) -> None:
    """Names beside the right edge, each at its curve's end (y, name, colour), pushed apart.

    Call it when the axis' limits are final, with a layout that leaves room for the names.
    """
    low, high = axes.get_ylim()
    inches = axes.get_position().height * axes.figure.get_figheight()
    apart = 1.25 * size / 72 / inches  # of the axis' height
    wanted = sorted(((y - low) / (high - low), text, colour) for y, text, colour in ends)
    at = [min(max(y, 0.0), 1.0) for y, _, _ in wanted]
    for _ in range(200):  # neighbours that are too close give way to both sides
        for i in range(len(at) - 1):
            lack = apart - (at[i + 1] - at[i])
            if lack > 1e-9:
                at[i], at[i + 1] = at[i] - lack / 2, at[i + 1] + lack / 2
    for y, (_, text, colour) in zip(at, wanted, strict=True):
        axes.annotate(
            *(text, (1.0, y)),
            **{"xycoords": "axes fraction", "xytext": (5, 0), "textcoords": "offset points"},
            **{"color": colour, "fontsize": size, "va": "center", "annotation_clip": False},
        )


def finish(figure: Any, path: Path, title: str, suffixes: Sequence[str] = (".png",)) -> list[Path]:
    """Give the figure its title, save it whole under each suffix, let it go; returns the paths."""
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_suffix(suffix) for suffix in suffixes]
    if len(paths) > 1:  # one layout for all of them, and its time spent once
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    for place in paths:
        beside = place.with_name(f"{place.name}.tmp")
        # Without date and random ids, the same numbers give the same file.
        kind = place.suffix[1:]
        with pyplot().rc_context({"svg.hashsalt": "ttt"}):
            dated = {"metadata": {"Date": None}} if kind == "svg" else {}
            figure.savefig(beside, dpi=150, format=kind, **dated)
        beside.replace(place)
    pyplot().close(figure)
    return paths
