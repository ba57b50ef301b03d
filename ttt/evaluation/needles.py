"""Recall of needles in haystacks: RULER's tasks over depths and lengths, greedy answers."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from ttt import figures
from ttt.evaluation import resources, ruler
from ttt.evaluation.resources import LoadedModels
from ttt.evaluation.result import Key, Row, estimate, printed
from ttt.evaluation.ruler import Haystack, Prompt
from ttt.evaluation.suite import AbstractSuite, Job, OnProgress, Reader
from ttt.inference.sampling import Sampling
from ttt.infra.progress import Progress
from ttt.intervals import share
from ttt.knobs import Config
from ttt.model.trained import TrainedModel

ALL, INSIDE, BEYOND, BOTH = "all", "inside", "beyond", "both"
"""Where needles lie: the window still holds them when the answer starts, or it does not."""


class Needles(AbstractSuite):
    """Every run on every task and length, learning or not."""

    name = "needles"
    keys = ("learning", "task", "depth", "reach", "distance_from")

    def __init__(self, config: Config, runs: Sequence[TrainedModel], models: LoadedModels):
        super().__init__(config, runs, models)
        self._settings = settings = config.evaluation.needles
        self._lengths = settings.lengths or (config.training.seq_length,)
        self._depths = ruler.depths(settings.depths) if settings.depths else []
        self._tokenizers = {run.name: resources.tokenizer(config, run) for run in runs}
        self._haystacks: dict[str, Haystack] = {"noise": ruler.noise()}
        if "essay" in {ruler.TASKS[task]["haystack"] for task in settings.tasks}:
            self._haystacks["essay"] = ruler.essays(settings.haystack)
        self._answers: dict[tuple[Reader, str], list[dict[str, Any]]] = {}
        self._prompts: dict[tuple[str, int], list[Prompt]] = {}
        cells = list(product(settings.tasks, self._lengths))
        with Progress(len(cells), "needles: prompts") as progress:
            for done, (task, length) in enumerate(cells, start=1):
                self._prompts[task, length] = ruler.make_prompts(
                    task,
                    self._haystacks[ruler.TASKS[task]["haystack"]],
                    # All runs answer the same prompts, so they share a tokenizer.
                    self._tokenizers[runs[0].name],
                    length=length,
                    tokens_to_generate=settings.tokens_to_generate,
                    depths=self._depths,
                    samples=settings.samples,
                    seed=config.evaluation.seed,
                )
                progress.update(done)

    def jobs(self, run: TrainedModel) -> Iterator[Job]:
        """One for each length, mode and task."""
        for length in self._lengths:
            for reader in self.readers_of(run):
                for task in self._settings.tasks:
                    keys = {"task": task, "learning": reader.learning}
                    work = partial(self._measure, reader, task, length)
                    yield Job(length, keys, len(self._prompts[task, length]), work)

    def _measure(
        self, reader: Reader, task: str, length: int, on_progress: OnProgress
    ) -> list[Row]:
        records = self._ask(reader, task, length, on_progress)
        self._answers.setdefault((reader, task), []).extend(records)
        answers = pd.DataFrame(records)
        groups: list[tuple[Key, str, pd.DataFrame]] = [(ALL, ALL, answers)]
        groups += [(ALL, reach, answers[answers.reach == reach]) for reach in (INSIDE, BEYOND)]
        for depth in self._depths:
            own = answers[answers.depth == depth]
            groups.append((depth, own.reach.iloc[0] if own.reach.nunique() == 1 else BOTH, own))
        rows = []
        for depth, reach, own in groups:
            if len(own):
                place = {"depth": depth, "reach": reach, "distance": round(own.distance.mean())}
                keys = {"task": task, "learning": reader.learning, **place}
                rows.append(self.row(reader.run, length, "accuracy", keys=keys, **_recall(own)))
        return rows

    def comparisons(self) -> list[Row]:
        """Accuracy by the needle's distance from the answer, all lengths together."""
        measure, length = "accuracy_at_distance", max(self._lengths)
        rows = []
        for (reader, task), records in self._answers.items():
            answers = pd.DataFrame(records)
            octaves = answers.distance.map(lambda tokens: int(tokens).bit_length())
            for octave in sorted(set(octaves)):
                place = {"distance_from": 2 ** (octave - 1), "distance_to": 2**octave}
                keys = {"task": task, "learning": reader.learning, **place}
                recall = _recall(answers[octaves == octave])
                rows.append(self.row(reader.run, length, measure, keys=keys, **recall))
        return rows

    def _ask(
        self, reader: Reader, task: str, length: int, on_progress: OnProgress
    ) -> list[dict[str, Any]]:
        """The lines of `needles-answers.csv` for these prompts."""
        run, evaluation = reader.run, self.config.evaluation
        tokenizer, prompts = self._tokenizers[run.name], self._prompts[task, length]
        written = resources.write_on(
            self.models.engine(run, length, learn=reader.learning),
            [prompt.tokens for prompt in prompts],
            self._settings.tokens_to_generate,
            Sampling(temperature=0.0),
            seed=evaluation.seed,
            batch_size=evaluation.batch_size,
            stop=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
            on_progress=on_progress,
        )
        keys = {"run": run.name, "task": task, "learning": reader.learning, "context": length}
        answers = []
        for prompt, ids in zip(prompts, written, strict=True):
            said = tokenizer.decode(ids)
            # The first token of the answer is predicted at the prompt's last one.
            inside = run.window is None or prompt.distance < run.window
            answers.append(
                {
                    **keys,
                    "depth": prompt.depth,
                    "distance": prompt.distance,
                    "reach": INSIDE if inside else BEYOND,
                    "right": int(ruler.holds(said, prompt.answer)),
                    "answer": prompt.answer,
                    "said": said,
                }
            )
        return answers

    # ---- what people see ----

    def files(self) -> dict[str, str]:
        """Every prompt's answer."""
        answers = pd.DataFrame([answer for own in self._answers.values() for answer in own])
        return {"needles-answers.csv": answers.to_csv(index=False, lineterminator="\n")}

    def notes(self) -> dict[str, Any]:
        """Sources and settings."""
        return {
            "what": "share of greedy answers that contain the needle's value (string match)",
            "after": "RULER, arXiv 2404.06654",
            "not_as_in_ruler": ruler.differences(drawn=not self._depths),
            "haystacks": {name: haystack.source for name, haystack in self._haystacks.items()},
            "depths": self._depths or "drawn",
            "samples": self._settings.samples,
            "tokens_to_generate": self._settings.tokens_to_generate,
            "distance": "tokens from the needle's start to the prompt's end; inside: < window",
            "windows": {run.name: run.window for run in self.runs},
            "interval": "95 %, Wilson",
        }

    def table(self, rows: pd.DataFrame) -> Table:
        """Accuracy by task, run and length, and of all lengths inside and beyond the window."""
        columns: dict[str, list[str]] = defaultdict(list)
        rows = rows[(rows.measure == "accuracy") & (rows.depth == ALL)]
        for task, reader in product(self._settings.tasks, self.readers):
            own = reader.own(rows[rows.task == task])
            whole = own[own.reach == ALL]
            values = dict(zip(whole.context, whole.value, strict=True))
            columns["task"].append(task.removeprefix("niah_"))
            columns["run"].append(reader.label)
            for n in self._lengths:
                columns[f"{n:,}"].append(f"{values[n]:.2f}" if n in values else "failed")
            for name, reach in (("in window", INSIDE), ("beyond", BEYOND)):
                part = own[own.reach == reach]
                value = f"{np.average(part.value, weights=part.n):.2f}" if len(part) else "-"
                columns[name].append(value)
        table = printed("needles found (share of prompts)", columns, names=2)
        table.caption = f"not as in RULER: {'; '.join(self.notes()['not_as_in_ruler'])}"
        return table

    def draw(self, rows: pd.DataFrame, folder: Path, title: str) -> list[Path]:
        """`needles.png`: depth and length; `needles_by_distance.png`: distance from the answer."""
        paths = []
        depths = rows[(rows.measure == "accuracy") & (rows.depth != ALL)]
        if len(depths):
            paths.append(folder / "needles.png")
            self._draw_depths(depths.assign(depth=depths.depth.astype(float)), paths[-1], title)
        distances = rows[rows.measure == "accuracy_at_distance"]
        if distances.distance_from.nunique() > 1:
            paths.append(folder / "needles_by_distance.png")
            self._draw_distances(distances, paths[-1], title)
        return paths

    def _draw_distances(self, rows: pd.DataFrame, path: Path, title: str) -> None:
        """A panel for each task, a line for each run and mode."""
        tasks = [task for task in self._settings.tasks if task in set(rows.task)]
        figure, panels = figures.grid(
            1, len(tasks), (max(8.0, 1 + 3 * len(tasks)), 3.4), sharey=True
        )
        starts = sorted(map(int, set(rows.distance_from)))
        for axes, task in zip(panels[0], tasks, strict=True):
            own = rows[rows.task == task]
            self.plot(axes, own.distance_from * 2**0.5, own, band=0.1)
            self.mark_windows(axes, starts[0], 2 * starts[-1])
            figures.log_tokens(axes, [*starts, 2 * starts[-1]])
            axes.set_ylim(-0.03, 1.03)
            axes.set_title(ruler.TASKS[task]["label"], fontsize=9, loc="left")
            axes.set_xlabel("needle to answer (tokens)")
        panels[0][0].set_ylabel("needles found (share, 95 % band)")
        figures.legend_below(figure, panels[0][0])
        figures.finish(figure, path, title)

    def _draw_depths(self, rows: pd.DataFrame, path: Path, title: str) -> None:
        """A heat map of depth and length for every run, mode and task."""
        readers = [reader for reader in self.readers if len(reader.own(rows))]
        tasks = [task for task in self._settings.tasks if task in set(rows.task)]
        width, height = 0.55 * len(self._lengths) + 1.7, 0.22 * len(self._depths) + 1.0
        size = max(6.0, len(tasks) * max(width, 2.6) + 1.2), len(readers) * height + 0.8
        figure, panels = figures.grid(len(readers), len(tasks), size, sharex=True, sharey=True)
        image = None
        for axes_row, reader in zip(panels, readers, strict=True):
            for axes, task in zip(axes_row, tasks, strict=True):
                image = self._heat(axes, reader.own(rows[rows.task == task]))
            axes_row[0].set_ylabel(f"{reader.label.replace(', ', '\n')}\ndepth (%)", fontsize=8)
        for axes, task in zip(panels[0], tasks, strict=True):
            axes.set_title(ruler.TASKS[task]["label"], fontsize=9, loc="left")
        for axes in panels[-1]:
            axes.set_xlabel("length (tokens)", fontsize=8)
        figure.colorbar(image, ax=panels, label="needles found (share)", shrink=0.8, aspect=30)
        note = "; above a white line the needle lies beyond the window"
        figures.finish(figure, path, title + note * any(run.window for run in self.runs))

    def _heat(self, axes: Any, rows: pd.DataFrame) -> Any:
        """One panel: colours, figures where they can be read, and the window's edge."""
        table = rows.pivot(index="depth", columns="context", values=["value", "reach"])
        table = table.reindex(index=self._depths)
        value, reach = (
            table[name].reindex(columns=list(self._lengths)) for name in ("value", "reach")
        )
        grid = value.to_numpy(float)
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for x, length in enumerate(self._lengths):
            beyond = [*(reach[length] == BEYOND), False]
            for y, (upper, lower) in enumerate(pairwise(beyond)):
                if upper and not lower:
                    edge = y + (0.5 if y < len(self._depths) - 1 else 0.45)
                    axes.plot([x - 0.5, x + 0.5], [edge, edge], color="white", lw=2)
        if grid.size <= 60:
            for y, x in np.argwhere(~np.isnan(grid)):
                colour = "black" if grid[y, x] > 0.6 else "white"
                text = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
                axes.text(x, y, f"{grid[y, x]:.2g}", **text)
        axes.set_xticks(range(len(self._lengths)), [figures.short(n) for n in self._lengths])
        every = max(1, len(self._depths) // 10)
        axes.set_yticks(
            range(0, len(self._depths), every), [f"{depth:g}" for depth in self._depths[::every]]
        )
        axes.tick_params(labelsize=8)
        axes.spines[:].set_visible(False)
        return image


def _recall(answers: pd.DataFrame) -> dict[str, Any]:
    """The share of right answers, as the fields of a row."""
    interval = share(int(answers.right.sum()), len(answers))
    return {**estimate(interval), "n": len(answers), "unit": "share of prompts"}
