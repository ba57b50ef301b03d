"""The plan on disk, and how far it is: `<experiments>/<exp_folder>/manifest.json`.

`flags`: what was asked for. `seconds_per_token`: kind of stage -> median seconds and the runs that
it comes from, written once and kept, so that a plan that goes on stays the same. `runs`: each with
its settings, command, `status` (pending, running, finished, interrupted, failed) and `gates`.
`paths`: which runs make which path, by matching and seed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ttt.errors import UserError
from ttt.runs.gates import Gate
from ttt.runs.plan import Plan
from ttt.runs.plan import PlannedRun as Run

NAME = "manifest.json"
_ELSE = "Choose another --exp-folder for the new plan, or ask for the same as before."


class Manifest:
    """The manifest of one folder; every change is on disk when the call returns."""

    def __init__(self, folder: Path, flags: Mapping[str, Any], head: Mapping[str, Any]):
        """Read the manifest that is there, if there is one; nothing is made.

        head: `registry`, `size` and `runtime_mode`.
        Raises UserError if it was made for other flags.
        """
        self.path = folder / NAME
        self._content: dict[str, Any] = {
            **head,
            "flags": dict(flags),
            "seconds_per_token": {},
            "runs": [],
            "paths": [],
        }
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text())
            before = content["flags"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: is no manifest ({error}); move it away, or choose another "
                "--exp-folder"
            ) from error
        changed = [
            f"  {key}: {before.get(key)} -> {flags.get(key)}"
            for key in sorted(before.keys() | flags.keys())
            if before.get(key) != flags.get(key)
        ]
        if changed:
            listed = "\n".join(changed)
            raise UserError(f"{self.path} is of a plan with other flags:\n{listed}\n{_ELSE}")
        self._content = content

    @property
    def seconds_per_token(self) -> dict[str, float] | None:
        """By kind of stage; None before they are frozen."""
        frozen = self._content["seconds_per_token"]
        return {kind: entry["seconds"] for kind, entry in frozen.items()} or None

    def freeze(self, seconds_per_token: Mapping[str, Any]) -> None:
        """Keep what was measured."""
        self._content["seconds_per_token"] = dict(seconds_per_token)
        self._write()

    def adopt(self, plan: Plan) -> None:
        """Take the plan's runs and paths in, in its order; those that are there stay as they are.

        Raises UserError if a run of the same name was planned with other settings before.
        """
        known = {entry["name"]: entry for entry in self._content["runs"]}
        entries = []
        for run in plan.runs:
            planned = _entry(run)
            entry = known.get(run.name, {**planned, "status": "pending", "gates": []})
            changed = [key for key in planned if entry.get(key) != planned[key]]
            if changed:
                listed = "\n".join(
                    f"  {key}: {entry.get(key)} -> {planned[key]}" for key in changed
                )
                raise UserError(
                    f"{run.name} in {self.path} was planned with other settings (the registry or "
                    f"the configs have changed since):\n{listed}\n{_ELSE}"
                )
            entries.append(entry)
        self._content["runs"] = entries
        self._content["paths"] = [{**asdict(path), "runs": list(path.runs)} for path in plan.paths]

    def status(self, name: str) -> str:
        """Of a run: pending, running, finished, interrupted or failed."""
        return self._run(name)["status"]

    def note(self, name: str, status: str, gates: Sequence[Gate] | None = None) -> None:
        """Write what became of a run."""
        entry = self._run(name)
        entry["status"] = status
        if gates is not None:
            entry["gates"] = [asdict(gate) for gate in gates]
        self._write()

    def _run(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self._content["runs"] if entry["name"] == name)

    def _write(self) -> None:
        """Beside and rename: readers and crashes meet the old manifest or the new one."""
        beside = self.path.with_name(self.path.name + ".tmp")
        with beside.open("w") as file:
            file.write(json.dumps(self._content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


def _entry(run: Run) -> dict[str, Any]:
    return {
        **asdict(run),
        "tokens": run.tokens,
        "overrides": list(run.overrides),
        "command": run.command,
    }
