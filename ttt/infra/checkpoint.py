"""Checkpoints on disk, and a restore that accounts for every parameter.

    <root>/<exp_folder>/<exp_name>/<step>/model_weights    nested dict of arrays, published names
                                          opt_state        any pytree of arrays
                                          train_ds_iter    JSON: the loader's position
                                          manifest         JSON: what the caller wants to know later

This is the layout of the published checkpoints, which have no manifest. A folder whose name is a
number is a whole checkpoint: saves write beside it and rename, deletions rename first.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from ttt.core.batch import AnyArray
from ttt.core.tree import named_leaves, with_leaves
from ttt.errors import UserError
from ttt.globs import matches

# What a save or a deletion that was cut off leaves behind (the first name is Orbax's).
_LEFTOVERS = ("*.orbax-checkpoint-tmp*", "*.deleting")
_JSON_FILES = {"train_ds_iter": "global_batch_progress.json", "manifest": "manifest.json"}


class CheckpointError(UserError):
    """No such run, step or item, or one that does not fit what was asked for."""


class ShapeDtype(Protocol):
    """What a target needs to tell: an array, or `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def dtype(self) -> np.dtype: ...  # noqa: D102


def run_folder(root: str | Path, exp_folder: str, exp_name: str) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(root).expanduser().absolute() / exp_folder / exp_name


class Checkpoints:
    """The checkpoints of one run. Every process of the run calls `save` and `restore`."""

    def __init__(self, folder: str | Path, *, keep: int = 1, milestone_freq: int = 0):
        """Bind to `folder`; nothing is read or made.

        keep: newest checkpoints that stay; the others go after each save.
        milestone_freq: multiples of this step stay for good; 0: none.
        """
        if keep < 1:
            raise CheckpointError(
                f"keep_checkpoints={keep} would delete what was just saved: ask for 1 or more"
            )
        self.folder = Path(folder).expanduser().absolute()
        self.keep = keep
        self.milestone_freq = milestone_freq

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints on disk, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """The last step, None where there is no checkpoint."""
        return max(self.steps(), default=None)

    def find(self, step: int = -1) -> Path:
        """The folder of a step (-1: the latest), or a CheckpointError that says which there are."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                f"there is no checkpoint in {self.folder}: check the run's name and the "
                "checkpoint root, or train that run first"
            )
        if step != -1 and step not in steps:
            there = ", ".join(map(str, steps))
            raise CheckpointError(f"{self.folder} has no step {step}: choose one of {there}")
        return self.folder / str(steps[-1] if step == -1 else step)

    def save(
        self,
        step: int,
        *,
        model_weights: PyTree,
        opt_state: PyTree,
        loader_state: dict[str, Any],
        manifest: dict[str, Any],
    ) -> None:
        """Write a step, whole or not at all; then delete what retention does not keep.

        loader_state, manifest: JSON-able.
        """
        if step in self.steps():
            raise CheckpointError(
                f"{self.folder} has a step {step} already, and saves do not overwrite: delete it, "
                "or continue from the latest step"
            )
        items = {
            "model_weights": _savable(model_weights),
            "opt_state": _savable(opt_state),
            "train_ds_iter": _JsonItem(_JSON_FILES["train_ds_iter"], loader_state),
            "manifest": _JsonItem(_JSON_FILES["manifest"], manifest),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self._delete_leftovers()
        ocp.save_checkpointables(str(self.folder / str(step)), items)
        self._delete_old()

    def restore(self, step: int, like: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Load array items exactly as `like` describes them: same names, shapes and dtypes.

        like: item name -> tree of `jax.ShapeDtypeStruct` (comes back as jax.Array, on its sharding
            or on the default device) or of NumPy arrays (comes back as NumPy).
        Raises CheckpointError with every name that differs; `read_flat` and `account` are for
        restores of a part.
        """
        step_dir = self.find(step)
        return {item: _restore_item(step_dir, item, tree) for item, tree in like.items()}

    def loader_state(self, step: int) -> dict[str, Any]:
        """The loader's position at a step."""
        return read_json(self.find(step), "train_ds_iter")

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a step."""
        return read_json(self.find(step), "manifest")

    def _delete_leftovers(self) -> None:
        if jax.process_index() == 0:
            for path in [path for glob in _LEFTOVERS for path in self.folder.glob(glob)]:
                shutil.rmtree(path)

    def _delete_old(self) -> None:
        if jax.process_index() != 0:
            return
        for step in self.steps()[: -self.keep]:
            if not self.milestone_freq or step % self.milestone_freq:
                doomed = (self.folder / str(step)).rename(self.folder / f"{step}.deleting")
                shutil.rmtree(doomed)


def read_flat(step_dir: str | Path, item: str) -> dict[str, np.ndarray]:
    """An array item as dotted name -> array in host memory, as stored; absent leaves left out."""
    path = str(_item_folder(step_dir, item).parent)
    stored = ocp.metadata(path, item).metadata
    on_host = jax.tree.map(lambda leaf: _OnHost(tuple(leaf.shape), leaf.dtype), stored)
    loaded = named_leaves(ocp.load(path, on_host, checkpointable_name=item))
    return {name: np.asarray(array) for name, array in loaded.items()}


def read_json(step_dir: str | Path, item: str) -> dict[str, Any]:
    """A JSON item."""
    path = _item_folder(step_dir, item) / _JSON_FILES[item]
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class RestoreAccount:
    """What became of every parameter; `dataclasses.asdict` of it is JSON-able."""

    restored: tuple[str, ...]
    initialised: tuple[str, ...]
    """Not in the checkpoint, and allowed to start anew."""
    cast: tuple[str, ...]
    """Restored in another float type; each with both types."""
    unused: tuple[str, ...]
    """In the checkpoint, and asked for by nobody."""

    def __str__(self) -> str:
        """One line, and one more for each kind of exception that occurred."""
        total = len(self.restored) + len(self.initialised)
        lists = {
            "initialised anew": self.initialised,
            "cast": self.cast,
            "unused in the checkpoint": self.unused,
        }
        lines = [f"{kind}: {', '.join(names)}" for kind, names in lists.items() if names]
        return "\n".join([f"restored {len(self.restored)} of {total} parameters", *lines])


def account(
    target: Mapping[str, ShapeDtype],
    source: Mapping[str, AnyArray],
    *,
    may_initialise: Sequence[str] = (),
) -> tuple[dict[str, AnyArray], RestoreAccount]:
    """Take every parameter of `target` from `source`, in the target's dtype, and account for it.

    may_initialise: dotted globs of parameters that may be missing from the source; they are left
        out of the result and listed.
    Raises CheckpointError with all faults at once: a parameter that is missing and not allowed to
    be, or one whose shape differs or whose dtype is of another kind, allowed or not.
    """
    faults = []
    restored: dict[str, AnyArray] = {}
    initialised = []
    for name, wanted in target.items():
        if name in source:
            faults += _misfit(name, wanted, source[name])
            restored[name] = source[name]
        elif any(matches(glob, name) for glob in may_initialise):
            initialised.append(name)
        else:
            faults.append(f"{name}: {_describe(wanted)} wanted, none in the checkpoint")
    if faults:
        raise CheckpointError(
            _listed(f"{len(faults)} of {len(target)} parameters cannot be restored", faults)
            + "\nSet the model's sizes as the checkpoint has them, or choose another checkpoint."
        )
    summary = RestoreAccount(
        restored=tuple(restored),
        initialised=tuple(initialised),
        cast=tuple(
            f"{name} ({array.dtype} to {target[name].dtype})"
            for name, array in restored.items()
            if array.dtype != target[name].dtype
        ),
        unused=tuple(name for name in source if name not in target),
    )
    taken = {name: array.astype(target[name].dtype, copy=False) for name, array in restored.items()}
    return taken, summary


class _JsonItem:
    """A JSON file as an Orbax checkpointable, so that it commits together with the arrays."""

    def __init__(self, file: str, content: dict[str, Any]):
        self._file = file
        self._text = json.dumps(content)

    async def save(self, directory: ocp.path.PathAwaitingCreation):
        async def write() -> None:
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                (folder / self._file).write_text(self._text)

        return write()

    async def load(self, directory: ocp.path.Path):
        # Orbax recognises the kind by having both methods; `read_json` does the reading.
        raise NotImplementedError


@dataclass
class _OnHost:
    """An abstract leaf that Orbax loads as a NumPy array."""

    shape: tuple[int, ...]
    dtype: np.dtype


def _item_folder(step_dir: str | Path, item: str) -> Path:
    folder = Path(step_dir).expanduser().absolute() / item
    if folder.is_dir():
        return folder
    if not folder.parent.is_dir():
        raise CheckpointError(f"there is no checkpoint at {folder.parent}")
    there = ", ".join(sorted(path.name for path in folder.parent.iterdir() if path.is_dir()))
    raise CheckpointError(f"{folder.parent} has no item {item!r}: it has {there}")


def _savable(tree: PyTree) -> PyTree:
    """Scalars as arrays: Orbax refuses NumPy's, and would give Python's back without a dtype."""

    def array(leaf: Any) -> AnyArray:
        return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)

    tree = jax.tree.map(array, tree)
    for name, leaf in named_leaves(tree).items():
        # Orbax fails on these too, but half-way through a save.
        if leaf.size == 0 or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSU"):
            raise CheckpointError(f"{name}: {_describe(leaf)} cannot be saved: no numbers in it")
    return tree


def _restore_item(step_dir: Path, item: str, like: PyTree) -> PyTree:
    path = str(_item_folder(step_dir, item).parent)
    stored = ocp.metadata(path, item).metadata
    wanted, there = named_leaves(like), named_leaves(stored)
    faults = [f"{name}: not in the checkpoint" for name in wanted if name not in there]
    faults += [f"{name}: not asked for" for name in there if name not in wanted]
    for name in wanted.keys() & there.keys():
        ours, theirs = _describe(wanted[name]), _describe(there[name])
        if ours != theirs:
            faults.append(f"{name}: {ours} wanted, {theirs} stored")
    if faults:
        raise CheckpointError(_listed(f"{item} of {step_dir} is not what was asked for", faults))
    # Asked for in the stored structure, so that only names have to agree: a NamedTuple is stored as
    # a dict, and trees may differ in where they hold None.
    abstract = with_leaves(stored, {name: _abstract(leaf) for name, leaf in wanted.items()})
    return with_leaves(like, named_leaves(ocp.load(path, abstract, checkpointable_name=item)))


def _abstract(leaf: ShapeDtype) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        return _OnHost(leaf.shape, leaf.dtype)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = getattr(leaf, "sharding", None) or here
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _misfit(name: str, wanted: ShapeDtype, found: ShapeDtype) -> list[str]:
    both_float = all(jnp.issubdtype(array.dtype, jnp.floating) for array in (wanted, found))
    if wanted.shape == found.shape and (wanted.dtype == found.dtype or both_float):
        return []
    return [f"{name}: {_describe(wanted)} wanted, {_describe(found)} in the checkpoint"]


def _describe(array: ShapeDtype) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _listed(head: str, faults: Sequence[str]) -> str:
    return "\n  ".join([f"{head}:", *sorted(faults)])
