"""Leaves of a pytree by dotted name: `language_model.model.wte.weight`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ttt.core.precision import at_least_float32
from ttt.globs import matches


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Dotted name -> leaf, in the tree's order. None is no leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def with_leaves(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """The same tree with its leaves taken from `leaves`, which must name all of them."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)]
    )


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as a dict of dicts, whose `named_leaves` they are."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *sections, last = name.split(".")
        node = root
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = leaf
    return root


def select(tree: PyTree, globs: Sequence[str]) -> PyTree[bool]:
    """A tree of booleans: whether any of the dotted globs matches the leaf's name.

    Where a layer stands in a stack of several kinds (`ttt.model.stacks.Cycle`) is no part of it.
    """
    names = map(without_place, named_leaves(tree))
    chosen = [any(matches(glob, name) for glob in globs) for name in names]
    return jax.tree.unflatten(jax.tree.structure(tree), chosen)


def without_place(name: str) -> str:
    """`….prefix_blocks.period.0.ffn_norm.weight` -> `….prefix_blocks.ffn_norm.weight`."""
    return _PLACE.sub("", name)


def is_single(name: str) -> bool:
    """Whether a leaf of a stack is of one layer, and has no axis of layers."""
    return without_place(name) != name and ".rest." in name


_PLACE = re.compile(r"\.(?:period|rest)\.\d+")


def cast(tree: PyTree, dtype: jnp.dtype) -> PyTree:
    """Every leaf in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def squared_norm(tree: PyTree) -> Float[Array, ""]:
    """Sum of squares over all leaves, accumulated in at least float32."""
    squares = [jnp.sum(jnp.square(at_least_float32(leaf))) for leaf in jax.tree.leaves(tree)]
    return jnp.sum(jnp.stack(squares))


def count(tree: PyTree) -> int:
    """Numbers in all leaves together."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
