"""Held-out loss by token position, learning while reading or not: numbers, table, picture.

Of one model at the end of its training; `loss_by_context` compares several, at several lengths.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.table import Table

from ttt import figures
from ttt.core.batch import Batch
from ttt.evaluation.result import Key, Row, estimate, log_edges, printed
from ttt.intervals import bootstrap
from ttt.model.loop import Scores

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
        on_progress: Callable[[int, float], None] = lambda batch, loss: None,
    ) -> "PositionLoss":
        """Score all batches, at least one.

        evaluator: (model, batch, learn=…) -> the scores of a batch.
        on_progress: called with the batches done and the mean loss so far.
        """
        nll = count = np.zeros(())
        edges = np.zeros(1, int)
        losses: list[float] = []
        binned: list[list[np.ndarray]] = [[], []]
        for done, batch in enumerate(batches, start=1):
            scores = evaluator(model, batch, learn=learn)
            mask = scores.loss_mask.astype(np.float64)
            masked = scores.token_nll * mask
            nll, count = nll + np.sum(masked, axis=0), count + np.sum(mask, axis=0)
            edges = log_edges(mask.shape[1])
            for bins, part in zip(binned, (masked, mask), strict=True):
                bins.append(np.add.reduceat(part, edges[:-1], axis=1))
            losses += scores.loss.tolist()
            on_progress(done, float(np.mean(losses)))
        return cls(nll, count, np.asarray(losses), edges, *map(np.concatenate, binned))

    @property
    def loss(self) -> float:
        """Mean over sequences, in nats per token: the loss of training."""
        return float(np.mean(self.sequence_loss))

    @property
    def token_loss(self) -> float:
        """Mean over all tokens that count, in nats: the same whatever the chunks."""
        return float(np.sum(self.nll) / max(np.sum(self.count), 1))

    def rows(
        self,
        like: Row,
        *,
        resamples: int,
        seed: int,
        keys: Mapping[str, Key],
        reference: "PositionLoss | None" = None,
    ) -> list[Row]:
        """`loss` over all, then `loss_at` of each logarithmic bin; `like` tells whose they are.

        With a reference, which scored the same sequences: `difference` and `difference_at`, the
        loss here less the one there. Intervals are those of the bootstrap over sequences. Those of
        differences, which are drawn in pairs, are far narrower: what all texts vary by falls out.
        """
        measure, losses, nll = "loss", self.sequence_loss, self.bin_nll
        if reference is not None:
            measure = "difference"
            losses, nll = losses - reference.sequence_loss, nll - reference.bin_nll
        whole = bootstrap(losses, np.ones_like(losses), resamples=resamples, seed=seed)
        bins = bootstrap(nll, self.bin_count, resamples=resamples, seed=seed)
        stretches: list[tuple[str, int, int, Any]] = [(measure, 0, len(self.nll), whole)]
        edges = self.edges.tolist()
        places = zip(edges[:-1], edges[1:], self.bin_count.T, *bins, strict=True)
        for start, stop, counts, *interval in places:
            if np.any(counts):
                stretches.append((f"{measure}_at", start, stop, interval))
        return [
            replace(
                like,
                measure=name,
                keys={**keys, "position_from": start, "position_to": stop},
                **estimate(interval),
                n=len(losses),
                unit="nats per token",
            )
            for name, start, stop, interval in stretches
        ]

    def in_bins(self, bins: int) -> Float[np.ndarray, " bins"]:
        """Mean over all counted tokens of each of `bins` equal stretches of the sequence."""
        starts = np.linspace(0, len(self.nll), bins + 1).astype(int)[:-1]
        nll, count = (np.add.reduceat(x, starts) for x in (self.nll, self.count))
        return nll / np.maximum(count, 1)


@dataclass(frozen=True)
class LearningComparison:
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
        parts = self._parts().items()
        return {f"{name}_{key}": value for name, part in parts for key, value in vars(part).items()}

    def rows(self, like: Row, *, resamples: int, seed: int) -> list[Row]:
        """Both in the schema of all suites, told apart by the key `learning`."""
        rows = []
        for name, part in self._parts().items():
            keys = {"learning": self.still is not None and name == "learning"}
            rows += part.rows(like, resamples=resamples, seed=seed, keys=keys)
        return rows

    def summary(self, bins: int = 8) -> dict[str, object]:
        """The figures that a report quotes."""
        sequences, length = len(self.learning.sequence_loss), len(self.learning.nll)
        facts: dict[str, object] = {"sequences": sequences, "seq_length": length}
        facts["window"] = self.window
        for name, part in self._parts().items():
            ending = "_without_learning" if name == "still" else ""
            facts[f"loss{ending}"] = part.loss
            facts[f"token_loss{ending}"] = part.token_loss
            facts[f"loss_by_bin{ending}"] = part.in_bins(bins).tolist()
        if self.still is not None:
            facts["gain_last_half"] = float(self.gains(2)[1])
        return facts

    def table(self, bins: int = 8) -> Table:
        """The loss by position, for a terminal."""
        size = len(self.learning.nll) // bins
        spans = [f"{i * size} - {(i + 1) * size - 1}" for i in range(bins)]
        values = {
            "loss" if self.still is None else LABELS[name]: part.in_bins(bins)
            for name, part in self._parts().items()
        }
        if self.still is not None:
            values["gain"] = self.gains(bins)
        columns = {name: [f"{x:.3f}" for x in column] for name, column in values.items()}
        sequences = len(self.learning.sequence_loss)
        title = f"held-out loss by token position, {sequences} sequences (nats per token)"
        return printed(title, {"position": spans, **columns}, names=0)

    def draw(self, path: Path, *, title: str, points: int) -> None:
        """Save the picture; each curve is the mean over each of `points` stretches."""
        length = len(self.learning.nll)
        middles = (np.arange(points) + 0.5) * length / points
        figure, [[axes]] = figures.grid(1, 1, (7, 4.2))
        for number, (name, part) in enumerate(self._parts().items()):
            axes.plot(middles, part.in_bins(points), label=LABELS[name], **figures.style(number))
        if self.still is not None:
            below, above = self.learning.in_bins(points), self.still.in_bins(points)
            axes.fill_between(middles, below, above, color=figures.COLOURS[0], alpha=0.12, lw=0)
            title += f": learning lowers the last half by {self.gains(2)[1]:.3f} nats"
            axes.legend(frameon=False)
        if self.window < length:
            figures.mark(axes, self.window, "attention window")
        figures.tidy(axes)
        axes.set_xlabel("token position")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.set_xlim(0, length)
        figures.finish(figure, path, title)

    def _parts(self) -> dict[str, PositionLoss]:
        parts = {"learning": self.learning, "still": self.still}
        return {name: part for name, part in parts.items() if part is not None}
