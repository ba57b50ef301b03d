"""The manifest of a plan, and how far the plan is: `<experiments>/<exp_folder>/manifest.json`.

`registry`, `size`, `runtime_mode` and `flags`: the request. `seconds_per_token`: kind of
stage -> median seconds and the runs that it comes from, written once and kept, so that a plan that
goes on stays the same. `runs`: each with its settings, `command`, `status` (pending, running,
finished, interrupted, failed) and `gates`. `paths`: which runs make which `path`, by `matching` and
`seed`. No JAX.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttt.errors import UserError
from ttt.infra.record import write_whole

NAME = "manifest.json"
_ELSE = "Choose another --exp-folder for the new plan, or give the same flags as before."
MATCHINGS = {
    "tokens": "token-matched",
    "wall_clock": "wall-clock-matched",
    "own": "each with its own steps",
}
"""What the paths of a comparison have in common: trained tokens, seconds of steps, or nothing."""


def label(matching: str) -> str:
    """Of a matching, for readers; its own name where it is none of `MATCHINGS`."""
    return MATCHINGS.get(matching, matching)


class Gate(NamedTuple):
    """A condition on a finished run, and its result."""

    name: str
    holds: bool | None
    """None: it does not apply, for the reason in `said`."""
    said: str
    """The values behind the result (the name is that of manifests on disk)."""


class ManifestError(UserError):
    """A manifest that is missing, cannot be read, or belongs to another plan."""


class PlanManifest:
    """The manifest of one folder; every change is on disk when the call returns."""

    def __init__(self, path: Path, content: Mapping[str, Any]):
        """content: as the file has it; see `read` and `open`."""
        self.path = path
        self._content = dict(content)

    @classmethod
    def read(cls, folder: Path) -> "PlanManifest":
        """The manifest of an experiment folder; raises ManifestError if it cannot be used."""
        path = folder / NAME
        if not path.exists():
            raise ManifestError(f"{path} is missing: a plan writes it (scripts/06_phase1_pilot.py)")
        try:
            content = json.loads(path.read_bytes())
            runs, paths = content["runs"], content["paths"]
            _ = [run["name"] for run in runs]
            _ = [[path[key] for key in ("path", "matching", "seed", "runs")] for path in paths]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{type(error).__name__}: {error}"
            raise ManifestError(
                f"{path} is not a plan's manifest ({message}): move it away and run the plan again "
                "to write it, or choose another --exp-folder"
            ) from error
        return cls(path, content)

    @classmethod
    def open(
        cls, folder: Path, flags: Mapping[str, Any], head: Mapping[str, Any]
    ) -> "PlanManifest":
        """The manifest on disk, or a new one, which is not on disk yet.

        head: `registry`, `size` and `runtime_mode`.
        Raises ManifestError if the one on disk was made for other flags.
        """
        if not (folder / NAME).exists():
            empty = {"flags": dict(flags), "seconds_per_token": {}, "runs": [], "paths": []}
            return cls(folder / NAME, {**head, **empty})
        manifest = cls.read(folder)
        before = manifest._content.get("flags", {})
        if changed := _changes(before, flags, sorted(before.keys() | flags.keys())):
            raise ManifestError(f"{manifest.path} is of a plan with other flags:\n{changed}{_ELSE}")
        return manifest

    @property
    def runs(self) -> dict[str, Mapping[str, Any]]:
        """Every run's entry, by name and in the order of the plan."""
        return {entry["name"]: entry for entry in self._content["runs"]}

    @property
    def paths(self) -> list[Mapping[str, Any]]:
        """Every path's `path` (its name: B1, P1, …), `matching`, `seed` and names of `runs`."""
        return self._content["paths"]

    @property
    def seconds_per_token(self) -> dict[str, float] | None:
        """By kind of stage; None before they are frozen."""
        frozen = self._content["seconds_per_token"]
        return {kind: entry["seconds"] for kind, entry in frozen.items()} or None

    def freeze(self, seconds_per_token: Mapping[str, Any]) -> None:
        """Keep the measured seconds for good."""
        self._content["seconds_per_token"] = dict(seconds_per_token)
        self._write()

    def adopt(self, runs: Sequence[Mapping[str, Any]], paths: Sequence[Mapping[str, Any]]) -> None:
        """Take runs and paths in, in their order; known entries stay as they are.

        Raises ManifestError if a run of the same name was planned with other settings before.
        """
        known, entries = self.runs, []
        runs, paths = json.loads(json.dumps([runs, paths]))  # tuples are lists in the file
        for planned in runs:
            entry = known.get(planned["name"], {**planned, "status": "pending", "gates": []})
            if changed := _changes(entry, planned, planned):
                raise ManifestError(
                    f"{planned['name']} in {self.path} was planned with other settings (the "
                    f"registry or the configs have changed since):\n{changed}{_ELSE}"
                )
            entries.append(entry)
        self._content |= {"runs": entries, "paths": paths}

    def status(self, name: str) -> str:
        """Of a run: pending, running, finished, interrupted or failed."""
        return self.runs[name]["status"]

    def note(self, name: str, status: str, gates: Sequence[Gate] | None = None) -> None:
        """Write a run's status, and its gates if given."""
        entry = next(entry for entry in self._content["runs"] if entry["name"] == name)
        entry["status"] = status
        if gates is not None:
            entry["gates"] = [gate._asdict() for gate in gates]
        self._write()

    def _write(self) -> None:
        write_whole(self.path, json.dumps(self._content, indent=2) + "\n")


def _changes(was: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> str:
    """A line for each key whose value has changed."""
    lines = [f"  {k}: {was.get(k)} -> {now.get(k)}\n" for k in keys if was.get(k) != now.get(k)]
    return "".join(lines)
