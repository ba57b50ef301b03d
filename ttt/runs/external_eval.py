"""Evaluations of an experiment folder's runs, one `evaluate` for each (script 11).

A run is evaluated by its own process, so that one that fails leaves the others alone, and what is
done is not done again. No JAX.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt.config import checkpoint_root, config_dir, experiments_root
from ttt.errors import RunError, UserError
from ttt.experiment_rules import size_setting
from ttt.infra.plan_manifest import NAME, PlanManifest
from ttt.infra.record import RunRecord
from ttt.infra.step_folders import newest, read_manifest
from ttt.runs import settings
from ttt.runs.children import is_finished, measure

_CORPORA = {
    "dclm_filter_8k": ("dclm_root", "size.pretrain_dataset"),
    "books3": ("books_root", "size.extension_dataset"),
}
"""The paper's dataset -> the flag that names its store, and its name in a model's own tokens."""
_SETTINGS = {
    "eval_split": "evaluation.split",
    "eval_batch_size": "evaluation.batch_size",
    "eval_seed": "evaluation.seed",
    "niah_positions": "evaluation.needles.depths",
    "niah_examples": "evaluation.needles.samples",
    "niah_answer_tokens": "evaluation.needles.tokens_to_generate",
    "decode_prefill": "evaluation.long_decoding.prefill",
    "decode_steps": "evaluation.long_decoding.decode",
    "decode_prompts": "evaluation.long_decoding.sequences",
}


@dataclass(frozen=True)
class Evaluation:
    """One call of `evaluate`."""

    run: str
    dataset: str
    name: str
    step: int
    arguments: tuple[str, ...]
    suites: tuple[str, ...]

    @property
    def command(self) -> str:
        """For a shell."""
        return shlex.join(["uv", "run", "evaluate", *self.arguments])


@dataclass(frozen=True)
class Planned:
    """What is to be evaluated, and what cannot be."""

    folder: Path
    """Of the run records."""
    checkpoints: Path
    evaluations: tuple[Evaluation, ...]
    absent: Mapping[str, str]
    """Run -> why it cannot be evaluated."""


def prepare(flags: Mapping[str, Any]) -> Planned:
    """The evaluations that the flags of script 11 ask for. Raises UserError."""
    roots = (flags.get("exp_dir") or experiments_root(), flags.get("checkpoint_root"))
    folder = Path(roots[0]).expanduser().absolute() / flags["exp_folder"]
    checkpoints = Path(roots[1] or checkpoint_root()).expanduser().absolute()
    known = _runs(folder, checkpoints / flags["exp_folder"])
    wanted = settings.names(flags.get("runs"), "--runs") or tuple(known)
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(
            f"--runs {','.join(unknown)}: not in {folder}; there are {', '.join(known) or 'none'}"
        )
    if not wanted:
        raise UserError(f"{folder}: has no run; train one (scripts/09_external_pilot.py)")
    evaluations, absent = [], {}
    for name in wanted:
        if known[name]:
            absent[name] = known[name]
            continue
        step_folder = newest(checkpoints / flags["exp_folder"] / name) or checkpoints
        stored = read_manifest(step_folder)["config"]
        evaluations += _evaluations(flags, name, int(step_folder.name), stored)
    return Planned(folder, checkpoints, tuple(evaluations), absent)


def _runs(folder: Path, checkpoints: Path) -> dict[str, str]:
    """Every run of the plan, or of the folder -> why it cannot be evaluated; empty: it can."""
    if (folder / NAME).exists():
        names = list(PlanManifest.read(folder).runs)
    else:
        places = [path for path in (folder, checkpoints) if path.is_dir()]
        found = {path.name for place in places for path in place.iterdir()}
        names = sorted(name for name in found if newest(checkpoints / name) is not None)
    return {name: _why_not(folder / name, checkpoints / name) for name in names}


def _why_not(record: Path, checkpoints: Path) -> str:
    step = newest(checkpoints)
    if step is None:
        return f"no checkpoint in {checkpoints}: it was not trained yet"
    mode = read_manifest(step)["config"]["training"]["runtime_mode"]
    if mode != "jax":
        return f"it was made by runtime_mode={mode}, and has no weights to evaluate"
    if (record / "run.json").exists() and (
        status := RunRecord(record).run()["status"]
    ) != "finished":
        return f"it is {status}, not finished"
    return ""


def _evaluations(
    flags: Mapping[str, Any], run: str, step: int, stored: Mapping[str, Any]
) -> list[Evaluation]:
    """One for each dataset."""
    training = stored["training"]
    length = training["seq_length"]
    contexts = _counts(flags, "contexts") or [length, 2 * length]
    lengths = _counts(flags, "niah_lengths") or contexts
    suites = settings.names(flags.get("suites"), "--suites")
    batch = flags.get("eval_batch_size") or training["eval_batch_size"]
    own = [
        *flags.get("override", ()),
        *([f"evaluation.suites=[{','.join(suites)}]"] if suites else []),
        f"evaluation.loss_by_context.contexts={contexts}".replace(" ", ""),
        f"evaluation.loss_by_context.tokens={flags['eval_batches'] * batch * max(contexts)}",
        f"evaluation.needles.lengths={lengths}".replace(" ", ""),
        *([f"evaluation.needles.tasks=[{tasks}]"] if (tasks := flags.get("niah_tasks")) else []),
        *(f"{key}={flags[flag]}" for flag, key in _SETTINGS.items() if flags.get(flag) is not None),
    ]
    made = []
    for dataset in settings.names(flags.get("datasets"), "--datasets") or (
        training["dataset_name"],
    ):
        name, store = _dataset(flags, dataset, stored["model"]["name"])
        text = [f"evaluation.dataset_name={name}"]
        text += [settings.override(f"deploy_paths.data.{name}", store)] if store else []
        # What was asked for is in the name, so another request does not pass for it.
        asked = hashlib.sha256(json.dumps([own, text]).encode()).hexdigest()[:8]
        label = f"external-{dataset}-{asked}"
        arguments = (f"+run={flags['exp_folder']}/{run}", f"evaluation.name={label}", *own, *text)
        made.append(Evaluation(run, dataset, label, step, arguments, suites or ()))
    return made


def _counts(flags: Mapping[str, Any], name: str) -> list[int]:
    """Numbers of tokens with commas between; empty where the flag is not given."""
    flag = f"--{name.replace('_', '-')}"
    parts = settings.names(flags.get(name), flag) or ()
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(
            f"{flag} {flags[name]}: must be whole numbers of tokens from 1, such as 1024,2048; "
            "correct it"
        )
    return [int(part) for part in parts]


def _dataset(flags: Mapping[str, Any], dataset: str, model: str) -> tuple[str, str]:
    """A dataset's name for a model, and its store where a flag gives it, else empty."""
    root = flags.get("data_root")
    if dataset not in _CORPORA:
        return dataset, str(Path(root) / dataset) if root else ""
    flag, key = _CORPORA[dataset]
    own = (config_dir() / "model" / "external" / f"{model}.yaml").is_file()
    name = size_setting(config_dir(), f"external/{model}", key) if own else dataset
    return name, flags.get(flag) or (str(Path(root) / name) if root else "")


# ---- doing it ----------------------------------------------------------------------------


def run(
    planned: Planned, say: Callable[[str], None], *, strict: bool = False
) -> list[Mapping[str, Any]]:
    """Evaluate what is not evaluated yet; all rows, of failed evaluations too.

    strict: runs that cannot be evaluated are failures; else they are only named.
    """
    rows: list[Mapping[str, Any]] = []
    for name, why in planned.absent.items():
        say(f"{name}: {why}")
        if strict:
            rows.append({"run": name, "failed": why})
    total = len(planned.evaluations)
    for number, one in enumerate(planned.evaluations, 1):
        place = planned.folder / one.run / "eval" / f"{one.name}-{one.step}"
        if is_finished(place):
            say(f"evaluation {number} of {total}: {one.run} on {one.dataset} is there already")
        else:
            say(f"evaluation {number} of {total}: {one.run} on {one.dataset}")
            log = planned.folder / "logs" / f"{one.run}.evaluate.log"
            places = [settings.override("deploy_paths.experiments", str(planned.folder.parent))]
            measure("evaluate", [*one.arguments, *places], log, planned.checkpoints)
        found = [row for file in sorted(place.glob("*.json")) for row in _rows_in(file)]
        if not found:
            log = planned.folder / "logs" / f"{one.run}.evaluate.log"
            end = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            found = [{"run": one.run, "step": one.step, "failed": f"{end[0]} (all of it: {log})"}]
        rows += [{"dataset": one.dataset, **row} for row in found]
    return rows


def _rows_in(file: Path) -> list[dict[str, Any]]:
    with suppress(ValueError, KeyError, TypeError):
        return json.loads(file.read_bytes())["rows"]
    return []


def check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise RunError if a row has no value."""
    if failed := [f"{row['run']}: {row['failed']}" for row in rows if row.get("failed")]:
        raise RunError(f"{len(failed)} of {len(rows)} rows failed:\n  " + "\n  ".join(failed[:10]))
