"""Golden values: where they lie, how a case is read, and how the trimmed set in git is made.

The full set is the folder `TTT_GOLDEN_DIR`, or `shared/golden` beside the clone. Where neither is,
tests use tests/data/golden, which holds the same cases with a part of each array
(tests/data/README.md). To make it again:

  uv run python tests/golden.py FULL_SET tests/data/golden
"""

import json
import os
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

TRIMMED = Path(__file__).resolve().parent / "data" / "golden"
STRIDE = 11
"""The trimmed set keeps every eleventh number of an array: no divisor of a layer's width."""
WHOLE = 512
"""Arrays of up to so many numbers are kept whole."""
COPIED = ("loader_order.json", "published_checkpoint", "token_store")
SHARED_START = "start.npz"
"""Tokens of all cases, and the one parameter that the published checkpoint lacks."""
HEAD = "param.language_model.lm_head.weight"


def folder() -> Path:
    """The full set where there is one, else the trimmed one."""
    beside = Path(__file__).parents[2] / "shared" / "golden"
    golden = os.environ.get("TTT_GOLDEN_DIR") or (beside if beside.is_dir() else TRIMMED)
    return Path(golden).resolve()


def cases(golden: Path) -> list[str]:
    """Names of the cases in a set."""
    return sorted(path.stem for path in golden.glob("*.npz") if path.name != SHARED_START)


def read(golden: Path, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a case states, and its arrays.

    `tokens` and `param.*` are whole in both sets; the others are `kept` parts in the trimmed one.
    """
    with np.load(golden / f"{name}.npz") as file:
        arrays = dict(file)
    about = json.loads((golden / f"{name}.json").read_text())
    if "tokens" not in arrays:
        stored = _published_parameters(golden)
        with np.load(golden / SHARED_START) as file:
            start = dict(file) | {f"param.{key}": array for key, array in stored.items()}
        arrays["tokens"] = start["tokens"]
        for key, digest in about["parameters"].items():
            if sha256(start[key].tobytes()).hexdigest() != digest:
                raise ValueError(f"{golden}: {key} is not what the full set has")
            arrays[key] = start[key]
    return about, arrays


def kept(array: np.ndarray) -> np.ndarray:
    """What the trimmed set keeps of an array."""
    return array if array.size <= WHOLE else array.ravel()[::STRIDE]


def like_expected(array: Any, expected: np.ndarray) -> np.ndarray:
    """A whole array in the form of its expected values: itself, or what is kept of it."""
    array = np.asarray(array)
    return array if array.shape == expected.shape else kept(array)


def trim(full: Path, trimmed: Path) -> None:
    """Make the trimmed set, at a place where there is nothing yet, from the full one."""
    trimmed.mkdir(parents=True)
    for name in COPIED:
        copy = shutil.copytree if (full / name).is_dir() else shutil.copyfile
        copy(full / name, trimmed / name)
    stored = _published_parameters(full)
    start: dict[str, np.ndarray] = {}
    for name in cases(full):
        about, arrays = read(full, name)
        own = {k: a for k, a in arrays.items() if k == "tokens" or k.startswith("param.")}
        for key, array in own.items():
            if key in ("tokens", HEAD):
                start.setdefault(key, array)
            shared = start[key] if key in start else stored[key.removeprefix("param.")]
            if not np.array_equal(shared, array):
                raise SystemExit(f"{name}: {key} is not the same in all cases")
        about["parameters"] = {
            key: sha256(array.tobytes()).hexdigest()
            for key, array in own.items()
            if key != "tokens"
        }
        (trimmed / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
        _save(trimmed / f"{name}.npz", {k: kept(a) for k, a in arrays.items() if k not in own})
    _save(trimmed / SHARED_START, start)


def _published_parameters(golden: Path) -> dict[str, np.ndarray]:
    # Not above: jaxtyping's plugin wants to see the first import of our modules.
    from ttt.infra import checkpoint

    return checkpoint.read_flat(golden / "published_checkpoint" / "7", "model_weights")


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(path, **arrays)  # ty: ignore[invalid-argument-type]
    path.chmod(0o644)


if __name__ == "__main__":
    trim(Path(sys.argv[1]), Path(sys.argv[2]))
