"""Held-out loss by token position, learning while reading or not: numbers, table, picture.

Of one model at the end of its training; `loss_by_context` compares several, at several lengths.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.table import Table

from ttt import figures
from ttt.dataloader.lm_dataset import HeldOut
from ttt.evaluation.result import Key, Row, bits_per_byte, estimate, log_edges, printed
from ttt.intervals import RESAMPLES, Interval, bootstrap
from ttt.model.loop import Scores

LABELS = {"learning": "learning while reading", "still": "not learning (inner rate 0)"}


@dataclass(frozen=True)
class PositionLoss:
    """Loss by position, summed over sequences, and by document in bins of positions."""

    nll: Float[np.ndarray, " T"]
    """Sum of −log p over the sequences whose target counts there, in nats."""
    count: Float[np.ndarray, " T"]
    """How many those are."""
    sequence_loss: Float[np.ndarray, " N"]
    """The training objective of each sequence: the mean over its chunks of their means."""
    edges: Int[np.ndarray, " edges"]
    """Of logarithmic bins: see `log_edges`."""
    documents: Int[np.ndarray, " D"]
    """Names of the documents that the tokens are of, as `HeldOut.documents` gives them."""
    document_nll: Float[np.ndarray, "D bins"]
    """Sum of −log p over each document's tokens in each bin."""
    document_count: Float[np.ndarray, "D bins"]

    @classmethod
    def measure(
        cls,
        evaluator: Callable[..., Scores],
        model: Any,
        text: HeldOut,
        *,
        batch_size: int,
        learn: bool,
        most: int = 0,
        on_progress: Callable[[int, float], None] = lambda batch, loss: None,
    ) -> "PositionLoss":
        """Score a text, or its first `most` batches.

        evaluator: (model, batch, learn=…) -> the scores of a batch.
        on_progress: called with the batches done and the mean loss so far.
        """
        length = text.source.seq_length
        edges = log_edges(length)
        nll, count, done = np.zeros(length), np.zeros(length), 0
        losses: list[float] = []
        parts: list[tuple[np.ndarray, ...]] = []
        for number, batch in enumerate(text.batches(batch_size, most=most), start=1):
            scores = evaluator(model, batch, learn=learn)
            mask = scores.loss_mask.astype(np.float64)
            masked = scores.token_nll * mask
            nll, count = nll + np.sum(masked, axis=0), count + np.sum(mask, axis=0)
            parts.append(_by_document(text.documents(done, batch), edges, masked, mask))
            losses += scores.loss.tolist()
            done += len(mask)
            on_progress(number, float(np.sum(nll) / max(np.sum(count), 1)))
        names, *sums = map(np.concatenate, zip(*parts, strict=True))
        documents, places = np.unique(names, return_inverse=True)
        merged = np.zeros((2, len(documents), len(edges) - 1))
        for whole, part in zip(merged, sums, strict=True):
            np.add.at(whole, places, part)
        counted = np.any(merged[1], axis=1)  # an empty document has no token to count
        by_document = (x[counted] for x in (documents, *merged))
        return cls(nll, count, np.asarray(losses), edges, *by_document)

    @property
    def loss(self) -> float:
        """Mean over all tokens that count, in nats: the same whatever the chunks."""
        return float(np.sum(self.nll) / max(np.sum(self.count), 1))

    @property
    def chunk_loss(self) -> float:
        """Mean over sequences and chunks, in nats per token: the training objective."""
        return float(np.mean(self.sequence_loss))

    def interval(self, reference: "PositionLoss | None" = None, **draws: int) -> Interval:
        """[1 + bins]: the loss over all, then in each bin; less a reference's on the same text.

        By bootstrap over documents (`ttt.intervals.bootstrap`, which takes `draws`). Intervals of
        differences are far narrower: what all texts vary by falls out.
        """
        nll = self.document_nll
        if reference is not None:
            nll = nll - reference.document_nll
        both = (
            np.concatenate([np.sum(x, axis=1, keepdims=True), x], axis=1)
            for x in (nll, self.document_count)
        )
        return bootstrap(*both, **draws)

    def same_text(self, other: "PositionLoss") -> bool:
        """Whether both scored the same tokens of the same documents."""
        return np.array_equal(self.documents, other.documents) and np.array_equal(
            self.document_count, other.document_count
        )

    def rows(
        self,
        like: Row,
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
        keys: Mapping[str, Key],
        bytes_per_token: float | None = None,
        reference: "PositionLoss | None" = None,
    ) -> list[Row]:
        """`loss` over all, then `loss_at` of each logarithmic bin; `like` tells whose they are.

        With bytes_per_token, `bits_per_byte` between them. With a reference, which scored the same
        text: `difference` and `difference_at`, the loss here less the one there.
        """
        measure = "loss" if reference is None else "difference"
        interval = self.interval(reference, resamples=resamples, seed=seed)
        edges = self.edges.tolist()
        spans = [(measure, 0, edges[-1])]
        spans += [(f"{measure}_at", *span) for span in pairwise(edges)]
        known = self.document_count > 0
        documents = [int(n) for n in (len(self.documents), *np.sum(known, axis=0))]
        rows = [
            replace(
                like,
                measure=name,
                keys={**keys, "position_from": start, "position_to": stop},
                **estimate(bounds),
                n=n,
                unit="nats per token",
            )
            for (name, start, stop), n, *bounds in zip(spans, documents, *interval, strict=True)
            if n
        ]
        if rows and bytes_per_token and reference is None:
            bits = estimate(bits_per_byte(bound[0], bytes_per_token) for bound in interval)
            text = {"measure": "bits_per_byte", "unit": "bits per byte"}
            rows.insert(1, replace(rows[0], **text, **bits))
        return rows

    def in_bins(self, bins: int) -> Float[np.ndarray, " bins"]:
        """Mean over all counted tokens of each of `bins` equal stretches of the sequence."""
        starts = np.linspace(0, len(self.nll), bins + 1).astype(int)[:-1]
        nll, count = (np.add.reduceat(x, starts) for x in (self.nll, self.count))
        return nll / np.maximum(count, 1)


def _by_document(
    documents: Int[np.ndarray, "B T"], edges: Int[np.ndarray, " edges"], *values: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Names of documents, and of each of `values` [B, T] the sums by document and bin."""
    bins = len(edges) - 1
    names, places = np.unique(documents, return_inverse=True)
    cells = places.reshape(documents.shape) * bins + np.repeat(np.arange(bins), np.diff(edges))
    size = len(names) * bins
    sums = (np.bincount(cells.ravel(), x.ravel(), size).reshape(-1, bins) for x in values)
    return names, *sums


@dataclass(frozen=True)
class LearningComparison:
    """The same sequences and weights, learning and not; `still` is None where nothing learns."""

    learning: PositionLoss
    still: PositionLoss | None
    window: int
    """Tokens that attention sees at once."""
    bytes_per_token: float | None = None
    """Of the text; None: not known."""

    def gains(self, bins: int) -> Float[np.ndarray, " bins"]:
        """By how much learning lowers the loss in each bin."""
        still = self.still or self.learning
        return still.in_bins(bins) - self.learning.in_bins(bins)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, for the run record: `<learning|still>_<field>`."""
        parts = self._parts().items()
        return {f"{name}_{key}": value for name, part in parts for key, value in vars(part).items()}

    def rows(self, like: Row, keys: Mapping[str, Key]) -> list[Row]:
        """Both in the schema of all suites, told apart by the key `learning`."""
        rows = []
        for name, part in self._parts().items():
            own = {**keys, "learning": self.still is not None and name == "learning"}
            rows += part.rows(like, keys=own, bytes_per_token=self.bytes_per_token)
        return rows

    def summary(self, bins: int = 8) -> dict[str, object]:
        """The figures that a report quotes."""
        sequences, length = len(self.learning.sequence_loss), len(self.learning.nll)
        facts: dict[str, object] = {"sequences": sequences, "seq_length": length}
        facts |= {"documents": len(self.learning.documents), "window": self.window}
        for name, part in self._parts().items():
            ending = "_without_learning" if name == "still" else ""
            facts[f"loss{ending}"] = part.loss
            if self.bytes_per_token:
                facts[f"bits_per_byte{ending}"] = bits_per_byte(part.loss, self.bytes_per_token)
            facts[f"chunk_loss{ending}"] = part.chunk_loss
            facts[f"loss_by_bin{ending}"] = part.in_bins(bins).tolist()
        if self.still is not None:
            facts["gain_last_half"] = float(self.gains(2)[1])
        return facts

    def table(self, split: str, bins: int = 8) -> Table:
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
        stretches, documents = len(self.learning.sequence_loss), len(self.learning.documents)
        lines = [f"{split}: {stretches} stretches, {documents} documents"]
        for name, part in self._parts().items():
            who = "" if self.still is None else f"{LABELS[name]}: "
            lines.append(f"{who}{part.loss:.3f} nats per token")
            if self.bytes_per_token:
                lines[-1] += f", {bits_per_byte(part.loss, self.bytes_per_token):.3f} bits per byte"
        title = "held-out loss by token position (nats per token)"
        return printed(title, {"position": spans, **columns}, names=0, caption="\n".join(lines))

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
