"""Everything that the records of an experiment folder tell, read and judged. No JAX."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from ttt.errors import UserError
from ttt.infra.plan_manifest import NAME, ManifestError, PlanManifest
from ttt.infra.record import is_run
from ttt.report import compare, curves, frame, verdict
from ttt.report.verdict import Verdict

_NO_RUN = (
    "holds no run: a run is a folder with run.json, config.yaml and metrics.jsonl, as `train` "
    "writes it. Train into it (training.exp_folder)"
)


@dataclass(frozen=True)
class Report:
    """Everything that the records of an experiment folder tell."""

    folder: Path
    runs: pd.DataFrame
    """See `frame.COLUMNS`."""
    comparisons: pd.DataFrame
    reaches: pd.DataFrame
    stages: pd.DataFrame
    positions: list[SimpleNamespace]
    costs: list[SimpleNamespace]
    """See `curves.positions` and `curves.costs`."""
    verdict: Verdict
    verdicts: list[Verdict]
    """By path."""
    without_merit: list[str]
    """Trained models that do not beat the count model."""
    missing: list[str]
    """Inputs that are not there, and what is therefore left out."""

    @property
    def faults(self) -> tuple[str, ...]:
        """Files of records that are broken, or missing though the run says it is finished."""
        return tuple(self.runs["faults"].explode().dropna())


def read_all(
    experiments_root: str | Path, exp_folder: str = "", checkpoint_root: str | Path | None = None
) -> list[Report]:
    """A report on `exp_folder`, or without one on every experiment folder below the root.

    Raises UserError where there is no run.
    """
    root = Path(experiments_root).expanduser()
    if not root.is_dir():
        raise UserError(f"--exp-dir {root}: no such folder; name the one that holds experiments")
    if exp_folder:
        return [read(root, exp_folder, checkpoint_root)]
    folders = [str(path.relative_to(root)) for path in experiment_folders(root)]
    if not folders:
        raise UserError(f"--exp-dir {root}: {_NO_RUN}, or name another --exp-dir")
    return [read(root, folder, checkpoint_root) for folder in folders]


def experiment_folders(root: Path) -> list[Path]:
    """Every folder below `root` that holds runs, or a plan of them."""
    folders = set()
    for path, below, files in os.walk(root):
        if is_run(Path(path)):
            folders.add(Path(path).parent)
            below.clear()
        elif NAME in files:  # checkpoints have a file of this name as well
            with suppress(ManifestError):
                folders |= {Path(path)} if PlanManifest.read(Path(path)).runs else set()
    return sorted(folders - {root.parent})


def read(
    experiments_root: str | Path, exp_folder: str, checkpoint_root: str | Path | None = None
) -> Report:
    """The report on `<experiments_root>/<exp_folder>`; a UserError where that holds no run.

    checkpoint_root: where checkpoints lie, if not where the runs' settings say.
    """
    root = Path(experiments_root).expanduser()
    folder = root / exp_folder
    if not folder.is_dir():
        names = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir()))
        present = f"there are {names}" if names else "it holds no folder at all"
        raise UserError(f"--exp-folder {exp_folder!r}: not in {root}; {present}")
    manifest, why_none = None, ""
    try:
        manifest = PlanManifest.read(folder)
    except ManifestError as error:
        why_none = str(error)
    runs = frame.read(folder, manifest, Path(checkpoint_root) if checkpoint_root else None)
    if runs.empty:
        raise UserError(f"{folder} {_NO_RUN}, or name another --exp-folder")
    runs["exp_folder"] = exp_folder
    missing = [f"{why_none}; without it there are no comparisons and no verdict"] * bool(why_none)
    missing += [f"{name} is pending" for name in runs.loc[runs["status"] == "pending", "name"]]
    branches = steps = compared = pd.DataFrame()
    if manifest and manifest.paths:
        steps = compare.steps_of(manifest, runs)
        branches = compare.branches(manifest, steps)
        compared = compare.comparisons(branches)
    verdicts = verdict.judge(compared)
    by_position, no_positions = curves.positions(branches)
    by_cost, no_costs = curves.costs(branches)
    for picture, what, names in (
        ("loss by position", "loss by position at the end of a finished run", no_positions),
        ("loss against cost", "losses and times of steps, and a held-out loss", no_costs),
    ):
        if names:
            listed = ", ".join(dict.fromkeys(names))
            missing.append(f"{what}, for the picture of {picture}, in {listed}")
    return Report(
        folder=folder,
        runs=runs,
        comparisons=compared,
        reaches=compare.reaches(compared) if len(compared) else compared,
        stages=compare.stages(steps) if len(steps) else steps,
        positions=by_position,
        costs=by_cost,
        verdict=verdict.overall(verdicts, why_none),
        verdicts=verdicts,
        without_merit=verdict.without_merit(runs),
        missing=missing,
    )
