"""What a model has read and learned, as a value: selected, joined, written to disk, read again."""

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ttt.core.tree import named_leaves, with_leaves
from ttt.errors import UserError

_FORMAT = 1
_ABOUT = "about"


class State(NamedTuple):
    """Of B sequences, each on its own: all leaves are [B, ...].

    A value: no call changes it, so that keeping a reference is a fork. Its size depends on the
    context under full attention alone.
    """

    fast: PyTree
    """The fast weights after all steps taken."""
    prefix: PyTree
    """Mixer states at the border of the open chunk."""
    suffix: PyTree
    ids: Int[Array, "B C"]
    """Tokens of the open chunk, the first `open` of them."""
    open: Int[Array, " B"]
    """1 … C once something is read: a chunk's step needs the token behind it."""
    seen: Int[Array, " B"]
    """Tokens read in all."""
    occurred: Bool[Array, "B V"]
    """Which tokens were among them."""
    logits: Float[Array, "B V"]
    """Of the next token; zeros before the first."""


def select(state: State, rows: Sequence[int]) -> State:
    """Sequences of a state by number, in any order and as often as one likes."""
    rows_array = jnp.asarray(rows, jnp.int32)
    return jax.tree.map(lambda leaf: leaf[rows_array], state)


def join(states: Sequence[State]) -> State:
    """The sequences of several states of one engine, one after the other."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *states)


def size_in_bytes(state: State) -> int:
    """Of all arrays; shapes suffice."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def save_state(
    path: str | Path, state: State, fingerprint: str, about: dict[str, Any] | None = None
) -> int:
    """Write a state to `path`, whole or not at all, over an older one; returns the file's bytes.

    fingerprint: of the model and the rule that it learns by; only the same ones can go on.
    about: what the caller wants to know later, JSON-able.
    """
    path = Path(path).expanduser().absolute()
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    head = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "about": about or {},
        # NumPy has no bfloat16: such arrays lie in the file as unsigned numbers of the same size.
        "dtypes": {name: array.dtype.name for name, array in arrays.items()},
    }
    plain = {name: array.view(_storable(array.dtype)) for name, array in arrays.items()}
    plain[_ABOUT] = np.array(json.dumps(head))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            np.savez(file, allow_pickle=False, **plain)
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: a state cannot be written there ({error})") from error
    finally:
        beside.unlink(missing_ok=True)
    return path.stat().st_size


def read_about(path: str | Path, fingerprint: str) -> dict[str, Any]:
    """The `about` of `save_state`; raises as `load_state` does."""
    return _opened(path, fingerprint)[1]["about"]


def load_state(path: str | Path, like: State, fingerprint: str) -> State:
    """The state that `save_state` wrote, for a model with the same fingerprint.

    like: a state of the same engine, or its shapes; sequences may differ in number.
    Raises UserError if there is none, or if it is another model's.
    """
    file, head = _opened(path, fingerprint)
    wanted = named_leaves(like)
    leaves = {}
    for name, leaf in wanted.items():
        if name not in file:
            raise UserError(f"{path} has no {name}: it is of another version; save it again")
        array = file[name].view(jnp.dtype(head["dtypes"][name]))
        if array.shape[1:] != leaf.shape[1:] or array.dtype != leaf.dtype:
            raise UserError(
                f"{path}: {name} is {array.dtype}{list(array.shape[1:])} per sequence, and "
                f"{leaf.dtype}{list(leaf.shape[1:])} is wanted: under full attention a state goes "
                "on with the context that it was saved with"
            )
        leaves[name] = jnp.asarray(array)
    return with_leaves(like, leaves)


def _opened(path: str | Path, fingerprint: str) -> tuple[Any, dict[str, Any]]:
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        raise UserError(f"there is no saved state at {path}: check the path, or save one first")
    try:
        file = np.load(path, allow_pickle=False)
        head = json.loads(str(file[_ABOUT]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a saved state: {error}") from error
    if head["format"] != _FORMAT:
        raise UserError(
            f"{path} has format {head['format']}, and this version reads {_FORMAT}: save it again"
        )
    if head["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} was saved by another model, or with another rule of learning (fingerprint "
            f"{head['fingerprint']}, this one's is {fingerprint}): load the checkpoint and "
            "settings that it was saved with"
        )
    return file, head


def _storable(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")
