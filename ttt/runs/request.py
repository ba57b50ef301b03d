"""From a script's flags to the settings of a plan: names, folders, data, overrides."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ttt.config import config_dir
from ttt.errors import UserError
from ttt.experiment_rules import size_setting
from ttt.runs.compose import override
from ttt.runs.registry import MATCHINGS, Size, one_of

_CORPORA = {"dclm": "size.pretrain_dataset", "books": "size.extension_dataset"}
"""What the ladder reads -> the setting that names the dataset."""
_DATASETS = {"dclm": "dclm_filter_8k", "books": "books3"}
"""The datasets of the paper, by corpus."""
# Settings that the plan decides itself.
_OWNED = re.compile(
    r"training\.(exp_\w+|resume_\w+|load_part|total_steps|seq_length|global_batch_size|\w+_seed"
    r"|runtime_mode|train_mode)"
    r"|size\.(pretrain_(steps|seq_length|batch_size)|window|chunk|adapt_(steps|share)"
    r"|extension_steps)"
    r"|deploy_paths\.(checkpoint|experiments)|experiment|model|method|training|context|deploy"
)


def names(text: str | None, flag: str) -> tuple[str, ...] | None:
    """`a,b` -> (a, b), each once; None stays None. Raises UserError."""
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts) or len(set(parts)) != len(parts):
        raise UserError(f"{flag} {text!r}: must be names with commas between, each once; mend it")
    return parts


def seeds(text: str | None) -> tuple[int, ...] | None:
    """`0,1` -> (0, 1). Raises UserError."""
    parts = names(text, "--seeds")
    if parts is not None and not all(part.isdecimal() for part in parts):
        raise UserError(f"--seeds {text!r}: must be whole numbers from 0, such as 0,1,2; mend it")
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


def data_settings(
    size: Size,
    *,
    data_root: str | None = None,
    dclm: str | None = None,
    books: str | None = None,
) -> tuple[str, ...]:
    """Overrides that say where both corpora lie; none given: as the configs have it.

    data_root: a folder with a token store per dataset, called as the dataset is.
    dclm, books: the stores themselves.
    """
    if data_root is not None and (dclm is not None or books is not None):
        raise UserError(
            f"--data-root {data_root}: is in place of the two stores' own flags; give one or the "
            "other"
        )
    own = {c: size_setting(config_dir(), size.name, key) for c, key in _CORPORA.items()}
    if data_root is not None:
        datasets = dict.fromkeys(own.values())
        return tuple(
            override(f"deploy_paths.data.{name}", str(Path(data_root) / name)) for name in datasets
        )
    settings = []
    for corpus, root in {"dclm": dclm, "books": books}.items():
        name = _DATASETS[corpus]
        if root is not None:
            settings.append(override(f"deploy_paths.data.{name}", root))
            settings += [f"{_CORPORA[corpus]}={name}"] * (own[corpus] != name)
    return tuple(settings)


def settings(
    *,
    exp_folder: str,
    deploy: str | None = None,
    checkpoint_root: str | None = None,
    exp_dir: str | None = None,
    runtime_mode: str = "jax",
    dummy_dataset: bool = False,
    wandb: Mapping[str, str | None] | None = None,
    log_wandb: bool = False,
    overrides: Sequence[str] = (),
) -> tuple[str, ...]:
    """Overrides of every run but for data and budgets; the user's own come first.

    wandb: `entity` and `project`.
    """
    check_overrides(overrides)
    places = {
        "training.exp_folder": exp_folder,
        "deploy_paths.checkpoint": checkpoint_root,
        "deploy_paths.experiments": exp_dir,
        **{f"training.wandb_{key}": value for key, value in (wandb or {}).items()},
    }
    own = [override(key, text) for key, text in places.items() if text is not None]
    own += [f"training.runtime_mode={runtime_mode}"] * (runtime_mode != "jax")
    own += ["training.dummy_dataset=true"] * dummy_dataset
    own += ["training.log_wandb=true"] * log_wandb
    return (*([f"+deploy={deploy}"] if deploy else []), *overrides, *own)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for a user's override that the plan itself decides, or is none."""
    for text in overrides:
        key = text.lstrip("+~").split("=")[0].split("@")[0]
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"--override {text}: must be KEY=VALUE, as for train; write it so")
        if key == "training.wandb_key":  # a plan is printed, and kept in a manifest
            raise UserError(
                "--override training.wandb_key: would stand in every command; set the variable "
                "WANDB_API_KEY in its place"
            )
        if _OWNED.fullmatch(key):
            raise UserError(
                f"--override {text}: the plan sets {key} for each run, from paths, seeds, budget "
                "and folders; use this script's own flags for it"
            )
