"""From registry, size and budget to runs in order of dependency.

How long a run is (steps, tokens) comes from the composed experiment and is never computed a second
time here; budgets reach it through the keys of `size`, from which the experiments' own rules derive
everything else.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from ttt.config import compose, resolve
from ttt.entry import cuda_extra
from ttt.errors import UserError
from ttt.figures import short
from ttt.knobs import Config, TrainingConfig
from ttt.runs.matching import Cost, pretrain_steps
from ttt.runs.registry import Budget, LadderPath, Registry, Size, Stage

_OTHER_ORDER = 1000
"""Between the data seeds of pretraining and adaptation, which read one corpus at one length: with
the same seed the adaptation would read pretraining's first batches once more."""
# What differs between runs of one stage: nothing in the configs follows from it.
_OWN = re.compile(r"(training\.(?:exp_name|resume_exp_name|model_seed|data_seed))=(.*)")


@dataclass(frozen=True)
class PlannedRun:
    """One call of `train`."""

    name: str
    experiment: str
    stage: str
    method: str
    kind: str
    parent: str | None
    parent_method: str | None
    seed: int | None
    steps: int
    seq_length: int
    global_batch_size: int
    overrides: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Trained in all."""
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Over all sequences of a step."""
        return self.seq_length * self.global_batch_size

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of the command `train`."""
        return (f"+experiment={self.experiment}", *self.overrides)

    @property
    def command(self) -> str:
        """For a shell, in the repository, on whatever machine."""
        return shlex.join(["uv", "run", "train", *self.arguments])

    @property
    def command_here(self) -> str:
        """The same with the extra that JAX needs for the GPU of this machine."""
        extra = cuda_extra()
        options = ["--exact", "--extra", extra] if extra else []
        return shlex.join(["uv", "run", *options, "train", *self.arguments])


@dataclass(frozen=True)
class PathRuns:
    """A path's runs in one matching and of one seed, by name and in order."""

    path: str
    matching: str
    seed: int | None
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Runs, each after its parent, and the paths that they make."""

    runs: tuple[PlannedRun, ...]
    paths: tuple[PathRuns, ...]


@dataclass(frozen=True)
class PreparedPlan:
    """A plan that is ready to run, in a folder of its own."""

    folder: Path
    """`<experiments>/<exp_folder>`."""
    head: Mapping[str, str]
    """`registry`, `size` and `runtime_mode`, as the manifest has them."""
    recorded: Mapping[str, Any]
    """The request in full, as the manifest keeps it: another one is refused."""
    plan: Plan
    skip_existing: bool = False
    """Whether records that another plan has made are taken, where their settings are this one's."""
    make_data: Callable[[Console], None] | None = None
    """Makes the token stores that are missing."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Run -> why it cannot run now; the runs that start from it cannot either, and are here too."""
    timed: tuple[PlannedRun, ...] = ()
    """Runs whose seconds per token decide what `rest` plans."""
    rest: Callable[[Mapping[str, float]], Plan] | None = None
    """Seconds per token by kind -> the whole plan; None: `plan` is all."""


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is to hold."""

    registry: Registry
    size: Size
    paths: tuple[str, ...]
    seeds: tuple[int | None, ...]
    """None: the experiments' own, and no seed in the names."""
    budget: Budget
    settings: tuple[str, ...] = ()
    """Overrides of every run: folders, data, the user's own."""


def build(
    request: PlanRequest, matchings: Sequence[str], per_token: Mapping[str, float] | None = None
) -> Plan:
    """The plan of these matchings; `wall_clock` needs `per_token`, in seconds by kind.

    Runs with equal settings are one run. Raises UserError for a budget that cannot be met.
    """
    runs: dict[str, PlannedRun] = {}
    paths = []
    reference = request.registry.reference
    for how in matchings:
        added = () if how == "own" or reference in request.paths else (reference,)
        for seed, name in product(request.seeds, (*added, *request.paths)):
            path = request.registry.path(name)
            steps = _matched_steps(request, path, how, per_token)
            chain = _chain(request, path, steps, seed)
            for run in chain:
                if runs.setdefault(run.name, run) != run:
                    raise UserError(
                        f"{run.name}: two runs of the plan would have this name with different "
                        "settings; give contexts or budgets that differ in the names"
                    )
            paths.append(PathRuns(name, how, seed, tuple(run.name for run in chain)))
    return Plan(tuple(runs.values()), tuple(paths))


def _matched_steps(
    request: PlanRequest, path: LadderPath, how: str, per_token: Mapping[str, float] | None
) -> int | None:
    """Steps of the path's pretraining that match it to the reference; None: the budget's."""
    reference = request.registry.path(request.registry.reference)
    if how == "own" or path.name == reference.name:
        return None
    costs, target = ([_cost(request, stage) for stage in one.stages] for one in (path, reference))
    steps = pretrain_steps(path.name, costs, target, per_token if how == "wall_clock" else None)
    return None if steps == costs[0].steps else steps


def _cost(request: PlanRequest, stage: Stage) -> Cost:
    training = training_of(stage.experiment(request.size), _budgeted(request, stage, None))
    tokens = training.seq_length * training.global_batch_size
    return Cost(stage.kind, training.total_steps, tokens)


def _chain(
    request: PlanRequest, path: LadderPath, pretrain_steps: int | None, seed: int | None
) -> list[PlannedRun]:
    """The runs of one path. pretrain_steps: of the first, where they are not the budget's."""
    chain: list[PlannedRun] = []
    for stage in path.stages:
        parent = chain[-1] if chain else None
        experiment = stage.experiment(request.size)
        overrides = _budgeted(request, stage, None if parent else pretrain_steps)
        training = training_of(experiment, overrides)
        if parent is None and pretrain_steps not in (None, training.total_steps):
            raise UserError(
                f"{experiment}: has {training.total_steps} steps where the plan needs "
                f"{pretrain_steps}; leave training.total_steps to the plan, and change the budget "
                "instead"
            )
        name = stage.run_name(request.size.name, short(training.seq_length))
        if pretrain_steps is not None:
            name += f"-{'after' if parent else 'steps'}{pretrain_steps}"
        if seed is not None:
            name += f"-seed{seed}"
            data_seed = seed + _OTHER_ORDER if stage.stage == "adapt" else seed
            overrides += (f"training.model_seed={seed}", f"training.data_seed={data_seed}")
        if name != _own_name(experiment):
            overrides += (f"training.exp_name={name}",)
        if parent and parent.name != _own_name(parent.experiment):
            overrides += (f"training.resume_exp_name={parent.name}",)
        chain.append(
            PlannedRun(
                name=name,
                experiment=experiment,
                stage=stage.stage,
                method=stage.method,
                kind=stage.kind,
                parent=parent.name if parent else None,
                parent_method=parent.method if parent else None,
                seed=seed,
                steps=training.total_steps,
                seq_length=training.seq_length,
                global_batch_size=training.global_batch_size,
                overrides=overrides,
            )
        )
    return chain


def _own_name(experiment: str) -> str:
    """The name that an experiment's run has unless the plan gives it another."""
    return experiment.rpartition("/")[2]


def _budgeted(request: PlanRequest, stage: Stage, pretrain_steps: int | None) -> tuple[str, ...]:
    """The overrides of a stage but for seed and names."""
    budget = request.budget
    settings = {
        "size.pretrain_steps": pretrain_steps or budget.pretrain_steps,
        "size.pretrain_seq_length": budget.seq_length,
        "size.pretrain_batch_size": budget.global_batch_size,
        "size.window": budget.window,
        "size.chunk": budget.chunk,
    }
    if stage.stage == "adapt" and budget.adapt_steps is not None:
        settings["size.adapt_steps"] = max(1, round(budget.adapt_steps * stage.share))
    if stage.stage == "extend":
        settings["size.extension_steps"] = budget.extension_steps
        settings["training.seq_length"] = budget.extension_length
    own = tuple(f"{key}={value}" for key, value in settings.items() if value is not None)
    return (*request.settings, *own)


# ---- what the configs say ----------------------------------------------------------------


@cache
def _composed(arguments: tuple[str, ...]) -> DictConfig:
    return compose(arguments)


@cache
def training_of(experiment: str, overrides: tuple[str, ...]) -> TrainingConfig:
    """Steps and shapes of a run; raises UserError where its configuration is faulty."""
    return resolve(_composed((f"+experiment={experiment}", *overrides))).training


def planned_run(experiment: str, overrides: Sequence[str], **named: Any) -> PlannedRun:
    """A run of an experiment with overrides, of one seed; named: the fields that they do not tell.

    Raises UserError where its configuration is faulty.
    """
    overrides = tuple(overrides)
    training = training_of(experiment, overrides)
    return PlannedRun(
        experiment=experiment,
        seed=None,
        steps=training.total_steps,
        seq_length=training.seq_length,
        global_batch_size=training.global_batch_size,
        overrides=overrides,
        **named,
    )


@cache
def config_of(run: PlannedRun) -> Config:
    """All settings of a planned run."""
    own = [match.groups() for text in run.arguments if (match := _OWN.fullmatch(text))]
    cfg = deepcopy(_composed(tuple(t for t in run.arguments if not _OWN.fullmatch(t))))
    for key, text in own:
        OmegaConf.update(cfg, key, int(text) if key.endswith("seed") else text)
    return resolve(cfg)


# ---- for a shell -------------------------------------------------------------------------


def commands(request: PlanRequest, matching: str) -> Iterator[str]:
    """The plan as lines in order of dependency; what is not a command is a comment."""
    plan = build(request, [matching])
    yield f"# {request.size.name}: {len(plan.runs)} runs, each after the one that it starts from"
    for path in plan.paths:
        matched = "" if matching == "own" else f", matched by {matching}"
        seed = "" if path.seed is None else f", seed {path.seed}"
        yield f"# {path.path}{matched}{seed}: {request.registry.path(path.path).title}"
        yield f"#   {' -> '.join(path.runs)}"
    for number, run in enumerate(plan.runs, 1):
        yield ""
        paths = dict.fromkeys(path.path for path in plan.paths if run.name in path.runs)
        start = f", from {run.parent}" if run.parent else ""
        yield (
            f"# {number}. {', '.join(paths)}: {run.steps:,} steps, {run.tokens:,} tokens at "
            f"{run.seq_length:,}{start}"
        )
        yield run.command_here
