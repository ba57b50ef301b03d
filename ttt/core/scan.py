"""Scans whose backward pass stores a carry once per group of steps, and running means."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def scan_in_groups(step: Callable, carry: PyTree, xs: PyTree, group: int) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan(step, carry, xs)` that keeps one carry per `group` steps for the backward pass.

    Nothing else of a step is kept: its inside is recomputed, one step at a time. With `group` above
    1 the carries inside a group are recomputed first, which costs one more forward pass and saves
    `group - 1` of `group` carries.
    """
    step = jax.checkpoint(step, prevent_cse=False)
    steps = jax.tree.leaves(xs)[0].shape[0]
    if group == 1:
        return jax.lax.scan(step, carry, xs)

    @jax.checkpoint
    def run(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(step, carry, xs)

    whole = steps // group * group
    grouped = jax.tree.map(lambda x: x[:whole].reshape(-1, group, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(run, carry, grouped)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if whole == steps:
        return carry, ys
    carry, rest = run(carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry, jax.tree.map(lambda y, r: jnp.concatenate([y, r]), ys, rest)


def mean_over(function: Callable[[PyTree], PyTree], xs: PyTree) -> PyTree:
    """Mean of `function(x)` over the leading axis of `xs`, one x at a time, holding one sum."""
    steps = jax.tree.leaves(xs)[0].shape[0]
    if steps == 1:
        return function(jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(
        lambda y: jnp.zeros(y.shape, y.dtype),
        jax.eval_shape(function, jax.tree.map(lambda x: x[0], xs)),
    )

    def add(total: PyTree, x: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(x)), None

    total, _ = jax.lax.scan(add, zeros, xs)
    return jax.tree.map(lambda y: y / steps, total)
