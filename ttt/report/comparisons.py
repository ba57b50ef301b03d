"""Paths of a plan against B1: differences paired by seed, what they cost, and their stages. No JAX.

A difference of two runs is taken only between runs with the same seed. With n seeds the interval is
Student's with n − 1 degrees of freedom; with one seed there is none.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ttt.intervals import student
from ttt.report.manifest import Manifest, PlannedPath
from ttt.report.records import Run

REFERENCE = "B1"
"""The path that all others are held against: TTT-E2E from its first step to its last."""
TOKENS_APART = 0.02
"""Share by which the tokens of a token-matched path may miss those of B1: whole steps round."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and the bounds of its 95 % interval where there is more than one."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Estimate | None":
        """None of no samples."""
        if not samples:
            return None
        value, low, high = (float(x) for x in student(np.asarray(samples, float)))
        n = len(samples)
        return cls(value, *((low, high) if n > 1 else (None, None)), n)


@dataclass(frozen=True)
class Branch:
    """A path with one seed, added up over its runs."""

    path: str
    matching: str
    seed: int | None
    runs: tuple[Run, ...]
    problems: tuple[str, ...]
    """Why it cannot be relied on."""

    @property
    def last(self) -> Run:
        """The run whose model the path leads to."""
        return self.runs[-1]

    @property
    def without_merit(self) -> list[str]:
        """That its model is no better than counting token pairs, if so."""
        run = self.last
        if run.beats_count_model is not False:
            return []
        losses = f"{run.validation_loss:.4f} against {run.count_model_loss:.4f}"
        return [f"{run.name} does not beat the count model: {losses}"]

    @property
    def done(self) -> bool:
        """Whether all of its runs are finished."""
        return all(run.status == "finished" for run in self.runs)

    def total(self, name: str) -> float | None:
        """Sum of a column over the runs; None if one of them lacks it."""
        values = [getattr(run, name) for run in self.runs]
        return None if None in values else float(sum(values))


@dataclass(frozen=True)
class Stage:
    """A run of a path: where it started, where it ended, what comes of it; means over seeds."""

    path: str
    matching: str
    number: int
    stage: str
    runs: tuple[str, ...]
    steps: float | None
    tokens: float | None
    step_hours: float | None
    start_loss: float | None
    """Held-out loss before the first step."""
    parent_loss: float | None
    warm_loss: float | None
    """Before the first step, on the tokens of `parent_loss`."""
    first_loss: float | None
    final_loss: float | None
    validation_loss: float | None
    next_start_loss: float | None
    """Held-out loss from which the next stage starts, at its own context."""
    seeds: int
    """Whose run is finished, and counts."""


@dataclass(frozen=True)
class Comparison:
    """A path against B1, under one matching."""

    path: str
    matching: str
    way: str
    """Methods of its runs in their order."""
    method: str | None
    """Of the last run."""
    context: int | None
    seeds: tuple[int | None, ...]
    """Of the plan."""
    loss: Estimate | None
    """Validation loss of the last run."""
    delta: Estimate | None
    """Validation loss less B1's, paired by seed, in nats per token."""
    saving: Estimate | None
    """Share of B1's training time that is saved; of the steps alone."""
    saving_in_all: Estimate | None
    """The same with waiting for data and saving."""
    tokens: float | None
    device_hours: float | None
    step_hours: float | None
    parameters: int | None
    count_model_loss: float | None
    devices: tuple[str, ...]
    """Of all runs of the path and of B1."""
    problems: tuple[str, ...]
    """Why its numbers cannot decide anything."""
    without_merit: tuple[str, ...]
    """Its models that are no better than counting token pairs: nothing is won with them."""

    @property
    def mixed(self) -> bool:
        """Whether times of different machines are compared."""
        return len(self.devices) > 1


def branches(manifest: Manifest, runs: Sequence[Run]) -> list[Branch]:
    """Every path and seed of the plan, with the runs that are there or not."""
    by_name = {run.name: run for run in runs}
    return [_branch(path, manifest, by_name) for path in manifest.paths if path.runs]


def compare(manifest: Manifest, found: Sequence[Branch]) -> list[Comparison]:
    """Every path and matching, B1 itself included."""
    return [
        _comparison([b for b in found if (b.path, b.matching) == (path, matching)], found)
        for matching in manifest.matchings
        for path in manifest.names
        if any((b.path, b.matching) == (path, matching) for b in found)
    ]


@dataclass(frozen=True)
class Reach:
    """How much training a path takes to B1's loss, between the budgets that it was given."""

    path: str
    hours: float | None
    """Device-hours of steps; None: `said` has the reason."""
    of_reference: float | None
    """The same as a share of B1's."""
    said: str


def reaches(found: Sequence[Comparison]) -> list[Reach]:
    """Of every path but B1, from its mean losses and times under all matchings."""
    references = [c for c in found if c.path == REFERENCE and c.loss and c.step_hours]
    if not references:
        return []
    target, cost = references[0].loss, references[0].step_hours
    names = dict.fromkeys(c.path for c in found if c.path != REFERENCE)
    return [
        _reach(name, [c for c in found if c.path == name and not c.mixed], target, cost)
        for name in names
    ]


def _reach(
    path: str, own: Sequence[Comparison], target: Estimate | None, cost: float | None
) -> Reach:
    """Loss is taken to fall linearly in the logarithm of time between the nearest two budgets."""
    points = sorted((c.step_hours, c.loss.mean) for c in own if c.step_hours and c.loss)
    if target is None or cost is None or not points:
        return Reach(path, None, None, "no finished path with a loss and a time")
    for (hours, loss), (more, lower) in pairwise(points):
        if loss > target.mean >= lower:
            share = (loss - target.mean) / (loss - lower)
            at = float(hours * (more / hours) ** share)
            return Reach(path, at, at / cost, "between two budgets")
    hours, loss = points[-1]
    if loss > target.mean:
        above = f"{loss - target.mean:.4f} nats above it at {hours / cost:.2f} of its time"
        return Reach(path, None, None, f"not reached: {above}")
    share = points[0][0] / cost
    return Reach(path, None, None, f"reached within the least budget, {share:.2f} of its time")


def stages(found: Sequence[Branch]) -> list[Stage]:
    """Every stage of every path and matching."""
    keys = dict.fromkeys((branch.path, branch.matching) for branch in found)
    return [
        stage
        for key in keys
        for stage in _stages([b for b in found if (b.path, b.matching) == key])
    ]


def reference_of(branch: Branch, found: Iterable[Branch]) -> Branch | None:
    """B1 with the same seed: the matching's own, else of any, for B1 is the same in all."""
    same = [b for b in found if b.path == REFERENCE and b.seed == branch.seed]
    return next((b for b in same if b.matching == branch.matching), same[0] if same else None)


# ---- one branch ------------------------------------------------------------------------


def _branch(path: PlannedPath, manifest: Manifest, by_name: dict[str, Run]) -> Branch:
    there = tuple(by_name.get(name) or Run(name, "not in the manifest") for name in path.runs)
    problems = [text for run in there for text in _problems(run, last=run is there[-1])]
    problems += [
        f"{run.name} gate failed: {gate.name} ({gate.said})"
        for run in there
        if run.name in manifest.runs
        for gate in manifest.runs[run.name].gates
        if gate.holds is False
    ]
    problems += [
        f"{run.name} was to train {manifest.runs[run.name].steps} steps and did {run.steps}"
        for run in there
        if run.status == "finished" and manifest.runs[run.name].steps not in (None, run.steps)
    ]
    for parent, child in pairwise(there):
        if child.status == "finished" and child.runtime_mode == "jax":
            problems += _inherited(parent, child)
    return Branch(path.path, path.matching, path.seed, there, tuple(problems))


def _problems(run: Run, *, last: bool) -> list[str]:
    """What keeps a run's numbers from being used; more is asked of a path's `last` one."""
    if run.status != "finished":
        return [f"{run.name} is {run.status}"]
    if run.runtime_mode != "jax":
        return [f"{run.name} trained no network: runtime_mode {run.runtime_mode}"]
    needed = ["tokens", "step_hours", *(["validation_loss", "context"] if last else [])]
    found = [f"{run.name} lacks {name}" for name in needed if getattr(run, name) is None]
    if last and run.count_model_loss is None:
        found.append(f"{run.name} has no count model's loss beside its own")
    return found


def _inherited(parent: Run, child: Run) -> list[str]:
    """Whether `child` took its weights from `parent`, as the plan says."""
    if not child.restored:
        return [f"{child.name} restored nothing, though {parent.name} is its parent"]
    if (child.parent or "").rpartition("/")[0] != parent.name:
        return [f"{child.name} started from {child.parent}, not from {parent.name}"]
    return []


# ---- one comparison --------------------------------------------------------------------


def _comparison(own: Sequence[Branch], found: Sequence[Branch]) -> Comparison:
    pairs = [(branch, reference_of(branch, found)) for branch in own]
    both = [(b, r) for b, r in pairs if r is not None]
    problems = [text for branch in own for text in branch.problems]
    problems += [
        f"seed {b.seed}: the plan has no {REFERENCE} to compare with" for b, r in pairs if not r
    ]
    is_reference = own[0].path == REFERENCE
    if not is_reference:
        spoiled = ((*r.problems, *r.without_merit) for _, r in both)
        problems += [f"{REFERENCE}: {text}" for texts in spoiled for text in texts]
        problems += [text for b, r in both for text in _unlike(b, r)]
    runs = [run for pair in both or [(b,) for b in own] for b in pair for run in b.runs]
    first, done = own[0], [branch for branch in own if branch.done]
    return Comparison(
        path=first.path,
        matching=first.matching,
        way=" → ".join(run.method or "unknown" for run in first.runs),
        method=first.last.method,
        context=first.last.context,
        seeds=tuple(branch.seed for branch in own),
        loss=Estimate.of(_known(branch.last.validation_loss for branch in done)),
        delta=None if is_reference else Estimate.of(_paired(both, _loss_above)),
        saving=None if is_reference else Estimate.of(_paired(both, _saved("step_hours"))),
        saving_in_all=None if is_reference else Estimate.of(_paired(both, _saved("device_hours"))),
        tokens=_mean(branch.total("tokens") for branch in done),
        device_hours=_mean(branch.total("device_hours") for branch in done),
        step_hours=_mean(branch.total("step_hours") for branch in done),
        parameters=first.last.parameters,
        count_model_loss=_mean(branch.last.count_model_loss for branch in done),
        devices=tuple(sorted({run.devices for run in runs if run.devices is not None})),
        problems=tuple(dict.fromkeys(problems)),
        without_merit=tuple(text for branch in own for text in branch.without_merit),
    )


def _unlike(branch: Branch, reference: Branch) -> list[str]:
    """What the two should have in common and have not."""
    found = []
    for name, what in (("context", "context"), ("evaluated_on", "held-out tokens")):
        mine, theirs = getattr(branch.last, name), getattr(reference.last, name)
        if None not in (mine, theirs) and mine != theirs:
            found.append(
                f"{branch.last.name} has another {what} than {REFERENCE}: {mine}, {theirs}"
            )
    tokens, of_reference = branch.total("tokens"), reference.total("tokens")
    if branch.matching == "tokens" and tokens and of_reference:
        apart = tokens / of_reference - 1
        if abs(apart) > TOKENS_APART:
            found.append(
                f"seed {branch.seed}: {tokens:,.0f} tokens against {of_reference:,.0f} of "
                f"{REFERENCE} ({apart:+.1%}) are not matched"
            )
    return found


def _loss_above(branch: Branch, reference: Branch) -> float | None:
    mine, theirs = branch.last, reference.last
    if mine.context != theirs.context or mine.evaluated_on != theirs.evaluated_on:
        return None
    if mine.validation_loss is None or theirs.validation_loss is None:
        return None
    return mine.validation_loss - theirs.validation_loss


def _saved(name: str) -> Callable[[Branch, Branch], float | None]:
    def share(branch: Branch, reference: Branch) -> float | None:
        mine, theirs = branch.total(name), reference.total(name)
        return None if mine is None or not theirs else 1 - mine / theirs

    return share


def _paired(
    pairs: Sequence[tuple[Branch, Branch]], measure: Callable[[Branch, Branch], float | None]
) -> list[float]:
    """One number for each seed that has both of finished runs."""
    return _known(measure(b, r) for b, r in pairs if b.done and r.done)


# ---- stages ----------------------------------------------------------------------------


def _stages(own: Sequence[Branch]) -> list[Stage]:
    longest = max(own, key=lambda branch: len(branch.runs)).runs
    columns = [
        [b.runs[i] for b in own if i < len(b.runs) and b.runs[i].status == "finished"]
        for i in range(len(longest))
    ]
    after = [*columns[1:], []]
    return [
        Stage(
            path=own[0].path,
            matching=own[0].matching,
            number=number,
            stage=longest[number - 1].stage or "unknown",
            runs=tuple(run.name for run in runs),
            **{name: _mean(getattr(run, name) for run in runs) for name in _MEANS},
            next_start_loss=_mean(run.start_loss for run in following),
            seeds=len(runs),
        )
        for number, (runs, following) in enumerate(zip(columns, after, strict=True), start=1)
    ]


_MEANS = (
    *("steps", "tokens", "step_hours", "start_loss", "parent_loss", "warm_loss"),
    *("first_loss", "final_loss", "validation_loss"),
)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    """None if any is unknown: a mean over some seeds would be compared with one over all."""
    there = list(values)
    return None if not there or None in there else float(np.mean(_known(there)))
