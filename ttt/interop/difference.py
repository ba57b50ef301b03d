"""A trained model as its difference from the imported one that it began with: a small file.

A child's checkpoint repeats every weight of its parent. The file has only the layers that changed,
in bfloat16, and what is needed to put them back: settings, tokenizer, the parent's hashes.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from ttt.core.tree import nested
from ttt.errors import UserError
from ttt.infra.checkpoint import Checkpoints, read_flat
from ttt.infra.step_folders import newest, read_manifest, run_folder

FOLDER = "adapted"
"""Experiment folder of the models that are made from a file."""
_PRIME = "prime_storage.feed_forward_prime"
_STATIC = "blocks.feed_forward"
_NORMS = ("prime_storage.ffn_prime_norm", "blocks.ffn_norm")


class Part(NamedTuple):
    """How an array of the child begins: as so many last rows of a parent's array."""

    source: str
    """Published name in the parent; empty: zeros."""
    first: int
    """Of the child's rows, the first that differs."""


def write(child: Path, parent: Path, out: Path) -> int:
    """Write the file at `out`; child, parent: folders of steps. Returns its size in bytes.

    Raises UserError where the child does not come from the parent's weights, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists, and nothing is overwritten; move it away, or name another")
    manifest, origin = (read_manifest(folder) for folder in (child, parent))
    known = (origin.get("provenance") or {}).get("files")
    if not known or (manifest.get("provenance") or {}).get("files") != known:
        raise UserError(f"{child} does not come from the imported weights in {parent}; name those")
    weights, base = (read_flat(folder, "model_weights") for folder in (child, parent))
    parts, differences = {}, {}
    for name, array in weights.items():
        source, start = _start(name, array, base)
        rows = np.flatnonzero(np.any((array != start).reshape(len(array), -1), axis=1))
        if len(rows) or name not in base:
            first = int(rows[0]) if len(rows) else 0
            parts[name] = Part(source, first)
            differences[name] = jnp.asarray(array[first:] - start[first:], jnp.bfloat16)
    about = {
        "config": manifest["config"],
        "bos_token": manifest.get("bos_token"),
        "tokenizer": manifest.get("tokenizer"),
        "parent": {"run": f"{parent.parents[1].name}/{parent.parent.name}", "files": known},
        "parts": parts,
        "step": int(child.name),
    }
    save_file(differences, out, {key: json.dumps(value) for key, value in about.items()})
    return out.stat().st_size


def _start(name: str, array: np.ndarray, base: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """The parent's array that is nearest, or zeros."""
    if name in base:
        return name, base[name]
    source = name.replace(_PRIME, _STATIC).replace(*_NORMS)
    zeros = np.zeros_like(array)
    if source in base:
        last = base[source][-len(array) :]
        if last.shape == array.shape and np.sum((array - last) ** 2) < np.sum(array**2):
            return source, last
    return "", zeros


def restore(file: Path, checkpoint_root: str | Path) -> Path:
    """The step's folder of the model in `file`, made below the checkpoint root unless it is there.

    Raises UserError where the import that it began with is missing or of other files, or where
    `file` is none of this kind.
    """
    about, differences = _read(file)
    name = f"{file.stem}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
    folder = run_folder(checkpoint_root, FOLDER, name)
    if (made := newest(folder)) is not None:
        return made
    place = run_folder(checkpoint_root, *about["parent"]["run"].split("/"))
    parent = newest(place)
    origin = read_manifest(parent) if parent else {}
    if parent is None or origin["provenance"]["files"] != about["parent"]["files"]:
        why = "is not there" if parent is None else "was made of other files"
        raise UserError(
            f"{file} is a difference from {about['parent']['run']}, and {place} {why}: import it "
            "(scripts/07 and scripts/10)"
        )
    weights = read_flat(parent, "model_weights")
    for array_name, (source, first) in about["parts"].items():
        difference = differences[array_name]
        rows = first + len(difference)
        start = weights[source][-rows:] if source else np.zeros((rows, *difference.shape[1:]))
        weights[array_name] = start.astype(np.float32).copy()
        weights[array_name][first:] += difference
    new = folder.with_name(f".{name}.new")
    shutil.rmtree(new, ignore_errors=True)
    checkpoints = Checkpoints(new)
    checkpoints.save(
        about["step"],
        model_weights=nested(weights),
        opt_state=None,
        loader_state={},
        manifest={
            "config": about["config"],
            "data": {},
            "provenance": origin["provenance"],
            "tokenizer": about["tokenizer"],
            "bos_token": about["bos_token"],
        },
        files={"tokenizer.json": (parent / "tokenizer.json").read_bytes()},
    )
    checkpoints.wait()
    new.rename(folder)
    return folder / str(about["step"])


def _read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with safe_open(file, "flax") as stored:
            about = {key: json.loads(text) for key, text in (stored.metadata() or {}).items()}
            names = list(about.get("parts", ()))
            arrays = {name: np.asarray(stored.get_tensor(name), np.float32) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a model's difference: {error}") from error
    if "parts" not in about:
        raise UserError(f"{file} is no model's difference; scripts/17 makes one")
    return about, arrays
