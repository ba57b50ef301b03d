"""The ladder in a short budget: what script 06 is given, checked, shown and executed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ttt.dataloader import builtin, token_store
from ttt.entry import UNUSED_GPU, cuda_extra, gpu_is_visible
from ttt.runs import compose, matching, registry, request
from ttt.runs.execute import TRAIN, Execution
from ttt.runs.plan import Plan, PlannedRun, PlanRequest, build


@dataclass(frozen=True)
class Flags:
    """The flags of script 06; None: as the registry's pilot of the size has it."""

    size: str = "tiny"
    exp_folder: str = "phase1_pilot"
    paths: str | None = None
    seeds: str | None = None
    matching: str | None = None
    pretrain_steps: int | None = None
    adapt_steps: int | None = None
    ext_steps: int | None = None
    seq_length: int | None = None
    ext_seq_length: int | None = None
    global_batch_size: int | None = None
    data_root: str | None = None
    dclm_root: str | None = None
    books_root: str | None = None
    bootstrap_token_data: bool = False
    runtime_mode: str = "jax"
    dummy_dataset: bool = False
    checkpoint_root: str | None = None
    exp_dir: str | None = None
    override: list[str] = field(default_factory=list)
    skip_existing: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class PreparedPilot:
    """A pilot that is ready to run."""

    flags: Flags
    request: PlanRequest
    matchings: tuple[str, ...]
    recorded: dict[str, Any]
    """The flags with the pilot's own where none is given, as the manifest keeps them."""
    plan: Plan
    """All but the wall-clock-matched runs."""
    experiments: str
    """The root of the run records."""


def prepare(flags: Flags) -> PreparedPilot:
    """Check everything that can be checked before the first run; raises UserError."""
    book = registry.load()
    size = book.size(flags.size)
    given = {
        "paths": request.names(flags.paths, "--paths"),
        "seeds": request.seeds(flags.seeds),
        "matchings": request.matchings(flags.matching, flags.runtime_mode),
        "pretrain_steps": flags.pretrain_steps,
        "adapt_steps": flags.adapt_steps,
        "extension_steps": flags.ext_steps,
        "seq_length": flags.seq_length,
        "extension_length": flags.ext_seq_length,
        "global_batch_size": flags.global_batch_size,
    }
    pilot = size.pilot(given)
    for path in pilot.paths:
        book.path(path)
    common = request.settings(
        exp_folder=flags.exp_folder,
        checkpoint_root=flags.checkpoint_root,
        exp_dir=flags.exp_dir,
        runtime_mode=flags.runtime_mode,
        dummy_dataset=flags.dummy_dataset,
        overrides=[*pilot.overrides, *flags.override],
    )
    data = request.data_settings(
        size, data_root=flags.data_root, dclm=flags.dclm_root, books=flags.books_root
    )
    wanted = PlanRequest(book, size, pilot.paths, pilot.seeds, pilot.budget, (*common, *data))
    known = tuple(how for how in pilot.matchings if how != "wall_clock")
    plan = build(wanted, known, compose.facts)
    matchings = known if flags.runtime_mode != "jax" else pilot.matchings  # else nothing is timed
    if "wall_clock" in matchings:
        matching.check_measurable({run.name: run.steps for run in plan.runs})
    recorded = {
        **{key: list(value) for key, value in asdict(pilot).items() if key != "budget"},
        **asdict(pilot.budget),
        "matchings": list(matchings),
        "settings": list(wanted.settings),
    }
    places = compose.config_of(plan.runs[0]).deploy_paths
    return PreparedPilot(flags, wanted, matchings, recorded, plan, places.experiments)


def run(prepared: PreparedPilot, console: Console, train: Sequence[str] = TRAIN) -> None:
    """Run all that is left to do; raises RunError at the first failure (see `Execution.run`)."""
    flags = prepared.flags
    if flags.runtime_mode == "jax" and gpu_is_visible() and cuda_extra() is None:
        console.print(f"warning: {UNUSED_GPU}", soft_wrap=True, style="bold", markup=False)
    if flags.bootstrap_token_data:
        bootstrap(prepared.plan, console)
    check_data(prepared.plan)
    Execution(
        request=prepared.request,
        matchings=prepared.matchings,
        folder=Path(prepared.experiments).expanduser().absolute() / flags.exp_folder,
        flags=prepared.recorded,
        head={
            "registry": "warmstart_registry",
            "size": flags.size,
            "runtime_mode": flags.runtime_mode,
        },
        skip_existing=flags.skip_existing,
        console=console,
        train=train,
    ).run()


def show(prepared: PreparedPilot, console: Console) -> None:
    """The plan: runs in order, their cost, and their commands."""
    plan = prepared.plan
    table = Table(title="nothing is run")
    for column in ("run", "starts from", "steps", "tokens", "context"):
        table.add_column(column, overflow="fold")
    for run in plan.runs:
        numbers = (f"{run.steps:,}", f"{run.tokens:,}", f"{run.seq_length:,}")
        table.add_row(run.name, run.parent or "", *numbers)
    console.print(table)
    tokens: dict[str, int] = {run.name: run.tokens for run in plan.runs}
    for path in plan.paths:
        total = sum(tokens[name] for name in path.runs)
        line = f"{path.path} ({path.matching}, seed {path.seed}): {total:,} tokens"
        console.print(line, soft_wrap=True, highlight=False)
    if "wall_clock" in prepared.matchings:
        console.print(
            "The wall-clock-matched runs follow when the token-matched ones have shown what a "
            "token of each stage costs.",
            soft_wrap=True,
        )
    for run in plan.runs:
        console.print(run.command_here, soft_wrap=True, highlight=False, markup=False)


# ---- data --------------------------------------------------------------------------------


def check_data(plan: Plan) -> None:
    """Raise UserError for a token store that a run will not find; `train` makes the built-in."""
    for name, (root, run) in _stores(plan).items():
        training = compose.config_of(run).training
        if name not in builtin.DATASETS or Path(root).exists():
            for split in (training.data_split, training.eval_split):
                token_store.open_split(root, split, remedy=token_store.remedy(name, root))


def bootstrap(plan: Plan, console: Console) -> None:
    """Make the token stores that are missing: the built-in text, or random ids, said so."""
    for name, (root, run) in _stores(plan).items():
        if Path(root).exists():
            continue
        if name in builtin.DATASETS:
            console.print(f"making the built-in corpus in {root}", soft_wrap=True)
            builtin.ensure(name, root)
            continue
        longest = max(one.seq_length for one in plan.runs)
        vocab_size = compose.config_of(run).model.vocab_size
        console.print(
            f"RANDOM TOKENS: {root} did not exist and is filled with random ids below "
            f"{vocab_size}. Losses from it say nothing; it is for trying the plan out.",
            soft_wrap=True,
            style="bold red",
        )
        token_store.write_random(
            root, {"train": 128 * longest, "val": 16 * longest}, vocab_size=vocab_size, seed=0
        )


def _stores(plan: Plan) -> Mapping[str, tuple[str, PlannedRun]]:
    """Dataset -> its root, and a run that reads it."""
    stores = {}
    for run in {run.experiment: run for run in plan.runs}.values():  # seeds read the same
        config = compose.config_of(run)
        name = config.training.dataset_name
        if not config.training.dummy_dataset:
            stores.setdefault(name, (config.deploy_paths.data[name], run))
    return stores
