"""The run record: what ran, on what, and what came out, as files that outlive every service.

    <experiments>/<exp_folder>/<exp_name>/config.yaml              settings of the last attempt
                                          run.json                 see `RunRecord.start`
                                          metrics.jsonl            one JSON object per step
                                          eval/<name>-<step>.npz   arrays of an evaluation
                                          eval/<name>-<step>.json  its summary

`RunRecord` writes these files and reads one of them at a time; a file that cannot be read is an
error. `read_run` reads them all, and lists which are missing or broken. Nothing else reads them.

Every line of `metrics.jsonl` has `step` (outer steps done) and metrics of that step: one line of
its training, with `loss` (nats per token), and another one of an evaluation after it. JSON has no
number for a diverged loss: NaN and the infinities are written as the strings "NaN", "Infinity" and
"-Infinity", and read back as floats.
"""

import errno
import json
import math
import os
import platform
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
from omegaconf import OmegaConf

from ttt.config import upgraded
from ttt.errors import UserError

FINAL_EVALUATION = "loss_by_position"
"""Name of the evaluation at the end of training."""

_REPOSITORY = Path(__file__).parents[2]
_PACKAGES = ("ttt", "jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "grain", "numpy")
_SECRET = re.compile(r".*(key|token|password)|.*secret.*", re.IGNORECASE)
_SECRET_ARGUMENT = re.compile(r"((?:key|token|password|secret\w*)\s*[=:])[^}]+", re.IGNORECASE)
_MASK = "***"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BROKEN = {errno.EROFS, errno.EIO, errno.ENXIO, errno.EACCES, errno.EPERM}
_GONE = {errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.ENOENT}  # a mount, or a run's folder
_NOT_FINITE = {"NaN", "Infinity", "-Infinity"}
_TAIL_BYTES = 1 << 16


class RecordError(UserError):
    """A record on disk that cannot be read."""


class RunRecord:
    """The record of one run. One process of the run writes it; anyone may read it."""

    def __init__(self, folder: str | Path, *, active: bool = True):
        """Bind to `folder`; nothing is read or made.

        active: false in all processes of a run but one: what would write does nothing.
        """
        self.folder = Path(folder).expanduser().absolute()
        self.active = active
        self._run_json = self.folder / "run.json"
        self._metrics_jsonl = self.folder / "metrics.jsonl"

    def start(
        self, config: Mapping[str, Any], *, devices: Sequence[str], data: Mapping[str, str]
    ) -> None:
        """Open a new record, or reopen an existing one for another attempt.

        config: resolved settings, masked here once more.
        devices: kinds of the accelerators, one per device.
        data: split -> fingerprint of its tokens.

        Writes `config.yaml` and `run.json`: `id` (stable over attempts), `status` (running,
        finished, failed or interrupted) and `attempts`, each with `started` and `finished` (UTC),
        `status`, `command`, `versions`, `git`, `hardware`, `data`, `restored` (from a checkpoint),
        `start` (losses before the first step) and `seconds`.
        """
        if not self.active:
            return
        settings = OmegaConf.to_yaml(OmegaConf.create(masked(config)))
        write_whole(self.folder / "config.yaml", settings)
        run: dict[str, Any] = {"id": uuid.uuid4().hex[:12], "attempts": []}
        if self._run_json.exists():
            run = self.run()
            for earlier in run["attempts"]:
                if earlier["status"] == "running":  # killed
                    earlier["status"] = "interrupted"
        machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
        attempt = {
            "started": _now(),
            "finished": None,
            "status": "running",
            "command": masked_arguments(sys.argv),
            "versions": {"python": platform.python_version()}
            | {package: _version(package) for package in _PACKAGES},
            "git": _git(),
            "hardware": machine | {"devices": list(devices)},
            "data": dict(data),
            **dict.fromkeys(("restored", "start", "seconds")),
        }
        run["attempts"].append(attempt)
        self._write_run(run)

    def note(self, **facts: Any) -> None:
        """Set facts of this attempt, such as `restored` and `start`."""
        if self.active:
            run = self.run()
            run["attempts"][-1].update(facts)
            self._write_run(run)

    def finish(self, status: str) -> None:
        """Close this attempt as finished, failed or interrupted."""
        self.note(finished=_now(), status=status)

    def spent(self, seconds: Mapping[str, float]) -> None:
        """Note where this attempt's time went."""
        self.note(seconds={name: round(value, 3) for name, value in seconds.items()})

    def run(self) -> dict[str, Any]:
        """The content of `run.json`, which has one attempt at least."""
        run = _loads(self._run_json.read_bytes(), self._run_json)
        attempts = run.get("attempts")
        if not (isinstance(attempts, list) and attempts and all("status" in a for a in attempts)):
            raise RecordError(f"{self._run_json} holds no attempt: repair or delete it")
        return run

    def settings(self) -> dict[str, Any]:
        """The content of `config.yaml`, with what older versions did where they had no setting."""
        path = self.folder / "config.yaml"
        try:
            content: Any = OmegaConf.to_container(OmegaConf.load(path))
            if not isinstance(content.get("training"), dict):
                raise ValueError("no settings of a training in it")
            return upgraded(content)
        except Exception as error:  # a parser of a broken file may raise anything
            message = " ".join(f"{type(error).__name__}: {error}".split())
            raise RecordError(f"{path} cannot be read ({message}): move the folder away") from error

    def log(self, step: int, **metrics: Any) -> None:
        """Append a step's metrics: numbers, strings or lists of them, NumPy and JAX included."""
        if not self.active:
            return
        # Opened each time, so that the line is in the file when the call returns.
        with self._metrics_jsonl.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, **metrics}))

    def metrics(self) -> list[dict[str, Any]]:
        """All logged lines, in order; a last line that a crash cut off is left out."""
        if not self._metrics_jsonl.exists():
            return []
        lines = self._metrics_jsonl.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        rows = [
            _loads(line, f"{self._metrics_jsonl}, line {number}")
            for number, line in enumerate(whole, start=1)
        ]
        return [{name: _number(value) for name, value in row.items()} for row in rows]

    def logged(self, step: int, name: str) -> bool:
        """Whether a line of `step` has the metric `name`."""
        return any(row["step"] == step and name in row for row in self.metrics())

    def last_step(self) -> tuple[int, float | None]:
        """The last logged step and its loss, if it has one; (0, None) before the first.

        It reads the end of `metrics.jsonl` alone, so that it may be called often.
        """
        try:
            with self._metrics_jsonl.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read().splitlines()
        except OSError:
            return 0, None
        for line in reversed(lines):
            with suppress(ValueError):  # cut off, at either end
                row = json.loads(line)
                if "loss" in row or "tokens" in row:
                    return row["step"], float(row["loss"]) if "loss" in row else None
        return 0, None

    def sync(self) -> None:
        """Wait until all logged lines are on the disk, safe from a power failure."""
        if self.active:
            with self._metrics_jsonl.open("rb") as file:
                os.fsync(file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, and a last line that a crash cut off.

        Call it whenever training starts, with the restored step (0: from scratch), so that steps
        which are trained again are not logged twice.
        """
        if not self.active:
            return
        kept = [row for row in self.metrics() if row["step"] <= step]
        write_whole(self._metrics_jsonl, "".join(map(_line, kept)))

    def save_arrays(
        self, name: str, step: int, arrays: Mapping[str, np.ndarray], summary: Mapping[str, Any]
    ) -> Path:
        """Write an evaluation's arrays and summary; returns the path of the arrays."""
        path = self.folder / "eval" / f"{name}-{step}.npz"
        if self.active:
            _write(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
            _write_json(path.with_suffix(".json"), summary)
        return path

    def last_evaluation(self) -> Path | None:
        """The path of the last final evaluation's summary; its arrays lie beside it."""
        paths = (self.folder / "eval").glob(f"{FINAL_EVALUATION}-*.json")
        steps = {path.stem.removeprefix(f"{FINAL_EVALUATION}-"): path for path in paths}
        last = max((step for step in steps if step.isdecimal()), key=int, default="")
        return steps.get(last)

    def _write_run(self, run: Mapping[str, Any]) -> None:
        _write_json(self._run_json, {**run, "status": run["attempts"][-1]["status"]})


@dataclass(frozen=True)
class StoredRun:
    """The record of a training run; missing parts are empty."""

    folder: Path
    run: Mapping[str, Any] = field(default_factory=dict)
    """`run.json`, as `RunRecord.start` describes it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """`config.yaml`: its sections `model`, `training`, …"""
    metrics: Sequence[Mapping[str, Any]] = ()
    """`metrics.jsonl`."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Of the last final evaluation."""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of the same, such as `learning_nll` [positions], the sum of −log p over sequences."""
    faults: tuple[str, ...] = ()
    """Files that are missing or cannot be read."""

    @property
    def status(self) -> str:
        """Running (or killed: nobody can tell), finished, failed, interrupted; broken: unknown."""
        return self.run.get("status", "broken")

    @property
    def attempts(self) -> Sequence[Mapping[str, Any]]:
        """Of the run, in their order."""
        return self.run.get("attempts", ())

    @property
    def training(self) -> Mapping[str, Any]:
        """The section of the settings."""
        return self.settings.get("training", {})

    @property
    def mode(self) -> str:
        """`jax`, `token_stats` or `simulate`."""
        return self.training.get("runtime_mode", "jax")

    def noted(self, key: str) -> list[Mapping[str, Any]]:
        """The attempts' values under `key`, without empty ones."""
        return [attempt[key] for attempt in self.attempts if attempt.get(key)]


def read_run(folder: Path) -> StoredRun:
    """Read all of a record, whatever state it is in."""
    record, faults = RunRecord(folder), []

    def fault(text: str) -> None:
        faults.append(" ".join(text.replace(str(folder.absolute()), str(folder)).split())[:400])

    def part(name: str, load: Callable[[], Any], empty: Any) -> Any:
        if not (folder / name).exists():
            fault(f"{folder / name} is missing")
            return empty
        try:
            return load()
        except RecordError as error:
            fault(str(error))
        except Exception as error:  # a parser of a broken file may raise anything
            fault(f"{folder / name} cannot be read: {type(error).__name__}: {error}")
        return empty

    run = part("run.json", record.run, {})
    settings = part("config.yaml", record.settings, {})
    finished = run.get("status") == "finished"
    rows: Any = ()
    if finished or (folder / "metrics.jsonl").exists():
        rows = part("metrics.jsonl", record.metrics, ())
        if finished and not rows and not faults:
            fault(f"{folder / 'metrics.jsonl'} holds no step")
    summary, arrays = {}, {}
    if path := record.last_evaluation():
        beside = path.with_suffix(".npz")
        summary = part(f"eval/{path.name}", lambda: _loads(path.read_bytes(), path), {})
        arrays = part(f"eval/{beside.name}", lambda: _arrays(beside), {})
    elif finished and settings.get("training", {}).get("runtime_mode") != "simulate":
        fault(f"{folder}/eval/{FINAL_EVALUATION}-STEP.json is missing")
    return StoredRun(folder, run, settings, rows, summary, arrays, tuple(faults))


def is_run(folder: Path) -> bool:
    """Whether it holds a training run's record, whole or in part.

    Evaluations have none of these files, benchmarks the settings of another run and no metrics.
    """
    names = ("run.json", "config.yaml", "metrics.jsonl")
    present = [name for name in names if (folder / name).exists()]
    if present != ["run.json", "config.yaml"]:
        return bool(present)
    try:
        training = RunRecord(folder).settings()["training"]
    except RecordError:
        return True
    return training.get("exp_name", folder.name) == folder.name


def disk_fault(error: OSError) -> str:
    """What failed, if it is the disk that gave up; empty for any other error."""
    if error.errno not in _FULL | _BROKEN | _GONE:
        return ""
    return f"{error.filename or 'a file of the run'}: {error.strerror}"


def masked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which the text of every secret, known by its name, is replaced by ***.

    Secret is what is named `…key`, `…token`, `…password` or `…secret…` (not `bos_token_id`).
    """
    return {
        name: masked(value)
        if isinstance(value, Mapping)
        else _MASK
        if _SECRET.fullmatch(name) and isinstance(value, str) and value
        else value
        for name, value in settings.items()
    }


def masked_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line without the values of secrets, `a.my_key=…` or `a={my_key:…}`."""
    return [_SECRET_ARGUMENT.sub(rf"\1{_MASK}", argument) for argument in arguments]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git() -> dict[str, Any] | str:
    """Commit and dirty flag of the checkout that this file lies in."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        ran = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        # An installed package may lie inside somebody else's checkout.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _REPOSITORY.resolve():
            return "not a checkout"
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy and JAX
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _number(value: Any) -> Any:
    """What `_plain` made of a float, as a float again."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value


def _loads(text: bytes, place: Path | str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise RecordError(f"{place} is not valid JSON ({error}): repair or delete it") from error
    if not isinstance(content, dict):
        raise RecordError(f"{place} is no JSON object: repair or delete it")
    return content


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text so that readers, and a crash, find the old file or the new one, never a part."""
    _write(path, lambda file: file.write(text.encode()))


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write another file and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # or a power failure may leave an empty file of that name
    beside.replace(path)
