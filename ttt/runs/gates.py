"""What must hold of a run before others are built upon it, read from its record. No JAX."""

import math

from ttt.globs import matches
from ttt.infra.plan_manifest import Gate
from ttt.infra.record import StoredRun
from ttt.runs.plan import PlannedRun

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
"""Nats between a parent's loss and its child's before the first step, by the compute dtype."""

_NEW_ON_PURPOSE = "**.prime_storage.**"
"""Published names of the prime MLPs and their norms, which a parent without them cannot give."""


def check(run: PlannedRun, record: StoredRun) -> list[Gate]:
    """All gates of a finished run."""
    return [finite_loss(record), restore_account(run, record), warm_start(run, record)]


def finite_loss(record: StoredRun) -> Gate:
    """Whether every training and evaluation loss is a finite number."""
    name = "finite loss"
    if record.mode == "simulate":
        return Gate(name, None, "not applicable: runtime_mode=simulate has no losses")
    keys = ("loss", "eval_loss", "final_eval_loss")
    losses = [(row["step"], key, row[key]) for row in record.metrics for key in keys if key in row]
    if not losses:
        return Gate(name, False, "metrics.jsonl has no loss")
    bad = [
        f"{key} {value} at step {step}"
        for step, key, value in losses
        if not (isinstance(value, int | float) and math.isfinite(value))
    ]
    if bad:
        return Gate(name, False, f"{len(bad)} of {len(losses)} are not: {', '.join(bad[:3])}")
    return Gate(name, True, f"all {len(losses)} losses")


def _no_start(run: PlannedRun, record: StoredRun) -> str:
    """Why a run took no parameters from a parent; empty: it did."""
    if run.parent is None:
        return "not applicable: the run starts from no other"
    if record.mode != "jax":
        return f"not applicable: runtime_mode={record.mode} has no parameters"
    return ""


def restore_account(run: PlannedRun, record: StoredRun) -> Gate:
    """Whether every parameter came from the planned parent, or is new or narrowed on purpose."""
    name = "restore account"
    if reason := _no_start(run, record):
        return Gate(name, None, reason)
    accounts = record.noted("restored")
    if not accounts:
        return Gate(name, False, f"the record has no account of what was taken from {run.parent}")
    account = accounts[0]  # of the attempt that began the run; later ones went on from itself
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


def warm_start(run: PlannedRun, record: StoredRun) -> Gate:
    """Whether the model before its first step predicts as its parent does.

    Where the start keeps the parent's function, to a tolerance. Where the parent was narrowed: the
    loss is nearer to the parent's than to ln V, that of a model which knows nothing.
    """
    name = "warm start"
    if reason := _no_start(run, record):
        return Gate(name, None, reason)
    starts = record.noted("start")
    if not starts:
        return Gate(name, False, "the record has no loss from before the first step")
    start = starts[0]
    warm, parent, why = start.get("warm_loss"), start.get("parent_loss"), start.get("why", "")
    narrowed = any(account.get("narrowed") for account in record.noted("restored")[:1])
    if warm is None or parent is None:
        if start.get("preserving"):
            return Gate(name, False, f"the start must keep the function, but has no losses: {why}")
        return Gate(name, None, f"not applicable: {why or 'the parent has no loss'}")
    distance = abs(warm - parent)
    losses = f"loss {warm:.5f}, of the parent {parent:.5f}"
    if start.get("preserving"):
        bound = TOLERANCE[record.settings["model"]["compute_dtype"]]
        return Gate(name, distance <= bound, f"{losses}: {distance:.1e} apart, at most {bound:.0e}")
    if narrowed:
        ignorant = math.log(record.settings["model"]["vocab_size"])
        losses = f"{losses}, ln V {ignorant:.5f}: it must be nearer to the parent's"
        return Gate(name, distance < abs(warm - ignorant), losses)
    return Gate(name, None, f"not applicable: the function changes on purpose ({why}); {losses}")
