"""The matrix of imported models, from scratch and from the weights: as commands, and as a plan.

Its runs are `ttt.experiment_rules.EXTERNAL`.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ttt.config import compose, config_dir, resolve
from ttt.dataloader import first_use
from ttt.dataloader.text import TOKENIZER_FILE
from ttt.errors import RunError, UserError
from ttt.experiment_rules import EXTERNAL, size_setting
from ttt.infra.step_folders import newest, run_folder
from ttt.interop import catalog
from ttt.runs import pilot, settings
from ttt.runs.plan import PathRuns, Plan, PlannedRun, PreparedPlan, config_of, planned_run
from ttt.runs.registry import one_of

PATHS = ("scratch", "adapter")
BUDGETS: Mapping[str, Mapping[str, int]] = {
    "pilot": {
        "pretrain_steps": 8,
        "adapt_steps": 4,
        "extension_steps": 2,
        "seq_length": 256,
        "extension_length": 512,
        "global_batch_size": 1,
    },
    "full": {},
}
"""What script 12 takes unless told otherwise: a trial for two cores; the experiments' own."""
_PILOT = (
    "training.eval_batch_size=1",
    "training.eval_batches=2",
    "training.eval_start_batches=1",
    "training.save_milestone_freq=0",
    "training.keep_checkpoints=1",
)
"""Of every run of a plan whose sequences the user shortens."""
_BUILT_IN = "builtin_imported"
_STAGES = {"pretrain": "pretrain", "adaptation": "adapt", "extension": "extend"}
_CORPORA = {"dclm_root": "size.pretrain_dataset", "books_root": "size.extension_dataset"}


def keys_of(model: str) -> tuple[str, ...]:
    """`all` or a key -> keys. Raises UserError."""
    if model == "all":
        return tuple(catalog.MODELS)
    return (one_of(model, catalog.MODELS, "--model"),)


def paths_of(path: str) -> tuple[str, ...]:
    """`all` or a path -> paths. Raises UserError."""
    return PATHS if path == "all" else (one_of(path, PATHS, "--path"),)


class Entry(NamedTuple):
    """A run of the matrix."""

    path: str
    method: str
    stage: str
    name: str
    parent: str
    """Empty: it starts from random weights."""


def matrix(model: catalog.Model, paths: Sequence[str]) -> Iterator[Entry]:
    """A model's runs, parents first."""
    for run, (method, stage, parent) in EXTERNAL.items():
        path = "adapter" if "import" in run else "scratch"
        if path in paths:
            names = (text.format(model=model.short) for text in (run, parent))
            yield Entry(path, method, stage, *names)


# ---- commands (script 08) ----------------------------------------------------------------


def commands(flags: Mapping[str, Any]) -> list[str]:
    """Comments and commands in order of dependency. Raises UserError for flags that do not fit.

    flags: as script 08 parsed them.
    """
    keys, paths = keys_of(flags["model"]), paths_of(flags["path"])
    lines = []
    for key in keys:
        model = catalog.MODELS[key]
        overrides = _sizes(flags) + _overrides(flags, model)
        lines.append(f"# {key}")
        first = next(iter(EXTERNAL)).format(model=model.short)  # the overrides are the same for all
        resolve(compose([f"+experiment=external/{model.short}/{first}", *overrides]))
        if "adapter" in paths:
            lines += _import_commands(flags, model)
        for entry in matrix(model, paths):
            experiment = f"+experiment=external/{model.short}/{entry.name}"
            lines.append(f"# {entry.path}" + (f" from {entry.parent}" if entry.parent else ""))
            lines.append(shlex.join(["uv", "run", "train", experiment, *overrides]))
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


def _sizes(flags: Mapping[str, Any]) -> list[str]:
    """Of every run, as script 08 takes them."""
    keys = ("total_steps", "seq_length", "global_batch_size")
    return [f"training.{key}={_count(flags, key)}" for key in keys if flags.get(key) is not None]


def _count(flags: Mapping[str, Any], key: str) -> int:
    if flags[key] < 1:
        names = {"extension_steps": "ext-steps", "extension_length": "ext-seq-length"}
        flag = names.get(key, key.replace("_", "-"))
        raise UserError(f"--{flag} {flags[key]}: must be at least 1; raise it")
    return flags[key]


def _overrides(flags: Mapping[str, Any], model: catalog.Model) -> list[str]:
    """What the user's flags give to every run of a model, but for lengths."""
    root = flags.get("data_root")
    data = []
    for flag, key in _CORPORA.items():
        name = size_setting(config_dir(), f"external/{model.short}", key)
        if flags.get(flag) and root:
            raise UserError(
                f"--data-root {root}: is in place of the two stores' own flags; give one or the "
                "other"
            )
        if flags.get("bootstrap_token_data"):
            data.append(f"{key}={_BUILT_IN}")
        elif store := flags.get(flag) or (root and str(Path(root) / name)):
            data.append(settings.override(f"deploy_paths.data.{name}", store))
    common = {k: v for k, v in flags.items() if not k.endswith("_root") or k == "checkpoint_root"}
    return [*settings.of_run(common), *data]


# ---- a plan (script 09) ------------------------------------------------------------------


def prepare(flags: Mapping[str, Any]) -> PreparedPlan:
    """Check everything that can be checked before the first run; raises UserError.

    flags: of script 09. Models whose import is not there stay in the plan as `absent`.
    """
    keys, paths = keys_of(flags["model"]), paths_of(flags["path"])
    flags = _with_budget(flags)
    if flags.get("bootstrap_token_data") and any(flags.get(f) for f in (*_CORPORA, "data_root")):
        raise UserError(
            "--bootstrap-token-data: reads the built-in text, and --data-root, --dclm-root or "
            "--books-root name other text; give one or the other"
        )
    runs: list[PlannedRun] = []
    absent: dict[str, str] = {}
    chains = []
    for key in keys:
        model = catalog.MODELS[key]
        own = [_planned(flags, model, entry) for entry in matrix(model, paths)]
        missing = _missing(flags, config_of(own[0]), model)
        for run in own:
            starts_from_it = run.parent == catalog.run_name(model.short)
            if missing and (starts_from_it or flags.get("bootstrap_token_data")):
                absent[run.name] = missing
            elif run.parent in absent:
                absent[run.name] = absent[run.parent]
        runs += own
        chains += _chains(own)
    plan = Plan(tuple(runs), tuple(chains))
    recorded = {key: flags.get(key) for key in sorted({*flags} - _NOT_OF_THE_PLAN)}
    return PreparedPlan(
        pilot.folder_of(plan, flags["exp_folder"]),
        {"registry": "external", "size": flags["model"], "runtime_mode": flags["runtime_mode"]},
        recorded,
        plan,
        skip_existing=bool(flags.get("skip_existing")),
        make_data=partial(_bootstrap, flags["import_folder"], runs, absent)
        if flags.get("bootstrap_token_data")
        else None,
        absent=absent,
    )


def _chains(runs: Sequence[PlannedRun]) -> Iterator[PathRuns]:
    """Each run that no other starts from, with those before it; its name is the path's."""
    by_name = {run.name: run for run in runs}
    for last in [name for name in by_name if name not in {run.parent for run in runs}]:
        chain, name = [], last
        while name in by_name:
            chain.append(name)
            name = by_name[name].parent
        yield PathRuns(last, "own", None, tuple(reversed(chain)))


def _with_budget(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags, with the budget's numbers where none is given."""
    filled = {**flags}
    if flags.get("seq_length") and flags.get("extension_length") is None:
        filled["extension_length"] = 4 * flags["seq_length"]
    budget = BUDGETS[flags["budget"]].items()
    return filled | {key: number for key, number in budget if filled.get(key) is None}


def check_complete(prepared: PreparedPlan) -> None:
    """Raise RunError that names the models whose runs were left out."""
    if reasons := dict.fromkeys(prepared.absent.values()):
        left = len(prepared.absent)
        raise RunError(f"{left} runs were left out:\n  " + "\n  ".join(reasons))


_NOT_OF_THE_PLAN = {"dry_run", "skip_existing"}


def _is_light(flags: Mapping[str, Any]) -> bool:
    return flags["runtime_mode"] != "jax"


def _missing(flags: Mapping[str, Any], config: Any, model: catalog.Model) -> str:
    """Why a model's imported weights cannot be started from; empty: they can."""
    name, root = catalog.run_name(model.short), config.deploy_paths.checkpoint
    folder = run_folder(root, flags["import_folder"], name)
    if newest(folder) is not None:
        return ""
    return (
        f"{model.key}: its weights are not in {folder}; {model.remedy}, and "
        f"scripts/10_seed_external_import_checkpoints.py --model {model.key} imports it"
    )


def _planned(flags: Mapping[str, Any], model: catalog.Model, entry: Entry) -> PlannedRun:
    overrides = [*(_PILOT if flags.get("seq_length") else ()), *_overrides(flags, model)]
    budget = {
        "size.pretrain_steps": "pretrain_steps",
        "size.adapt_steps": "adapt_steps",
        "size.extension_steps": "extension_steps",
        "size.pretrain_seq_length": "seq_length",
        "size.window": "seq_length",
        "size.pretrain_batch_size": "global_batch_size",
    }
    overrides += [f"{k}={_count(flags, f)}" for k, f in budget.items() if flags.get(f) is not None]
    if flags.get("seq_length") is not None:
        overrides.append(f"size.chunk={max(1, flags['seq_length'] // 4)}")
    if entry.stage == "extension" and flags.get("extension_length") is not None:
        overrides.append(f"training.seq_length={_count(flags, 'extension_length')}")
    parent = entry.parent
    if parent == catalog.run_name(model.short) and _is_light(flags):
        parent = ""  # a count model takes nothing from weights
        overrides += ["training.load_part=none", "training.resume_exp_name="]
    elif parent == catalog.run_name(model.short):
        overrides.append(settings.override("training.resume_exp_folder", flags["import_folder"]))
    methods = {run.format(model=model.short): known[0] for run, known in EXTERNAL.items()}
    return planned_run(
        f"external/{model.short}/{entry.name}",
        overrides,
        name=entry.name,
        stage=_STAGES[entry.stage],
        method=entry.method,
        kind=f"{model.short}-{entry.stage}-{entry.method}",
        parent=parent or None,
        parent_method=methods.get(parent, "fa") if parent else None,
    )


def _bootstrap(
    import_folder: str, runs: Sequence[PlannedRun], absent: Mapping[str, str], console: Console
) -> None:
    """Make the built-in text in each model's own tokens, where it is missing."""
    for run in runs:
        config = config_of(run)
        root = config.deploy_paths.data[config.training.dataset_name]
        if run.name in absent or Path(root).exists():
            continue
        console.print(f"making the built-in corpus in {root}", soft_wrap=True)
        name = catalog.run_name(config.model.name)
        step = newest(run_folder(config.deploy_paths.checkpoint, import_folder, name))
        file = step and step / TOKENIZER_FILE
        first_use.ensure(config.training.dataset_name, root, tokenizer_file=file)
