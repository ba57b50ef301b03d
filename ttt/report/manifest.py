"""What a plan says of its runs: `<experiments>/<exp_folder>/manifest.json`, read. No JAX."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MATCHED = {
    "tokens": "token-matched",
    "wall_clock": "wall-clock-matched",
    "own": "each with its own steps",
}
"""What the paths of a comparison have in common: trained tokens, seconds of steps, or nothing."""


@dataclass(frozen=True)
class Gate:
    """A condition that the plan put to a run, and what became of it."""

    name: str
    holds: bool | None
    """None: it does not apply."""
    said: str


@dataclass(frozen=True)
class Planned:
    """A run of the plan."""

    name: str
    experiment: str | None = None
    stage: str | None = None
    """`pretrain`, `adapt` or `extend`."""
    method: str | None = None
    seed: int | None = None
    steps: int | None = None
    status: str = "unknown"
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True)
class PlannedPath:
    """The runs of one way to a model, in their order, with one seed."""

    path: str
    """Its name: B1, B2, P1, …"""
    matching: str
    """One of `MATCHED`."""
    seed: int | None
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A plan, as far as a report needs it."""

    runs: Mapping[str, Planned]
    paths: tuple[PlannedPath, ...]

    @property
    def names(self) -> list[str]:
        """Names of the paths, B1 first, as the plan has them."""
        return list(dict.fromkeys(path.path for path in self.paths))

    @property
    def matchings(self) -> list[str]:
        """Those that the plan has, the known ones first."""
        there = dict.fromkeys(path.matching for path in self.paths)
        return [*(name for name in MATCHED if name in there), *sorted(set(there) - set(MATCHED))]


def read(folder: Path) -> tuple[Manifest | None, str]:
    """The plan of an experiment folder, or None and why there is none to use."""
    path = folder / "manifest.json"
    if not path.exists():
        return None, f"{path} is missing: a plan writes it (scripts/06_phase1_pilot.py)"
    try:
        return _parsed(json.loads(path.read_bytes())), ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        return None, f"{path} is not a plan's manifest ({told}): run the plan again to write it"


def _parsed(found: Mapping[str, Any]) -> Manifest:
    runs = {
        entry["name"]: Planned(
            **{name: entry[name] for name in _PLAIN if name in entry},
            gates=tuple(
                Gate(gate["name"], gate["holds"], str(gate.get("said", "")))
                for gate in entry.get("gates") or ()
            ),
        )
        for entry in found["runs"]
    }
    paths = tuple(
        PlannedPath(entry["path"], entry["matching"], entry["seed"], tuple(entry["runs"]))
        for entry in found["paths"]
    )
    return Manifest(runs, paths)


_PLAIN = ("name", "experiment", "stage", "method", "seed", "steps", "status")
