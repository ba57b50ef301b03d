"""What the pictures of all suites share: colours, the way axes look, saving."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# A CVD-safe palette (Okabe and Ito), taken by runs in their order, and marks for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "os^Dv<>"


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


def finish(figure: Any, path: Path, title: str) -> None:
    """Give the figure its title, save it and let it go."""
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
