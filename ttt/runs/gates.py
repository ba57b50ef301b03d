"""What must hold of a run before others are built upon it, read from its record. No JAX."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttt.globs import matches
from ttt.runs.plan import PlannedRun as Run

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
"""Nats between a parent's loss and its child's before the first step, by the compute dtype."""

_NEW_ON_PURPOSE = "**.prime_storage.**"
"""Published names of the prime MLPs and their norms, which a parent without them cannot give."""


@dataclass(frozen=True)
class Gate:
    """One verdict."""

    name: str
    holds: bool | None
    """None: it does not apply, and `said` tells why."""
    said: str


@dataclass(frozen=True)
class Evidence:
    """What a run's record holds."""

    settings: Mapping[str, Any]
    """`config.yaml`."""
    attempts: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def mode(self) -> str:
        """`jax`, `token_stats` or `simulate`."""
        return self.settings["training"]["runtime_mode"]

    def first(self, key: str) -> Mapping[str, Any] | None:
        """What the attempt that began the run has under `key`; later ones went on from itself."""
        found = [attempt[key] for attempt in self.attempts if attempt.get(key)]
        return found[0] if found else None


def check(run: Run, evidence: Evidence) -> list[Gate]:
    """All gates of a finished run."""
    return [
        finite_loss(evidence),
        restore_account(run, evidence),
        warm_start(run, evidence),
    ]


def finite_loss(evidence: Evidence) -> Gate:
    """Whether every training and evaluation loss is a finite number."""
    name = "finite loss"
    if evidence.mode == "simulate":
        return Gate(name, None, "not applicable: runtime_mode=simulate has no losses")
    keys = ("loss", "eval_loss", "final_eval_loss")
    losses = [
        (row["step"], key, row[key]) for row in evidence.metrics for key in keys if key in row
    ]
    if not losses:
        return Gate(name, False, "there is no loss in metrics.jsonl")
    bad = [f"{key} {value} at step {step}" for step, key, value in losses if not _finite(value)]
    if bad:
        return Gate(name, False, f"{len(bad)} of {len(losses)} are not: {', '.join(bad[:3])}")
    return Gate(name, True, f"all {len(losses)} losses")


def restore_account(run: Run, evidence: Evidence) -> Gate:
    """Whether every parameter came from the planned parent, or is new or narrowed on purpose."""
    name = "restore account"
    if run.parent is None:
        return Gate(name, None, "not applicable: the run starts from no other")
    if evidence.mode != "jax":
        return Gate(name, None, f"not applicable: runtime_mode={evidence.mode} has no parameters")
    account = evidence.first("restored")
    if account is None:
        return Gate(name, False, f"the record has no account of what was taken from {run.parent}")
    kinds = ("restored", "initialised", "moved", "narrowed", "unused")
    restored, initialised, moved, narrowed, unused = (account.get(kind, ()) for kind in kinds)
    vacated = {entry.split(" -> ")[0] for entry in moved}  # its old weights serve elsewhere
    faults = []
    if f"/{run.parent}/" not in str(account.get("from", "")):
        faults.append(f"taken from {account.get('from')}, not from {run.parent}")
    if account.get("part") != "params" or not restored:
        faults.append(f"part {account.get('part')} with {len(restored)} restored parameters")
    random = {leaf for leaf in initialised if not matches(_NEW_ON_PURPOSE, leaf)} - vacated
    if random:
        faults.append(f"random: {', '.join(sorted(random))}")
    if initialised and run.parent_method == "e2e":
        faults.append(f"random though the parent has them: {', '.join(initialised)}")
    if run.method == "e2e" and run.parent_method != "e2e" and not (initialised or moved):
        faults.append("no prime MLP is new, though the parent has none")
    if unused:
        faults.append(f"unused: {', '.join(unused)}")
    counts = (
        f"{len(restored)} restored, {len(initialised)} new, {len(moved)} of the restored moved, "
        f"{len(narrowed)} narrowed"
    )
    if faults:
        return Gate(name, False, f"{counts}; {'; '.join(faults)}")
    return Gate(name, True, f"{counts}, from {run.parent}")


def warm_start(run: Run, evidence: Evidence) -> Gate:
    """Whether the model before its first step predicts as its parent does.

    Where the start keeps the parent's function, to a tolerance. Where the parent was narrowed: the
    loss is nearer to the parent's than to ln V, that of a model which knows nothing.
    """
    name = "warm start"
    if run.parent is None:
        return Gate(name, None, "not applicable: the run starts from no other")
    if evidence.mode != "jax":
        return Gate(name, None, f"not applicable: runtime_mode={evidence.mode} has no such loss")
    start = evidence.first("start")
    if start is None:
        return Gate(name, False, "the record has no loss from before the first step")
    warm, parent, why = start.get("warm_loss"), start.get("parent_loss"), start.get("why", "")
    narrowed = (evidence.first("restored") or {}).get("narrowed", ())
    if warm is None or parent is None:
        if start.get("preserving"):
            return Gate(name, False, f"the start is to keep the function, but no loss tells: {why}")
        return Gate(name, None, f"not applicable: {why or 'there is no loss of the parent'}")
    distance = abs(warm - parent)
    told = f"loss {warm:.5f}, of the parent {parent:.5f}"
    if start.get("preserving"):
        bound = TOLERANCE[evidence.settings["model"]["compute_dtype"]]
        return Gate(name, distance <= bound, f"{told}: {distance:.1e} apart, at most {bound:.0e}")
    if narrowed:
        ignorant = math.log(evidence.settings["model"]["vocab_size"])
        told = f"{told}, ln V {ignorant:.5f}: it must be nearer to the parent's"
        return Gate(name, distance < abs(warm - ignorant), told)
    return Gate(name, None, f"not applicable: the function changes on purpose ({why}); {told}")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
