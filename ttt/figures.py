"""What all pictures and tables share: palette, numbers for readers, how axes look, saving."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# A CVD-safe palette (Okabe and Ito), taken by runs in their order, and marks for print. One mark
# more than colours, so that a colour that comes again has another mark.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "os^Dv<>P"
PATH_COLOURS = {
    "B1": "#000000",
    "B2": "#E69F00",
    "P1": "#0072B2",
    "P2": "#D55E00",
    "P3": "#009E73",
    "S1": "#CC79A7",
}
"""Of the same palette; the paths of a sweep share the colour of the one that they vary."""
_DASHES = ("-", "--", ":", "-.")
NONE = "–"
"""A number that is not known, in a table."""


# ---- numbers -----------------------------------------------------------------------------


def short(tokens: int) -> str:
    """A length in tokens: 8192 -> 8K, 1000 -> 1000."""
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else str(tokens)


def known(value: Any, form: str = "") -> str:
    """The value in this format; a dash for None and NaN."""
    return NONE if value is None or value != value else format(value, form)


def whole(value: float | None) -> str:
    """With thousands set apart: 12,345."""
    return known(value, ",.0f")


def count(value: float | None) -> str:
    """Three digits of a large number: 1234567 -> 1.23M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value is not None and value >= size:
            return f"{value / size:.3g}{letter}"
    return known(value, ".3g")


def nats(value: float | None) -> str:
    """A loss, with four digits behind the point."""
    return known(value, ".4f")


def duration(hours: float | None) -> str:
    """Three digits in the unit that suits: `41 s`, `3.2 min`, `12.5 h`."""
    if hours is None or hours != hours:
        return NONE
    size, unit = (1, "h") if hours >= 1 else (60, "min") if hours * 60 >= 1 else (3600, "s")
    value = hours * size
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def gigabytes(size: float) -> str:
    """Three digits of a number of bytes, in GB."""
    return f"{size / 1e9:.3g} GB" if size < 999.5e9 else f"{size / 1e9:,.0f} GB"


def markdown_table(
    header: Iterable[str], rows: Iterable[Sequence[str]], names: int, *, aligned: bool = False
) -> str:
    """A table as GitHub reads it; the first `names` columns hold names, the others numbers.

    aligned: in columns of equal width, for a terminal.
    """
    cells = [[*header], *rows]
    widths = [max(map(len, column)) * aligned for column in zip(*cells, strict=True)]
    dashes = ["-" * max(width - 1, 3) for width in widths]
    cells.insert(1, [f":{x}" if i < names else f"{x}:" for i, x in enumerate(dashes)])
    sides = "<" * names + ">" * (len(widths) - names)
    padded = (map(format, row, map("{}{}".format, sides, widths)) for row in cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


# ---- pictures ----------------------------------------------------------------------------


def pyplot() -> ModuleType:
    """The plotting library, without a display; it costs a second, so it is imported when used."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt


def style(index: int, *, learns: bool = True) -> dict[str, Any]:
    """How the curve of the run with this number looks; dashed and open where learning is off."""
    colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
    look = {"color": colour, "marker": mark, "ms": 4, "lw": 1.6}
    return look | ({"ls": "-", "mfc": colour} if learns else {"ls": "--", "mfc": "white"})


def path_colour(path: str) -> str:
    """Of a path of the ladder; its variants, such as P1-5pct, share it."""
    return PATH_COLOURS.get(path.split("-")[0], "#56B4E9")


def path_styles(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour by path, dashes by variant."""
    looks: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(paths):
        colour = path_colour(path)
        variants = sum(look["color"] == colour for look in looks.values())
        looks[path] = {"color": colour, "ls": _DASHES[variants % len(_DASHES)]}
    return looks


def grid(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes [rows, columns]."""
    return pyplot().subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )


def panels(widths: Sequence[float], height: float = 4.2, **options: Any) -> tuple[Any, Any]:
    """A figure with a row of panels of these widths in inches, and its axes [panels]."""
    size = (sum(widths) + 1, height)
    figure, axes = grid(1, len(widths), size, width_ratios=widths, **options)
    return figure, axes[0]


def subtitle(axes: Any, text: str) -> None:
    """What a panel shows, in small grey letters above it."""
    axes.set_title(text, fontsize=8, loc="left", color="0.35")


def tidy(axes: Any, grid: str = "y") -> None:
    """A quiet frame and grid."""
    axes.grid(axis=grid, color="0.92")
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


def legend_below(figure: Any, axes: Any, columns: int = 4) -> None:
    """One legend for all panels, that of `axes`, in so many columns at most."""
    handles, labels = axes.get_legend_handles_labels()
    look: dict[str, Any] = {"ncols": min(columns, len(labels)), "frameon": False, "fontsize": 8}
    figure.legend(handles, labels, loc="outside lower center", **look)


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
        look: dict[str, Any] = {"color": colour, "fontsize": size, "va": "center"}
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(text, (1.0, y), xytext=(5, 0), annotation_clip=False, **place, **look)


def leave_room(figure: Any, texts: Sequence[str], size: float = 8) -> None:
    """Keep a margin on the right for the names of `label_ends`, and lay the figure out."""
    inches = (0.6 * size * max(map(len, texts)) + 6) / 72
    figure.get_layout_engine().set(rect=(0, 0, 1 - inches / figure.get_figwidth(), 1))
    figure.canvas.draw()


def name_points(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """A name beside each point (x, y, name, colour), clear of other names and points if it can be.

    Call it when the axis' limits are final and the figure was drawn.
    """
    scale = axes.figure.dpi / 72
    pixels = [axes.transData.transform(point[:2]) for point in points]
    taken = [(x, y, 5 * scale, 5 * scale) for x, y in pixels]  # centres and half sizes
    for (px, py), (x, y, text, colour) in zip(pixels, points, strict=True):
        half, aside = (3.2 * len(text) * scale, 6 * scale), 14 + 1.4 * len(text)
        offsets = [(side * aside, 9 * up) for up in (1, -1, 2, -2, 3, -3) for side in (1, -1)]

        def is_free(offset: tuple[float, float], px=px, py=py, half=half) -> bool:
            return not any(
                abs(px + offset[0] * scale - ox) < half[0] + ow
                and abs(py + offset[1] * scale - oy) < half[1] + oh
                for ox, oy, ow, oh in taken
            )

        best = next(filter(is_free, offsets), offsets[0])
        taken.append((px + best[0] * scale, py + best[1] * scale, *half))
        look: dict[str, Any] = {"color": colour, "fontsize": 9, "fontweight": "bold"}
        align: dict[str, Any] = {"ha": "center", "va": "center"}
        axes.annotate(text, (x, y), xytext=best, textcoords="offset points", **align, **look)


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
