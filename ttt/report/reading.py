"""Everything that the records of an experiment folder tell, read and judged. No JAX."""

from dataclasses import dataclass
from pathlib import Path

from ttt.errors import UserError
from ttt.report import comparisons, curves, records, verdict
from ttt.report import manifest as manifests
from ttt.report.comparisons import Comparison, Reach, Stage
from ttt.report.curves import CostCurve, PositionCurve
from ttt.report.records import Run
from ttt.report.verdict import Verdict


@dataclass(frozen=True)
class Report:
    """Everything that the records of an experiment folder tell."""

    folder: Path
    runs: tuple[Run, ...]
    comparisons: tuple[Comparison, ...]
    reaches: tuple[Reach, ...]
    stages: tuple[Stage, ...]
    positions: tuple[PositionCurve, ...]
    costs: tuple[CostCurve, ...]
    verdict: Verdict
    verdicts: tuple[Verdict, ...]
    """By path."""
    without_merit: tuple[str, ...]
    """Trained models that do not beat the count model."""
    missing: tuple[str, ...]
    """Inputs that are not there, and what is therefore left out."""

    @property
    def faults(self) -> tuple[str, ...]:
        """Files of records that are broken, or missing though the run says it is finished."""
        return tuple(fault for run in self.runs for fault in run.faults)


def read(
    experiments_root: str | Path, exp_folder: str, checkpoint_root: str | Path | None = None
) -> Report:
    """The report on `<experiments_root>/<exp_folder>`; a UserError where that holds no run.

    checkpoint_root: where checkpoints lie, if not where the runs' settings say.
    """
    folder = folder_of(experiments_root, exp_folder)
    plan, why_none = manifests.read(folder)
    root = Path(checkpoint_root) if checkpoint_root else None
    runs = records.read_all(folder, plan, root)
    if not runs:
        raise UserError(
            f"{folder} holds no run: a run is a folder with run.json, config.yaml and "
            "metrics.jsonl, as `train` writes it. Train into it (training.exp_folder), or name "
            "another --exp-folder"
        )
    missing = (
        [f"{why_none}; without it there are no comparisons and no verdict"] if why_none else []
    )
    branches = comparisons.branches(plan, runs) if plan else []
    compared = comparisons.compare(plan, branches) if plan else []
    verdicts = verdict.judge(compared)
    by_position, no_positions = curves.positions(branches)
    by_cost, no_costs = curves.costs(branches)
    missing += [f"{run.name} is {run.status}" for run in runs if run.status == "pending"]
    for picture, what, names in (
        ("loss by position", "loss by position at the end of a finished run", no_positions),
        ("loss against cost", "losses and times of steps, and a held-out loss", no_costs),
    ):
        if names:
            told = ", ".join(dict.fromkeys(names))
            missing.append(f"{what}, for the picture of {picture}, in {told}")
    return Report(
        folder=folder,
        runs=tuple(runs),
        comparisons=tuple(compared),
        reaches=tuple(comparisons.reaches(compared)),
        stages=tuple(comparisons.stages(branches)),
        positions=tuple(by_position),
        costs=tuple(by_cost),
        verdict=verdict.overall(verdicts, why_none),
        verdicts=tuple(verdicts),
        without_merit=tuple(verdict.without_merit(runs)),
        missing=tuple(missing),
    )


def folder_of(experiments_root: str | Path, exp_folder: str) -> Path:
    """`<experiments_root>/<exp_folder>`, which must be there."""
    root = Path(experiments_root).expanduser()
    folder = root / exp_folder
    if folder.is_dir() and exp_folder:
        return folder
    if not root.is_dir():
        raise UserError(f"--exp-dir {root}: no such folder; name the one that holds experiments")
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    told = f"there are {', '.join(there)}" if there else "it holds no folder at all"
    raise UserError(f"--exp-folder {exp_folder!r}: not in {root}; {told}")
