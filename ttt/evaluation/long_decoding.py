"""Long decoding: read held-out text, write on, and let an evaluator judge both halves.

The paper reads 8K tokens and writes 8K at temperature 1, top-p 0.95 and repetition penalty 1.1
(arXiv 2512.23675, section 3.6). Beside the written text stands what really followed in the held-out
one, judged and measured in the same way.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.table import Table

from ttt import figures
from ttt.errors import UserError
from ttt.evaluation import held_out, repetition
from ttt.evaluation.judge import FOREIGN, AbstractJudge, ForeignJudge, Judged, OwnJudge
from ttt.evaluation.machine import Machine, in_batches
from ttt.evaluation.result import Key, Row
from ttt.evaluation.suite import AbstractSuite, Job, Told
from ttt.inference.sampling import Sampling
from ttt.intervals import bootstrap
from ttt.knobs import Config
from ttt.model.trained import TrainedModel, load_one

BINS = 8
"""Stretches of each half whose loss is told."""
WRITTEN, TRUE = "written", "held out"


class LongDecoding(AbstractSuite):
    """Every run, learning or not."""

    name = "long_decoding"

    def __init__(self, config: Config, runs: Sequence[TrainedModel], machine: Machine):
        self._config, self._machine, self._runs = config, machine, list(runs)
        self._asked = asked = config.evaluation.long_decoding
        self._context = asked.prefill + asked.decode
        self._texts = {run.name: self._held_out(run) for run in runs}
        self._judge = self._find_judge(config, runs)
        self._true: list[Row] = []
        self._written: list[tuple[str, bool, int, str]] = []

    def _held_out(self, run: TrainedModel) -> list[np.ndarray]:
        """The texts, prefix and what follows it."""
        source = held_out.source(self._config, run, self._context)
        if len(source) < self._asked.sequences:
            raise UserError(
                f"evaluation.long_decoding.sequences={self._asked.sequences}: {source.name} holds "
                f"{len(source)} stretches of {self._context} tokens; lower it, or prefill and "
                "decode, or add data"
            )
        return [source[i][: self._context] for i in range(self._asked.sequences)]

    def _find_judge(self, config: Config, runs: Sequence[TrainedModel]) -> AbstractJudge:
        asked = self._asked.evaluator
        if asked.startswith(FOREIGN):
            tokenizers = [held_out.tokenizer(config, run) for run in runs]
            return ForeignJudge(asked.removeprefix(FOREIGN), tokenizers[0])
        judges = {run.name: run for run in runs}
        judge = runs[0] if not asked else judges.get(asked) or load_one(config, asked)
        for run in runs:
            if run.config.vocab_size != judge.config.vocab_size:
                raise UserError(
                    f"evaluation.long_decoding.evaluator={judge.name} has {judge.config.vocab_size}"
                    f" ids and {run.name} has {run.config.vocab_size}: an evaluator reads the "
                    "same tokens; name a run with the same tokenizer, or hf:FOLDER"
                )
        return OwnJudge(judge, self._machine, config.evaluation.batch_size)

    def jobs(self, run: TrainedModel) -> Iterator[Job]:
        """One for each mode."""
        for learn in run.modes(self._config.evaluation.without_learning):

            def work(told: Told, learn: bool = learn) -> list[Row]:
                return self._measure(run, learn, told)

            steps = 2 * self._asked.sequences
            yield Job(self._context, {"learning": learn and run.learns}, steps, work)

    def _measure(self, run: TrainedModel, learn: bool, told: Told) -> list[Row]:
        prefix = self._asked.prefill
        truth = self._texts[run.name]
        written = self._write(run, learn, told)
        texts = [np.concatenate([t[:prefix], w]) for t, w in zip(truth, written, strict=True)]
        judged = self._judge.read(texts, prefix, lambda done: told(self._asked.sequences + done))
        learning = learn and run.learns
        self._keep(run, learning, written)
        keys: dict[str, Key] = {"learning": learning, "text": WRITTEN}
        rows = self._loss_rows(run, judged, keys) + self._repetition_rows(run, written, keys)
        if run is self._runs[0] and learn:  # the held-out text is the same for all
            keys = {"learning": learning, "text": TRUE}
            real = self._judge.read(truth, prefix, lambda done: None)
            rows += self._loss_rows(run, real, keys)
            rows += self._repetition_rows(run, [t[prefix:] for t in truth], keys)
        return rows

    def _write(self, run: TrainedModel, learn: bool, told: Told) -> list[np.ndarray]:
        asked, evaluation = self._asked, self._config.evaluation
        engine = self._machine.engine(run, self._context, learn=learn)
        sampling = Sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            repetition_penalty=asked.repetition_penalty,
        )
        found: list[np.ndarray] = []
        for batch, rows in enumerate(in_batches(asked.sequences, evaluation.batch_size)):
            part = [self._texts[run.name][row][: asked.prefill] for row in rows]
            state, _ = engine.read(engine.start(len(part)), part)
            seed = evaluation.seed + batch
            _, written = engine.write(state, asked.decode, sampling, seed=seed)
            found += [np.asarray(tokens, np.int32) for tokens in written.tokens]
            told(min(len(found), asked.sequences))
        return found[: asked.sequences]

    # ---- rows ----

    def _loss_rows(
        self, run: TrainedModel, judged: Sequence[Judged], keys: Mapping[str, Key]
    ) -> list[Row]:
        asked, evaluation = self._asked, self._config.evaluation
        halves = {"prefill": (0, asked.prefill), "decoded": (asked.prefill, self._context)}
        rows = []
        for half, (start, stop) in halves.items():
            for measure, bins in (("log_loss", 1), ("log_loss_at", BINS)):
                edges = np.unique(np.linspace(start, stop, bins + 1).astype(int))
                parts = np.stack([binned(text, edges) for text in judged])
                sums, counts = parts[:, 0], parts[:, 1]
                found = bootstrap(
                    sums, counts, resamples=evaluation.resamples, seed=evaluation.seed
                )
                for i, (low, high) in enumerate(pairwise(edges.tolist())):
                    if not np.any(counts[:, i]):
                        continue
                    place = {"half": half, "position_from": low, "position_to": high}
                    rows.append(
                        self.row(
                            *(run, self._context, measure),
                            keys={**keys, "evaluator": self._judge.name, **place},
                            **{k: float(v[i]) for k, v in found._asdict().items()},
                            n=len(judged),
                            unit=self._judge.unit,
                        )
                    )
        return rows

    def _repetition_rows(
        self, run: TrainedModel, texts: Sequence[np.ndarray], keys: Mapping[str, Key]
    ) -> list[Row]:
        found = {
            f"distinct_{n}": ([repetition.distinct(t, n) for t in texts], "share of n-grams")
            for n in repetition.NGRAMS
        }
        repeats = [repetition.repeated(t) for t in texts]
        found[f"repeated_within_{repetition.SPAN}"] = (repeats, "share of tokens")
        longest = [float(repetition.longest_repeat(t)) for t in texts]
        found["longest_repeat"] = (longest, "tokens")
        rows = []
        for measure, (values, unit) in found.items():
            interval = bootstrap(
                np.asarray(values),
                np.ones(len(values)),
                resamples=self._config.evaluation.resamples,
                seed=self._config.evaluation.seed,
            )
            numbers = {k: float(v) for k, v in interval._asdict().items()}
            own = {"keys": {**keys, "half": "decoded"}, "n": len(values), "unit": unit}
            rows.append(self.row(run, self._context, measure, **own, **numbers))
        return rows

    def _keep(self, run: TrainedModel, learning: bool, written: Sequence[np.ndarray]) -> None:
        try:
            tokenizer = held_out.tokenizer(self._config, run)
        except UserError:  # a store without a tokenizer: ids are all there is
            texts = [" ".join(map(str, ids.tolist())) for ids in written]
        else:
            texts = [tokenizer.decode(ids) for ids in written]
        self._written += [(run.name, learning, i, text) for i, text in enumerate(texts)]

    # ---- what people see ----

    def files(self) -> dict[str, str]:
        """What was written."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", "learning", "sequence", "text"])
        writer.writerows(self._written)
        return {"long_decoding-texts.csv": text.getvalue()}

    def notes(self) -> dict[str, Any]:
        """Text, sampling, evaluator."""
        return {
            "what": "log-loss, under one evaluator, of text that was read and of text written on",
            "text": held_out_name(self._config),
            "evaluator": self._judge.name,
            "settings": asdict(self._asked),
            "interval": "95 %, bootstrap over sequences",
        }

    def table(self, rows: Sequence[Row]) -> Table:
        """Log-loss of both halves, and repetition."""
        table = Table(title=f"long decoding: log-loss by {self._judge.name}, and repetition")
        wanted = {
            ("log_loss", "prefill"): "read",
            ("log_loss", "decoded"): "written",
            ("distinct_4", "decoded"): "distinct 4-grams",
            (f"repeated_within_{repetition.SPAN}", "decoded"): f"seen in last {repetition.SPAN}",
            ("longest_repeat", "decoded"): "longest repeat",
        }
        table.add_column("text", overflow="fold")
        for title in wanted.values():
            table.add_column(title, justify="right")
        for label, there in _by_text(rows, self._runs):
            cells = {
                (row.measure, row.keys.get("half")): f"{row.value:.3f}"
                for row in there
                if row.value is not None
            }
            table.add_row(label, *(cells.get(key, "failed") for key in wanted))
        return table

    def draw(self, rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
        """`long_decoding.png`: log-loss over position, read and written."""
        good = [row for row in rows if row.measure == "log_loss_at" and row.value is not None]
        if not good:
            return []
        plt = figures.pyplot()
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        order = {run.name: index for index, run in enumerate(self._runs)}
        curves = list(_by_text(good, self._runs))
        for number, (label, there) in enumerate(curves, start=1):
            first = there[0]
            if number < len(curves):  # what was read is the same for all: the last one shows it
                there = [row for row in there if row.keys["half"] == "decoded"]
            look = figures.style(order[first.run], learns=not _is_off(first, self._runs))
            if first.keys["text"] == TRUE:
                look |= {"color": "0.5", "marker": "x", "lw": 1.2}
            x = [
                (float(row.keys["position_from"]) + float(row.keys["position_to"])) / 2
                for row in there
            ]
            axes.plot(x, [row.value for row in there], label=label, **look)
            bounds = [[row.low for row in there], [row.high for row in there]]
            axes.fill_between(x, *bounds, color=look["color"], alpha=0.1, lw=0)
        axes.axvline(self._asked.prefill, color="0.6", lw=1, ls=":")
        for side, text in ((-1, "read "), (1, " written")):
            place = {"xy": (self._asked.prefill, 1.0), "xycoords": ("data", "axes fraction")}
            align = {"ha": "right" if side < 0 else "left", "va": "top"}
            axes.annotate(text, **place, **align, color="0.4", fontsize=8)
        figures.tidy(axes)
        axes.set_xlim(0, self._context)
        axes.set_xlabel("token position")
        axes.set_ylabel(f"log-loss ({self._judge.unit}), by {self._judge.name}")
        axes.legend(frameon=False, fontsize=8)
        path = folder / "long_decoding.png"
        figures.finish(figure, path, title)
        return [path]


def held_out_name(config: Config) -> str:
    """Where the text comes from, in words."""
    if config.training.dummy_dataset:
        return "random tokens"
    return f"{config.evaluation.dataset_name}/{config.evaluation.split}"


def binned(
    judged: Judged, edges: Int[np.ndarray, " edges"]
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Sum of −log p, and how many tokens, in each bin."""
    place = np.digitize(judged.position, edges) - 1
    inside = (place >= 0) & (place < len(edges) - 1)
    bins = len(edges) - 1
    sums = np.bincount(place[inside], judged.nll[inside].astype(np.float64), bins)
    return sums, np.bincount(place[inside], minlength=bins).astype(np.float64)


def _is_off(row: Row, runs: Sequence[TrainedModel]) -> bool:
    learns = {run.name: run.learns for run in runs}[row.run]
    return learns and not row.keys["learning"]


def _by_text(rows: Sequence[Row], runs: Sequence[TrainedModel]) -> Iterator[tuple[str, list[Row]]]:
    """(label, rows) of each text: written by each run and mode, and the held-out one."""
    groups: dict[tuple[str, Key, Key], list[Row]] = {}
    for row in rows:
        key = (row.run, row.keys["learning"], row.keys.get("text", WRITTEN))
        groups.setdefault(key, []).append(row)
    for (name, _, text), there in groups.items():
        if text != TRUE:
            yield f"{name}{', not learning' * _is_off(there[0], runs)}", there
    yield from (("held-out text", g) for (_, _, text), g in groups.items() if text == TRUE)
