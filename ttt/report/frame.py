"""Run records -> one table, a row for each run; what is not there is named, never guessed. No JAX.

Times are in device-hours, devices × hours: GPU-hours on GPUs. A run's training time is that of its
steps, of waiting for data and of saving, over all attempts; compiling and evaluating stand apart.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ttt import mixers
from ttt.infra.plan_manifest import PlanManifest
from ttt.infra.record import StoredRun, is_run, read_run
from ttt.knobs import ModelConfig
from ttt.plan.parameters import parameter_sizes

TRAINING = ("step", "data_wait", "save")
"""What counts as training time, by its name among a run's seconds."""
COLUMNS = tuple(
    """
    name exp_folder status experiment size stage method seed runtime_mode train_mode context batch
    steps steps_asked tokens parameters width_policy prime_init first_loss final_loss
    validation_loss validation_loss_without_learning count_model_loss start_loss
    start_loss_without_learning parent_loss warm_loss preserving device_hours step_hours
    compile_hours evaluation_hours wall_hours tokens_per_second devices attempts commit evaluated_on
    parent checkpoint restore restored initialised narrowed moved cast unused missing faults notes
    """.split()  # noqa: SIM905
)
"""Columns of the table. None in a cell: `missing` has the reason, as `column: reason`.

status: finished, failed, interrupted; running (or killed: a record cannot tell); pending: planned,
no record; broken: no usable run.json. steps, tokens: done by this run. first_loss, final_loss:
training losses, each of a batch. validation_loss: mean over all scored held-out tokens at the end,
learning if the run learns; count_model_loss: of a count model on the same tokens, whose fingerprint
is evaluated_on. start_loss: held-out, before the first step; warm_loss: the same on the tokens of
parent_loss; preserving: whether the start is meant to keep the parent's function. wall_hours: from
start to end of every attempt. tokens_per_second: median over steps. restore: restored; initialised
(in part or in whole); not attempted (fresh weights were asked for). restored to unused: numbers of
parameters by name; moved: restored to another place, such as a parent's MLP as the prime one.
"""
_COUNTS = ("restored", "initialised", "narrowed", "moved", "cast", "unused")
_STAGES = {"pretrain": "pretrain", "adapt": "adapt", "ext": "extend"}


class Unknown(str):
    """Why there is no value."""


class Curve(NamedTuple):
    """Training, step by step; each [steps]."""

    step: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    """Trained by this run up to and with the step."""
    hours: np.ndarray
    """Device-hours of this run's training up to and with the step."""


def read(
    folder: Path, manifest: PlanManifest | None, checkpoint_root: Path | None = None
) -> pd.DataFrame:
    """Every run of an experiment folder: the plan's in its order, then all others by name.

    The table has `COLUMNS`, and two that no file shows: `curve`, a `Curve` or None, and `arrays`,
    those of the final evaluation. Cells are objects, so that numbers stay as they were recorded.
    checkpoint_root: where checkpoints lie, if not where the settings say.
    """
    planned: dict[str, Mapping[str, Any] | None] = dict(manifest.runs) if manifest else {}
    others = (path.name for path in sorted(folder.iterdir()) if path.name not in planned)
    named = planned | {name: None for name in others if is_run(folder / name)}
    rows = [_row(folder / name, plan, checkpoint_root) for name, plan in named.items()]
    return pd.DataFrame(rows, columns=[*COLUMNS, "curve", "arrays"], dtype=object)


def rows_of(table: pd.DataFrame) -> list[Any]:
    """The rows of a table, with a cell for each column by its name, and `Index`."""
    return list(table.itertuples())


def _row(folder: Path, plan: Mapping[str, Any] | None, checkpoint_root: Path | None) -> dict:
    """The facts of one run, whatever state its record is in."""
    if plan and not is_run(folder):
        return _without_record(folder, plan)
    record = read_run(folder)
    before = _steps_before(record)
    facts: dict[str, Any] = {
        **_identity(record, plan or {}),
        **_settings(record),
        **_progress(record, before),
        **_evaluated(record),
        **_start(record),
        **_times(record),
        **_restored(record),
        "checkpoint": _checkpoint(record, checkpoint_root),
    }
    known = {name: None if isinstance(value, Unknown) else value for name, value in facts.items()}
    return known | {
        "name": folder.name,
        "status": record.status,
        "missing": tuple(f"{key}: {why}" for key, why in facts.items() if isinstance(why, Unknown)),
        "faults": record.faults,
        "notes": tuple(_notes(record, plan or {})),
        "curve": _curve(record, before),
        "arrays": record.arrays,
    }


def _without_record(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """A planned run that left nothing."""
    why, done = f"{folder / 'run.json'} is missing", plan.get("status") == "finished"
    facts = {key: plan.get(key) for key in ("experiment", "stage", "method", "seed")}
    facts = {
        **dict.fromkeys([*COLUMNS, "curve"]),
        "name": folder.name,
        "status": "broken" if done else "pending",
        "steps_asked": plan.get("steps"),
        **facts,
        "faults": (f"{why}, though the plan says that the run is finished",) if done else (),
        "notes": (),
    }
    empty = [key for key in COLUMNS if key != "missing" and facts[key] is None]
    return facts | {"missing": tuple(f"{key}: {why}" for key in empty), "arrays": {}}


def _identity(record: StoredRun, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Which run it is."""
    last: Mapping[str, Any] = record.attempts[-1] if record.attempts else {}
    chosen = [text for text in last.get("command", ()) if text.startswith("+experiment=")]
    experiment = plan.get("experiment") or (chosen[-1].partition("=")[2] if chosen else None)
    stage = plan.get("stage") or _STAGES.get(record.folder.name.split("-")[0])
    seed = plan.get("seed")
    git, data = last.get("git"), last.get("data") or {}
    commit = f"{git['commit']}{'+changes' * git['dirty']}" if isinstance(git, Mapping) else None
    evaluated_on = data.get(record.training.get("eval_split", "val"))
    seed = record.training.get("model_seed") if seed is None else seed
    return {
        "experiment": _or(experiment, "neither in a manifest nor on the command line"),
        "stage": _or(stage, f"no manifest, and the name begins with none of {[*_STAGES]}"),
        "seed": _or(seed, "not in config.yaml"),
        "commit": _or(commit, f"{git}" if git else "not in run.json"),
        "evaluated_on": _or(evaluated_on, "not in run.json"),
    }


def _settings(record: StoredRun) -> dict[str, Any]:
    """What was asked for."""
    training, model = record.training, record.settings.get("model", {})
    method = None
    if "train_mode" in training and "seq_modeling_block" in model:
        layers = model.get("layer_types", ())
        method = mixers.method(model["seq_modeling_block"], layers, training["train_mode"])
    facts = {
        "size": model.get("name"),
        "method": method,
        "runtime_mode": record.mode if training else None,
        "train_mode": training.get("train_mode"),
        "context": training.get("seq_length"),
        "batch": training.get("global_batch_size"),
        "steps_asked": training.get("total_steps"),
        "parameters": _parameters(model, record.mode),
        "width_policy": model.get("width_policy"),
        "prime_init": training.get("prime_init"),
    }
    return {name: _or(value, "not in config.yaml") for name, value in facts.items()}


def _parameters(model: Mapping[str, Any], mode: str) -> int | Unknown:
    """Of the network, in closed form from its settings."""
    if mode != "jax":
        return Unknown(f"runtime_mode {mode} has no network")
    known: dict[str, Any] = {f.name: model.get(f.name) for f in fields(ModelConfig)}
    try:
        return sum(parameter_sizes(ModelConfig(**known)).values())
    except (TypeError, ZeroDivisionError):
        return Unknown("config.yaml does not describe the network")


def _progress(record: StoredRun, before: int) -> dict[str, Any]:
    """How far training came, its loss and its speed."""
    simulated, no_step = record.mode == "simulate", "no step in metrics.jsonl"
    why = "simulated: nothing was computed" if simulated else no_step
    losses = [row["loss"] for row in record.metrics if "loss" in row]
    speeds = [row.get("tokens_per_second") for row in record.metrics]
    speeds = [speed for speed in speeds if speed is not None]
    steps = max((row["step"] for row in record.metrics), default=None)
    done = None if steps is None else max(0, steps - before)
    batch, context = (record.training.get(key) for key in ("global_batch_size", "seq_length"))
    tokens = None if done is None or not batch or not context else done * batch * context
    return {
        "steps": _or(done, no_step),
        "tokens": _or(tokens, f"{no_step}, or no batch in config.yaml"),
        "first_loss": _number(losses[0] if losses else None, why),
        "final_loss": _number(losses[-1] if losses else None, why),
        "tokens_per_second": _or(
            float(np.median(speeds)) if speeds else None, f"{no_step} tells it"
        ),
    }


def _evaluated(record: StoredRun) -> dict[str, Any]:
    """Held-out losses at the end, means over tokens."""
    summary, arrays, without = record.summary, record.arrays, "token_loss_without_learning"
    why = (
        "simulated: nothing was computed"
        if record.mode == "simulate"
        else "not in the summary of the evaluation"
        if summary
        else f"no evaluation in the record of a run that is {record.status}"
    )
    loss, still = summary.get("token_loss"), summary.get(without)
    if loss is None and arrays:  # the record is from before these were summed up
        count = arrays["learning_count"].sum()
        sums = [arrays[name].sum() if name in arrays else None for name in _NLL]
        loss, still = (float(x / count) if x is not None and count else None for x in sums)
    learns = "loss_without_learning" in summary or without in summary
    no_still = why if learns or not summary else "the model does not learn while it is evaluated"
    return {
        "validation_loss": _number(loss, why),
        "validation_loss_without_learning": _number(still, no_still),
        "count_model_loss": _number(summary.get("count_model_loss"), why),
    }


_NLL = ("learning_nll", "still_nll")


def _start(record: StoredRun) -> dict[str, Any]:
    """The held-out loss before the first step, and the parent's."""
    starts = record.noted("start")
    start: Mapping[str, Any] = starts[-1] if starts else {}
    why = start.get("why") or "null in run.json"
    if not start:
        simulated = record.mode == "simulate"
        why = "simulated: nothing was computed" if simulated else "no `start` in run.json"
    orphan = "starts from fresh weights" if _fresh(record) else why
    still = "the model does not learn there" if start else why
    return {
        "start_loss": _number(start.get("loss"), why),
        "start_loss_without_learning": _number(start.get("loss_without_learning"), still),
        "parent_loss": _number(start.get("parent_loss"), orphan),
        "warm_loss": _number(start.get("warm_loss"), orphan),
        "preserving": _or(start.get("preserving"), orphan),
    }


def _times(record: StoredRun) -> dict[str, Any]:
    """Hours by what they went into, over all attempts.

    An attempt that was killed, or still runs, left no account; the steps that were kept tell of
    theirs, so the larger of the two sums is what was spent at least.
    """
    attempts = record.attempts
    timed = [(_devices(a)[1], a["seconds"]) for a in attempts if a.get("seconds")]
    ended = [(a["started"], a["finished"]) for a in attempts if a.get("finished")]
    logged = Counter[str]()
    for row in record.metrics:
        logged.update({k: v for k, v in row.items() if k.endswith("_seconds") and v is not None})

    def hours(*names: str) -> float | Unknown:
        of_steps = sum(logged[f"{name}_seconds"] for name in names) * _devices(attempts[-1])[1]
        accounted = sum(n * seconds.get(name, 0.0) for n, seconds in timed for name in names)
        if not timed and not of_steps:
            return Unknown("no `seconds` in run.json: the run still runs, or was killed")
        return (accounted if len(timed) == len(attempts) else max(accounted, of_steps)) / 3600

    lived = [datetime.fromisoformat(end) - datetime.fromisoformat(start) for start, end in ended]
    wall = max(sum(span.total_seconds() for span in lived), sum(logged.values())) / 3600
    unknown = Unknown("not in run.json")
    parts = {"device": TRAINING} | {name: (name,) for name in ("step", "compile", "evaluation")}
    kinds = dict.fromkeys(_devices(attempt)[0] for attempt in attempts)
    return {
        **{f"{name}_hours": hours(*of) if attempts else unknown for name, of in parts.items()},
        "wall_hours": wall or Unknown("no attempt in run.json has an end"),
        "devices": " and ".join(kinds) or unknown,
        "attempts": len(attempts) or unknown,
    }


def _devices(attempt: Mapping[str, Any]) -> tuple[str, int]:
    """Kinds and number of an attempt's devices; a CPU is told by its cores as well."""
    hardware = attempt.get("hardware") or {}
    kinds = hardware.get("devices") or []
    cores = f" ({hardware.get('cpus')} cores)" if set(kinds) == {"cpu"} else ""
    named = " + ".join(f"{n} × {kind}" for kind, n in sorted(Counter(kinds).items()))
    return named + cores or "unknown devices", len(kinds)


def _curve(record: StoredRun, before: int) -> Curve | None:
    """Training step by step, if there are steps with a loss."""
    training = record.training
    rows = [row for row in record.metrics if "loss" in row and "step_seconds" in row]
    if not rows or "seq_length" not in training or "global_batch_size" not in training:
        return None
    devices = _devices(record.attempts[-1])[1] if record.attempts else 0
    seconds = [sum(row.get(f"{what}_seconds", 0.0) for what in TRAINING) for row in rows]
    step = np.asarray([row["step"] for row in rows])
    return Curve(
        step=step,
        loss=np.asarray([row["loss"] for row in rows], float),
        tokens=(step - before) * training["global_batch_size"] * training["seq_length"],
        hours=np.cumsum(seconds) * devices / 3600,
    )


def _account(record: StoredRun) -> Mapping[str, Any] | None:
    """What was taken from another run's checkpoint, if any was."""
    own = (record.folder.parent.name, record.folder.name)
    foreign = [account for account in record.noted("restored") if _source(account)[:2] != own]
    return foreign[-1] if foreign else None


def _source(account: Mapping[str, Any]) -> tuple[str, str, str]:
    """exp_folder, exp_name and step of the checkpoint of an account."""
    parts = ("", "", "", *Path(str(account.get("from", ""))).parts)
    return parts[-3], parts[-2], parts[-1]


def _steps_before(record: StoredRun) -> int:
    """Steps that were done before this run, and count on in its numbers: with load_part=all."""
    account = _account(record)
    step = _source(account)[2] if account and account.get("part") == "all" else ""
    return int(step) if step.isdigit() else 0


def _fresh(record: StoredRun) -> bool:
    return record.training.get("load_part") == "none"


def _restored(record: StoredRun) -> dict[str, Any]:
    """The account of the start, with counts of parameters by name."""
    account = _account(record)
    if account is None:
        fresh = _fresh(record)
        why = "starts from fresh weights" if fresh else "no account of a restore in run.json"
        parent = None if fresh else record.training.get("resume_exp_name")
        return {
            "parent": parent or Unknown(why),
            "restore": "not attempted" if fresh else Unknown(why),
            **dict.fromkeys(_COUNTS, Unknown(why)),
        }
    counts = {name: len(account.get(name) or ()) for name in _COUNTS}
    _, parent, step = _source(account)
    in_part = counts["initialised"] or not counts["restored"]
    return {
        "parent": f"{parent}/{step}" if parent else str(account.get("from")),
        "restore": "initialised" if in_part else "restored",
        **counts,
    }


def _checkpoint(record: StoredRun, root: Path | None) -> str | Unknown:
    """The newest checkpoint on disk."""
    stated = root or record.settings.get("deploy_paths", {}).get("checkpoint")
    folder = record.training.get("exp_folder")
    if not folder or not stated:
        return Unknown("config.yaml does not say where")
    own = Path(stated).expanduser() / folder / record.folder.name
    steps = [int(p.name) for p in own.glob("*") if p.name.isdigit()] if own.is_dir() else []
    return str(own / str(max(steps))) if steps else Unknown(f"none in {own}")


def _notes(record: StoredRun, plan: Mapping[str, Any]) -> list[str]:
    """What a reader of the row should know besides."""
    attempts, notes = record.attempts, []
    if len({_devices(attempt)[0] for attempt in attempts}) > 1:
        notes.append("attempts ran on different devices: device-hours are of mixed kinds")
    commits = {str(attempt.get("git")) for attempt in attempts}
    if len(commits) > 1:
        notes.append(f"attempts ran on {len(commits)} states of the code; the last is shown")
    if any(not attempt.get("seconds") for attempt in attempts):
        notes.append("an attempt left no account of its time: hours are a lower bound, from steps")
    return notes + [f"gate failed: {text}" for text in failed_gates(plan, "{name}: {said}")]


def failed_gates(plan: Mapping[str, Any], form: str) -> list[str]:
    """The gates of a planned run that do not hold, in the form given."""
    gates: Sequence[Mapping[str, Any]] = plan.get("gates") or ()
    return [form.format(**{"said": "", **gate}) for gate in gates if gate["holds"] is False]


def _number(value: Any, why: str) -> float | Unknown:
    """The value if it is a finite number, else why there is none."""
    if value is None:
        return Unknown(why)
    try:
        value = float(value)
    except (TypeError, ValueError):
        return Unknown(f"no number: {value!r}")
    return value if math.isfinite(value) else Unknown(f"not a finite number: {value}")


def _or(value: Any, why: str) -> Any:
    return Unknown(why) if value is None else value
