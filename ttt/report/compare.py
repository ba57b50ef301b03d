"""Paths of a plan against B1: differences paired by seed, what they cost, and their stages. No JAX.

A difference of two runs is taken only between runs with the same seed. With n seeds the interval is
Student's with n − 1 degrees of freedom; with one seed there is none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ttt.infra.plan_manifest import MATCHINGS, PlanManifest
from ttt.intervals import student
from ttt.report.frame import failed_gates, rows_of

REFERENCE = "B1"
"""The path that all others are held against: TTT-E2E from its first step to its last."""
TOKENS_APART = 0.02
"""Share by which the tokens of a token-matched path may miss those of B1: whole steps round."""
_SUMS = ["tokens", "step_hours", "device_hours"]
_MEANS = [
    "steps",
    "tokens",
    "step_hours",
    "start_loss",
    "parent_loss",
    "warm_loss",
    "first_loss",
    "final_loss",
    "validation_loss",
]


class Estimate(NamedTuple):
    """A mean over seeds, and the bounds of its 95 % interval where there is more than one."""

    mean: float
    low: float | None
    high: float | None
    n: int


def estimate(samples: Iterable[float | None]) -> Estimate | None:
    """Of the samples that are known; None if there are none."""
    known = [sample for sample in samples if pd.notna(sample)]
    if not known:
        return None
    value, low, high = (float(x) for x in student(np.asarray(known, float)))
    n = len(known)
    return Estimate(value, low, high, n) if n > 1 else Estimate(value, None, None, n)


# ---- paths -----------------------------------------------------------------------------


def steps_of(manifest: PlanManifest, runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each path, matching, seed and run in it: `branch` numbers the first three together.

    Columns: path, matching, seed (of the plan), branch, number (from 1), and those of the runs.
    """
    paths = pd.DataFrame(manifest.paths, columns=["path", "matching", "seed", "runs"], dtype=object)
    paths = paths[paths["runs"].map(len) > 0]
    rows = paths.reset_index(names="branch").explode("runs").rename(columns={"runs": "name"})
    rows["number"] = rows.groupby("branch").cumcount() + 1
    rows = rows.merge(runs.drop(columns="seed"), on="name", how="left").astype(object)
    rows["status"] = rows["status"].fillna("not in the manifest")
    return rows.where(rows.notna(), None)


def branches(manifest: PlanManifest, steps: pd.DataFrame) -> pd.DataFrame:
    """A row for each path with one seed, added up over its runs.

    Columns are those of its last run, with `_SUMS` over all of them (NaN if one is unknown), and
    runs: the rows of `steps`; done: all are finished; problems: why it cannot be relied on;
    without_merit: that its model is no better than counting pairs of tokens, if so;
    reference: the index of B1 with the same seed, or None.
    """
    rows = []
    for _, own in steps.groupby("branch", sort=False):
        runs = rows_of(own)
        last = runs[-1]
        rows.append(
            {
                **own.iloc[-1],
                **own[_SUMS].astype(float).sum(skipna=False),
                "runs": runs,
                "done": all(run.status == "finished" for run in runs),
                "problems": _problems(runs, manifest.runs),
                "without_merit": [f"{last.name} does not beat the count model: {text}"]
                if (text := no_merit(last))
                else [],
            }
        )
    found = pd.DataFrame(rows, dtype=object)
    found["reference"] = [_reference(own, found) for own in rows_of(found)]
    return found


def no_merit(run: Any) -> str:
    """How a run's held-out loss compares with its count model's, if it is not below that."""
    loss, counts = run.validation_loss, run.count_model_loss
    if loss is None or counts is None or loss < counts:
        return ""
    return f"{loss:.4f} against {counts:.4f}"


def _reference(own: Any, found: pd.DataFrame) -> int | None:
    """B1 with the same seed: the matching's own, else of any, for B1 is the same in all."""
    same = [b for b in rows_of(found) if b.path == REFERENCE and b.seed == own.seed]
    same.sort(key=lambda b: b.matching != own.matching)
    return same[0].Index if same else None


def _problems(runs: Sequence[Any], planned: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why a path cannot be relied on; more is asked of its last run."""
    problems = []
    for run in runs:
        last, plan = run is runs[-1], planned.get(run.name, {})
        if run.status != "finished":
            problems.append(f"{run.name} is {run.status}")
        elif run.runtime_mode != "jax":
            problems.append(f"{run.name} trained no network: runtime_mode {run.runtime_mode}")
        else:
            needed = ["tokens", "step_hours", *(["validation_loss", "context"] if last else [])]
            problems += [f"{run.name} lacks {x}" for x in needed if getattr(run, x) is None]
            if last and run.count_model_loss is None:
                problems.append(f"{run.name} has no count model's loss beside its own")
        problems += failed_gates(plan, f"{run.name} gate failed: {{name}} ({{said}})")
        if run.status == "finished" and plan.get("steps") not in (None, run.steps):
            problems.append(f"{run.name} was to train {plan['steps']} steps and did {run.steps}")
    for parent, child in pairwise(runs):
        if child.status != "finished" or child.runtime_mode != "jax":
            continue
        if not child.restored:
            problems.append(f"{child.name} restored nothing, though {parent.name} is its parent")
        elif (child.parent or "").rpartition("/")[0] != parent.name:
            problems.append(f"{child.name} started from {child.parent}, not from {parent.name}")
    return problems


# ---- comparisons -----------------------------------------------------------------------


def comparisons(found: pd.DataFrame) -> pd.DataFrame:
    """Every path and matching against B1, and B1 itself.

    Columns: way: methods of its runs in their order; method, context, parameters: of the last run;
    seeds: of the plan; loss: `Estimate` of the last run's validation loss; delta: of that less
    B1's, paired by seed, in nats per token; saving: of the share of B1's time that is saved, of the
    steps alone; saving_in_all: the same with waiting for data and saving; tokens, device_hours,
    step_hours, count_model_loss: means over seeds; devices: of all runs of the path and of B1;
    problems: why its numbers cannot decide anything; without_merit: its models that are no better
    than counts; mixed: whether times of different machines are compared.
    """
    order = sorted(
        found["matching"].unique(), key=lambda m: (m not in MATCHINGS, [*MATCHINGS, m].index(m))
    )
    names = found["path"].unique()
    grouped: dict[Any, pd.DataFrame] = dict(list(found.groupby(["path", "matching"], sort=False)))
    keys = [(name, how) for how in order for name in names if (name, how) in grouped]
    return pd.DataFrame([_comparison(grouped[key], found) for key in keys], dtype=object)


def _comparison(own: pd.DataFrame, found: pd.DataFrame) -> dict[str, Any]:
    mine = rows_of(own)
    by_index = {branch.Index: branch for branch in rows_of(found)}
    pairs = [(b, by_index[b.reference]) for b in mine if b.reference is not None]
    problems = [text for branch in mine for text in branch.problems]
    problems += [
        f"seed {b.seed}: the plan has no {REFERENCE} to compare with"
        for b in mine
        if b.reference is None
    ]
    first = mine[0]
    if first.path != REFERENCE:
        spoiled = [text for _, r in pairs for text in (*r.problems, *r.without_merit)]
        problems += [f"{REFERENCE}: {text}" for text in spoiled]
        problems += [text for pair in pairs for text in _unlike(*pair)]
    done = own[own["done"].astype(bool)]
    both = [run for pair in pairs or [(b,) for b in mine] for b in pair for run in b.runs]
    devices = tuple(sorted({run.devices for run in both if run.devices is not None}))

    def paired(measure: Callable[[Any, Any], float | None]) -> Estimate | None:
        if first.path == REFERENCE:
            return None
        return estimate(measure(b, r) for b, r in pairs if b.done and r.done)

    def saved(name: str) -> Callable[[Any, Any], float | None]:
        return lambda b, r: 1 - getattr(b, name) / getattr(r, name) if getattr(r, name) else None

    return {
        "path": first.path,
        "matching": first.matching,
        "way": " → ".join(run.method or "unknown" for run in first.runs),
        "method": first.method,
        "context": first.context,
        "seeds": tuple(own["seed"]),
        "loss": estimate(done["validation_loss"]),
        "delta": paired(loss_above),
        "saving": paired(saved("step_hours")),
        "saving_in_all": paired(saved("device_hours")),
        **{
            name: done[name].astype(float).mean(skipna=False)
            for name in ("tokens", "device_hours", "step_hours", "count_model_loss")
        },
        "parameters": first.parameters,
        "devices": devices,
        "problems": tuple(dict.fromkeys(problems)),
        "without_merit": tuple(text for branch in mine for text in branch.without_merit),
        "mixed": len(devices) > 1,
    }


def alike(mine: Any, theirs: Any) -> bool:
    """Whether two runs were evaluated on the same tokens at the same context."""
    return (mine.context, mine.evaluated_on) == (theirs.context, theirs.evaluated_on)


def loss_above(mine: Any, theirs: Any) -> float | None:
    """Validation loss less the other's."""
    losses = mine.validation_loss, theirs.validation_loss
    return None if None in losses or not alike(mine, theirs) else losses[0] - losses[1]


def _unlike(own: Any, reference: Any) -> list[str]:
    """What the two should have in common and have not."""
    texts = []
    for name, what in (("context", "context"), ("evaluated_on", "held-out tokens")):
        mine, theirs = getattr(own, name), getattr(reference, name)
        if None not in (mine, theirs) and mine != theirs:
            texts.append(f"{own.name} has another {what} than {REFERENCE}: {mine}, {theirs}")
    apart = own.tokens / reference.tokens - 1 if reference.tokens else 0.0
    if own.matching == "tokens" and abs(apart) > TOKENS_APART:
        texts.append(
            f"seed {own.seed}: {own.tokens:,.0f} tokens against {reference.tokens:,.0f} of "
            f"{REFERENCE} ({apart:+.1%}) are not matched"
        )
    return texts


# ---- stages and budgets ----------------------------------------------------------------


def stages(steps: pd.DataFrame) -> pd.DataFrame:
    """Every stage of every path and matching: means over the seeds whose run is finished.

    start_loss: held-out, before the first step; next_start_loss: of the next stage, at its own
    context; warm_loss: before the first step, on the tokens of parent_loss.
    """
    keys = ["path", "matching", "number"]
    numbers = steps.astype(dict.fromkeys(_MEANS, float))
    finished = numbers[numbers["status"] == "finished"].groupby(keys, sort=False)
    table = numbers.groupby(keys, sort=False).agg(stage=("stage", "first")).fillna("unknown")
    table["runs"] = finished["name"].agg(tuple)
    table["runs"] = table["runs"].map(lambda x: x if isinstance(x, tuple) else ())
    table = table.join(finished[_MEANS].agg(lambda values: values.mean(skipna=False)))
    table["next_start_loss"] = table.groupby(keys[:2], sort=False)["start_loss"].shift(-1)
    table["seeds"] = table["runs"].map(len)
    return table.reset_index()


def reaches(compared: pd.DataFrame) -> pd.DataFrame:
    """How much training every path but B1 takes to B1's loss, between the budgets it was given.

    Columns: path; hours: device-hours of steps, NaN where `said` has the reason; of_reference: the
    same as a share of B1's.
    """
    timed = compared[compared["loss"].notna() & (compared["step_hours"] > 0)]
    references = timed[timed["path"] == REFERENCE]
    if references.empty:
        return pd.DataFrame()
    target, cost = references["loss"].iloc[0].mean, references["step_hours"].iloc[0]
    timed = timed[~timed["mixed"].astype(bool)]
    rows = []
    for name in compared.loc[compared["path"] != REFERENCE, "path"].unique():
        own = timed[timed["path"] == name]
        points = sorted((c.step_hours, c.loss.mean) for c in rows_of(own))
        hours, said = _reach(points, target, cost)
        rows.append({"path": name, "hours": hours, "of_reference": hours / cost, "said": said})
    return pd.DataFrame(rows)


def _reach(points: Sequence[tuple[float, float]], target: float, cost: float) -> tuple[float, str]:
    """Loss is taken to fall linearly in the logarithm of time between the nearest two budgets."""
    if not points:
        return np.nan, "no finished path with a loss and a time"
    for (hours, loss), (more, lower) in pairwise(points):
        if loss > target >= lower:
            return hours * (more / hours) ** (
                (loss - target) / (loss - lower)
            ), "between two budgets"
    hours, loss = points[-1]
    if loss > target:
        above = f"{loss - target:.4f} nats above it at {hours / cost:.2f} of its time"
        return np.nan, f"not reached: {above}"
    return np.nan, f"reached within the least budget, {points[0][0] / cost:.2f} of its time"
