"""Our tree <-> the published parameter names (METHOD.md section 1), the one layout on disk.

In memory prefix and suffix are two stacks; on disk all blocks are one stack, prefix first, and what
the suffix alone has (prime MLPs and their norms) stands in `prime_storage`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PyTree

from ttt.core.batch import AnyArray
from ttt.core.tree import is_single, named_leaves, nested, with_leaves, without_place
from ttt.errors import UserError
from ttt.infra import checkpoint
from ttt.infra.checkpoint import RestoreAccount
from ttt.infra.mesh import joined
from ttt.knobs import ModelConfig
from ttt.model.transformer import MetaModel

NEW_IN_META = ("language_model.model.h.prime_storage.**",)
"""Published names that a parent without prime MLPs cannot have."""

_STACKS = "language_model.model.h."
_PRIME = ("feed_forward_prime", "ffn_prime_norm", "ffn_prime_post_norm")


def to_published(tree: PyTree) -> dict[str, AnyArray]:
    """A model-shaped tree (parameters, moments, gradients) as published name -> array.

    What several stacks share is joined in host memory: see `ttt.infra.mesh.joined`.
    """
    leaves = named_leaves(tree)
    layers = _layers(leaves)

    def array(names: Sequence[str]) -> AnyArray:
        if names[0] not in layers:
            return leaves[names[0]]
        parts = [leaves[name][None] if is_single(name) else leaves[name] for name in names]
        order = np.argsort(np.concatenate([layers[name] for name in names]))
        return joined(parts, None if np.all(np.diff(order) == 1) else order)

    return {target: array(names) for target, names in _sources(leaves).items()}


def from_published(like: PyTree, published: Mapping[str, AnyArray]) -> PyTree:
    """The inverse of `to_published`; `like` gives the structure, and may hold shapes alone."""
    leaves = named_leaves(like)
    layers = _layers(leaves)
    taken = {}
    for target, names in _sources(leaves).items():
        if names[0] not in layers:
            taken[names[0]] = published[target]
            continue
        # The array has a row for each layer that has the weight, in the order of layers.
        present = np.sort(np.concatenate([layers[name] for name in names]))
        for name in names:
            rows = np.searchsorted(present, layers[name])
            step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
            even = np.all(np.diff(rows) == step)  # a slice takes no second copy in host memory
            part = published[target][slice(rows[0], rows[-1] + 1, step) if even else rows]
            taken[name] = part[0] if is_single(name) else part
    return with_leaves(like, taken)


def _sources(leaves: Mapping[str, Any]) -> dict[str, list[str]]:
    """Published name -> the leaves that it consists of."""
    sources: dict[str, list[str]] = {}
    for name in sorted(leaves, key=lambda name: name.startswith(_STACKS)):
        sources.setdefault(published_name(name), []).append(name)
    return sources


def _layers(leaves: Mapping[str, Any]) -> dict[str, Int[np.ndarray, " N"]]:
    """Leaf of a stack -> the numbers of its layers, which ascend from prefix to suffix."""
    layers: dict[str, np.ndarray] = {}
    first = 0
    for stack in (f"{_STACKS}prefix_blocks.", f"{_STACKS}suffix_blocks."):
        # `period.I.` or `rest.I.` in a stack of several kinds (`ttt.model.stacks.Cycle`).
        places = {
            name: name.removeprefix(stack).split(".")[:2]
            for name in leaves
            if name.startswith(stack)
        }
        turning = {name: int(i) for name, (part, i) in places.items() if part == "period"}
        period = 1 + max(turning.values(), default=0)
        turns = max((leaves[name].shape[0] for name in turning), default=0)
        for name, (part, i) in places.items():
            if part == "period":
                numbers = int(i) + period * np.arange(turns)
            elif part == "rest":
                numbers = np.array([period * turns + int(i)])
            else:
                numbers = np.arange(leaves[name].shape[0])
            layers[name] = first + numbers
        first = 1 + max((int(layers[name][-1]) for name in places), default=-1)
    return layers


def to_stored(tree: PyTree) -> PyTree:
    """Any tree as it lies on disk: model-shaped parts become nested dicts of published names."""
    return jax.tree.map(
        lambda part: nested(to_published(part)) if _is_model(part) else part,
        tree,
        is_leaf=_is_model,
    )


def from_stored(like: PyTree, stored: PyTree) -> PyTree:
    """The inverse of `to_stored`; `like` gives the structure, and may hold shapes alone."""
    return jax.tree.map(
        lambda part, saved: from_published(part, named_leaves(saved)) if _is_model(part) else saved,
        like,
        stored,
        is_leaf=_is_model,
    )


def load_model(config: ModelConfig, step_folder: Path) -> tuple[MetaModel, RestoreAccount]:
    """The model of a checkpoint's parameters, for use: all of them, or a CheckpointError.

    No gradient will pass through it but that of a chunk, so nothing is rematerialised. Raises
    UserError too where a parameter is not finite.
    """
    config = replace(config, remat_prefix="none", remat_suffix="none")
    shapes = jax.eval_shape(lambda: MetaModel(config, key=jax.random.key(0)))
    return take(shapes, checkpoint.read_flat(step_folder, "model_weights"), step_folder)


def take(
    like: MetaModel,
    stored: Mapping[str, np.ndarray],
    step_folder: Path,
    *,
    may_initialise: Sequence[str] = (),
) -> tuple[MetaModel, RestoreAccount]:
    """The model `like` (shapes suffice) with leaves from `stored`, and what became of each.

    stored: read from `step_folder`, by published name; leaves are views of it where they can be.
    may_initialise: dotted globs of published names that may be missing. Such leaves are zeros that
        take no memory; the caller replaces them.
    Raises CheckpointError for parameters that are missing or do not fit, all at once, and UserError
    for those that are not finite.
    """
    wanted = jax.eval_shape(to_published, like)
    taken, account = checkpoint.account(wanted, stored, may_initialise=may_initialise)
    broken = [name for name, array in taken.items() if not np.all(np.isfinite(array))]
    if broken:
        raise UserError(
            f"{step_folder} holds weights that are not finite: {', '.join(broken)}. The run has "
            "diverged; choose an earlier step or another checkpoint"
        )
    zeros = {
        name: np.broadcast_to(np.zeros((), wanted[name].dtype), wanted[name].shape)
        for name in account.initialised
    }
    return from_published(like, taken | zeros), account


def _is_model(tree: PyTree) -> bool:
    return isinstance(tree, MetaModel)


def published_name(name: str) -> str:
    """The published name of a leaf: `….suffix_blocks.ffn_norm.weight` -> `….blocks.…`."""
    if not name.startswith(_STACKS):
        return name
    field = without_place(name).removeprefix(_STACKS).split(".", 1)[1]
    return f"{_STACKS}{'prime_storage' if field.startswith(_PRIME) else 'blocks'}.{field}"
