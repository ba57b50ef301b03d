"""Where the checkpoints of a run lie, and what they say of themselves. No JAX.

`<root>/<exp_folder>/<exp_name>/<step>/`; `ttt.infra.checkpoint` writes and reads what is in them.
"""

import json
from pathlib import Path
from typing import Any

MANIFEST = Path("manifest") / "manifest.json"
"""Of a step's folder: settings, data, provenance, tokenizer."""


def run_folder(root: str | Path, exp_folder: str, exp_name: str) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(root).expanduser().absolute() / exp_folder / exp_name


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def newest(folder: Path) -> Path | None:
    """The folder of the last step; None: there is none."""
    found = steps(folder)
    return folder / str(found[-1]) if found else None


def read_manifest(step_folder: Path) -> dict[str, Any]:
    """What a step's manifest says; empty for a published checkpoint, which has none."""
    path = step_folder / MANIFEST
    return json.loads(path.read_bytes()) if path.is_file() else {}
