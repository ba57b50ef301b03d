"""The study of a real model that learns while it reads: trials, arms, measurements (script 15).

What is run stands in configs/research/adaptation_study.yaml; why, in docs/adaptation_study.md.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ttt.config import config_dir, experiments_root
from ttt.errors import RunError, UserError
from ttt.experiment_rules import EXTERNAL
from ttt.infra.record import RunRecord
from ttt.runs import pilot, settings
from ttt.runs.children import is_finished, measure
from ttt.runs.plan import PathRuns, Plan, PlannedRun, PreparedPlan, planned_run

_PLANNED = ("model", "parent", "settings", "arms", "untrained", "trials", "steps")
"""What may not change under a plan that has begun."""
_RATES = ("training.optimizer_outer.lr", "training.optimizer_inner.lr")


@dataclass(frozen=True)
class Study:
    """The file as it is written."""

    content: Mapping[str, Any]
    flags: Mapping[str, Any]
    """Of script 15."""

    @classmethod
    def load(cls, flags: Mapping[str, Any]) -> "Study":
        """The study that `--study` names."""
        path = config_dir() / "research" / f"{flags['study']}.yaml"
        if not path.is_file():
            raise UserError(f"--study {flags['study']}: there is no {path}; name one that is there")
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        return cls(content, flags)

    @property
    def folder(self) -> str:
        """Of the arms, below the roots of records and checkpoints."""
        return self.flags["exp_folder"] or self.flags["study"]

    @property
    def trials_folder(self) -> str:
        """Of the trials."""
        return f"{self.folder}_trials"

    # ---- plans ----

    def trials(self) -> PreparedPlan:
        """Every arm at every rate, for few steps."""
        given = dict(self.content["trials"])
        steps = given.pop("steps")
        counts = {arm: len(rates) for arm, rates in given.items()}
        if len(set(counts.values())) > 1:
            raise UserError(f"trials: {counts}; give every arm as many")
        runs = [
            self._run(self.trials_folder, trial_name(arm, rates), arm, rates, steps)
            for arm, own in given.items()
            for rates in own
        ]
        return self._prepared(self.trials_folder, runs)

    def arms(self) -> PreparedPlan:
        """The untrained models, then every arm at the rates that were best in the trials."""
        untrained = [
            self._run(self.folder, name, entry["arm"], [self.content["untrained_rate"]], 1)
            for name, entry in self.content["untrained"].items()
        ]
        trained = [
            self._run(self.folder, arm, arm, self.best_rates(arm), self.content["steps"])
            for arm in self.content["arms"]
        ]
        return self._prepared(self.folder, [*untrained, *trained])

    def best_rates(self, arm: str) -> Sequence[float]:
        """Of the trial with the lowest loss on the development split. Raises UserError."""
        losses = {}
        for rates in self.content["trials"][arm]:
            name = trial_name(arm, rates)
            record = RunRecord(self.experiments / self.trials_folder / name)
            losses[tuple(rates)] = final_loss(record, name)
        return min(losses, key=lambda rates: losses[rates])

    @property
    def experiments(self) -> Path:
        """The root of run records."""
        return Path(self.flags["exp_dir"] or experiments_root()).expanduser().absolute()

    def _run(
        self, folder: str, name: str, arm: str, rates: Sequence[float], steps: int
    ) -> PlannedRun:
        entry, parent = self.content["arms"][arm], self.content["parent"]
        experiment = f"external/{self.content['model']}/{entry['experiment']}"
        method, stage, _ = EXTERNAL[entry["experiment"].replace(self.content["model"], "{model}")]
        overrides = (
            *settings.of_run({**self.flags, "exp_folder": folder}),
            *self.content["settings"],
            *entry.get("settings", ()),
            f"training.total_steps={steps}",
            *(f"{key}={rate:g}" for key, rate in zip(_RATES, rates, strict=False)),
            f"training.exp_name={name}",
            settings.override("training.resume_exp_folder", parent["folder"]),
            settings.override("training.resume_exp_name", parent["run"]),
        )
        return planned_run(
            experiment,
            overrides,
            name=name,
            stage="adapt",
            method=method,
            kind=f"{stage}-{arm}",
            parent=parent["run"],
            parent_method="fa",
        )

    def _prepared(self, folder: str, runs: Sequence[PlannedRun]) -> PreparedPlan:
        plan = Plan(tuple(runs), tuple(PathRuns(r.name, "own", None, (r.name,)) for r in runs))
        return PreparedPlan(
            pilot.folder_of(plan, folder),
            {"registry": self.flags["study"], "size": self.content["model"], "runtime_mode": "jax"},
            {key: self.content[key] for key in _PLANNED} | {"override": self.flags["override"]},
            plan,
        )

    # ---- measurements ----

    def measurements(self) -> Iterator[tuple[str, str, Path, list[str]]]:
        """Command, name, folder of its record and overrides of each."""
        root = self.experiments / self.folder
        places = {
            "exp_dir": "deploy_paths.experiments",
            "checkpoint_root": "deploy_paths.checkpoint",
        }
        given = [settings.override(k, self.flags[f]) for f, k in places.items() if self.flags[f]]
        for name, entry in self.content["evaluations"].items():
            first, runs = entry["runs"][0], ",".join(entry["runs"])
            own = [f"evaluation.name={name}", f"evaluation.runs=[{runs}]", *entry["settings"]]
            place = root / f"evaluation-{name}" / "eval"
            yield (
                "evaluate",
                f"evaluation-{name}",
                place,
                [f"+run={self.folder}/{first}", *given, *own],
            )
        for arm in self.content["arms"]:
            own = ["benchmark.calls=[prefill]", "benchmark.repetitions=2"]
            place = root / f"benchmark-{arm}"
            yield "benchmark", place.name, place, [f"+run={self.folder}/{arm}", *given, *own]

    def measure(self, say: Callable[[str], None]) -> None:
        """Every evaluation and timing that is not there yet. Raises RunError where one fails."""
        for command, name, place, overrides in self.measurements():
            if is_finished(place):
                say(f"{name} is there already")
                continue
            say(name)
            log = self.experiments / self.folder / "logs" / f"{name}.log"
            if code := measure(command, overrides, log, self.flags["checkpoint_root"]):
                raise RunError(f"{name} ended with exit code {code}: see {log}")


def trial_name(arm: str, rates: Sequence[float]) -> str:
    """`trial-e2e-0.0003-0.3`."""
    return "-".join(["trial", arm, *(f"{rate:g}" for rate in rates)])


def final_loss(record: RunRecord, name: str) -> float:
    """A finished run's loss on the development split. Raises UserError."""
    rows = record.metrics() if (record.folder / "metrics.jsonl").exists() else []
    losses = [row["final_eval_loss"] for row in rows if "final_eval_loss" in row]
    if not losses:
        raise UserError(f"{record.folder}: {name} has no final loss; run the trials first")
    return losses[-1]
