"""The study's report: from its records to tables and pictures (script 15). No JAX.

Names as in configs/research/adaptation_study.yaml. Differences are of the same tokens of the same
documents, their intervals a bootstrap over documents.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ttt import figures
from ttt.errors import UserError
from ttt.figures import NONE, count, markdown_table
from ttt.infra.plan_manifest import PlanManifest
from ttt.infra.record import RunRecord, write_whole
from ttt.intervals import Interval, bootstrap
from ttt.report import frame

KINDS = ("prose", "code")
RESAMPLES = 4000
FULL, EQUAL, LEARNER = "fa", "prime", "e2e"
"""c, d′ and e: their losses beyond the window make the headline."""
STILL = "e2e, not learning"
LABELS = {
    "parent": "parent, full attention, untrained (a)",
    "window": "parent, cut to the window, untrained (b)",
    FULL: "full attention (c)",
    "swa": "sliding window (d)",
    EQUAL: "sliding window, prime MLPs as ordinary layers (d′)",
    LEARNER: "TTT-E2E (e)",
    STILL: "TTT-E2E, read without learning (f)",
}


class Losses:
    """Sums of −log p of every document and bin of positions, by reader."""

    def __init__(self, folder: Path):
        """folder: of an evaluation by `loss_by_context`, at one context."""
        path = folder / "eval" / "loss_by_context-documents.csv"
        if not path.is_file():
            raise UserError(f"{path} is missing: evaluate first (--only evaluations)")
        table = pd.read_csv(path)
        learns = table.groupby("run")["learning"].transform("nunique") > 1
        off = learns & ~table["learning"]
        table["reader"] = table["run"].where(~off, table["run"] + ", not learning")
        self._table = table
        self.context = int(table["context"].max())
        self.readers = [name for name in LABELS if name in set(table["reader"])]
        bins = (
            table[["position_from", "position_to"]].drop_duplicates().sort_values("position_from")
        )
        self.bins = [(int(a), int(b)) for a, b in bins.itertuples(index=False)]
        self.documents = table["document"].nunique()

    def sums(self, reader: str, first: int, last: int) -> pd.DataFrame:
        """Columns nll and count of each document at positions [first, last), borders of bins."""
        t = self._table
        own = t[(t.reader == reader) & (t.position_from >= first) & (t.position_to <= last)]
        return own.groupby("document")[["nll", "count"]].sum()

    def loss(self, reader: str, first: int, last: int) -> Interval:
        """Mean −log p there."""
        own = self.sums(reader, first, last)
        return bootstrap(own["nll"].to_numpy(), own["count"].to_numpy(), resamples=RESAMPLES)

    def difference(self, reader: str, other: str, first: int, last: int) -> Interval:
        """The reader's loss less the other's."""
        own, its = self.sums(reader, first, last), self.sums(other, first, last)
        nll = (own["nll"] - its["nll"]).to_numpy()
        return bootstrap(nll, own["count"].to_numpy(), resamples=RESAMPLES)

    def recovered(self, first: int, last: int) -> Interval | None:
        """(d′ − e) / (d′ − c); None where the interval of d′ − c does not lie above 0."""
        if not self.difference(EQUAL, FULL, first, last).low > 0:
            return None
        equal, full, learner = (
            self.sums(name, first, last)["nll"].to_numpy() for name in (EQUAL, FULL, LEARNER)
        )
        return bootstrap(equal - learner, equal - full, resamples=RESAMPLES)


def shown(interval: Interval | None, form: str = "+.4f") -> str:
    """`value [low, high]`."""
    if interval is None:
        return NONE
    value, low, high = (format(float(x), form) for x in interval)
    return f"{value} [{low}, {high}]"


def write(experiments: Path, folder: str) -> Path:
    """`report/report.md` with its pictures in the study's folder; returns the page's path."""
    root = experiments / folder
    window = _window(root)
    out = root / "report"
    parts = [f"# Study `{folder}`", _INTRODUCTION.format(window=window)]
    known = {kind: Losses(root / f"evaluation-{kind}") for kind in KINDS}
    for kind, losses in known.items():
        parts += [
            f"## {kind.capitalize()}: {losses.documents} held-out documents",
            _headline(losses, window),
        ]
        parts += [_losses(losses, window), _bins(losses, window)]
    parts.append(f"![loss by position]({_draw(known, window, out / 'loss_by_position.png').name})")
    long = {
        kind: Losses(root / f"evaluation-long_{kind}")
        for kind in KINDS
        if (root / f"evaluation-long_{kind}").is_dir()
    }
    if long:
        parts += ["## Beyond the trained length", *(_long(kind, own) for kind, own in long.items())]
        parts.append(f"![long]({_draw(long, window, out / 'long.png').name})")
    for title, section in (
        ("Needles", _needles(root)),
        ("Writing on", _decoding(root)),
        ("Cost", _cost(root)),
        ("Trials of rates", _trials(experiments / f"{folder}_trials")),
    ):
        if section:
            parts += [f"## {title}", section]
    write_whole(out / "report.md", "\n\n".join(parts) + "\n")
    return out / "report.md"


_INTRODUCTION = (
    "Losses in nats per token on documents that no arm was trained on, each read from its start. "
    "In brackets 95 % intervals, a bootstrap over documents; differences are of the same tokens. "
    "Beyond the window: positions from {window} on."
)


def _window(root: Path) -> int:
    return int(RunRecord(root / LEARNER).settings()["model"]["sliding_window_size"])


def _headline(losses: Losses, window: int) -> str:
    span = (window, losses.context)
    share = losses.recovered(*span)
    lines = [
        f"- Full attention's advantage beyond the window, d′ − c: "
        f"{shown(losses.difference(EQUAL, FULL, *span))}",
        f"- What learning gives there, d′ − e: {shown(losses.difference(EQUAL, LEARNER, *span))}",
        f"- Share of the advantage that learning recovers: {shown(share, '.1%')}"
        + ("" if share else ", since the advantage's own interval does not lie above 0"),
        f"- The same weights without learning, f − e: "
        f"{shown(losses.difference(STILL, LEARNER, *span))}",
    ]
    return "\n".join(lines)


def _losses(losses: Losses, window: int) -> str:
    spans = {
        "all": (0, losses.context),
        "in the window": (0, window),
        "beyond": (window, losses.context),
    }
    rows = []
    for reader in losses.readers:
        cells = [f"{float(losses.loss(reader, *span).value):.4f}" for span in spans.values()]
        other = "" if reader == EQUAL else shown(losses.difference(reader, EQUAL, *spans["beyond"]))
        rows.append([LABELS[reader], *cells, other])
    return markdown_table(["arm", *spans, "beyond, less d′"], rows, 1)


def _bins(losses: Losses, window: int) -> str:
    """Every bin beyond the window."""
    rows = []
    for first, last in losses.bins:
        if first >= window:
            pairs = [(FULL, EQUAL), (LEARNER, EQUAL), (LEARNER, STILL)]
            cells = [shown(losses.difference(a, b, first, last)) for a, b in pairs]
            rows.append([f"{first:,} – {last - 1:,}", *cells])
    return markdown_table(["positions", "c − d′", "e − d′", "e − f"], rows, 1)


def _long(kind: str, losses: Losses) -> str:
    spans = [(2**k, 2 ** (k + 1)) for k in range(9, 20) if 2 ** (k + 1) <= losses.context]
    rows = [
        [LABELS[reader], *(f"{float(losses.loss(reader, *s).value):.4f}" for s in spans)]
        for reader in losses.readers
    ]
    header = ["arm", *(f"{first:,} – {last - 1:,}" for first, last in spans)]
    return (
        f"{kind.capitalize()}, {losses.documents} documents:\n\n{markdown_table(header, rows, 1)}"
    )


def _draw(known: dict[str, Losses], window: int, path: Path) -> Path:
    """Loss by position above, difference from d′ below, a column for each kind of text."""
    figure, panels = figures.grid(2, len(known), (1.4 + 4 * len(known), 6.6), sharex="col")
    for column, (kind, losses) in enumerate(known.items()):
        above, below = panels[0][column], panels[1][column]
        middle = [float(np.sqrt(max(a, 8) * b)) for a, b in losses.bins]
        for number, reader in enumerate(losses.readers):
            look = figures.style(number % 6, learns=reader != STILL)
            look["color"] = figures.COLOURS[list(LABELS).index(reader) % 7]
            values = [float(losses.loss(reader, *span).value) for span in losses.bins]
            above.plot(middle, values, label=LABELS[reader], **look)
            if reader in ("parent", "window") or reader == EQUAL:
                continue
            found = [losses.difference(reader, EQUAL, *span) for span in losses.bins]
            below.plot(middle, [float(x.value) for x in found], **look)
            low, high = ([float(getattr(x, side)) for x in found] for side in ("low", "high"))
            below.fill_between(middle, low, high, color=look["color"], alpha=0.12, lw=0)
        below.axhline(0, color="0.4", lw=1)
        above.set_title(f"{kind}, {losses.documents} documents", fontsize=9, loc="left")
        for axes in (above, below):
            figures.log_tokens(
                axes, [n for n in (16, 64, 256, 1024, 4096, 16384) if n <= losses.context]
            )
            figures.mark(axes, window, "attention window")
            figures.tidy(axes)
        below.set_xlabel("token position")
    panels[0][0].set_ylabel("held-out loss (nats per token)")
    panels[1][0].set_ylabel("difference from d′\n(nats per token, 95 % band)")
    figures.legend_below(figure, panels[0][0], columns=2)
    figures.finish(figure, path, "SmolLM2-135M that learns while it reads, and its rivals")
    return path


# ---- the rest ------------------------------------------------------------------------------


def _rows(root: Path, name: str, suite: str) -> pd.DataFrame:
    path = root / f"evaluation-{name}" / "eval" / f"{suite}.json"
    return pd.DataFrame(json.loads(path.read_bytes())["rows"]) if path.is_file() else pd.DataFrame()


def _readers(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for reader in LABELS:
        own = table[table.run == (LEARNER if reader == STILL else reader)]
        if reader in (LEARNER, STILL):  # of the others, `learning` says nothing
            own = own[own.learning == (reader == LEARNER)]
        if len(own):
            yield reader, own


def _needles(root: Path) -> str:
    table = _rows(root, "needles", "needles")
    if table.empty:
        return ""
    table = table[(table.measure == "accuracy") & (table.depth == "all")]
    cells = [(n, where) for n in sorted(set(table.context)) for where in ("inside", "beyond")]
    rows = []
    for reader, own in _readers(table):
        texts = []
        for context, where in cells:
            here = own[(own.context == context) & (own.reach == where)]
            n = int(here.n.sum())
            hits = float((here.value * here.n).sum())
            texts.append(f"{hits:.0f} of {n}" if n else NONE)
        rows.append([LABELS[reader], *texts])
    header = ["arm", *(f"{n:,}, {where} the window" for n, where in cells)]
    return f"Right answers over both tasks.\n\n{markdown_table(header, rows, 1)}"


def _decoding(root: Path) -> str:
    table = _rows(root, "decoding", "long_decoding")
    if table.empty:
        return ""
    own = table[table.measure == "log_loss"]
    keys = ["run", "learning", "repetition_penalty", "text", "half"]
    rows = [
        [*(str(row[key]) for key in keys), f"{row['value']:.3f}"] for row in own.to_dict("records")
    ]
    return "Loss under the parent's full attention.\n\n" + markdown_table([*keys, "loss"], rows, 5)


def _cost(root: Path) -> str:
    table = frame.read(root, PlanManifest.read(root))
    rows = []
    for run in frame.rows_of(table):
        if run.name in LABELS and run.steps and run.steps > 1:
            place = root / f"benchmark-{run.name}" / "benchmark.json"
            reading = NONE
            if place.is_file():
                cells = json.loads(place.read_bytes())["results"]
                reading = f"{cells[0]['tokens_per_second']:.0f}"
            rows.append(
                [
                    LABELS[run.name],
                    count(run.parameters),
                    f"{run.tokens:,}",
                    f"{run.step_seconds:.1f}",
                    f"{run.tokens_per_second:.0f}",
                    reading,
                    f"{run.start_loss:.4f} → {run.validation_loss:.4f}",
                    f"{run.count_model_loss:.3f}",
                ]
            )
    header = ["arm", "parameters", "trained tokens", "s per step", "training tokens/s"]
    header += ["reading tokens/s", "development loss before → after", "count of pairs"]
    return markdown_table(header, rows, 1)


def _trials(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    rows: list[Sequence[str]] = []
    for run in frame.rows_of(frame.read(folder, None)):
        record: Any = RunRecord(folder / run.name).settings()["training"]
        inner = record["optimizer_inner"]["lr"] if record["train_mode"] == "meta" else None
        rates = [f"{record['optimizer_outer']['lr']:g}", NONE if inner is None else f"{inner:g}"]
        arm = run.name.split("-")[1]
        rows.append(
            [arm, *rates, f"{run.steps}", f"{run.tokens:,}", figures.nats(run.validation_loss)]
        )
    header = ["arm", "outer rate", "inner rate", "steps", "tokens", "development loss"]
    return markdown_table(header, rows, 1)
