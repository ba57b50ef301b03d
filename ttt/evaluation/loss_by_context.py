"""Loss by token position and by context length: one held-out text, cut into several lengths."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from ttt import figures
from ttt.dataloader.lm_dataset import HeldOut
from ttt.errors import UserError
from ttt.evaluation.loss_by_position import PositionLoss
from ttt.evaluation.resources import LoadedModels, held_out
from ttt.evaluation.result import Key, Row, bits_per_byte, printed
from ttt.evaluation.suite import AbstractSuite, Job, OnProgress, Reader
from ttt.infra.mesh import Layout
from ttt.knobs import Config
from ttt.model.loop import Evaluator
from ttt.model.trained import TrainedModel

_KEY = "evaluation.loss_by_context"
DOCUMENTS = "loss_by_context-documents.csv"
"""Sum of −log p in nats and number of tokens by run, mode, context, document and positions."""
_STRETCHES = 256
"""Of the trained length, that are scored unless `tokens` says otherwise."""


class LossByContext(AbstractSuite):
    """Every run at every context, learning or not, with intervals over documents."""

    name = "loss_by_context"
    keys = ("learning", "position_from", "position_to")

    def __init__(self, config: Config, runs: Sequence[TrainedModel], models: LoadedModels):
        super().__init__(config, runs, models)
        settings = config.evaluation.loss_by_context
        self._contexts = settings.contexts or _default_contexts(config.training.seq_length, runs)
        self._evaluators: dict[tuple[str, int], Evaluator] = {}
        self._scored: dict[tuple[Reader, int], PositionLoss] = {}
        self._reference = _reference(self.readers)
        pairs = list(product(runs, self._contexts))
        for run, context in pairs:
            run.check_context(context, f"{_KEY}.contexts")
        longest = max(self._contexts)
        if 0 < settings.tokens < longest:
            raise UserError(
                f"{_KEY}.tokens={settings.tokens}: less than one sequence of {longest} tokens; "
                "raise it, or leave out that context"
            )
        source = held_out(config, runs[0], longest)
        if len(source) * longest < settings.tokens:
            raise UserError(
                f"{_KEY}.tokens={settings.tokens}: {source.name} holds {len(source)} sequences of "
                f"{longest} tokens; lower it to at most {len(source) * longest}, or add data"
            )
        tokens = settings.tokens or _STRETCHES * config.training.seq_length
        drawn = {"seed": config.evaluation.seed, "count": max(1, tokens // longest)}
        stretches = HeldOut.drawn(source, runs[0].config.bos_token_id, **drawn)
        self._texts = {
            (run.name, context): stretches.cut(
                held_out(config, run, context), run.config.bos_token_id
            )
            for run, context in pairs
        }

    def jobs(self, run: TrainedModel) -> Iterator[Job]:
        """One for each context and mode."""
        for context, reader in product(self._contexts, self.readers_of(run)):
            steps = -(-len(self._texts[run.name, context]) // self._batch_size(run, context))
            work = partial(self._measure, reader, context)
            yield Job(context, {"learning": reader.learning}, steps, work)

    def _measure(self, reader: Reader, context: int, on_progress: OnProgress) -> list[Row]:
        run, size = reader.run, self._batch_size(reader.run, context)
        if (run.name, context) not in self._evaluators:
            # One program serves both modes; those of other runs and lengths are let go.
            training = replace(run.training, eval_batch_size=size)
            evaluator = Evaluator(training, Layout(self.models.mesh))
            self._evaluators = {(run.name, context): evaluator}
        self._scored[reader, context] = PositionLoss.measure(
            self._evaluators[run.name, context],
            self.models.model(run, context),
            self._texts[run.name, context],
            batch_size=size,
            learn=reader.learning,
            on_progress=lambda done, loss: on_progress(done),
        )
        return self._rows(reader, context)

    def _rows(self, reader: Reader, context: int, reference: Reader | None = None) -> list[Row]:
        named: dict[str, Key] = {"split": self.config.evaluation.split}
        named |= {"reference": reference.label} if reference else {}
        return self._scored[reader, context].rows(
            self.row(reader.run, context, "loss"),
            resamples=self.config.evaluation.resamples,
            seed=self.config.evaluation.seed,
            keys={"learning": reader.learning, **named},
            bytes_per_token=self._bytes_per_token,
            reference=self._scored[reference, context] if reference else None,
        )

    def comparisons(self) -> list[Row]:
        """Each curve less the reference's, where both are there and of the same documents."""
        rows = []
        for reader, context in product(self.readers, self._contexts):
            own, other = (self._scored.get((r, context)) for r in (reader, self._reference))
            if own and other and own is not other and own.same_text(other):
                rows += self._rows(reader, context, self._reference)
        return rows

    def _batch_size(self, run: TrainedModel, context: int) -> int:
        return min(self.config.evaluation.batch_size, len(self._texts[run.name, context]))

    @property
    def _bytes_per_token(self) -> float | None:
        return next(iter(self._texts.values())).source.bytes_per_token

    def files(self) -> dict[str, str]:
        """Sums of every document, so that any comparison of runs can be made later."""
        parts = []
        for (reader, context), scored in self._scored.items():
            starts, stops = scored.edges[:-1], scored.edges[1:]
            documents, bins = scored.document_nll.shape
            parts.append(
                pd.DataFrame(
                    {
                        "run": reader.run.name,
                        "learning": reader.learning,
                        "context": context,
                        "document": np.repeat(scored.documents, bins),
                        "position_from": np.tile(starts, documents),
                        "position_to": np.tile(stops, documents),
                        "nll": scored.document_nll.ravel(),
                        "count": scored.document_count.ravel().astype(int),
                    }
                )
            )
        table = pd.concat(parts)[lambda t: t["count"] > 0] if parts else pd.DataFrame()
        return {DOCUMENTS: table.to_csv(index=False, lineterminator="\n")}

    def notes(self) -> dict[str, Any]:
        """Text and lengths."""
        evaluation, texts = self.config.evaluation, self._texts
        stretches = {c: len(texts[self.runs[0].name, c]) for c in self._contexts}
        return {
            "what": "mean -log p of held-out tokens; each scored by weights that have not seen it",
            "text": next(iter(texts.values())).source.name,
            "split": evaluation.split,
            "stretches": f"drawn with evaluation.seed={evaluation.seed}, the same for every run",
            "tokens": {str(c): count * c for c, count in stretches.items()},
            "bytes_per_token": self._bytes_per_token,
            "interval": f"95 %, percentile bootstrap over documents, {evaluation.resamples} draws",
            "trained_at": {run.name: run.training.seq_length for run in self.runs},
        }

    # ---- what people see ----

    def table(self, rows: pd.DataFrame) -> Table:
        """Loss by run and context; in brackets the difference from the reference's."""
        columns = {"run": [reader.label for reader in self.readers]}
        for context in self._contexts:
            own = rows[rows.context == context]
            columns[f"{context:,}"] = [_cell(reader.own(own)) for reader in self.readers]
        label, split = self._reference.label, self.config.evaluation.split
        title = f"held-out loss ({split}), nats per token (difference from {label} [95 %])"
        per = self._bytes_per_token
        caption = f"1 nat per token is {bits_per_byte(1.0, per):.4f} bits per byte" if per else ""
        return printed(title, columns, caption=caption)

    def draw(self, rows: pd.DataFrame, folder: Path, title: str) -> list[Path]:
        """`loss_by_position.png`, a column per context, and `loss_by_context.png` over contexts."""
        contexts = sorted(set(rows.context[rows.measure == "loss"]))
        if not contexts:
            return []
        paths = [folder / "loss_by_position.png"]
        self._draw_positions(rows, contexts, paths[0], title)
        if len(contexts) > 1:
            paths.append(folder / "loss_by_context.png")
            self._draw_contexts(rows, contexts, paths[1], title)
        return paths

    def _draw_positions(
        self, rows: pd.DataFrame, contexts: Sequence[int], path: Path, title: str
    ) -> None:
        measures = self._panels(rows)
        size = max(8.0, 1.4 + 3 * len(contexts)), 0.8 + 2.7 * len(measures)
        figure, panels = figures.grid(
            len(measures), len(contexts), size, sharey="row", sharex="col"
        )
        for axes_row, (measure, label) in zip(panels, measures.items(), strict=True):
            for axes, context in zip(axes_row, contexts, strict=True):
                here = rows[(rows.measure == f"{measure}_at") & (rows.context == context)]
                # The geometric middle of a bin; the first one starts at 0.
                middle = np.sqrt(here.position_from.clip(8) * here.position_to)
                self._plot(axes, middle, here, measure)
                ticks = [4**i for i in range(2, 20)]
                figures.log_tokens(axes, [n for n in ticks if n <= context])
                self.mark_windows(axes, 0, context)
            axes_row[0].set_ylabel(label)
        for axes, context in zip(panels[0], contexts, strict=True):
            axes.set_title(f"context {figures.short(context)}", fontsize=9, loc="left")
        for axes in panels[-1]:
            axes.set_xlabel("token position")
        figures.legend_below(figure, panels[0][0])
        figures.finish(figure, path, title)

    def _draw_contexts(
        self, rows: pd.DataFrame, contexts: Sequence[int], path: Path, title: str
    ) -> None:
        measures = self._panels(rows)
        figure, panels = figures.grid(1, len(measures), (1 + 4 * len(measures), 4))
        for axes, (measure, label) in zip(panels[0], measures.items(), strict=True):
            here = rows[rows.measure == measure]
            self._plot(axes, here.context, here, measure)
            figures.log_tokens(axes, contexts)
            for length in {run.training.seq_length for run in self.runs}:
                figures.mark(axes, length, "trained length")
            axes.set_xlabel("context (tokens)")
            axes.set_ylabel(label)
        figures.legend_below(figure, panels[0][0])
        figures.finish(figure, path, title)

    def _panels(self, rows: pd.DataFrame) -> dict[str, str]:
        """Measures to draw, with the labels of their axes."""
        labels = {"loss": "held-out loss (nats per token)"}
        if "difference" in set(rows.measure):
            label = self._reference.label
            labels["difference"] = f"difference from {label}\n(nats per token, 95 % band)"
        return labels

    def _plot(self, axes: Any, x: pd.Series, rows: pd.DataFrame, measure: str) -> None:
        self.plot(axes, x, rows, band=0.15 * (measure == "difference"))
        if measure == "difference":
            axes.axhline(0, color="0.4", lw=1)


def _reference(readers: Sequence[Reader]) -> Reader:
    """Who the others are held against.

    A run with full attention, else one that never learns, else one not learning, else the first.
    """
    wanted = (
        lambda reader: reader.run.one_chunk,
        lambda reader: not reader.run.learns,
        lambda reader: not reader.learning,
        lambda reader: True,
    )
    return next(reader for holds in wanted for reader in readers if holds(reader))


def _cell(rows: pd.DataFrame) -> str:
    """The loss, and its difference from the reference's, with its interval, where it is known."""
    known = rows.dropna(subset="value").set_index("measure")[["value", "low", "high"]]
    if "loss" not in known.index:
        return "failed"
    cell = f"{known.value['loss']:.3f}"
    if "difference" in known.index:
        value, low, high = known.loc["difference"].astype(float)
        bounds = "" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]"
        cell += f"\n({value:+.3f}{bounds})"
    return cell


def _default_contexts(length: int, runs: Sequence[TrainedModel]) -> tuple[int, ...]:
    """Half the trained length, it, and twice it, where these are whole chunks of every run."""
    wanted = (length // 2, length, 2 * length)
    return tuple(
        n for n in wanted if n == length or (n and all(run.whole_chunks(n) == n for run in runs))
    )
