"""The matrix of imported models as commands: from scratch, and from the imported weights."""

import shlex
from collections.abc import Mapping
from typing import Any

from ttt.config import compose, config_dir, resolve
from ttt.errors import UserError
from ttt.experiment_rules import EXTERNAL, size_setting
from ttt.interop import catalog
from ttt.runs import settings
from ttt.runs.registry import one_of

PATHS = ("scratch", "adapter")
_FLAGS = {
    "total_steps": "training.total_steps",
    "seq_length": "training.seq_length",
    "global_batch_size": "training.global_batch_size",
}


def keys_of(model: str) -> tuple[str, ...]:
    """`all` or a key -> keys. Raises UserError."""
    if model == "all":
        return tuple(catalog.MODELS)
    return (one_of(model, catalog.MODELS, "--model"),)


def commands(flags: Mapping[str, Any]) -> list[str]:
    """Comments and commands in order of dependency. Raises UserError for flags that do not fit.

    flags: as script 08 parsed them.
    """
    keys = keys_of(flags["model"])
    paths = PATHS if flags["path"] == "all" else (one_of(flags["path"], PATHS, "--path"),)
    lines = []
    for key in keys:
        model = catalog.MODELS[key]
        lines.append(f"# {key}")
        first = next(iter(EXTERNAL)).format(model=model.short)  # the overrides are the same for all
        resolve(compose([f"+experiment=external/{model.short}/{first}", *_overrides(flags, model)]))
        if "adapter" in paths:
            lines += _import_commands(flags, model)
        for run, (_, _, parent) in EXTERNAL.items():
            path = "adapter" if "import" in run else "scratch"
            if path in paths:
                name = f"external/{model.short}/{run.format(model=model.short)}"
                start = f" from {parent.format(model=model.short)}" if parent else ""
                lines += [f"# {path}{start}", _command(flags, model, name)]
    return lines


def _import_commands(flags: Mapping[str, Any], model: catalog.Model) -> list[str]:
    """What brings the weights in."""
    root = flags.get("profile_root")
    prepare = ["scripts/07_prepare_external_models.py", "--model", model.key]
    seed = ["scripts/10_seed_external_import_checkpoints.py", "--model", model.key]
    prepare += ["--out-root", root] if root else []
    seed += ["--profile-root", root] if root else []
    if flags.get("checkpoint_root"):
        seed += ["--checkpoint-root", flags["checkpoint_root"]]
    seed += ["--exp-folder", flags["exp_folder"]]
    lines = [] if model.package else [f"# {model.remedy}"]
    python = ["uv", "run", "--exact", "python"]
    note = f"# the weights, as {catalog.run_name(model.short)}"
    return [*lines, note, *(shlex.join([*python, *script]) for script in (prepare, seed))]


def _command(flags: Mapping[str, Any], model: catalog.Model, name: str) -> str:
    return shlex.join(["uv", "run", "train", f"+experiment={name}", *_overrides(flags, model)])


def _overrides(flags: Mapping[str, Any], model: catalog.Model) -> list[str]:
    stores = {"dclm_root": "size.pretrain_dataset", "books_root": "size.extension_dataset"}
    data = []
    for flag, key in stores.items():
        if flags.get(flag):
            dataset = size_setting(config_dir(), f"external/{model.short}", key)
            data.append(settings.override(f"deploy_paths.data.{dataset}", flags[flag]))
    sizes = []
    for flag, key in _FLAGS.items():
        value = flags.get(flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least 1; raise it")
        sizes += [f"{key}={value}"] if value is not None else []
    common = {k: v for k, v in flags.items() if not k.endswith("_root") or k == "checkpoint_root"}
    return [*settings.of_run(common), *sizes, *data]
