"""Our tree <-> the published parameter names (METHOD.md section 1), the one layout on disk.

In memory prefix and suffix are two stacks; on disk all blocks are one stack, prefix first, and what
the suffix alone has (prime MLPs and their norms) stands in `prime_storage`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from ttt.core.batch import AnyArray
from ttt.core.tree import named_leaves, nested, with_leaves
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

    What two stacks share is joined in host memory: see `ttt.infra.mesh.joined`.
    """
    leaves = named_leaves(tree)
    published = {name: leaf for name, leaf in leaves.items() if not name.startswith(_STACKS)}
    for name in leaves:
        if name.startswith(_STACKS):
            target = published_name(name)
            parts = [leaves[part] for part in own_names(target) if part in leaves]
            published[target] = joined(parts)
    return published


def from_published(like: PyTree, published: Mapping[str, AnyArray]) -> PyTree:
    """The inverse of `to_published`; `like` gives the structure, and may hold shapes alone."""
    leaves = named_leaves(like)
    taken = {}
    for name, leaf in leaves.items():
        array = published[published_name(name)]
        if name.startswith(f"{_STACKS}suffix_blocks."):
            array = array[array.shape[0] - leaf.shape[0] :]
        elif name.startswith(f"{_STACKS}prefix_blocks."):
            array = array[: leaf.shape[0]]
        taken[name] = array
    return with_leaves(like, taken)


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
    field = name.removeprefix(_STACKS).split(".", 1)[1]
    return f"{_STACKS}{'prime_storage' if field.startswith(_PRIME) else 'blocks'}.{field}"


def own_names(published: str) -> list[str]:
    """The names in our tree that a published stacked array is cut into, prefix first."""
    field = published.removeprefix(_STACKS).split(".", 1)[1]
    return [f"{_STACKS}{stack}.{field}" for stack in ("prefix_blocks", "suffix_blocks")]
