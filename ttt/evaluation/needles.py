"""Recall of needles in haystacks: RULER's tasks over depths and lengths, greedy answers."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ttt import figures
from ttt.evaluation import held_out, ruler
from ttt.evaluation.machine import Machine, in_batches
from ttt.evaluation.result import Key, Row
from ttt.evaluation.ruler import Haystack, Prompt
from ttt.evaluation.suite import AbstractSuite, Job, Told
from ttt.inference.sampling import Sampling
from ttt.infra.progress import Progress
from ttt.intervals import share
from ttt.knobs import Config
from ttt.model.trained import TrainedModel

LABELS = {
    "niah_single_1": "S-NIAH-1: passkey in noise",
    "niah_single_2": "S-NIAH-2: number in essays",
    "niah_single_3": "S-NIAH-3: UUID in essays",
}
_ANSWER_COLUMNS = (
    *("run", "task", "learning", "context", "depth", "distance", "reach"),
    *("right", "answer", "said"),
)
ALL, INSIDE, BEYOND, BOTH = "all", "inside", "beyond", "both"
"""Where needles lie: the window still holds them when the answer starts, or it does not."""


@dataclass(frozen=True)
class Answer:
    """What a run said to one prompt."""

    prompt: Prompt
    said: str
    reach: str
    """INSIDE or BEYOND."""

    @property
    def right(self) -> bool:
        """Whether the needle's value occurs in it."""
        return ruler.holds(self.said, self.prompt.answer)


class Needles(AbstractSuite):
    """Every run on every task and length, learning or not."""

    name = "needles"

    def __init__(self, config: Config, runs: Sequence[TrainedModel], machine: Machine):
        self._config, self._machine, self._runs = config, machine, list(runs)
        self._asked = asked = config.evaluation.needles
        self._lengths = asked.lengths or (config.training.seq_length,)
        self._depths = ruler.depths(asked.depths)
        self._tokenizers = {run.name: held_out.tokenizer(config, run) for run in runs}
        wanted = {ruler.TASKS[task].haystack for task in asked.tasks}
        self._haystacks: dict[str, Haystack] = {"noise": ruler.noise()}
        if "essay" in wanted:
            self._haystacks["essay"] = ruler.essays(asked.haystack)
        self._answers: dict[tuple[str, bool, str], list[tuple[int, Answer]]] = {}
        self._prompts: dict[tuple[str, int], list[Prompt]] = {}
        cells = [(task, length) for task in asked.tasks for length in self._lengths]
        with Progress(len(cells), "needles: prompts") as progress:
            for done, (task, length) in enumerate(cells, start=1):
                self._prompts[task, length] = self._make(task, length)
                progress.update(done)

    def _make(self, task: str, length: int) -> list[Prompt]:
        """All runs answer the same prompts, so they share a tokenizer: that of the first."""
        asked = self._asked
        return ruler.make_prompts(
            task,
            self._haystacks[ruler.TASKS[task].haystack],
            self._tokenizers[self._runs[0].name],
            length=length,
            tokens_to_generate=asked.tokens_to_generate,
            depths=self._depths,
            samples=asked.samples,
            seed=self._config.evaluation.seed,
        )

    def jobs(self, run: TrainedModel) -> Iterator[Job]:
        """One for each length, task and mode."""
        for length in self._lengths:
            for learn in run.modes(self._config.evaluation.without_learning):
                learning = learn and run.learns
                for task in self._asked.tasks:

                    def work(
                        told: Told, task: str = task, length: int = length, learn: bool = learn
                    ) -> list[Row]:
                        return self._measure(run, task, length, learn, told)

                    steps = len(self._prompts[task, length])
                    yield Job(length, {"task": task, "learning": learning}, steps, work)

    def _measure(
        self, run: TrainedModel, task: str, length: int, learn: bool, told: Told
    ) -> list[Row]:
        answers = self._ask(run, self._prompts[task, length], length, learn, told)
        keys: dict[str, Key] = {"task": task, "learning": learn and run.learns}
        kept = self._answers.setdefault((run.name, learn and run.learns, task), [])
        kept += [(length, answer) for answer in answers]
        rows = [self._row(run, length, answers, keys, ALL, ALL)]
        by_reach = {reach: [a for a in answers if a.reach == reach] for reach in (INSIDE, BEYOND)}
        rows += [self._row(run, length, by_reach[r], keys, ALL, r) for r in by_reach if by_reach[r]]
        for depth in self._depths:
            there = [a for a in answers if a.prompt.depth == depth]
            reaches = {a.reach for a in there}
            reach = reaches.pop() if len(reaches) == 1 else BOTH
            rows.append(self._row(run, length, there, keys, depth, reach))
        return rows

    def _row(
        self,
        run: TrainedModel,
        length: int,
        answers: Sequence[Answer],
        keys: Mapping[str, Key],
        depth: Key,
        reach: str,
    ) -> Row:
        value, low, high = share(sum(a.right for a in answers), len(answers))
        distance = round(float(np.mean([a.prompt.distance for a in answers])))
        return self.row(
            *(run, length, "accuracy"),
            keys={**keys, "depth": depth, "reach": reach, "distance": distance},
            **{"value": value, "low": low, "high": high},
            n=len(answers),
            unit="share of prompts",
        )

    def comparisons(self) -> list[Row]:
        """Accuracy by the needle's distance from the answer, all lengths together."""
        rows = []
        by_name = {run.name: run for run in self._runs}
        for (name, learning, task), kept in self._answers.items():
            by_octave: dict[int, list[Answer]] = {}
            for _, answer in kept:
                by_octave.setdefault(answer.prompt.distance.bit_length(), []).append(answer)
            for octave, there in sorted(by_octave.items()):
                value, low, high = share(sum(a.right for a in there), len(there))
                place = {"distance_from": 2 ** (octave - 1), "distance_to": 2**octave}
                rows.append(
                    self.row(
                        *(by_name[name], max(self._lengths), "accuracy_at_distance"),
                        keys={"task": task, "learning": learning, **place},
                        **{"value": value, "low": low, "high": high},
                        n=len(there),
                        unit="share of prompts",
                    )
                )
        return rows

    def _ask(
        self, run: TrainedModel, prompts: Sequence[Prompt], length: int, learn: bool, told: Told
    ) -> list[Answer]:
        evaluation, tokenizer = self._config.evaluation, self._tokenizers[run.name]
        engine = self._machine.engine(run, length, learn=learn)
        stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        found: list[Answer] = []
        for rows in in_batches(len(prompts), evaluation.batch_size):
            part = [prompts[row] for row in rows]
            state, _ = engine.read(engine.start(len(part)), [p.tokens for p in part])
            _, written = engine.write(
                state,
                self._asked.tokens_to_generate,
                Sampling(temperature=0.0),
                seed=evaluation.seed,
                stop=stop,
            )
            for prompt, ids in zip(part, written.tokens, strict=True):
                # The first token of the answer is predicted at the prompt's last one.
                inside = run.window is None or prompt.distance < run.window
                said = tokenizer.decode(np.asarray(ids))
                found.append(Answer(prompt, said, INSIDE if inside else BEYOND))
            told(min(len(found), len(prompts)))
        return found[: len(prompts)]

    # ---- what people see ----

    def files(self) -> dict[str, str]:
        """Every prompt's answer."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_ANSWER_COLUMNS)
        for (name, learning, task), kept in self._answers.items():
            for length, answer in kept:
                prompt = answer.prompt
                place = [prompt.depth, prompt.distance, answer.reach, int(answer.right)]
                said = [prompt.answer, answer.said]
                writer.writerow([name, task, learning, length, *place, *said])
        return {"needles-answers.csv": text.getvalue()}

    def notes(self) -> dict[str, Any]:
        """Sources and settings."""
        return {
            "what": "share of greedy answers that contain the needle's value (string match)",
            "after": "RULER, arXiv 2404.06654: templates, needles, noise, answer length, scoring",
            "haystacks": {name: haystack.source for name, haystack in self._haystacks.items()},
            "depths": self._depths,
            "samples": self._asked.samples,
            "tokens_to_generate": self._asked.tokens_to_generate,
            "distance": "tokens from the needle's start to the prompt's end; inside: < window",
            "windows": {run.name: run.window for run in self._runs},
            "interval": "95 %, Wilson",
        }

    def table(self, rows: Sequence[Row]) -> Table:
        """Accuracy by task, run and length, and of all lengths inside and beyond the window."""
        table = Table(title="needles found (share of prompts)")
        table.add_column("task", overflow="fold")
        table.add_column("run", overflow="fold")
        for title in (*(f"{length:,}" for length in self._lengths), "in window", "beyond"):
            table.add_column(title, justify="right")
        there = [row for row in rows if row.measure == "accuracy" and row.keys["depth"] == ALL]
        for task in self._asked.tasks:
            for run in self._runs:
                for learn in run.modes(self._config.evaluation.without_learning):
                    mode = (learn and run.learns, task)
                    own = [row for row in there if (row.run, *_mode(row)) == (run.name, *mode)]
                    whole = {row.context: f"{row.value:.2f}" for row in own if _reach(row) == ALL}
                    cells = [whole.get(length, "failed") for length in self._lengths]
                    cells += [_pooled([r for r in own if _reach(r) == x]) for x in (INSIDE, BEYOND)]
                    off = ", not learning" * (run.learns and not learn)
                    table.add_row(task.removeprefix("niah_"), run.name + off, *cells)
        return table

    def draw(self, rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
        """`needles.png`: depth and length; `needles_by_distance.png`: distance from the answer."""
        good = [row for row in rows if row.value is not None]
        depths = [r for r in good if r.measure == "accuracy" and r.keys["depth"] != ALL]
        distances = [row for row in good if row.measure == "accuracy_at_distance"]
        if not depths:
            return []
        self._draw_depths(depths, folder / "needles.png", title)
        if len({row.keys["distance_from"] for row in distances}) < 2:
            return [folder / "needles.png"]
        self._draw_distances(distances, folder / "needles_by_distance.png", title)
        return [folder / "needles.png", folder / "needles_by_distance.png"]

    def _draw_distances(self, rows: Sequence[Row], path: Path, title: str) -> None:
        """A panel for each task, a line for each run and mode."""
        tasks = [task for task in self._asked.tasks if any(r.keys["task"] == task for r in rows)]
        figure, panels = figures.pyplot().subplots(
            *(1, len(tasks)),
            figsize=(max(5.5, 1 + 3 * len(tasks)), 3.4),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        starts = sorted({int(row.keys["distance_from"]) for row in rows})
        for axes, task in zip(panels[0], tasks, strict=True):
            for index, run in enumerate(self._runs):
                for learning in (True, False):
                    curve = (run.name, learning, task)
                    there = [r for r in rows if (r.run, *_mode(r)) == curve]
                    if there:
                        off = run.learns and not learning
                        x = [int(row.keys["distance_from"]) * 2**0.5 for row in there]
                        look = figures.style(index, learns=not off)
                        label = f"{run.name}{', not learning' * off}"
                        axes.plot(x, [row.value for row in there], label=label, **look)
                        bounds = [[row.low for row in there], [row.high for row in there]]
                        axes.fill_between(x, *bounds, color=look["color"], alpha=0.1, lw=0)
            for window in {run.window for run in self._runs if run.window}:
                if starts[0] < window < 2 * starts[-1]:
                    figures.mark(axes, window, "window")
            figures.tidy(axes)
            figures.log_tokens(axes, [*starts, 2 * starts[-1]])
            axes.set_ylim(-0.03, 1.03)
            axes.set_title(LABELS[task], fontsize=9, loc="left")
            axes.set_xlabel("needle to answer (tokens)")
        panels[0][0].set_ylabel("needles found (share, 95 % band)")
        figures.legend_below(figure, panels[0][0])
        figures.finish(figure, path, title)

    def _draw_depths(self, good: Sequence[Row], path: Path, title: str) -> None:
        """A heat map of depth and length for every run, mode and task."""
        lines = list(dict.fromkeys((r.run, bool(r.keys["learning"])) for r in good))
        tasks = [task for task in self._asked.tasks if any(r.keys["task"] == task for r in good)]
        plt = figures.pyplot()
        width, height = 0.55 * len(self._lengths) + 1.7, 0.22 * len(self._depths) + 1.0
        figure, panels = plt.subplots(
            *(len(lines), len(tasks)),
            figsize=(max(6.0, len(tasks) * max(width, 2.6) + 1.2), len(lines) * height + 0.8),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        image = None
        for axes_row, (name, learning) in zip(panels, lines, strict=True):
            for axes, task in zip(axes_row, tasks, strict=True):
                there = {
                    (r.context, r.keys["depth"]): r
                    for r in good
                    if (r.run, *_mode(r)) == (name, learning, task)
                }
                image = self._heat(axes, there)
            run = next(run for run in self._runs if run.name == name)
            off = "\nnot learning" * (run.learns and not learning)
            axes_row[0].set_ylabel(f"{name}{off}\ndepth (%)", fontsize=8)
        for axes, task in zip(panels[0], tasks, strict=True):
            axes.set_title(LABELS[task], fontsize=9, loc="left")
        for axes in panels[-1]:
            axes.set_xlabel("length (tokens)", fontsize=8)
        figure.colorbar(image, ax=panels, label="needles found (share)", shrink=0.8, aspect=30)
        note = "; above a white line the needle lies beyond the window"
        figures.finish(figure, path, title + note * any(run.window for run in self._runs))

    def _heat(self, axes: Any, rows: Mapping[tuple, Row]) -> Any:
        """One panel: colours, figures where they can be read, and the window's edge."""
        grid = np.full((len(self._depths), len(self._lengths)), np.nan)
        for y, depth in enumerate(self._depths):
            for x, length in enumerate(self._lengths):
                if row := rows.get((length, depth)):
                    grid[y, x] = row.value
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for x, length in enumerate(self._lengths):
            reach = [
                row.keys["reach"] if (row := rows.get((length, d))) else None for d in self._depths
            ]
            for y, (upper, lower) in enumerate(pairwise(reach)):
                if upper == BEYOND and lower != BEYOND:
                    axes.plot([x - 0.5, x + 0.5], [y + 0.5] * 2, color="white", lw=2)
            if reach and reach[-1] == BEYOND:
                axes.plot([x - 0.5, x + 0.5], [len(reach) - 0.55] * 2, color="white", lw=2)
        if grid.size <= 60:
            for (y, x), value in np.ndenumerate(grid):
                if not np.isnan(value):
                    colour = "black" if value > 0.6 else "white"
                    text = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
                    axes.text(x, y, f"{value:.2g}", **text)
        axes.set_xticks(range(len(self._lengths)), [figures.short(n) for n in self._lengths])
        every = max(1, len(self._depths) // 10)
        ticks = range(0, len(self._depths), every)
        axes.set_yticks(ticks, [f"{self._depths[i]:g}" for i in ticks])
        axes.tick_params(labelsize=8)
        axes.spines[:].set_visible(False)
        return image


def _mode(row: Row) -> tuple[bool, str]:
    """Whether it was learning, and the task."""
    return bool(row.keys["learning"]), str(row.keys["task"])


def _reach(row: Row) -> str:
    return str(row.keys["reach"])


def _pooled(rows: Sequence[Row]) -> str:
    """The share over all prompts of several rows."""
    n = sum(row.n for row in rows)
    return f"{sum(row.n * (row.value or 0.0) for row in rows) / n:.2f}" if n else "-"
