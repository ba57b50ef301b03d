"""Loss by token position and by context length: one held-out text, cut into several lengths."""

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
from ttt.dataloader import lm_dataset
from ttt.errors import UserError
from ttt.evaluation.loss_by_position import PositionLoss
from ttt.evaluation.resources import LoadedModels, held_out
from ttt.evaluation.result import Key, Row, printed
from ttt.evaluation.suite import AbstractSuite, Job, OnProgress, Reader
from ttt.infra.mesh import Layout
from ttt.knobs import Config
from ttt.model.loop import Evaluator
from ttt.model.trained import TrainedModel

_KEY = "evaluation.loss_by_context"


class LossByContext(AbstractSuite):
    """Every run at every context, learning or not, with intervals over sequences."""

    name = "loss_by_context"
    keys = ("learning", "position_from", "position_to")

    def __init__(self, config: Config, runs: Sequence[TrainedModel], models: LoadedModels):
        super().__init__(config, runs, models)
        settings = config.evaluation.loss_by_context
        self._contexts = settings.contexts or _default_contexts(config.training.seq_length, runs)
        self._evaluators: dict[tuple[str, int], Evaluator] = {}
        self._scored: dict[tuple[Reader, int], PositionLoss] = {}
        full = [reader for reader in self.readers if reader.run.one_chunk]
        still = [reader for reader in self.readers_of(runs[0]) if not reader.learning]
        self._reference = next(iter([*full, *still]), None)
        pairs = list(product(runs, self._contexts))
        for run, context in pairs:
            run.check_context(context, f"{_KEY}.contexts")
        longest = max(self._contexts)
        if settings.tokens < longest:
            raise UserError(
                f"{_KEY}.tokens={settings.tokens}: less than one sequence of {longest} tokens; "
                "raise it, or leave out that context"
            )
        self._source = {(run.name, c): held_out(config, run, c) for run, c in pairs}
        source = self._source[runs[0].name, longest]
        if len(source) * longest < settings.tokens:
            raise UserError(
                f"{_KEY}.tokens={settings.tokens}: {source.name} holds {len(source)} sequences of "
                f"{longest} tokens; lower it to at most {len(source) * longest}, or add data"
            )

    def jobs(self, run: TrainedModel) -> Iterator[Job]:
        """One for each context and mode."""
        for context, reader in product(self._contexts, self.readers_of(run)):
            steps = self._sequences(context) // self._batch_size(context)
            work = partial(self._measure, reader, context)
            yield Job(context, {"learning": reader.learning}, steps, work)

    def _measure(self, reader: Reader, context: int, on_progress: OnProgress) -> list[Row]:
        run, size = reader.run, self._batch_size(context)
        if (run.name, context) not in self._evaluators:
            # One program serves both modes; those of other runs and lengths are let go.
            training = replace(run.training, eval_batch_size=size)
            evaluator = Evaluator(training, Layout(self.models.mesh))
            self._evaluators = {(run.name, context): evaluator}
        self._scored[reader, context] = PositionLoss.measure(
            self._evaluators[run.name, context],
            self.models.model(run, context),
            lm_dataset.eval_batches(
                self._source[run.name, context],
                batch_size=size,
                max_batches=self._sequences(context) // size,
                bos_token_id=run.config.bos_token_id,
            ),
            learn=reader.learning,
            on_progress=lambda done, loss: on_progress(done),
        )
        return self._rows(reader, context)

    def _rows(self, reader: Reader, context: int, reference: Reader | None = None) -> list[Row]:
        named: dict[str, Key] = {"reference": reference.label} if reference else {}
        return self._scored[reader, context].rows(
            self.row(reader.run, context, "loss"),
            resamples=self.config.evaluation.resamples,
            seed=self.config.evaluation.seed,
            keys={"learning": reader.learning, **named},
            reference=self._scored[reference, context] if reference else None,
        )

    def comparisons(self) -> list[Row]:
        """Each curve less the reference: full attention if there is some, else not learning."""
        reference, rows = self._reference, []
        for reader, context in product(self.readers, self._contexts):
            scored = {(reader, context), (reference, context)} <= self._scored.keys()
            if scored and reader is not reference:
                rows += self._rows(reader, context, reference)
        return rows

    def _sequences(self, context: int) -> int:
        return self.config.evaluation.loss_by_context.tokens // context

    def _batch_size(self, context: int) -> int:
        """The largest divisor of the number of sequences that `batch_size` allows."""
        sequences = self._sequences(context)
        sizes = range(min(self.config.evaluation.batch_size, sequences), 0, -1)
        return next(n for n in sizes if sequences % n == 0)

    def notes(self) -> dict[str, Any]:
        """Text and lengths."""
        draws = self.config.evaluation.resamples
        return {
            "what": "mean -log p of held-out tokens; each scored by weights that have not seen it",
            "text": next(iter(self._source.values())).name,
            "tokens": {str(c): self._sequences(c) * c for c in self._contexts},
            "interval": f"95 %, bootstrap over sequences, {draws} draws",
            "trained_at": {run.name: run.training.seq_length for run in self.runs},
        }

    # ---- what people see ----

    def table(self, rows: pd.DataFrame) -> Table:
        """Loss by run and context, and in brackets what it is less than the reference's."""
        columns = {"run": [reader.label for reader in self.readers]}
        for context in self._contexts:
            own = rows[rows.context == context]
            columns[f"{context:,}"] = [_cell(reader.own(own)) for reader in self.readers]
        title = f"held-out loss, nats per token (difference from {self._reference_label()})"
        return printed(title, columns)

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
            reference = self._reference_label()
            labels["difference"] = f"difference from {reference}\n(nats per token, 95 % band)"
        return labels

    def _plot(self, axes: Any, x: pd.Series, rows: pd.DataFrame, measure: str) -> None:
        self.plot(axes, x, rows, band=0.15 * (measure == "difference"))
        if measure == "difference":
            axes.axhline(0, color="0.4", lw=1)

    def _reference_label(self) -> str:
        if self._reference is None or len(self.runs) == 1:
            return "not learning"
        return self._reference.label


def _cell(rows: pd.DataFrame) -> str:
    """The loss, and its difference from the reference's where that is known."""
    known = rows.dropna(subset="value")
    values = dict(zip(known.measure, known.value, strict=True))
    loss, less = values.get("loss"), values.get("difference")
    cell = "failed" if loss is None else f"{loss:.3f}"
    return cell if less is None else f"{cell} ({less:+.3f})"


def _default_contexts(length: int, runs: Sequence[TrainedModel]) -> tuple[int, ...]:
    """Half the trained length, it, and twice it, where these are whole chunks of every run."""
    wanted = (length // 2, length, 2 * length)
    return tuple(
        n for n in wanted if n == length or (n and all(run.whole_chunks(n) == n for run in runs))
    )
