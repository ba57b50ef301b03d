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
from typing import Any

import numpy as np
import pandas as pd

from ttt import mixers
from ttt.infra import step_folders
from ttt.infra.plan_manifest import PlanManifest
from ttt.infra.record import StoredRun, is_run, read_run
from ttt.intervals import median
from ttt.knobs import ModelConfig
from ttt.plan.parameters import parameter_sizes

TRAINING = ("step", "data_wait", "save")
"""What counts as training time, by its name among a run's seconds."""
COLUMNS = tuple(
    """
    name exp_folder status experiment size stage method seed runtime_mode train_mode context batch
    steps steps_asked tokens parameters width_policy prime_init first_loss final_loss
    validation_loss validation_loss_without_learning bits_per_byte count_model_loss split start_loss
    start_loss_without_learning parent_loss warm_loss preserving device_hours step_hours
    step_seconds step_seconds_low step_seconds_high compile_hours evaluation_hours wall_hours
    tokens_per_second devices attempts commit evaluated_on
    parent checkpoint restore restored initialised narrowed moved cast unused missing faults notes
    """.split()  # noqa: SIM905
)
"""Columns of the table. None in a cell: `missing` has the reason, as `column: reason`.

status: finished, failed, interrupted; running (or killed: a record cannot tell); pending: planned,
no record; broken: no usable run.json. steps, tokens: done by this run. first_loss, final_loss:
training losses, each of a batch. validation_loss: mean over all scored held-out tokens at the end,
learning if the run learns; count_model_loss: of a count model on the same tokens. split: that all
held-out losses are of; evaluated_on: which tokens of it. start_loss: held-out, before the first
step; warm_loss: the same on the tokens of parent_loss; preserving: whether the start is meant to
keep the parent's function. step_seconds: median over the steps of all attempts, with the bounds of
its interval, and tokens_per_second in the same way: the first step after each start never counts.
step_hours: at that median, for every step once. wall_hours: from start to end of every attempt.
restore: restored; initialised (in part or in whole); not attempted (fresh weights were asked for).
restored to unused: numbers of parameters by name; moved: restored to another place, such as a
parent's MLP as the prime one.
"""
_NLL = ("learning_nll", "still_nll")
_COUNTS = ("restored", "initialised", "narrowed", "moved", "cast", "unused")
_STAGES = {"pretrain": "pretrain", "adapt": "adapt", "ext": "extend"}
_SIMULATED, _FRESH = "simulated: nothing was computed", "starts from fresh weights"


class Unknown(str):
    """Why there is no value."""


def read(
    folder: Path, manifest: PlanManifest | None, checkpoint_root: Path | None = None
) -> pd.DataFrame:
    """Every run of an experiment folder: the plan's in its order, then all others by name.

    The table has `COLUMNS`, and two that no file shows: `curve`, see `_curve`, and `arrays`,
    those of the final evaluation. Cells are objects, so that numbers stay as they were recorded.
    checkpoint_root: where checkpoints lie, if not where the settings say.
    """
    planned: dict[str, Mapping[str, Any]] = dict(manifest.runs) if manifest else {}
    others = (path.name for path in sorted(folder.iterdir()) if path.name not in planned)
    named = planned | {name: {} for name in others if is_run(folder / name)}
    rows = [_row(folder / name, plan, checkpoint_root) for name, plan in named.items()]
    return pd.DataFrame(rows, columns=[*COLUMNS, "curve", "arrays"], dtype=object)


def rows_of(table: pd.DataFrame) -> list[Any]:
    """The rows of a table, with a cell for each column by its name, and `Index`."""
    return list(table.itertuples())


def _row(folder: Path, plan: Mapping[str, Any], checkpoint_root: Path | None) -> dict[str, Any]:
    """The facts of one run, whatever state its record is in; plan: of the manifest, or empty."""
    if plan and not is_run(folder):
        facts, row = _without_record(folder, plan)
    else:
        record = read_run(folder)
        restored, before = _restored(record)
        facts = {
            **_identity(record, plan),
            **_settings(record),
            **_progress(record, before),
            **_evaluated(record),
            **_start(record),
            **_times(record),
            **_speed(record, before),
            **restored,
            "checkpoint": _checkpoint(record, checkpoint_root),
        }
        row = {
            "status": record.status,
            "faults": record.faults,
            "notes": tuple(_notes(record, plan)),
            "curve": _curve(record, before),
            "arrays": record.arrays,
        }
    known = {name: None if isinstance(value, Unknown) else value for name, value in facts.items()}
    missing = tuple(f"{key}: {why}" for key, why in facts.items() if isinstance(why, Unknown))
    return known | row | {"name": folder.name, "missing": missing}


def _without_record(folder: Path, plan: Mapping[str, Any]) -> tuple[dict, dict]:
    """A planned run that left nothing: what the plan says of it, and the rest of its row."""
    why, done = f"{folder / 'run.json'} is missing", plan.get("status") == "finished"
    others = ("name", "exp_folder", "status", "missing", "faults", "notes")
    facts = {key: Unknown(why) for key in COLUMNS if key not in others}
    said = {key: plan.get(key) for key in ("experiment", "stage", "method", "seed")}
    said["steps_asked"] = plan.get("steps")
    row = {
        "status": "broken" if done else "pending",
        "faults": (f"{why}, though the plan says that the run is finished",) if done else (),
        "notes": (),
        "arrays": {},
    }
    return facts | {key: value for key, value in said.items() if value is not None}, row


def _identity(record: StoredRun, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Which run it is."""
    last: Mapping[str, Any] = record.attempts[-1] if record.attempts else {}
    chosen = [text for text in last.get("command", ()) if text.startswith("+experiment=")]
    experiment = plan.get("experiment") or (chosen[-1].partition("=")[2] if chosen else None)
    stage = plan.get("stage") or _STAGES.get(record.folder.name.split("-")[0])
    seed = plan.get("seed")
    git, data = last.get("git"), last.get("data") or {}
    commit = f"{git['commit']}{'+changes' * git['dirty']}" if isinstance(git, Mapping) else None
    split = record.summary.get("split") or record.training.get("eval_split")
    evaluated_on = data.get(split)
    if evaluated_on and "evaluation_seed" in record.summary:  # older ones read the first tokens
        stretches, drawn = (record.summary[key] for key in ("sequences", "evaluation_seed"))
        evaluated_on = f"{evaluated_on}, {stretches} stretches of {split} drawn with seed {drawn}"
    seed = record.training.get("model_seed") if seed is None else seed
    return {
        **_known("neither in a manifest nor on the command line", experiment=experiment),
        **_known(f"no manifest, and the name begins with none of {[*_STAGES]}", stage=stage),
        **_known("not in config.yaml", seed=seed),
        **_known(f"{git}" if git else "not in run.json", commit=commit),
        **_known("not in run.json", evaluated_on=evaluated_on),
        **_known("not in config.yaml", split=split),
    }


def _settings(record: StoredRun) -> dict[str, Any]:
    """What was asked for."""
    training, model = record.training, record.settings.get("model", {})
    method = None
    if "train_mode" in training and "seq_modeling_block" in model:
        layers = model.get("layer_types", ())
        method = mixers.method(model["seq_modeling_block"], layers, training["train_mode"])
    return _known(
        "not in config.yaml",
        size=model.get("name"),
        method=method,
        runtime_mode=record.mode if training else None,
        train_mode=training.get("train_mode"),
        context=training.get("seq_length"),
        batch=training.get("global_batch_size"),
        steps_asked=training.get("total_steps"),
        parameters=_parameters(model, record.mode),
        width_policy=model.get("width_policy"),
        prime_init=training.get("prime_init"),
    )


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
    """How far training came, and its loss. before: steps that its parent did."""
    no_step = "no step in metrics.jsonl"
    losses = [row["loss"] for row in record.metrics if "loss" in row] or [None]
    steps = max((max(0, row["step"] - before) for row in record.metrics), default=None)
    batch, context = (record.training.get(key) for key in ("global_batch_size", "seq_length"))
    tokens = None if steps is None or not batch or not context else steps * batch * context
    why = _SIMULATED if record.mode == "simulate" else no_step
    return {
        **_known(no_step, steps=steps),
        **_known(f"{no_step}, or no batch in config.yaml", tokens=tokens),
        **_numbers(why, first_loss=losses[0], final_loss=losses[-1]),
    }


def _speed(record: StoredRun, before: int) -> dict[str, Any]:
    """Medians over the steps of all attempts, without the first step after each start."""
    own = (record.folder.parent.name, record.folder.name)
    restored = (Path(str(a.get("from", ""))).parts for a in record.noted("restored"))
    went_on = {int(at[-1]) for at in restored if at[-3:-1] == own and at[-1].isdigit()}
    warm = [row for row in record.metrics if row["step"] - 1 not in went_on | {before}]
    names = ("step_seconds", "tokens_per_second")
    seconds, speeds = ([row[x] for row in warm if row.get(x) is not None] for x in names)
    steps = max((max(0, row["step"] - before) for row in record.metrics), default=0)
    devices = _devices(record.attempts[-1])[1] if record.attempts else 0
    middle, low, high = median(np.asarray(seconds)) if seconds else [None] * 3
    hours = devices * steps * middle / 3600 if middle is not None and devices else None
    return {
        **_known(
            "no timed step after the first of a start in metrics.jsonl",
            step_seconds=middle,
            step_hours=hours,
            tokens_per_second=float(np.median(speeds)) if speeds else None,
        ),
        **_numbers("fewer than 6 timed steps", step_seconds_low=low, step_seconds_high=high),
    }


def _evaluated(record: StoredRun) -> dict[str, Any]:
    """Held-out losses at the end, means over tokens."""
    summary, arrays, without = record.summary, record.arrays, "token_loss_without_learning"
    why = "not in the summary of the evaluation"
    if record.mode == "simulate":
        why = _SIMULATED
    elif not summary:
        why = f"no evaluation in the record of a run that is {record.status}"
    loss, still = summary.get("token_loss"), summary.get(without)
    if "chunk_loss" in summary:  # in older records `loss` is that, and `token_loss` the mean
        loss, still = summary.get("loss"), summary.get("loss_without_learning")
    elif loss is None and arrays:  # the record is from before these were summed up
        count = arrays["learning_count"].sum()
        sums = [arrays[name].sum() if name in arrays else None for name in _NLL]
        loss, still = (float(x / count) if x is not None and count else None for x in sums)
    learns = "loss_without_learning" in summary or without in summary
    no_still = why if learns or not summary else "the model does not learn while it is evaluated"
    return {
        **_numbers(why, validation_loss=loss),
        **_numbers(no_still, validation_loss_without_learning=still),
        **_numbers(why, count_model_loss=summary.get("count_model_loss")),
        **_numbers(
            f"{why}, or the store does not tell", bits_per_byte=summary.get("bits_per_byte")
        ),
    }


def _start(record: StoredRun) -> dict[str, Any]:
    """The held-out loss before the first step, and the parent's."""
    start: Mapping[str, Any] = (record.noted("start") or [{}])[-1]
    why = start.get("why") or "null in run.json"
    if not start:
        why = _SIMULATED if record.mode == "simulate" else "no `start` in run.json"
    orphan = _FRESH if _is_fresh(record) else why
    still = "the model does not learn there" if start else why
    parent, warm = start.get("parent_loss"), start.get("warm_loss")
    return {
        **_numbers(why, start_loss=start.get("loss")),
        **_numbers(still, start_loss_without_learning=start.get("loss_without_learning")),
        **_numbers(orphan, parent_loss=parent, warm_loss=warm),
        **_known(orphan, preserving=start.get("preserving")),
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
    parts = {"device": TRAINING} | {name: (name,) for name in ("compile", "evaluation")}
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


def _curve(record: StoredRun, before: int) -> pd.DataFrame | None:
    """Each training step, its loss, and tokens and device-hours of this run up to and with it."""
    training = record.training
    rows = [row for row in record.metrics if "loss" in row and "step_seconds" in row]
    if not rows or "seq_length" not in training or "global_batch_size" not in training:
        return None
    devices = _devices(record.attempts[-1])[1] if record.attempts else 0
    seconds = [sum(row.get(f"{what}_seconds", 0.0) for what in TRAINING) for row in rows]
    curve = pd.DataFrame(rows, columns=["step", "loss"])
    tokens = (curve["step"] - before) * training["global_batch_size"] * training["seq_length"]
    return curve.assign(tokens=tokens, hours=np.cumsum(seconds) * devices / 3600)


def _is_fresh(record: StoredRun) -> bool:
    return record.training.get("load_part") == "none"


def _restored(record: StoredRun) -> tuple[dict[str, Any], int]:
    """What the start took from another run, with counts of parameters by name.

    And the steps done before this run that count on in its numbers: with load_part=all.
    """
    own, taken = (record.folder.parent.name, record.folder.name), None
    for account in record.noted("restored"):
        source = ("", "", "", *Path(str(account.get("from", ""))).parts)[-3:]
        taken = taken if source[:2] == own else (account, *source[1:])
    if taken is None:
        fresh = _is_fresh(record)
        why = _FRESH if fresh else "no account of a restore in run.json"
        parent = None if fresh else record.training.get("resume_exp_name") or None
        restore = "not attempted" if fresh else None
        return _known(why, parent=parent, restore=restore, **dict.fromkeys(_COUNTS)), 0
    account, parent, step = taken
    counts = {name: len(account.get(name) or ()) for name in _COUNTS}
    in_part = counts["initialised"] or not counts["restored"]
    facts = {
        "parent": f"{parent}/{step}" if parent else str(account.get("from")),
        "restore": "initialised" if in_part else "restored",
    }
    counts_on = account.get("part") == "all" and step.isdigit()
    return facts | counts, int(step) if counts_on else 0


def _checkpoint(record: StoredRun, root: Path | None) -> str | Unknown:
    """The newest checkpoint on disk."""
    stated = root or record.settings.get("deploy_paths", {}).get("checkpoint")
    folder = record.training.get("exp_folder")
    if not folder or not stated:
        return Unknown("config.yaml does not say where")
    own = Path(stated).expanduser() / folder / record.folder.name
    newest = step_folders.newest(own)
    return str(newest) if newest else Unknown(f"none in {own}")


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


def _known(why: str, **facts: Any) -> dict[str, Any]:
    """The facts, and for None why there is none."""
    return {name: Unknown(why) if value is None else value for name, value in facts.items()}


def _numbers(why: str, **facts: Any) -> dict[str, Any]:
    """The facts that are finite numbers, and for others why there is none."""
    numbers = _known(why, **facts)
    for name, value in numbers.items():
        if isinstance(value, Unknown):
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            numbers[name] = Unknown(f"no number: {value!r}")
        else:
            finite = math.isfinite(number)
            numbers[name] = number if finite else Unknown(f"not a finite number: {number}")
    return numbers
