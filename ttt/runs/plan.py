"""From registry, size and budget to runs in order of dependency.

What a run amounts to (steps, tokens) is asked of the composed experiment, never computed a second
time here; budgets reach it through the keys of `size`, from which the experiments' own rules derive
everything else.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ttt.errors import UserError
from ttt.runs import matching
from ttt.runs.matching import Cost
from ttt.runs.registry import Budget, Registry, Route, Size, Stage


class Facts(NamedTuple):
    """What a composed experiment says of its run."""

    steps: int
    seq_length: int
    global_batch_size: int

    @property
    def tokens_per_step(self) -> int:
        """Over all sequences of a step."""
        return self.seq_length * self.global_batch_size


_OTHER_ORDER = 1000
"""Between the data seeds of pretraining and adaptation, which read one corpus at one length: with
the same seed the adaptation would read pretraining's first batches once more."""

Ask = Callable[[str, tuple[str, ...]], Facts]
"""(experiment, overrides) -> facts."""


@dataclass(frozen=True)
class Run:
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
        """For a shell, in the repository."""
        return shlex.join(["uv", "run", "train", *self.arguments])


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

    runs: tuple[Run, ...]
    paths: tuple[PathRuns, ...]


@dataclass(frozen=True)
class Order:
    """What is asked for."""

    registry: Registry
    size: Size
    paths: tuple[str, ...]
    seeds: tuple[int | None, ...]
    """None: the experiments' own, and no seed in the names."""
    budget: Budget
    settings: tuple[str, ...] = ()
    """Overrides of every run: folders, data, the user's own."""


def build(
    order: Order,
    matchings: Sequence[str],
    ask: Ask,
    per_token: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of these matchings; `wall_clock` needs `per_token`, in seconds by kind.

    Runs with equal settings are one run. Raises UserError for a budget that cannot be met.
    """
    runs: dict[str, Run] = {}
    paths = []
    for how in matchings:
        for seed in order.seeds:
            for name in _with_reference(order, how):
                chain = _chain(order, order.registry.path(name), how, seed, ask, per_token)
                for run in chain:
                    if runs.setdefault(run.name, run) != run:
                        raise UserError(
                            f"{run.name}: two runs of the plan would have this name with different "
                            "settings; give contexts or budgets that tell them apart"
                        )
                paths.append(PathRuns(name, how, seed, tuple(run.name for run in chain)))
    return Plan(tuple(runs.values()), tuple(paths))


def _with_reference(order: Order, how: str) -> tuple[str, ...]:
    """The paths, and before them the one that they are matched to."""
    reference = order.registry.reference
    if how == "own" or reference in order.paths:
        return order.paths
    return (reference, *order.paths)


def _chain(
    order: Order,
    path: Route,
    how: str,
    seed: int | None,
    ask: Ask,
    per_token: Mapping[str, float] | None,
) -> list[Run]:
    """The runs of one path."""
    steps = None
    if how != "own" and path.name != order.registry.reference:
        costs, reference = (
            [_cost(order, stage, ask) for stage in route.stages]
            for route in (path, order.registry.path(order.registry.reference))
        )
        steps = matching.pretrain_steps(
            path.name, costs, reference, per_token if how == "wall_clock" else None
        )
        if steps == costs[0].steps:
            steps = None
    chain: list[Run] = []
    for stage in path.stages:
        chain.append(_run(order, stage, steps, seed, ask, chain[-1] if chain else None))
    return chain


def _cost(order: Order, stage: Stage, ask: Ask) -> Cost:
    facts = ask(_experiment(order.size, stage), _budgeted(order, stage, None))
    return Cost(stage.kind, facts.steps, facts.tokens_per_step)


def _run(
    order: Order,
    stage: Stage,
    pretrain_steps: int | None,
    seed: int | None,
    ask: Ask,
    parent: Run | None,
) -> Run:
    """pretrain_steps: of the path's first stage, where they are not the budget's."""
    experiment = _experiment(order.size, stage)
    overrides = _budgeted(order, stage, pretrain_steps if parent is None else None)
    facts = ask(experiment, overrides)
    if parent is None and pretrain_steps not in (None, facts.steps):
        raise UserError(
            f"{experiment}: has {facts.steps} steps where the plan needs {pretrain_steps}; leave "
            "training.total_steps to the plan, and change the budget instead"
        )
    name = stage.experiment.format(size=order.size.name, context=label(facts.seq_length))
    name = name.rpartition("/")[2]
    if pretrain_steps is not None:
        name += f"-{'steps' if parent is None else 'after'}{pretrain_steps}"
    if seed is not None:
        name += f"-seed{seed}"
        data_seed = seed + _OTHER_ORDER if stage.stage == "adapt" else seed
        overrides += (f"training.model_seed={seed}", f"training.data_seed={data_seed}")
    if name != experiment.rpartition("/")[2]:
        overrides += (f"training.exp_name={name}",)
    if parent is not None and parent.name != _parent_name(order, stage):
        overrides += (f"training.resume_exp_name={parent.name}",)
    return Run(
        name=name,
        experiment=experiment,
        stage=stage.stage,
        method=stage.method,
        kind=stage.kind,
        parent=None if parent is None else parent.name,
        parent_method=None if parent is None else parent.method,
        seed=seed,
        overrides=overrides,
        **facts._asdict(),
    )


def _experiment(size: Size, stage: Stage) -> str:
    context = size.contexts.get(stage.stage, "")
    return f"{size.name}/{stage.experiment.format(size=size.name, context=context)}"


def _parent_name(order: Order, stage: Stage) -> str:
    """The run that the stage's experiment starts from unless told otherwise."""
    return _experiment(order.size, order.registry.stages[stage.parent or ""]).rpartition("/")[2]


def _budgeted(order: Order, stage: Stage, pretrain_steps: int | None) -> tuple[str, ...]:
    """The overrides of a stage but for seed and names."""
    budget = order.budget
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
    return (*order.settings, *own)


def label(tokens: int) -> str:
    """A context as it is written in names: 8192 -> 8K, 512 -> 512."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


_OWNED = re.compile(
    r"training\.(exp_\w+|resume_\w+|load_part|total_steps|seq_length|global_batch_size|\w+_seed"
    r"|runtime_mode|train_mode)"
    r"|size\.(pretrain_(steps|seq_length|batch_size)|window|chunk|adapt_(steps|share)"
    r"|extension_steps)"
    r"|deploy_paths\.(checkpoint|experiments)|experiment|model|method|training|context|deploy"
)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for a user's override that the plan itself decides, or is none."""
    for text in overrides:
        key = text.lstrip("+~").split("=")[0].split("@")[0]
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"--override {text}: must be KEY=VALUE, as for train; write it so")
        if key == "training.wandb_key":  # a plan is printed, and kept in a manifest
            raise UserError(
                "--override training.wandb_key: would stand in every command; set the variable "
                "WANDB_API_KEY in its place"
            )
        if _OWNED.fullmatch(key):
            raise UserError(
                f"--override {text}: the plan sets {key} for each run, from paths, seeds, budget "
                "and folders; use this script's own flags for it"
            )


def with_settings(order: Order, *more: str) -> Order:
    """The same with more overrides for every run."""
    return replace(order, settings=(*order.settings, *more))
