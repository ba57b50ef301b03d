"""Checkpoints on disk, and a restore that accounts for every parameter.

    <root>/<exp_folder>/<exp_name>/<step>/model_weights    nested dict of arrays, published names
                                          opt_state        any pytree of arrays
                                          train_ds_iter    JSON: the loader's position
                                          manifest         JSON: what the caller wants to know later
                                          tokenizer.json   of the text it was trained on, if known
                                          hashes.json      size and SHA-256 of every other file

This is the layout of the published checkpoints, which have neither manifest nor hashes. A folder
whose name is a number is a whole checkpoint: a save writes beside it, hashes the files, waits until
they are on the disk and renames; deletions rename first. A checkpoint that turns out broken is
renamed to `<step>.broken`.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from ttt.core.batch import AnyArray
from ttt.core.tree import named_leaves, with_leaves
from ttt.errors import RunError, UserError
from ttt.globs import matches
from ttt.infra import distributed, step_folders

_logger = logging.getLogger(__name__)

# What a save or a deletion that was cut off leaves behind (the first name is Orbax's).
_LEFTOVERS = ("*.orbax-checkpoint-tmp*", "*.saving", "*.deleting")
_HASHES = "hashes.json"
_POLL_SECONDS = 0.1
_JSON_FILES = {"train_ds_iter": "global_batch_progress.json", "manifest": "manifest.json"}


class CheckpointError(UserError):
    """No such run, step or item, or one that does not fit the request."""


type ShapeDtype = AnyArray | jax.ShapeDtypeStruct
"""A target of a restore: its shape and dtype count."""


class Checkpoints:
    """The checkpoints of one run. Every process of the run calls `save`, `wait` and `restore`."""

    def __init__(self, folder: str | Path, *, keep: int = 1, milestone_freq: int = 0):
        """Bind to `folder`; nothing is read or made.

        keep: newest checkpoints that stay; the others go after each save.
        milestone_freq: multiples of this step stay for good; 0: none.
        """
        if keep < 1:
            raise CheckpointError(
                f"keep_checkpoints={keep} would delete what was just saved: set 1 or more"
            )
        self.folder = Path(folder).expanduser().absolute()
        self.keep = keep
        self.milestone_freq = milestone_freq
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints on disk, ascending."""
        return step_folders.steps(self.folder)

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
            listed = ", ".join(map(str, steps))
            raise CheckpointError(f"{self.folder} has no step {step}: choose one of {listed}")
        return self.folder / str(steps[-1] if step == -1 else step)

    def newest_good(self) -> int | None:
        """The newest undamaged step; None if the first process sees no checkpoint."""
        return self.find_good() if distributed.from_first(bool(self.steps())) else None

    def find_good(self, step: int = -1) -> int:
        """The newest whole and undamaged step, or `step` if it is that; damage is a loud warning.

        Every file is read and compared with `hashes.json`; a checkpoint with neither hashes nor
        manifest is a published one and taken as it is. Nothing is changed. The first process looks
        for all: on a shared file system another may see less.
        Raises CheckpointError if no checkpoint, or not the requested one, is good.
        """
        return distributed.from_first(distributed.first_does(lambda: self._find_good(step)) or 0)

    def _find_good(self, step: int) -> int:
        newest = int(self.find(step).name)
        damage: dict[int, str] = {}
        for candidate in [newest] if step != -1 else self.steps()[::-1]:
            if not (fault := _damage(self.folder / str(candidate))):
                if damage:
                    _logger.warning("FALLING BACK TO THE CHECKPOINT OF STEP %d", candidate)
                return candidate
            damage[candidate] = fault
            _logger.warning("CHECKPOINT %d IS BROKEN: %s", candidate, fault)
        listed = _listed(f"no checkpoint in {self.folder} can be used", damage.values())
        raise CheckpointError(
            f"{listed}\nBring one back from a copy, or move the folder away to start anew. "
            "Nothing was changed."
        )

    def put_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps, broken for `find_good`, to STEP.broken."""
        for broken in [later for later in self.steps() if later > step and distributed.is_first()]:
            aside = self.folder / f"{broken}.broken"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(broken)).rename(aside)
            _logger.warning("the broken checkpoint of step %d lies in %s", broken, aside)

    def save(
        self,
        step: int,
        *,
        model_weights: PyTree,
        opt_state: PyTree | None,
        loader_state: dict[str, Any],
        manifest: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Start to write a step, whole or not at all; then delete what retention does not keep.

        Returns when the arrays may change again; `wait` tells when the step is on disk. Waits for
        the save before it, and raises what became of that one.
        opt_state: None for weights that no training goes on from.
        loader_state, manifest: JSON-able.
        files: more to lay beside them, name -> content.
        """
        self.wait()
        if step in self.steps():
            raise CheckpointError(
                f"{self.folder} has a step {step} already, and saves do not overwrite: delete it, "
                "or continue from the latest step"
            )
        items = {"model_weights": _savable(model_weights)}
        if opt_state is not None:
            items["opt_state"] = _savable(opt_state)
        texts = {"train_ds_iter": json.dumps(loader_state), "manifest": json.dumps(manifest)}
        partial = self.folder / f"{step}.saving"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._delete_leftovers()
            began = time.monotonic()
            with _folders_first():
                response = ocp.save_checkpointables_async(str(partial), items)
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error

        def commit() -> None:
            response.result()
            if distributed.is_first():
                for item, text in texts.items():
                    (partial / item).mkdir()
                    (partial / item / _JSON_FILES[item]).write_text(text, encoding="utf-8")
                for name, content in (files or {}).items():
                    (partial / name).write_bytes(content)
                _write_hashes(partial)
                partial.rename(self.folder / str(step))
                _sync(self.folder)
                self._delete_old()
            else:
                while not (self.folder / str(step)).exists():  # a first process that fails ends all
                    time.sleep(_POLL_SECONDS)
            _logger.info("checkpoint %d is on disk after %.1f s", step, time.monotonic() - began)

        self._saving = step, self._background.submit(commit)

    def wait(self) -> None:
        """Return when the last save is on disk; raises a RunError if it failed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        step, future = saving
        if isinstance(error := future.exception(), Exception):
            raise self._failed(step, error) from error

    def check(self) -> None:
        """Raise a RunError if the last save has failed already."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def _failed(self, step: int, error: Exception) -> RunError:
        latest = self.latest()
        safe = "there is none" if latest is None else f"the checkpoint of step {latest} is intact"
        return RunError(
            f"the checkpoint of step {step} could not be written to {self.folder}: "
            f"{type(error).__name__}: {error}\n"
            f"Of those before, {safe}. Free space or repair the disk, then start the same command "
            "again: it continues from there."
        )

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
        if distributed.is_first():
            for path in [path for glob in _LEFTOVERS for path in self.folder.glob(glob)]:
                shutil.rmtree(path)

    def _delete_old(self) -> None:
        for step in self.steps()[: -self.keep]:
            if not self.milestone_freq or step % self.milestone_freq:
                doomed = (self.folder / str(step)).rename(self.folder / f"{step}.deleting")
                shutil.rmtree(doomed)


def find_folder(root: str | Path, name: str, step: int = -1) -> Path:
    """A step's folder: of the run FOLDER/NAME below `root`, or at the path of a run or a step."""
    named = Path(name).expanduser()
    folder = named if named.is_dir() else Path(root).expanduser() / named
    if (folder / "model_weights").is_dir():
        return folder.absolute()
    return Checkpoints(folder).find(step)


def _folders_first() -> ocp.Context:
    """Orbax set to make a checkpoint's folders before it returns.

    Made in the background, folders that cannot be made keep its writers waiting for minutes.
    """
    if not hasattr(ocp.Context, "asynchronous"):  # before Orbax 0.12.8
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        return ocp.Context(async_options=options)
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    return context


def _write_hashes(step_dir: Path) -> None:
    """Name every file of a checkpoint with its size and hash, all of it seen to the disk."""
    entries = {
        str(path.relative_to(step_dir)): {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in _files(step_dir)
    }
    hashes = step_dir / _HASHES
    hashes.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    for path in [*_files(step_dir), *(p for p in step_dir.rglob("*") if p.is_dir()), step_dir]:
        _sync(path)


def _damage(step_dir: Path) -> str:
    """What is wrong with a checkpoint's files, as one line; empty: nothing."""
    hashes = step_dir / _HASHES
    if not hashes.exists() and not (step_dir / "manifest").exists():
        return "" if _files(step_dir) else f"{step_dir} is empty"
    try:
        entries = json.loads(hashes.read_bytes())
        for name, entry in entries.items():
            path = step_dir / name
            if not path.is_file():
                return f"{path} is missing"
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{path} has {size} bytes, {entry['bytes']} were saved"
        for name, entry in entries.items():
            if _hash(step_dir / name) != entry["sha256"]:
                return f"{step_dir / name} is not what was saved (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{hashes} or what it names cannot be read ({error})"
    return "" if entries else f"{hashes} names no file"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a power failure cannot take it back."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def check_mode(step_dir: str | Path, mode: str) -> None:
    """Raise a CheckpointError unless a run of this `training.runtime_mode` made the checkpoint.

    Without a manifest (a published checkpoint), or with one from before there were other modes, it
    is taken for one of `jax`.
    """
    try:
        made = read_json(step_dir, "manifest")["config"]["training"]["runtime_mode"]
    except (CheckpointError, KeyError, OSError, ValueError):
        made = "jax"
    if made != mode:
        what = {"jax": "a network", "token_stats": "counts of tokens", "simulate": "nothing at all"}
        raise CheckpointError(
            f"{step_dir} was made under training.runtime_mode={made} and holds "
            f"{what.get(made, 'something else')}; this run needs {what[mode]}, and no mode "
            f"continues another's: name a run of training.runtime_mode={mode}, or train one "
            "under another training.exp_name"
        )


@dataclass(frozen=True)
class RestoreAccount:
    """What became of every parameter; `dataclasses.asdict` of it is JSON-able."""

    restored: tuple[str, ...]
    initialised: tuple[str, ...]
    """Not in the checkpoint, and allowed to start anew."""
    cast: tuple[str, ...]
    """Restored in another float type; each with both types."""
    unused: tuple[str, ...]
    """In the checkpoint, and not in the target."""
    narrowed: tuple[str, ...] = ()
    """Restored in part: the rest was taken away on purpose."""
    moved: tuple[str, ...] = ()
    """Restored to another place than it had; `from -> to`."""

    def __str__(self) -> str:
        """One line, and one more for each kind of exception that occurred."""
        total = len(self.restored) + len(self.initialised)
        kinds = ("initialised anew", "narrowed", "moved", "cast", "unused in the checkpoint")
        lists = (self.initialised, self.narrowed, self.moved, self.cast, self.unused)
        pairs = zip(kinds, lists, strict=True)
        lines = [f"{kind}: {', '.join(names)}" for kind, names in pairs if names]
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
    faults, cast, initialised = [], [], []
    taken: dict[str, AnyArray] = {}
    for name, leaf in target.items():
        if (saved := source.get(name)) is not None:
            both_float = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (leaf, saved))
            if leaf.shape != saved.shape or (leaf.dtype != saved.dtype and not both_float):
                faults.append(
                    f"{name}: {_describe(leaf)} expected, {_describe(saved)} in the checkpoint"
                )
                continue
            if leaf.dtype != saved.dtype:
                cast.append(f"{name} ({saved.dtype} to {leaf.dtype})")
            taken[name] = saved.astype(leaf.dtype, copy=False)
        elif any(matches(glob, name) for glob in may_initialise):
            initialised.append(name)
        else:
            faults.append(f"{name}: {_describe(leaf)} expected, none in the checkpoint")
    if faults:
        raise CheckpointError(
            _listed(f"{len(faults)} of {len(target)} parameters cannot be restored", faults)
            + "\nSet the model's sizes as the checkpoint has them, or choose another checkpoint."
        )
    unused = [name for name in source if name not in target]
    return taken, RestoreAccount(tuple(taken), tuple(initialised), tuple(cast), tuple(unused))


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
    items = ", ".join(sorted(path.name for path in folder.parent.iterdir() if path.is_dir()))
    raise CheckpointError(f"{folder.parent} has no item {item!r}: it has {items}")


def _savable(tree: PyTree) -> PyTree:
    """Scalars as arrays: Orbax refuses NumPy's, and would give Python's back without a dtype."""
    tree = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), tree
    )
    for name, leaf in named_leaves(tree).items():
        # Orbax fails on these too, but half-way through a save.
        if leaf.size == 0 or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSU"):
            raise CheckpointError(f"{name}: {_describe(leaf)} cannot be saved: no numbers in it")
    return tree


def _restore_item(step_dir: Path, item: str, like: PyTree) -> PyTree:
    path = str(_item_folder(step_dir, item).parent)
    stored = ocp.metadata(path, item).metadata
    target = named_leaves(like)
    ours = {name: _describe(leaf) for name, leaf in target.items()}
    theirs = {name: _describe(leaf) for name, leaf in named_leaves(stored).items()}
    faults = [
        f"{name}: {ours.get(name, 'nothing')} requested, {theirs.get(name, 'nothing')} stored"
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name)
    ]
    if faults:
        raise CheckpointError(_listed(f"{item} of {step_dir} does not fit the request", faults))
    # Requested in the stored structure, so that only names have to agree: a NamedTuple is stored as
    # a dict, and trees may differ in where they hold None.
    abstract = with_leaves(stored, {name: _abstract(leaf) for name, leaf in target.items()})
    return with_leaves(like, named_leaves(ocp.load(path, abstract, checkpointable_name=item)))


def _abstract(leaf: ShapeDtype) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        return _OnHost(leaf.shape, leaf.dtype)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = getattr(leaf, "sharding", None) or here
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(array: ShapeDtype) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _listed(head: str, faults: Iterable[str]) -> str:
    return "\n  ".join([f"{head}:", *sorted(faults)])
