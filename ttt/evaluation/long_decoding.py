"""Long decoding: read held-out text, write on, and let an evaluator judge both halves.

The paper reads 8K tokens and writes 8K at temperature 1, top-p 0.95 and repetition penalty 1.1
(arXiv 2512.23675, section 3.6). Beside the written text stands what really followed in the held-out
one, judged and measured in the same way, and what the model writes without the penalty.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from rich.table import Table

from ttt import figures
from ttt.errors import UserError
from ttt.evaluation import repetition, resources
from ttt.evaluation.judge import FOREIGN, CountJudge, ForeignJudge, Judge, Judged, OwnJudge
from ttt.evaluation.resources import LoadedModels
from ttt.evaluation.result import Key, Row, estimate, printed
from ttt.evaluation.suite import AbstractSuite, Job, OnProgress, Reader, plot
from ttt.inference.sampling import Sampling
from ttt.intervals import Interval, bootstrap
from ttt.knobs import Config
from ttt.model.trained import TrainedModel, load_one

BINS = 8
"""Stretches of each half whose loss is given."""
WRITTEN, TRUE = "written", "held out"


class LongDecoding(AbstractSuite):
    """Every run, learning or not."""

    name = "long_decoding"
    keys = ("learning", "repetition_penalty", "text", "half", "position_from", "position_to")

    def __init__(self, config: Config, runs: Sequence[TrainedModel], models: LoadedModels):
        super().__init__(config, runs, models)
        self._settings = settings = config.evaluation.long_decoding
        self._context = settings.prefill + settings.decode
        self._penalties = tuple(dict.fromkeys((settings.repetition_penalty, 1.0)))
        self._texts = {run.name: self._held_out(run) for run in runs}
        self._judge = self._find_judge()
        self._written: list[tuple[str, bool, float, int, str]] = []

    def _held_out(self, run: TrainedModel) -> list[np.ndarray]:
        """The texts, prefix and what follows it."""
        count, context = self._settings.sequences, self._context
        source = resources.held_out(self.config, run, context)
        if len(source) < count:
            raise UserError(
                f"evaluation.long_decoding.sequences={count}: {source.name} holds {len(source)} "
                f"stretches of {context} tokens; lower it, or prefill and decode, or add data"
            )
        return [source[i][:context] for i in range(count)]

    def _find_judge(self) -> Judge:
        """The evaluator of all texts, which is none of the runs: a model finds its own text good.

        Raises a UserError.
        """
        name = self._settings.evaluator
        for run in self.runs:
            if name == run.name:
                raise UserError(
                    f"evaluation.long_decoding.evaluator={name} would judge its own text; leave it "
                    "out of evaluation.runs, or name another run, hf:FOLDER, or none (a count of "
                    "token pairs judges)"
                )
        if name.startswith(FOREIGN):
            tokenizers = [resources.tokenizer(self.config, run) for run in self.runs]
            return ForeignJudge(name.removeprefix(FOREIGN), tokenizers[0])
        judge = load_one(self.config, name) if name else self.runs[0]
        for run in self.runs:
            if run.config.vocab_size != judge.config.vocab_size:
                raise UserError(
                    f"{judge.name} has {judge.config.vocab_size} ids and {run.name} has "
                    f"{run.config.vocab_size}: an evaluator reads the same tokens; name a run with "
                    "the same tokenizer, or hf:FOLDER (evaluation.long_decoding.evaluator), and "
                    "runs that share one"
                )
        if not name:
            return CountJudge(self.config, judge)
        return OwnJudge(judge, self.models, self.config.evaluation.batch_size)

    def jobs(self, run: TrainedModel) -> Iterator[Job]:
        """One for each mode, with the repetition penalty and without."""
        steps = 2 * self._settings.sequences
        for reader, penalty in product(self.readers_of(run), self._penalties):
            keys = {"learning": reader.learning, "repetition_penalty": penalty}
            yield Job(self._context, keys, steps, partial(self._measure, reader, penalty))

    def _measure(self, reader: Reader, penalty: float, on_progress: OnProgress) -> list[Row]:
        prefix, count = self._settings.prefill, self._settings.sequences
        truth = self._texts[reader.run.name]
        written = self._write(reader, penalty, on_progress)
        texts = [np.concatenate([t[:prefix], w]) for t, w in zip(truth, written, strict=True)]
        keys: dict[str, Key] = {"learning": reader.learning}
        own = keys | {"repetition_penalty": penalty, "text": WRITTEN}
        rows = self._rows(reader, own, texts, lambda done: on_progress(count + done))
        if reader is self.readers[0] and penalty == self._penalties[0]:
            # The held-out text is the same for all.
            rows += self._rows(reader, keys | {"text": TRUE}, truth, lambda done: None)
        return rows

    def _write(self, reader: Reader, penalty: float, on_progress: OnProgress) -> list[np.ndarray]:
        run, settings, evaluation = reader.run, self._settings, self.config.evaluation
        written = resources.write_on(
            self.models.engine(run, self._context, learn=reader.learning),
            [text[: settings.prefill] for text in self._texts[run.name]],
            settings.decode,
            Sampling(
                temperature=settings.temperature,
                top_p=settings.top_p,
                repetition_penalty=penalty,
            ),
            seed=evaluation.seed,
            batch_size=evaluation.batch_size,
            on_progress=on_progress,
        )
        try:
            texts = map(resources.tokenizer(self.config, run).decode, written)
        except UserError:  # a store without a tokenizer: ids are all there is
            texts = (" ".join(map(str, ids.tolist())) for ids in written)
        own = run.name, reader.learning, penalty
        self._written += [(*own, i, text) for i, text in enumerate(texts)]
        return written

    # ---- rows ----

    def _rows(
        self,
        reader: Reader,
        keys: dict[str, Key],
        texts: Sequence[np.ndarray],
        on_progress: OnProgress,
    ) -> list[Row]:
        """Of texts that follow the prefix: log-loss of both halves, repetition in the second."""
        prefix = self._settings.prefill
        judged = self._judge.read(texts, prefix, on_progress)
        rows = self._loss_rows(reader, judged, keys | {"evaluator": self._judge.name})
        return rows + self._repetition_rows(reader, [t[prefix:] for t in texts], keys)

    def _loss_rows(
        self, reader: Reader, judged: Sequence[Judged], keys: Mapping[str, Key]
    ) -> list[Row]:
        border, end = self._settings.prefill, self._context
        rows = []
        for half, start, stop in (("prefill", 0, border), ("decoded", border, end)):
            for measure, bins in (("log_loss", 1), ("log_loss_at", BINS)):
                edges = np.unique(np.linspace(start, stop, bins + 1).astype(int))
                sums, counts = np.stack([binned(text, edges) for text in judged], axis=1)
                starts, stops = edges[:-1].tolist(), edges[1:].tolist()
                places = zip(starts, stops, counts.T, *self._mean(sums, counts), strict=True)
                for low, high, of_bin, *interval in places:
                    if np.any(of_bin):
                        own = {"half": half, "position_from": low, "position_to": high}
                        known = {"keys": {**keys, **own}, "n": len(judged), **estimate(interval)}
                        known["unit"] = self._judge.unit
                        rows.append(self.row(reader.run, self._context, measure, **known))
        return rows

    def _repetition_rows(
        self, reader: Reader, texts: Sequence[np.ndarray], keys: Mapping[str, Key]
    ) -> list[Row]:
        measures: dict[str, tuple[Callable[[np.ndarray], float], str]] = {
            f"distinct_{n}": (partial(repetition.distinct, n=n), "share of n-grams")
            for n in repetition.NGRAMS
        }
        measures[f"repeated_within_{repetition.SPAN}"] = repetition.repeated, "share of tokens"
        measures["longest_repeat"] = repetition.longest_repeat, "tokens"
        rows = []
        for measure, (of, unit) in measures.items():
            interval = self._mean(np.array([float(of(t)) for t in texts]), np.ones(len(texts)))
            known = {"keys": {**keys, "half": "decoded"}, "n": len(texts), **estimate(interval)}
            rows.append(self.row(reader.run, self._context, measure, unit=unit, **known))
        return rows

    def _mean(self, sums: np.ndarray, counts: np.ndarray) -> Interval:
        """Over all that the sequences hold."""
        evaluation = self.config.evaluation
        return bootstrap(sums, counts, resamples=evaluation.resamples, seed=evaluation.seed)

    # ---- what people see ----

    def files(self) -> dict[str, str]:
        """What was written."""
        columns = ["run", "learning", "repetition_penalty", "sequence", "text"]
        texts = pd.DataFrame(self._written, columns=columns)
        return {"long_decoding-texts.csv": texts.to_csv(index=False, lineterminator="\n")}

    def notes(self) -> dict[str, Any]:
        """Text, sampling, evaluator."""
        return {
            "what": "log-loss, under one evaluator, of text that was read and of text written on",
            "text": resources.held_out_name(self.config),
            "evaluator": f"{self._judge.name}, which does not learn while it reads",
            "settings": asdict(self._settings),
            "interval": "95 %, bootstrap over sequences",
        }

    def _curves(self, rows: pd.DataFrame) -> list[tuple[str, str, dict[str, Any], pd.DataFrame]]:
        """(whose, penalty, look, rows) of each text: those written, and the held-out one."""
        written, true = rows[rows.text != TRUE], rows[rows.text == TRUE]  # failed rows have none
        curves = []
        for reader, penalty in product(self.readers, self._penalties):
            own = reader.own(written[written.repetition_penalty == penalty])
            look = reader.style | ({"alpha": 0.55, "lw": 1.0} if penalty == 1 else {})
            curves.append((reader.label, "none" if penalty == 1 else f"{penalty:g}", look, own))
        look = figures.style(0) | {"color": "0.5", "marker": "x", "lw": 1.2}
        return [curve for curve in [*curves, ("held-out text", "-", look, true)] if len(curve[3])]

    def table(self, rows: pd.DataFrame) -> Table:
        """Log-loss of both halves, and repetition."""
        span = repetition.SPAN
        wanted = {
            ("log_loss", "prefill"): "read",
            ("log_loss", "decoded"): "written",
            ("distinct_4", "decoded"): "distinct 4-grams",
            (f"repeated_within_{span}", "decoded"): f"seen in last {span}",
            ("longest_repeat", "decoded"): "longest repeat",
        }
        columns: dict[str, list[str]] = defaultdict(list)
        for label, penalty, _, own in self._curves(rows):
            known = own.dropna(subset="value").set_index(["measure", "half"]).value.to_dict()
            columns["text"].append(label)
            columns["penalty"].append(penalty)
            for key, name in wanted.items():
                columns[name].append(f"{known[key]:.3f}" if key in known else "failed")
        title = f"long decoding: log-loss by {self._judge.name}, and repetition"
        return printed(title, columns, names=2)

    def draw(self, rows: pd.DataFrame, folder: Path, title: str) -> list[Path]:
        """`long_decoding.png`: log-loss over position, read and written."""
        good = rows[rows.measure == "log_loss_at"]
        if good.empty:
            return []
        figure, [[axes]] = figures.grid(1, 1, (7, 4.4))
        curves = self._curves(good)
        for label, penalty, look, own in curves:
            if own is not curves[-1][3]:  # what was read is the same for all: the last one shows it
                own = own[own.half == "decoded"]
            middle = (own.position_from + own.position_to) / 2
            label += f", penalty {penalty}" if penalty != "-" else ""
            plot(axes, middle, own, band=0.1, label=label, **look)
        axes.axvline(self._settings.prefill, color="0.6", lw=1, ls=":")
        look = {"xycoords": ("data", "axes fraction"), "va": "top", "color": "0.4", "fontsize": 8}
        axes.annotate("read ", (self._settings.prefill, 1.0), ha="right", **look)
        axes.annotate(" written", (self._settings.prefill, 1.0), ha="left", **look)
        figures.tidy(axes)
        axes.set_xlim(0, self._context)
        axes.set_xlabel("token position")
        axes.set_ylabel(f"log-loss by {self._judge.name}\n({self._judge.unit})")
        figures.legend_below(figure, axes, columns=2)  # long names
        figures.finish(figure, folder / "long_decoding.png", title)
        return [folder / "long_decoding.png"]


def binned(
    judged: Judged, edges: Int[np.ndarray, " edges"]
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Sum of −log p, and how many tokens, in each bin."""
    place = np.digitize(judged.position, edges) - 1
    inside = (place >= 0) & (place < len(edges) - 1)
    bins = len(edges) - 1
    sums = np.bincount(place[inside], judged.nll[inside].astype(np.float64), bins)
    return sums, np.bincount(place[inside], minlength=bins).astype(np.float64)
