"""The ladder in a short budget: what script 06 asks for, checked and shown, and its data."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ttt.dataloader import first_use, token_store
from ttt.errors import UserError
from ttt.runs import registry, settings
from ttt.runs.matching import WARM_UP_ROWS
from ttt.runs.plan import Plan, PlannedRun, PlanRequest, PreparedPlan, build, config_of


def prepare(flags: Mapping[str, Any]) -> PreparedPlan:
    """Check everything that can be checked before the first run; raises UserError.

    flags: of script 06; a flag that is missing or None is as the registry's pilot has it.
        `size`, `exp_folder` and `runtime_mode` must be there.
    """
    book = registry.load()
    size = book.size(flags["size"])
    mode = flags["runtime_mode"]
    pilot = size.pilot(
        {
            "paths": settings.names(flags.get("paths"), "--paths"),
            "seeds": settings.seeds(flags.get("seeds")),
            "matchings": settings.matchings(flags.get("matching"), mode),
            **{name: flags.get(name) for name in registry.BUDGET},
        }
    )
    for path in pilot.paths:
        book.path(path)
    common = settings.of_flags(flags, size, pilot.overrides)
    request = PlanRequest(book, size, pilot.paths, pilot.seeds, pilot.budget, common)
    planned = tuple(how for how in pilot.matchings if how != "wall_clock")
    plan = build(request, planned)
    matchings = pilot.matchings if mode == "jax" else planned  # other modes have no times
    timed = "wall_clock" in matchings
    if timed:
        for run in plan.runs:
            if run.steps <= WARM_UP_ROWS:
                raise UserError(
                    f"{run.name} has {run.steps} steps: wall-clock matching times the steps after "
                    f"the first {WARM_UP_ROWS} of each stage; give it more, or leave wall_clock "
                    "out of --matching"
                )
    recorded = {
        **{key: list(value) for key, value in asdict(pilot).items() if key != "budget"},
        **asdict(pilot.budget),
        "matchings": list(matchings),
        "settings": list(common),
    }
    return PreparedPlan(
        folder_of(plan, flags["exp_folder"]),
        {"registry": "warmstart_registry", "size": size.name, "runtime_mode": mode},
        recorded,
        plan,
        skip_existing=bool(flags.get("skip_existing")),
        make_data=partial(bootstrap, plan) if flags.get("bootstrap_token_data") else None,
        timed=build(request, ["tokens"]).runs if timed else (),
        rest=partial(build, request, matchings) if timed else None,
    )


def folder_of(plan: Plan, exp_folder: str) -> Path:
    """Where the records of a plan's runs go."""
    root = config_of(plan.runs[0]).deploy_paths.experiments
    return Path(root).expanduser().absolute() / exp_folder


def show(prepared: PreparedPlan, console: Console) -> None:
    """The plan: runs in order, their cost, and their commands."""
    plan = prepared.plan
    table = Table(title="nothing is run")
    for column in ("run", "starts from", "steps", "tokens", "context"):
        table.add_column(column, overflow="fold")
    for run in plan.runs:
        numbers = (f"{run.steps:,}", f"{run.tokens:,}", f"{run.seq_length:,}")
        table.add_row(run.name, run.parent or "", *numbers)
    console.print(table)
    tokens = {run.name: run.tokens for run in plan.runs}
    lines = []
    for path in plan.paths:
        total = sum(tokens[name] for name in path.runs)
        seed = "" if path.seed is None else f", seed {path.seed}"
        lines.append(f"{path.path} ({path.matching}{seed}): {total:,} tokens")
    if prepared.rest is not None:
        lines.append(
            "The wall-clock-matched runs follow when the token-matched ones have shown what a "
            "token of each stage costs."
        )
    lines += [run.command_here for run in plan.runs]
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


# ---- data --------------------------------------------------------------------------------


def check_data(runs: Iterable[PlannedRun]) -> None:
    """Raise UserError for a missing token store; `train` makes some on first use."""
    for name, (root, run) in _stores(runs).items():
        training = config_of(run).training
        if name not in first_use.DATASETS or Path(root).exists():
            for split in (training.data_split, training.eval_split):
                token_store.open_split(root, split, remedy=token_store.remedy(name, root))


def bootstrap(plan: Plan, console: Console) -> None:
    """Make the token stores that are missing: the built-in text, or random ids with a warning."""
    for name, (root, run) in _stores(plan.runs).items():
        if Path(root).exists():
            continue
        if name in first_use.DATASETS:
            console.print(f"making the built-in corpus in {root}", soft_wrap=True)
            first_use.ensure(name, root)
            continue
        longest = max(one.seq_length for one in plan.runs)
        vocab_size = config_of(run).model.vocab_size
        console.print(
            f"RANDOM TOKENS: {root} did not exist and is filled with random ids below "
            f"{vocab_size}. Losses from it say nothing; it is for trying the plan out.",
            soft_wrap=True,
            style="bold red",
        )
        token_store.write_random(
            root, {"train": 128 * longest, "val": 16 * longest}, vocab_size=vocab_size, seed=0
        )


def _stores(runs: Iterable[PlannedRun]) -> Mapping[str, tuple[str, PlannedRun]]:
    """Dataset -> its root, and a run that reads it."""
    stores = {}
    for run in {run.experiment: run for run in runs}.values():  # seeds read the same
        config = config_of(run)
        name = config.training.dataset_name
        if not config.training.dummy_dataset:
            stores.setdefault(name, (config.deploy_paths.data[name], run))
    return stores
