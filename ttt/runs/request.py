"""From a script's flags to an `Order`: sizes and paths by name, folders, data, overrides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt.errors import UserError
from ttt.runs.compose import override
from ttt.runs.plan import check_overrides
from ttt.runs.registry import MATCHINGS, Registry, Size, one_of


def names(text: str | None, flag: str) -> tuple[str, ...] | None:
    """`a,b` -> (a, b), each once; None stays None. Raises UserError."""
    if text is None:
        return None
    found = tuple(part.strip() for part in text.split(","))
    if not all(found) or len(set(found)) != len(found):
        raise UserError(f"{flag} {text!r}: must be names with commas between, each once; mend it")
    return found


def seeds(text: str | None) -> tuple[int, ...] | None:
    """`0,1` -> (0, 1). Raises UserError."""
    found = names(text, "--seeds")
    if found is not None and not all(part.isdecimal() for part in found):
        raise UserError(f"--seeds {text!r}: must be whole numbers from 0, such as 0,1,2; mend it")
    return None if found is None else tuple(int(part) for part in found)


def matchings(text: str | None, runtime_mode: str) -> tuple[str, ...] | None:
    """Names of matchings. Raises UserError where there would be nothing to measure."""
    found = names(text, "--matching")
    for name in found or ():
        one_of(name, MATCHINGS, "--matching")
    if found and "wall_clock" in found:
        if "tokens" not in found:
            raise UserError(
                "--matching wall_clock: takes its seconds per token from the token-matched runs; "
                "write --matching tokens,wall_clock"
            )
        if runtime_mode != "jax":
            raise UserError(
                f"--matching wall_clock: --runtime-mode {runtime_mode} trains no network whose "
                "steps could be timed; leave wall_clock out"
            )
    return found


def data_settings(
    registry: Registry,
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
    settings = []
    if data_root is not None:
        datasets = dict.fromkeys(size.corpora.values())
        settings = [
            override(f"deploy_paths.data.{name}", str(Path(data_root) / name)) for name in datasets
        ]
    roots = {"dclm": ("size.pretrain_dataset", dclm), "books": ("size.extension_dataset", books)}
    for corpus, (key, root) in roots.items():
        if root is not None:
            name = registry.corpora[corpus]
            settings.append(override(f"deploy_paths.data.{name}", root))
            if size.corpora[corpus] != name:
                settings.append(f"{key}={name}")
    return tuple(settings)


def settings(
    *,
    exp_folder: str,
    deploy: str | None = None,
    checkpoint_root: str | None = None,
    exp_dir: str | None = None,
    runtime_mode: str = "jax",
    dummy_dataset: bool = False,
    wandb: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[str, ...]:
    """Overrides of every run but for data and budgets; the user's own come first."""
    check_overrides(overrides)
    places = {
        "training.exp_folder": exp_folder,
        "deploy_paths.checkpoint": checkpoint_root,
        "deploy_paths.experiments": exp_dir,
        "training.wandb_entity": (wandb or {}).get("entity"),
        "training.wandb_project": (wandb or {}).get("project"),
    }
    own = [override(key, text) for key, text in places.items() if text is not None]
    own += [f"training.runtime_mode={runtime_mode}"] * (runtime_mode != "jax")
    own += ["training.dummy_dataset=true"] * dummy_dataset
    own += ["training.log_wandb=true"] * bool((wandb or {}).get("log"))
    return (*([f"+deploy={deploy}"] if deploy else []), *overrides, *own)
