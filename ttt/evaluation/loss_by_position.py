"""Held-out loss by token position, learning while reading or not: numbers, table, picture.

Of one model at the end of its training; `loss_by_context` compares several, at several lengths.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.table import Table

from ttt.core.batch import Batch
from ttt.evaluation.bins import log_edges
from ttt.evaluation.result import Key, Row
from ttt.intervals import Interval, bootstrap
from ttt.model.loop import Scores

# Of a CVD-safe palette (Okabe and Ito); the same curve has the same colour in every picture.
COLOURS = {"learning": "#0072B2", "still": "#D55E00"}
LABELS = {"learning": "learning while reading", "still": "not learning (inner rate 0)"}


@dataclass(frozen=True)
class PositionLoss:
    """Loss by position, summed over sequences, and by sequence in bins."""

    nll: Float[np.ndarray, " T"]
    """Sum of −log p over the sequences whose target counts there, in nats."""
    count: Float[np.ndarray, " T"]
    """How many those are."""
    sequence_loss: Float[np.ndarray, " N"]
    """Loss of each sequence as in training: the mean over its chunks."""
    edges: Int[np.ndarray, " edges"]
    """Of logarithmic bins: see `log_edges`."""
    bin_nll: Float[np.ndarray, "N bins"]
    """Sum of −log p in each bin of each sequence."""
    bin_count: Float[np.ndarray, "N bins"]

    @classmethod
    def measure(
        cls,
        evaluator: Callable[..., Scores],
        model: Any,
        batches: Iterable[Batch],
        *,
        learn: bool,
        told: Callable[[int, float], None] = lambda batch, loss: None,
    ) -> "PositionLoss":
        """Score all batches; `told(batches done, mean loss so far)` hears of the progress.

        evaluator: (model, batch, learn=…) -> the scores of a batch.
        """
        nll = count = np.zeros(())
        edges = np.zeros(1, int)
        losses: list[float] = []
        binned: list[list[np.ndarray]] = [[], []]
        for done, batch in enumerate(batches, start=1):
            scores = evaluator(model, batch, learn=learn)
            mask = scores.loss_mask.astype(np.float64)
            parts = scores.token_nll * mask, mask
            nll, count = (
                x + np.sum(part, axis=0) for x, part in zip((nll, count), parts, strict=True)
            )
            edges = log_edges(mask.shape[1])
            for bins, part in zip(binned, parts, strict=True):
                bins.append(np.add.reduceat(part, edges[:-1], axis=1))
            losses += scores.loss.tolist()
            told(done, float(np.mean(losses)))
        return cls(nll, count, np.asarray(losses), edges, *map(np.concatenate, binned))

    @property
    def loss(self) -> float:
        """Mean over sequences, in nats per token: the loss of training."""
        return float(np.mean(self.sequence_loss))

    @property
    def token_loss(self) -> float:
        """Mean over all tokens that count, in nats: the same whatever the chunks."""
        return float(np.sum(self.nll) / max(np.sum(self.count), 1))

    def rows(self, like: Row, *, resamples: int, seed: int, keys: Mapping[str, Key]) -> list[Row]:
        """`loss` over all, then `loss_at` of each logarithmic bin; `like` tells whose they are.

        Intervals are those of the bootstrap over sequences.
        """
        draws = {"resamples": resamples, "seed": seed}
        whole = bootstrap(self.sequence_loss, np.ones_like(self.sequence_loss), **draws)
        bins = bootstrap(self.bin_nll, self.bin_count, **draws)
        return self._rows(replace(like, measure="loss"), whole, bins, keys)

    def rows_against(
        self,
        reference: "PositionLoss",
        like: Row,
        *,
        resamples: int,
        seed: int,
        keys: Mapping[str, Key],
    ) -> list[Row]:
        """`difference` and `difference_at`: the loss here less that of `reference`.

        Both scored the same sequences, which are drawn in pairs: what all texts vary by falls out,
        so these intervals are far narrower than those of either loss.
        """
        draws = {"resamples": resamples, "seed": seed}
        less = self.sequence_loss - reference.sequence_loss
        whole = bootstrap(less, np.ones_like(less), **draws)
        bins = bootstrap(self.bin_nll - reference.bin_nll, self.bin_count, **draws)
        return self._rows(replace(like, measure="difference"), whole, bins, keys)

    def _rows(
        self, like: Row, whole: Interval, bins: Interval, keys: Mapping[str, Key]
    ) -> list[Row]:
        def row(measure: str, at: Interval, start: int, stop: int) -> Row:
            place = {"position_from": start, "position_to": stop}
            value, low, high = (float(x) for x in at)
            return replace(
                like,
                measure=measure,
                keys={**keys, **place},
                value=value,
                low=low,
                high=high,
                n=len(self.sequence_loss),
                unit="nats per token",
            )

        found = [row(like.measure, whole, 0, len(self.nll))]
        for i, (start, stop) in enumerate(pairwise(self.edges.tolist())):
            if np.any(self.bin_count[:, i]):
                at = Interval(*(x[i] for x in bins))
                found.append(row(f"{like.measure}_at", at, start, stop))
        return found

    def in_bins(self, bins: int) -> Float[np.ndarray, " bins"]:
        """Mean over all counted tokens of each of `bins` equal stretches of the sequence."""
        nll, count = (np.add.reduceat(x, self._edges(bins)[:-1]) for x in (self.nll, self.count))
        return nll / np.maximum(count, 1)

    def _edges(self, bins: int) -> Int[np.ndarray, " edges"]:
        return np.linspace(0, len(self.nll), bins + 1).astype(int)


@dataclass(frozen=True)
class Comparison:
    """The same sequences and weights, learning and not; `still` is None where nothing learns."""

    learning: PositionLoss
    still: PositionLoss | None
    window: int
    """Tokens that attention sees at once."""

    def gains(self, bins: int) -> Float[np.ndarray, " bins"]:
        """By how much learning lowers the loss in each bin."""
        still = self.still or self.learning
        return still.in_bins(bins) - self.learning.in_bins(bins)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, for the run record: `<learning|still>_<field>`."""
        return {
            f"{name}_{field}": value
            for name, part in self._parts().items()
            for field, value in vars(part).items()
        }

    def rows(self, like: Row, *, resamples: int, seed: int) -> list[Row]:
        """Both in the schema of all suites, told apart by the key `learning`."""
        return [
            row
            for name, part in self._parts().items()
            for row in part.rows(
                like,
                resamples=resamples,
                seed=seed,
                keys={"learning": self.still is not None and name == "learning"},
            )
        ]

    def summary(self, bins: int = 8) -> dict[str, object]:
        """The figures that a report quotes."""
        figures: dict[str, object] = {
            "sequences": len(self.learning.sequence_loss),
            "seq_length": len(self.learning.nll),
            "window": self.window,
            "loss": self.learning.loss,
            "token_loss": self.learning.token_loss,
            "loss_by_bin": self.learning.in_bins(bins).tolist(),
        }
        if self.still is not None:
            figures["loss_without_learning"] = self.still.loss
            figures["token_loss_without_learning"] = self.still.token_loss
            figures["loss_by_bin_without_learning"] = self.still.in_bins(bins).tolist()
            figures["gain_last_half"] = float(np.mean(self.gains(2)[1]))
        return figures

    def table(self, bins: int = 8) -> Table:
        """The loss by position, for a terminal."""
        size = len(self.learning.nll) // bins
        sequences = len(self.learning.sequence_loss)
        table = Table(
            title=f"held-out loss by token position, {sequences} sequences (nats per token)"
        )
        table.add_column("position", justify="right")
        for name in self._parts():
            table.add_column(LABELS[name] if self.still is not None else "loss", justify="right")
        rows = [part.in_bins(bins) for part in self._parts().values()]
        if self.still is not None:
            table.add_column("gain", justify="right")
            rows.append(self.gains(bins))
        for i, values in enumerate(zip(*rows, strict=True)):
            span = f"{i * size} - {(i + 1) * size - 1}"
            table.add_row(span, *(f"{value:.3f}" for value in values))
        return table

    def draw(self, path: Path, *, title: str, points: int) -> None:
        """Save the picture; each curve is the mean over each of `points` stretches."""
        import matplotlib  # costs a second, and most imports of this module do without

        matplotlib.use("agg")
        from matplotlib import pyplot as plt

        length = len(self.learning.nll)
        middles = (np.arange(points) + 0.5) * length / points
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        for name, part in self._parts().items():
            label = LABELS[name] if self.still is not None else None
            axes.plot(middles, part.in_bins(points), "o-", ms=4, color=COLOURS[name], label=label)
        if self.still is not None:
            below, above = self.learning.in_bins(points), self.still.in_bins(points)
            axes.fill_between(middles, below, above, color=COLOURS["learning"], alpha=0.12, lw=0)
            gain = self.gains(2)[1]
            axes.set_title(
                f"learning lowers the last half by {gain:.3f} nats", fontsize=9, loc="right"
            )
            axes.legend(frameon=False)
        if self.window < length:
            axes.axvline(self.window, color="0.6", lw=1, ls="--")
            axes.annotate(
                " attention window",
                (self.window, 0.02),
                xycoords=("data", "axes fraction"),
                color="0.4",
                fontsize=8,
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("token position")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.set_xlim(0, length)
        axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)

    def _parts(self) -> dict[str, PositionLoss]:
        parts = {"learning": self.learning, "still": self.still}
        return {name: part for name, part in parts.items() if part is not None}
