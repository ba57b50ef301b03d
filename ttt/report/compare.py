"""Paths of a plan against B1: differences paired by seed, what they cost, and their stages. No JAX.

A difference of two runs is taken only between runs with the same seed. Intervals are Student's t
over seeds; of losses, where the records hold them by document, over seeds and documents
(`ttt.intervals.nested`). One seed has none.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ttt.infra.plan_manifest import MATCHINGS, PlanManifest
from ttt.intervals import nested, student
from ttt.report.frame import failed_gates, rows_of

REFERENCE = "B1"
"""The path that all others are held against: TTT-E2E from its first step to its last."""
TOKENS_APART = 0.02
"""Share by which the tokens of a token-matched path may miss those of B1: whole steps round."""
_SUMS = ["tokens", "step_hours", "device_hours"]
_LOSSES = ["start_loss", "parent_loss", "warm_loss", "first_loss", "final_loss", "validation_loss"]


class Estimate(NamedTuple):
    """A mean over n seeds, and the bounds of its 95 % interval; None for one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int
    documents: int = 0
    """That the interval is over as well; 0: over seeds alone."""

    def __format__(self, form: str) -> str:
        bounds = "" if self.low is None else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.mean:{form}}{bounds}"


def estimate(samples: Iterable[float | None]) -> Estimate | None:
    """Of the samples that are known; None if there are none."""
    known = [sample for sample in samples if pd.notna(sample)]
    if not known:
        return None
    mean, low, high = map(float, student(np.asarray(known, float)))
    return (
        Estimate(mean, low, high, len(known)) if len(known) > 1 else Estimate(mean, None, None, 1)
    )


def estimate_loss(runs: Sequence[Any], references: Sequence[Any] = ()) -> Estimate | None:
    """Of the runs' validation losses, or of what they are less the references', run by run."""
    losses = [run.validation_loss for run in runs]
    if references:
        others = [run.validation_loss for run in references]
        losses = [own - other for own, other in zip(losses, others, strict=True)]
    found = estimate(losses)
    sums = document_sums(runs, references)
    if found is None or sums is None or not 1 < found.n == len(losses):
        return found
    nll, count = sums
    bounds = nested(np.sum(nll, axis=2), np.sum(count, axis=1))
    return Estimate(*map(float, bounds), found.n, len(count))


def document_sums(
    runs: Sequence[Any], references: Sequence[Any] = ()
) -> tuple[np.ndarray, np.ndarray] | None:
    """Sums of −log p [runs, documents, bins] and counts [documents, bins] of the final evaluations.

    Less those of the references, run by run. None where a record has none, or of other text.
    """
    names = ("learning_documents", "learning_document_count", "learning_document_nll")
    arrays = [run.arrays or {} for run in (*runs, *references)]
    if not arrays or not all(name in own for own in arrays for name in names):
        return None
    documents, count, _ = (arrays[0][name] for name in names)
    if not all(
        np.array_equal(own[names[0]], documents) and np.array_equal(own[names[1]], count)
        for own in arrays
    ):
        return None
    nll = np.stack([own[names[2]] for own in arrays])
    return (nll[: len(runs)] - nll[len(runs) :] if references else nll), count


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
    reference: the row of B1 with the same seed (of the same matching, if it is there), or None.
    """
    rows = []
    for _, own in steps.groupby("branch", sort=False):
        runs = rows_of(own)
        text = no_merit(runs[-1])
        derived = {
            "runs": runs,
            "done": all(run.status == "finished" for run in runs),
            "problems": _problems(runs, manifest.runs),
            "without_merit": [f"{runs[-1].name} does not beat the count model: {text}"]
            * bool(text),
        }
        rows.append({**own.iloc[-1], **own[_SUMS].astype(float).sum(skipna=False), **derived})
    table = pd.DataFrame(rows, dtype=object)
    known = rows_of(table[table["path"] == REFERENCE])
    references = [
        min(
            (r for r in known if r.seed == own.seed),
            key=lambda r: r.matching != own.matching,
            default=None,
        )
        for own in rows_of(table)
    ]
    return table.assign(reference=pd.Series(references, dtype=object))


def no_merit(run: Any) -> str:
    """How a run's held-out loss compares with its count model's, if it is not below that."""
    loss, counts = run.validation_loss, run.count_model_loss
    if loss is None or counts is None or loss < counts:
        return ""
    return f"{loss:.4f} against {counts:.4f}"


def _problems(runs: Sequence[Any], planned: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why a path cannot be relied on; more is asked of its last run."""
    problems = []
    parents: list[Any] = [None, *runs]
    for parent, run in zip(parents, runs, strict=False):
        last, plan = run is runs[-1], planned.get(run.name, {})
        trained = run.status == "finished" and run.runtime_mode == "jax"
        if run.status != "finished":
            problems.append(f"{run.name} is {run.status}")
        elif not trained:
            problems.append(f"{run.name} trained no network: runtime_mode {run.runtime_mode}")
        needed = ["tokens", "step_hours"] + ["validation_loss", "context"] * last
        if trained:
            problems += [f"{run.name} lacks {x}" for x in needed if getattr(run, x) is None]
        if trained and last and run.count_model_loss is None:
            problems.append(f"{run.name} has no count model's loss beside its own")
        problems += failed_gates(plan, f"{run.name} gate failed: {{name}} ({{said}})")
        if run.status == "finished" and plan.get("steps") not in (None, run.steps):
            problems.append(f"{run.name} was to train {plan['steps']} steps and did {run.steps}")
        if parent and trained and not run.restored:
            problems.append(f"{run.name} restored nothing, though {parent.name} is its parent")
        elif parent and trained and (run.parent or "").rpartition("/")[0] != parent.name:
            problems.append(f"{run.name} started from {run.parent}, not from {parent.name}")
    return problems


# ---- comparisons -----------------------------------------------------------------------


def comparisons(table: pd.DataFrame) -> pd.DataFrame:
    """Every path and matching against B1, and B1 itself.

    Columns: way: methods of its runs in their order; method, context, parameters: of the last run;
    seeds: of the plan; loss: `Estimate` of the last run's validation loss; delta: of that less
    B1's, paired by seed, in nats per token; saving: of the share of B1's time that is saved, of the
    steps alone; saving_in_all: the same with waiting for data and saving; tokens, device_hours,
    step_hours, count_model_loss: means over seeds; devices: of all runs of the path and of B1;
    problems: why its numbers cannot decide anything; without_merit: its models that are no better
    than counts; mixed: whether times of different machines are compared.
    """
    order = dict.fromkeys([*MATCHINGS, *table["matching"]])
    groups = dict(list(table.groupby(["path", "matching"], sort=False)))
    keys = [(path, how) for how in order for path in table["path"].unique()]
    rows = [_comparison(groups[key]) for key in keys if key in groups]
    return pd.DataFrame(rows, dtype=object)


def _comparison(own: pd.DataFrame) -> dict[str, Any]:
    mine = rows_of(own)
    first, pairs = mine[0], [(b, b.reference) for b in mine if b.reference is not None]
    missing = f"the plan has no {REFERENCE} to compare with"
    problems = [text for branch in mine for text in branch.problems]
    problems += [f"seed {b.seed}: {missing}" for b in mine if b.reference is None]
    gains, likes = [], []
    if first.path != REFERENCE:
        spoiled = [text for _, r in pairs for text in (*r.problems, *r.without_merit)]
        problems += [f"{REFERENCE}: {text}" for text in spoiled]
        problems += [text for pair in pairs for text in _unlike(*pair)]
        done_pairs = [(b, r) for b, r in pairs if b.done and r.done]
        gains = [_savings(b, r) for b, r in done_pairs]
        known = [pair for pair in done_pairs if None not in [b.validation_loss for b in pair]]
        likes = [pair for pair in known if alike(*pair)]
    done = own[own["done"].astype(bool)]
    runs = [run for pair in pairs or [(b,) for b in mine] for b in pair for run in b.runs]
    devices = tuple(sorted({run.devices for run in runs if run.devices is not None}))
    means = ["tokens", "device_hours", "step_hours", "count_model_loss"]
    return {
        "path": first.path,
        "matching": first.matching,
        "way": " → ".join(run.method or "unknown" for run in first.runs),
        "method": first.method,
        "context": first.context,
        "seeds": tuple(own["seed"]),
        "loss": estimate_loss([b for b in rows_of(done) if b.validation_loss is not None]),
        "delta": estimate_loss(*zip(*likes, strict=True)) if likes else None,
        **{
            name: estimate(gain.get(name) for gain in gains) for name in ("saving", "saving_in_all")
        },
        **done[means].astype(float).mean(skipna=False),
        "parameters": first.parameters,
        "devices": devices,
        "problems": tuple(dict.fromkeys(problems)),
        "without_merit": tuple(text for branch in mine for text in branch.without_merit),
        "mixed": len(devices) > 1,
    }


def alike(mine: Any, theirs: Any) -> bool:
    """Whether two runs were evaluated on the same tokens at the same context."""
    return (mine.context, mine.evaluated_on) == (theirs.context, theirs.evaluated_on)


def _savings(own: Any, reference: Any) -> dict[str, float]:
    """The shares of B1's time that a finished path saves."""
    gain = {}
    for name, hours in (("saving", "step_hours"), ("saving_in_all", "device_hours")):
        if getattr(reference, hours):
            gain[name] = 1 - getattr(own, hours) / getattr(reference, hours)
    return gain


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
    keys, means = ["path", "matching", "number"], ["steps", "tokens", "step_hours", *_LOSSES]
    done = steps["status"] == "finished"
    groups = steps.assign(done=steps["name"].where(done)).groupby(keys, sort=False)
    table = groups.agg(stage=("stage", "first"), runs=("done", lambda names: (*names.dropna(),)))
    finished = steps[done].astype(dict.fromkeys(means, float)).groupby(keys, sort=False)
    table = table.fillna("unknown").join(finished[means].agg(lambda x: x.mean(skipna=False)))
    table["next_start_loss"] = table.groupby(keys[:2], sort=False)["start_loss"].shift(-1)
    table["seeds"] = table["runs"].map(len)
    return table.reset_index()


def reaches(compared: pd.DataFrame) -> pd.DataFrame:
    """How much training every path but B1 takes to B1's loss, between the budgets it was given.

    Columns: path; hours: device-hours of steps, NaN where `said` has the reason; of_reference: the
    same as a share of B1's.
    """
    timed = compared[compared["loss"].notna() & (compared["step_hours"] > 0)]
    references = rows_of(timed[timed["path"] == REFERENCE])
    if not references:
        return pd.DataFrame()
    target, cost = references[0].loss.mean, references[0].step_hours
    rows = []
    for name in compared.loc[compared["path"] != REFERENCE, "path"].unique():
        own = [c for c in rows_of(timed) if c.path == name and not c.mixed]
        hours, said = _reach(sorted((c.step_hours, c.loss.mean) for c in own), target, cost)
        rows.append({"path": name, "hours": hours, "of_reference": hours / cost, "said": said})
    return pd.DataFrame(rows)


def _reach(points: Sequence[tuple[float, float]], target: float, cost: float) -> tuple[float, str]:
    """Loss is taken to fall linearly in the logarithm of time between the nearest two budgets."""
    if not points:
        return np.nan, "no finished path with a loss and a time"
    for (hours, loss), (more, lower) in pairwise(points):
        if loss > target >= lower:
            share = (loss - target) / (loss - lower)
            return hours * (more / hours) ** share, "between two budgets"
    hours, loss = points[-1]
    if loss > target:
        above = f"{loss - target:.4f} nats above it at {hours / cost:.2f} of its time"
        return np.nan, f"not reached: {above}"
    return np.nan, f"reached within the least budget, {points[0][0] / cost:.2f} of its time"
