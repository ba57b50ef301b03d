"""Run records -> one row of facts for each run; what is not there is named, never guessed. No JAX.

Times are in device-hours, devices × hours: GPU-hours on GPUs. A run's training time is that of its
steps, of waiting for data and of saving, over all attempts; compiling and evaluating stand apart.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ttt import mixers
from ttt.config import upgraded
from ttt.infra.record import RunRecord
from ttt.knobs import ModelConfig
from ttt.plan.parameters import parameter_sizes
from ttt.report.manifest import Manifest, Planned

TRAINING = ("step", "data_wait", "save")
"""What counts as training time, by its name among a run's seconds."""
_STAGES = {"pretrain": "pretrain", "adapt": "adapt", "ext": "extend"}
_RUN_FILES = ("run.json", "config.yaml", "metrics.jsonl")


@dataclass(frozen=True)
class Curve:
    """Training, step by step."""

    step: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    """Trained by this run up to and with the step."""
    hours: np.ndarray
    """Device-hours of this run's training up to and with the step."""


@dataclass(frozen=True)
class Positions:
    """Sum of −log p and count of the scored targets at each position, in nats."""

    nll: np.ndarray
    count: np.ndarray
    still_nll: np.ndarray | None = None
    """The same without learning, of a model that learns."""

    def mean(self, nll: np.ndarray | None) -> float | None:
        """Over all that counts."""
        total = self.count.sum()
        return None if nll is None or not total else float(nll.sum() / total)


@dataclass(frozen=True)
class Run:
    """A run as its record tells it. A field that is None has its reason in `missing`."""

    name: str
    status: str
    """finished, failed, interrupted; running (or killed: a record cannot tell); pending: planned,
    no record; broken: no usable run.json."""
    experiment: str | None = None
    size: str | None = None
    stage: str | None = None
    method: str | None = None
    seed: int | None = None
    runtime_mode: str | None = None
    train_mode: str | None = None
    context: int | None = None
    batch: int | None = None
    steps: int | None = None
    """Outer steps done by this run."""
    steps_asked: int | None = None
    tokens: int | None = None
    parameters: int | None = None
    width_policy: str | None = None
    prime_init: str | None = None
    first_loss: float | None = None
    """Training loss of the first step, of a batch as all training losses."""
    final_loss: float | None = None
    validation_loss: float | None = None
    """Mean over all scored held-out tokens at the end, learning if the run learns."""
    validation_loss_without_learning: float | None = None
    count_model_loss: float | None = None
    """Of a count model, on the same tokens."""
    start_loss: float | None = None
    """Held-out loss before the first step."""
    start_loss_without_learning: float | None = None
    parent_loss: float | None = None
    """The parent's, on the tokens of `warm_loss`."""
    warm_loss: float | None = None
    """This run's before its first step, on the tokens of `parent_loss`."""
    preserving: bool | None = None
    """Whether the start is meant to keep the parent's function."""
    device_hours: float | None = None
    step_hours: float | None = None
    compile_hours: float | None = None
    evaluation_hours: float | None = None
    tokens_per_second: float | None = None
    """Median over the steps."""
    devices: str | None = None
    attempts: int | None = None
    commit: str | None = None
    evaluated_on: str | None = None
    """Fingerprint of the tokens of the validation loss."""
    parent: str | None = None
    checkpoint: str | None = None
    restore: str | None = None
    """restored; initialised: in part or in whole; not attempted: fresh weights were asked for."""
    restored: int | None = None
    initialised: int | None = None
    narrowed: int | None = None
    moved: int | None = None
    """Restored to another place: a parent's MLP as the prime one."""
    cast: int | None = None
    unused: int | None = None
    missing: tuple[str, ...] = ()
    """`field: why it is empty`."""
    faults: tuple[str, ...] = ()
    """Files that should be there and are not, or cannot be read."""
    notes: tuple[str, ...] = ()
    curve: Curve | None = field(default=None, repr=False, compare=False)
    positions: Positions | None = field(default=None, repr=False, compare=False)

    @property
    def beats_count_model(self) -> bool | None:
        """None if either loss is unknown."""
        if self.validation_loss is None or self.count_model_loss is None:
            return None
        return self.validation_loss < self.count_model_loss

    def flat(self) -> dict[str, Any]:
        """Column -> value, without curves."""
        return {name: getattr(self, name) for name in COLUMNS}


COLUMNS = tuple(f.name for f in fields(Run) if f.name not in ("curve", "positions"))


class Unknown(str):
    """Why there is no value."""


def read_all(
    folder: Path, manifest: Manifest | None, checkpoint_root: Path | None = None
) -> list[Run]:
    """Every run of an experiment folder: the plan's in its order, then all others by name.

    checkpoint_root: where checkpoints lie, if not where the settings say.
    """
    planned = dict(manifest.runs) if manifest else {}
    others = (path.name for path in sorted(folder.iterdir()) if path.name not in planned)
    named = planned | {name: None for name in others if _is_run(folder / name)}
    return [read_one(folder / name, plan, checkpoint_root) for name, plan in named.items()]


def _is_run(folder: Path) -> bool:
    """Whether it holds a training run's record, whole or in part.

    Evaluations have none of these files, benchmarks the settings of another run and no metrics.
    """
    there = [name for name in _RUN_FILES if (folder / name).exists()]
    if there != ["run.json", "config.yaml"]:
        return bool(there)
    settings = _Files(folder).settings()
    return settings.get("training", {}).get("exp_name", folder.name) == folder.name


class _Files:
    """The files of one record; what is wrong with them gathers in `faults`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults: list[str] = []
        self._record = RunRecord(folder)

    def run(self) -> dict[str, Any]:
        """`run.json`, with one attempt at least; empty if there is none to use."""

        def read(_: Path) -> dict[str, Any]:
            found = self._record.run()
            if not (found["attempts"] and all("status" in each for each in found["attempts"])):
                raise ValueError("no attempt in it")
            return found

        return self._read("run.json", read) or {}

    def settings(self) -> dict[str, Any]:
        """`config.yaml`; empty if there is none to use."""

        def read(path: Path) -> dict[str, Any]:
            found = OmegaConf.to_container(OmegaConf.load(path))
            if not (isinstance(found, dict) and isinstance(found.get("training"), dict)):
                raise ValueError("no settings of a training in it")
            return {str(name): part for name, part in found.items() if isinstance(part, dict)}

        return self._read("config.yaml", read) or {}

    def metrics(self, *, due: bool) -> list[dict[str, Any]]:
        """`metrics.jsonl`. due: whether the run should have got that far."""
        name = "metrics.jsonl"
        if not due and not (self.folder / name).exists():
            return []
        rows = self._read(name, lambda _: self._record.metrics()) or []
        if due and not rows and not self.faults:
            self._fault(f"{self.folder / name} holds no step")
        return rows

    def evaluation(self, *, due: bool) -> tuple[dict[str, Any], Positions | None]:
        """Summary and arrays of the last evaluation. due: whether there should be one."""
        steps = [
            int(match[1])
            for path in (self.folder / "eval").glob("loss_by_position-*.json")
            if (match := re.fullmatch(r"loss_by_position-(\d+)\.json", path.name))
        ]
        if not steps:
            if due:
                self._fault(f"{self.folder}/eval/loss_by_position-STEP.json is missing")
            return {}, None

        def arrays(path: Path) -> Positions:
            with np.load(path, allow_pickle=False) as found:
                names = ("learning_nll", "learning_count", "still_nll")
                return Positions(*(found[name] for name in names if name in found))

        name = f"eval/loss_by_position-{max(steps)}"
        summary = self._read(f"{name}.json", lambda path: dict(json.loads(path.read_bytes())))
        return summary or {}, self._read(f"{name}.npz", arrays)

    def _read[T](self, name: str, read: Callable[[Path], T]) -> T | None:
        path = self.folder / name
        if not path.exists():
            self._fault(f"{path} is missing")
            return None
        try:
            return read(path)
        except Exception as error:  # there is no telling what a broken file makes a parser raise
            self._fault(f"{path} cannot be read: {type(error).__name__}: {error}")
            return None

    def _fault(self, text: str) -> None:
        told = text.replace(str(self.folder.absolute()), str(self.folder))
        self.faults.append(" ".join(told.split())[:400])


def read_one(folder: Path, plan: Planned | None, checkpoint_root: Path | None = None) -> Run:
    """The row of one run, whatever state its record is in."""
    files = _Files(folder)
    if plan and not any((folder / name).exists() for name in _RUN_FILES):
        return _without_record(files, plan)
    found, settings = files.run(), files.settings()
    training = settings.get("training", {})
    status = found.get("status", "broken")
    mode = training.get("runtime_mode", "jax")
    rows = files.metrics(due=status == "finished")
    summary, positions = files.evaluation(due=status == "finished" and mode != "simulate")
    attempts = found.get("attempts", [])
    account = _account(attempts, folder)
    before = _steps_before(account)
    curve = _curve(rows, attempts, training, before)
    facts: dict[str, Any] = {
        **_identity(folder.name, plan, attempts, training),
        **_settings(settings, mode),
        **_progress(rows, training, mode, before),
        **_evaluated(summary, positions, mode, status),
        **_start(attempts, training, mode),
        **_times(attempts, rows),
        **_restored(account, training),
        "checkpoint": _checkpoint(settings, folder.name, checkpoint_root),
        "tokens_per_second": _median([row.get("tokens_per_second") for row in rows]),
    }
    known = {name: None if isinstance(value, Unknown) else value for name, value in facts.items()}
    return Run(
        name=folder.name,
        status=status,
        missing=tuple(f"{name}: {why}" for name, why in facts.items() if isinstance(why, Unknown)),
        faults=tuple(files.faults),
        notes=tuple(_notes(attempts, plan)),
        curve=curve,
        positions=positions,
        **known,
    )


def _without_record(files: _Files, plan: Planned) -> Run:
    """A planned run that left nothing."""
    why = f"{files.folder / 'run.json'} is missing"
    done = plan.status == "finished"
    known = {"name", "status", "missing", "faults", "notes"}
    facts: dict[str, Any] = {
        name: getattr(plan, name)
        for name in ("experiment", "stage", "method", "seed")
        if getattr(plan, name) is not None
    }
    if plan.steps is not None:
        facts["steps_asked"] = plan.steps
    empty = [name for name in COLUMNS if name not in known | set(facts)]
    return Run(
        name=plan.name,
        status="broken" if done else "pending",
        missing=tuple(f"{name}: {why}" for name in empty),
        faults=(f"{why}, though the plan says that the run is finished",) if done else (),
        **facts,
    )


Fact = Any
"""A field's value, or `Unknown`."""


def _identity(
    name: str, plan: Planned | None, attempts: Sequence[Any], training: Mapping[str, Any]
) -> dict[str, Fact]:
    """Which run it is."""
    command = attempts[-1].get("command", []) if attempts else []
    asked = [part.partition("=")[2] for part in command if part.startswith("+experiment=")]
    experiment = (plan and plan.experiment) or (asked[-1] if asked else None)
    stage = (plan and plan.stage) or _STAGES.get(name.split("-")[0])
    seed = plan.seed if plan and plan.seed is not None else training.get("model_seed")
    git = attempts[-1].get("git") if attempts else None
    data = (attempts[-1].get("data") or {}) if attempts else {}
    commit = f"{git['commit']}{'+changes' * git['dirty']}" if isinstance(git, Mapping) else None
    return {
        "experiment": experiment or Unknown("neither in a manifest nor on the command line"),
        "stage": stage or Unknown(f"no manifest, and the name begins with none of {[*_STAGES]}"),
        "seed": _or(seed, "not in config.yaml"),
        "commit": commit or Unknown(f"{git}" if git else "not in run.json"),
        "evaluated_on": _or(data.get(training.get("eval_split", "val")), "not in run.json"),
    }


def _settings(settings: Mapping[str, Any], mode: str) -> dict[str, Fact]:
    """What was asked for."""
    training, model = settings.get("training", {}), settings.get("model", {})
    why = "not in config.yaml"
    known = "train_mode" in training and "seq_modeling_block" in model
    return {
        "size": _or(model.get("name"), why),
        "method": mixers.method(
            model["seq_modeling_block"], model.get("layer_types", ()), training["train_mode"]
        )
        if known
        else Unknown(why),
        "runtime_mode": mode if training else Unknown(why),
        "train_mode": _or(training.get("train_mode"), why),
        "context": _or(training.get("seq_length"), why),
        "batch": _or(training.get("global_batch_size"), why),
        "steps_asked": _or(training.get("total_steps"), why),
        "parameters": _parameters(model, mode),
        "width_policy": _or(model.get("width_policy"), why),
        "prime_init": _or(training.get("prime_init"), why),
    }


def _parameters(model: Mapping[str, Any], mode: str) -> int | Unknown:
    """Of the network, in closed form from its settings."""
    if mode != "jax":
        return Unknown(f"runtime_mode {mode} has no network")
    model = upgraded({"model": model})["model"]
    known: dict[str, Any] = {f.name: model.get(f.name) for f in fields(ModelConfig)}
    try:
        return sum(parameter_sizes(ModelConfig(**known)).values())
    except (TypeError, KeyError, ZeroDivisionError):
        return Unknown("config.yaml does not describe the network")


def _progress(
    rows: Sequence[Mapping[str, Any]], training: Mapping[str, Any], mode: str, before: int
) -> dict[str, Fact]:
    """How far training came, and its loss."""
    why = "simulated: nothing was computed" if mode == "simulate" else "no step in metrics.jsonl"
    losses = [row["loss"] for row in rows if "loss" in row]
    steps = max((row["step"] for row in rows), default=None)
    done = None if steps is None else max(0, steps - before)
    batch, context = training.get("global_batch_size"), training.get("seq_length")
    tokens = None if done is None or not batch or not context else done * batch * context
    return {
        "steps": _or(done, "no step in metrics.jsonl"),
        "tokens": _or(tokens, "no step in metrics.jsonl, or no batch in config.yaml"),
        "first_loss": _number(losses[0] if losses else None, why),
        "final_loss": _number(losses[-1] if losses else None, why),
    }


def _evaluated(
    summary: Mapping[str, Any], positions: Positions | None, mode: str, status: str
) -> dict[str, Fact]:
    """Held-out losses at the end, means over tokens."""
    why = (
        "simulated: nothing was computed"
        if mode == "simulate"
        else "not in the summary of the evaluation"
        if summary
        else f"no evaluation in the record of a run that is {status}"
    )
    without = "token_loss_without_learning"
    loss, still = summary.get("token_loss"), summary.get(without)
    if loss is None and positions is not None:  # the record is from before these were summed up
        loss, still = positions.mean(positions.nll), positions.mean(positions.still_nll)
    learns = "loss_without_learning" in summary or without in summary
    no_still = why if learns or not summary else "the model does not learn while it is evaluated"
    return {
        "validation_loss": _number(loss, why),
        "validation_loss_without_learning": _number(still, no_still),
        "count_model_loss": _number(summary.get("count_model_loss"), why),
    }


def _start(
    attempts: Sequence[Mapping[str, Any]], training: Mapping[str, Any], mode: str
) -> dict[str, Fact]:
    """The held-out loss before the first step, and the parent's."""
    started = [attempt["start"] for attempt in attempts if attempt.get("start")]
    start = started[-1] if started else {}
    why = start.get("why") or "null in run.json"
    if not start:
        why = "simulated: nothing was computed" if mode == "simulate" else "no `start` in run.json"
    orphan = "starts from fresh weights" if training.get("load_part") == "none" else why
    return {
        "start_loss": _number(start.get("loss"), why),
        "start_loss_without_learning": _number(
            start.get("loss_without_learning"), "the model does not learn there" if start else why
        ),
        "parent_loss": _number(start.get("parent_loss"), orphan),
        "warm_loss": _number(start.get("warm_loss"), orphan),
        "preserving": _or(start.get("preserving"), orphan),
    }


def _times(
    attempts: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Fact]:
    """Device-hours by what they went into, over all attempts.

    An attempt that was killed, or still runs, left no account; the steps that were kept tell of
    theirs, so the larger of the two sums is what was spent at least.
    """
    timed = [(_devices(a)[1], a["seconds"]) for a in attempts if a.get("seconds")]
    count = _devices(attempts[-1])[1] if attempts else 0
    whole = len(timed) == len(attempts)

    def hours(*names: str) -> float | Unknown:
        logged = count * sum(row.get(f"{name}_seconds", 0.0) for row in rows for name in names)
        accounted = sum(n * s.get(name, 0.0) for n, s in timed for name in names)
        if not timed and not logged:
            return Unknown("no `seconds` in run.json: the run still runs, or was killed")
        return (accounted if whole else max(accounted, logged)) / 3600

    kinds = list(dict.fromkeys(_devices(attempt)[0] for attempt in attempts))
    return {
        "device_hours": hours(*TRAINING),
        "step_hours": hours("step"),
        "compile_hours": hours("compile"),
        "evaluation_hours": hours("evaluation"),
        "devices": " and ".join(kinds) or Unknown("not in run.json"),
        "attempts": len(attempts) or Unknown("not in run.json"),
    }


def _devices(attempt: Mapping[str, Any]) -> tuple[str, int]:
    """Kinds and number of an attempt's devices; a CPU is told by its cores as well."""
    hardware = attempt.get("hardware") or {}
    kinds = hardware.get("devices") or []
    cores = f" ({hardware.get('cpus')} cores)" if set(kinds) == {"cpu"} else ""
    named = " + ".join(f"{n} × {kind}" for kind, n in sorted(Counter(kinds).items()))
    return named + cores or "unknown devices", len(kinds)


def _curve(
    rows: Sequence[Mapping[str, Any]],
    attempts: Sequence[Mapping[str, Any]],
    training: Mapping[str, Any],
    before: int,
) -> Curve | None:
    """Training step by step, if there are steps with a loss."""
    steps = [row for row in rows if "loss" in row and "step_seconds" in row]
    if not steps or "seq_length" not in training or "global_batch_size" not in training:
        return None
    devices = _devices(attempts[-1])[1] if attempts else 0
    seconds = [sum(row.get(f"{what}_seconds", 0.0) for what in TRAINING) for row in steps]
    step = np.asarray([row["step"] for row in steps])
    return Curve(
        step=step,
        loss=np.asarray([row["loss"] for row in steps], float),
        tokens=(step - before) * training["global_batch_size"] * training["seq_length"],
        hours=np.cumsum(seconds) * devices / 3600,
    )


def _account(attempts: Sequence[Mapping[str, Any]], folder: Path) -> Mapping[str, Any] | None:
    """What was taken from another run's checkpoint, if any was."""
    accounts = [attempt["restored"] for attempt in attempts if attempt.get("restored")]
    own = (folder.parent.name, folder.name)
    foreign = [account for account in accounts if _place(account)[:2] != own]
    return foreign[-1] if foreign else None


def _place(account: Mapping[str, Any]) -> tuple[str, str, str]:
    """exp_folder, exp_name and step of the checkpoint of an account."""
    parts = ("", "", "", *Path(str(account.get("from", ""))).parts)
    return parts[-3], parts[-2], parts[-1]


def _steps_before(account: Mapping[str, Any] | None) -> int:
    """Steps that were done before this run, and count on in its numbers: with load_part=all."""
    if account is None or account.get("part") != "all":
        return 0
    step = _place(account)[2]
    return int(step) if step.isdigit() else 0


def _restored(account: Mapping[str, Any] | None, training: Mapping[str, Any]) -> dict[str, Fact]:
    """The account of the start, with counts of parameters by name."""
    counts = ("restored", "initialised", "narrowed", "moved", "cast", "unused")
    if account is None:
        fresh = training.get("load_part") == "none"
        why = "starts from fresh weights" if fresh else "no account of a restore in run.json"
        parent = training.get("resume_exp_name") if training and not fresh else None
        return {
            "parent": parent or Unknown(why),
            "restore": "not attempted" if fresh else Unknown(why),
            **dict.fromkeys(counts, Unknown(why)),
        }
    found = {name: len(account.get(name) or ()) for name in counts}
    _, parent, step = _place(account)
    return {
        "parent": f"{parent}/{step}" if parent else str(account.get("from")),
        "restore": "initialised" if found["initialised"] or not found["restored"] else "restored",
        **found,
    }


def _checkpoint(settings: Mapping[str, Any], name: str, root: Path | None) -> str | Unknown:
    """The newest checkpoint on disk."""
    stated = settings.get("deploy_paths", {}).get("checkpoint")
    folder = settings.get("training", {}).get("exp_folder")
    if not folder or not (root or stated):
        return Unknown("config.yaml does not say where")
    own = Path(root or stated).expanduser() / folder / name
    steps = [int(p.name) for p in own.glob("*") if p.name.isdigit()] if own.is_dir() else []
    return str(own / str(max(steps))) if steps else Unknown(f"none in {own}")


def _notes(attempts: Sequence[Mapping[str, Any]], plan: Planned | None) -> list[str]:
    """What a reader of the row should know besides."""
    notes = []
    if len({_devices(attempt)[0] for attempt in attempts}) > 1:
        notes.append("attempts ran on different devices: device-hours are of mixed kinds")
    commits = {str(attempt.get("git")) for attempt in attempts}
    if len(commits) > 1:
        notes.append(f"attempts ran on {len(commits)} states of the code; the last is shown")
    if any(not attempt.get("seconds") for attempt in attempts):
        notes.append("an attempt left no account of its time: hours are a lower bound, from steps")
    gates = plan.gates if plan else ()
    notes += [f"gate failed: {gate.name}: {gate.said}" for gate in gates if gate.holds is False]
    return notes


def _median(values: Sequence[Any]) -> float | Unknown:
    there = [value for value in values if value is not None]
    return float(np.median(there)) if there else Unknown("no step in metrics.jsonl tells it")


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
