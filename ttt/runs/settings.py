"""From the flags of scripts 03 and 06 to names and to the settings of every run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt.config import config_dir
from ttt.errors import UserError
from ttt.experiment_rules import size_setting
from ttt.infra.plan_manifest import MATCHINGS
from ttt.runs.registry import Size, one_of

_SETTINGS = {
    "exp_folder": "training.exp_folder",
    "checkpoint_root": "deploy_paths.checkpoint",
    "exp_dir": "deploy_paths.experiments",
    "wandb_entity": "training.wandb_entity",
    "wandb_project": "training.wandb_project",
    "runtime_mode": "training.runtime_mode",
    "dummy_dataset": "training.dummy_dataset",
    "log_wandb": "training.log_wandb",
}
"""Flag -> the setting that it gives to every run."""
_CORPORA = {
    "dclm_root": ("size.pretrain_dataset", "dclm_filter_8k"),
    "books_root": ("size.extension_dataset", "books3"),
}
"""Flag that names a store -> the setting that names the dataset, and the paper's dataset."""
# Settings that the plan decides itself.
_OWNED = re.compile(
    r"training\.(exp_\w+|resume_\w+|load_part|total_steps|seq_length|global_batch_size|\w+_seed"
    r"|runtime_mode|train_mode)"
    r"|size\.(pretrain_(steps|seq_length|batch_size)|window|chunk|adapt_(steps|share)"
    r"|extension_steps)"
    r"|deploy_paths\.(checkpoint|experiments)|experiment|model|method|training|context|deploy"
)
_PLAIN = re.compile(r"[\w./:-]+", re.ASCII)
_OTHERWISE_TYPED = re.compile(r"[-+.\d_e]*|true|false|null|yes|no|on|off|inf|nan", re.IGNORECASE)


def override(key: str, text: str) -> str:
    """`KEY=VALUE` with the text as it is, whatever is in it: blanks, commas, quotes, dollars."""
    if _PLAIN.fullmatch(text) and not _OTHERWISE_TYPED.fullmatch(text):
        return f"{key}={text}"
    # Hydra takes a backslash before a quote for an escape, OmegaConf one before `${`.
    inner = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    inner = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", inner)
    return f"{key}='{inner}'"


def names(text: str | None, flag: str) -> tuple[str, ...] | None:
    """`a,b` -> (a, b), each once; None stays None. Raises UserError."""
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts) or len(set(parts)) != len(parts):
        raise UserError(
            f"{flag} {text!r}: must be names with commas between, each once; correct it"
        )
    return parts


def seeds(text: str | None) -> tuple[int, ...] | None:
    """`0,1` -> (0, 1). Raises UserError."""
    parts = names(text, "--seeds")
    if parts is not None and not all(part.isdecimal() for part in parts):
        raise UserError(
            f"--seeds {text!r}: must be whole numbers from 0, such as 0,1,2; correct it"
        )
    return None if parts is None else tuple(map(int, parts))


def matchings(text: str | None, runtime_mode: str) -> tuple[str, ...] | None:
    """Names of matchings. Raises UserError where there would be nothing to measure."""
    parts = names(text, "--matching")
    for name in parts or ():
        one_of(name, MATCHINGS, "--matching")
    if parts and "wall_clock" in parts:
        if "tokens" not in parts:
            raise UserError(
                "--matching wall_clock: takes its seconds per token from the token-matched runs; "
                "write --matching tokens,wall_clock"
            )
        if runtime_mode != "jax":
            raise UserError(
                f"--matching wall_clock: --runtime-mode {runtime_mode} trains no network whose "
                "steps could be timed; leave wall_clock out"
            )
    return parts


def of_flags(flags: Mapping[str, Any], size: Size, first: Sequence[str] = ()) -> tuple[str, ...]:
    """Overrides of every run, without seeds, names and budgets. Raises UserError.

    flags: as a script parsed them; a flag that is missing is one that was not given.
    first: overrides that come before the user's own.
    """
    return (*of_run(flags, first), *of_data(flags, size))


def of_run(flags: Mapping[str, Any], first: Sequence[str] = ()) -> tuple[str, ...]:
    """`of_flags` without the data: the place to run at, the user's overrides, folders, W&B."""
    overrides = [*first, *flags.get("override", ())]
    for text in overrides:
        check_override(text)
    own = [
        f"{key}=true" if value is True else override(key, value)
        for flag, key in _SETTINGS.items()
        if (value := flags.get(flag)) not in (None, False)
        and (flag, value) != ("runtime_mode", "jax")
    ]
    deploy = [f"+deploy={flags['deploy']}"] if flags.get("deploy") else []
    return (*deploy, *overrides, *own)


def of_data(flags: Mapping[str, Any], size: Size) -> tuple[str, ...]:
    """Overrides that say where both corpora are; without flags, none: the configs say it.

    flags: `data_root`, a folder with a token store per dataset, named as the dataset is; or the
    stores themselves, `dclm_root` and `books_root`.
    """
    root = flags.get("data_root")
    stores = {flag: flags[flag] for flag in _CORPORA if flags.get(flag) is not None}
    if root is not None and stores:
        raise UserError(
            f"--data-root {root}: is in place of the two stores' own flags; give one or the other"
        )
    own = {flag: size_setting(config_dir(), size.name, key) for flag, (key, _) in _CORPORA.items()}
    if root is not None:
        return tuple(
            override(f"deploy_paths.data.{name}", str(Path(root) / name))
            for name in dict.fromkeys(own.values())
        )
    settings = []
    for flag, store in stores.items():
        key, name = _CORPORA[flag]
        settings.append(override(f"deploy_paths.data.{name}", store))
        settings += [f"{key}={name}"] * (own[flag] != name)
    return tuple(settings)


def check_override(text: str) -> None:
    """Raise UserError for a user's override that the plan decides itself, or that is none."""
    key = text.lstrip("+~").split("=")[0].split("@")[0]
    if "=" not in text and not text.startswith("~"):
        raise UserError(f"--override {text}: must be KEY=VALUE, as for train; write it so")
    if key == "training.wandb_key":  # a plan is printed, and kept in a manifest
        raise UserError(
            "--override training.wandb_key: would be in every command; set the variable "
            "WANDB_API_KEY instead"
        )
    if _OWNED.fullmatch(key):
        raise UserError(
            f"--override {text}: the plan sets {key} for each run, from paths, seeds, budget "
            "and folders; use this script's own flags for it"
        )
