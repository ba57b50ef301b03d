"""Loss by token position and by context length: one held-out text, cut into several lengths."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ttt import figures
from ttt.dataloader import lm_dataset
from ttt.dataloader.lm_dataset import Source
from ttt.errors import UserError
from ttt.evaluation import held_out
from ttt.evaluation.loss_by_position import PositionLoss
from ttt.evaluation.machine import Machine
from ttt.evaluation.result import Row
from ttt.evaluation.suite import AbstractSuite, Job, Told
from ttt.infra.mesh import Layout, check_divides
from ttt.knobs import Config
from ttt.model.loop import Evaluator
from ttt.model.trained import TrainedModel

Curve = tuple[str, bool]
"""A run's name, and whether it was learning."""

_KEY = "evaluation.loss_by_context.contexts"


class LossByContext(AbstractSuite):
    """Every run at every context, learning or not, with intervals over sequences."""

    name = "loss_by_context"

    def __init__(self, config: Config, runs: Sequence[TrainedModel], machine: Machine):
        self._asked, self._machine = config.evaluation, machine
        own = config.evaluation.loss_by_context
        self._contexts = own.contexts or _default_contexts(config.training.seq_length, runs)
        self._runs = list(runs)
        self._compiled: dict[tuple[str, int], Evaluator] = {}
        self._scored: dict[tuple[Curve, int], PositionLoss] = {}
        self._trained = {run.name: run.training.seq_length for run in runs}
        for run in runs:
            for context in self._contexts:
                run.check_context(context, _KEY)
        longest = max(self._contexts)
        if own.tokens < longest:
            raise UserError(
                f"evaluation.loss_by_context.tokens={own.tokens}: less than one sequence of "
                f"{longest} tokens; raise it, or leave out that context"
            )
        self._source = {
            (run.name, context): held_out.source(config, run, context)
            for run in runs
            for context in self._contexts
        }
        source = self._source[runs[0].name, longest]
        if len(source) * longest < own.tokens:
            raise UserError(
                f"evaluation.loss_by_context.tokens={own.tokens}: {source.name} holds "
                f"{len(source)} sequences of {longest} tokens; lower it to at most "
                f"{len(source) * longest}, or add data"
            )
        for context in self._contexts:
            check_divides(machine.mesh, self._batch_size(context))

    def jobs(self, run: TrainedModel) -> Iterator[Job]:
        """One for each context and mode."""
        for context in self._contexts:
            for learn in run.modes(self._asked.without_learning):

                def work(told: Told, context: int = context, learn: bool = learn) -> list[Row]:
                    return self._measure(run, context, learn, told)

                steps = self._sequences(context) // self._batch_size(context)
                yield Job(context, {"learning": learn and run.learns}, steps, work)

    def _measure(self, run: TrainedModel, context: int, learn: bool, told: Told) -> list[Row]:
        size = self._batch_size(context)
        batches = self._sequences(context) // size
        found = PositionLoss.measure(
            self._evaluator(run, context, size),
            self._machine.model(run, context),
            self._batches(self._source[run.name, context], size, batches, run),
            learn=learn,
            told=lambda done, loss: told(done),
        )
        curve = (run.name, learn and run.learns)
        self._scored[curve, context] = found
        return found.rows(self.row(run, context, "loss"), **self._draws(curve))

    def _draws(self, curve: Curve, **keys: str) -> dict[str, Any]:
        asked = self._asked
        told = {"learning": curve[1], **keys}
        return {"resamples": asked.resamples, "seed": asked.seed, "keys": told}

    def comparisons(self) -> list[Row]:
        """Each curve less the reference: full attention if there is some, else not learning."""
        reference = self._reference()
        rows = []
        for run in self._runs:
            for learning in (True, False):
                for context in self._contexts:
                    curve = (run.name, learning)
                    mine = self._scored.get((curve, context))
                    other = self._scored.get((reference, context))
                    if curve != reference and mine is not None and other is not None:
                        like = self.row(run, context, "difference")
                        draws = self._draws(curve, reference=self._label(reference))
                        rows += mine.rows_against(other, like, **draws)
        return rows

    def _reference(self) -> Curve:
        for run in self._runs:
            if run.method == "fa":
                return run.name, False
        return self._runs[0].name, False

    def _evaluator(self, run: TrainedModel, context: int, size: int) -> Evaluator:
        """One program serves both modes; those of other runs and lengths are let go."""
        if (run.name, context) not in self._compiled:
            training = replace(run.training, eval_batch_size=size)
            evaluator = Evaluator(training, Layout(self._machine.mesh))
            self._compiled = {(run.name, context): evaluator}
        return self._compiled[run.name, context]

    def _batches(self, source: Source, size: int, batches: int, run: TrainedModel) -> Any:
        bos = run.config.bos_token_id
        return lm_dataset.eval_batches(
            source, batch_size=size, max_batches=batches, bos_token_id=bos
        )

    def _sequences(self, context: int) -> int:
        return self._asked.loss_by_context.tokens // context

    def _batch_size(self, context: int) -> int:
        """The largest divisor of the number of sequences that `batch_size` and devices allow."""
        sequences = self._sequences(context)
        sizes = range(min(self._asked.batch_size, sequences), 0, -1)
        return next(n for n in sizes if sequences % n == 0)

    def notes(self) -> dict[str, Any]:
        """Text and lengths."""
        source = next(iter(self._source.values()))
        return {
            "what": "mean -log p of held-out tokens; each scored by weights that have not seen it",
            "text": source.name,
            "tokens": {str(c): self._sequences(c) * c for c in self._contexts},
            "interval": f"95 %, bootstrap over sequences, {self._asked.resamples} draws",
            "trained_at": self._trained,
        }

    def table(self, rows: Sequence[Row]) -> Table:
        """Loss by run and context, and in brackets what it is less than the reference's."""
        title = f"held-out loss, nats per token (difference from {self._reference_label()})"
        table = Table(title=title)
        table.add_column("run", overflow="fold")
        for context in self._contexts:
            table.add_column(f"{context:,}", justify="right")
        values = {
            (_curve(row), row.context, row.measure): row.value
            for row in rows
            if row.measure in ("loss", "difference")
        }
        for curve in dict.fromkeys(map(_curve, rows)):
            cells = []
            for context in self._contexts:
                loss = values.get((curve, context, "loss"))
                less = values.get((curve, context, "difference"))
                cell = "failed" if loss is None else f"{loss:.3f}"
                cells.append(cell if less is None else f"{cell} ({less:+.3f})")
            table.add_row(self._label(curve), *cells)
        return table

    def draw(self, rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
        """`loss_by_position.png`, a column per context, and `loss_by_context.png` over contexts."""
        good = [row for row in rows if row.value is not None]
        contexts = sorted({row.context for row in good if row.measure == "loss"})
        if not contexts:
            return []
        path = folder / "loss_by_position.png"
        self._draw_positions(good, contexts, path, title)
        if len(contexts) == 1:
            return [path]
        self._draw_contexts(good, contexts, folder / "loss_by_context.png", title)
        return [path, folder / "loss_by_context.png"]

    def _draw_positions(
        self, rows: Sequence[Row], contexts: Sequence[int], path: Path, title: str
    ) -> None:
        measures = self._panels(rows)
        figure, panels = figures.pyplot().subplots(
            *(len(measures), len(contexts)),
            figsize=(max(5.5, 1.4 + 3 * len(contexts)), 0.8 + 2.7 * len(measures)),
            sharey="row",
            sharex="col",
            squeeze=False,
            layout="constrained",
        )
        for axes_row, (measure, label) in zip(panels, measures.items(), strict=True):
            for axes, context in zip(axes_row, contexts, strict=True):
                here = [r for r in rows if (r.measure, r.context) == (f"{measure}_at", context)]
                self._plot(axes, here, _middle, band=measure == "difference")
                ticks = (16, 64, 256, 1024, 4096, 16384, 65536)
                figures.log_tokens(axes, [n for n in ticks if n <= context])
                for window in {run.window for run in self._runs if run.window}:
                    if window < context:
                        figures.mark(axes, window, "window")
            axes_row[0].set_ylabel(label)
        for axes, context in zip(panels[0], contexts, strict=True):
            axes.set_title(f"context {figures.short(context)}", fontsize=9, loc="left")
        for axes in panels[-1]:
            axes.set_xlabel("token position")
        figures.legend_below(figure, panels[0][0])
        figures.finish(figure, path, title)

    def _draw_contexts(
        self, rows: Sequence[Row], contexts: Sequence[int], path: Path, title: str
    ) -> None:
        measures = self._panels(rows)
        figure, panels = figures.pyplot().subplots(
            *(1, len(measures)),
            figsize=(1 + 4 * len(measures), 4),
            squeeze=False,
            layout="constrained",
        )
        for axes, (measure, label) in zip(panels[0], measures.items(), strict=True):
            here = [row for row in rows if row.measure == measure]
            self._plot(axes, here, lambda row: row.context, band=measure == "difference")
            figures.log_tokens(axes, contexts)
            for trained in set(self._trained.values()):
                figures.mark(axes, trained, "trained length")
            axes.set_xlabel("context (tokens)")
            axes.set_ylabel(label)
        figures.legend_below(figure, panels[0][0])
        figures.finish(figure, path, title)

    def _panels(self, rows: Sequence[Row]) -> dict[str, str]:
        """Measures to draw, with the labels of their axes."""
        labels = {"loss": "held-out loss (nats per token)"}
        if any(row.measure == "difference" for row in rows):
            labels["difference"] = (
                f"difference from {self._reference_label()}\n(nats per token, 95 % band)"
            )
        return labels

    def _plot(
        self, axes: Any, rows: Sequence[Row], x: Callable[[Row], float], *, band: bool
    ) -> None:
        for index, run in enumerate(self._runs):
            for learning in (True, False):
                there = [row for row in rows if _curve(row) == (run.name, learning)]
                if not there:
                    continue
                look = figures.style(index, learns=learning or not run.learns)
                at = [x(row) for row in there]
                label = self._label((run.name, learning))
                axes.plot(at, [row.value for row in there], label=label, **look)
                if band:
                    low, high = [row.low for row in there], [row.high for row in there]
                    axes.fill_between(at, low, high, color=look["color"], alpha=0.15, lw=0)
        if band:
            axes.axhline(0, color="0.4", lw=1)
        figures.tidy(axes)

    def _label(self, curve: Curve) -> str:
        """Its name in pictures and tables."""
        name, learning = curve
        run = next(run for run in self._runs if run.name == name)
        return f"{name}, not learning" if run.learns and not learning else name

    def _reference_label(self) -> str:
        reference = self._reference()
        return self._label(reference) if len(self._runs) > 1 else "not learning"


def _default_contexts(length: int, runs: Sequence[TrainedModel]) -> tuple[int, ...]:
    """Half the trained length, it, and twice it, where these are whole chunks of every run."""
    chunks = [run.config.mini_batch_size for run in runs if run.window is not None]
    wanted = (length // 2, length, 2 * length)
    return tuple(n for n in wanted if n == length or (n and all(n % c == 0 for c in chunks)))


def _curve(row: Row) -> Curve:
    return row.run, bool(row.keys["learning"])


def _middle(row: Row) -> float:
    """Geometric middle of a bin; the first one starts at 0."""
    start, stop = float(row.keys["position_from"]), float(row.keys["position_to"])
    return (max(start, 8.0) * stop) ** 0.5
