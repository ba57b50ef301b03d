"""Stacks of layers, scanned over what repeats, so that depth costs no compile time.

A stack of equal layers is one layer whose leaves have a leading axis. Where the layers differ, a
`Cycle` holds the shortest period that repeats, scanned as a whole, and the layers behind it. States
of layers are kept in the same form as the layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from ttt import mixers
from ttt.core.remat import remat


class Cycle(NamedTuple):
    """Layers in turn: `period`, as often as the leading axis of its leaves is long, then `rest`."""

    period: tuple[PyTree, ...]
    rest: tuple[PyTree, ...]
    """Single layers, without a leading axis."""


type Stack = PyTree
"""None (no layer), a layer with stacked leaves, or a `Cycle`."""


def make(
    layer: Callable[[str, PRNGKeyArray], PyTree], names: Sequence[str], keys: Key[Array, " L"]
) -> Stack:
    """The stack of `layer(name, key)` for every name."""
    if not names:
        return None
    period = mixers.period(names)
    if period == 1:
        return jax.vmap(partial(layer, names[0]))(keys)
    whole = len(names) // period * period
    return Cycle(
        tuple(jax.vmap(partial(layer, names[i]))(keys[i:whole:period]) for i in range(period)),
        tuple(layer(names[i], keys[i]) for i in range(whole, len(names))),
    )


def each(function: Callable[[PyTree], PyTree], stack: Stack) -> Stack:
    """`function` of every layer, in the stack's own form."""
    if stack is None:
        return None
    if not isinstance(stack, Cycle):
        return jax.vmap(function)(stack)
    return Cycle(
        tuple(jax.vmap(function)(layer) for layer in stack.period),
        tuple(map(function, stack.rest)),
    )


def walk(
    stack: Stack,
    x: PyTree,
    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    states: Stack = None,
    *,
    policy: str = "none",
) -> tuple[PyTree, Stack]:
    """`x, state = step(x, layer, state)` through all layers; returns x and the states.

    states: in the form of the stack; None: None for every layer.
    policy: what a step keeps for its backward pass (`ttt.core.remat`).
    """
    if stack is None:
        return x, states
    scanned = remat(step, policy)
    if not isinstance(stack, Cycle):
        return jax.lax.scan(lambda x, layer: scanned(x, *layer), x, (stack, states))
    if states is None:
        states = Cycle(*((None,) * len(layers) for layers in stack))

    def turn(step: Callable, x: PyTree, layers: tuple) -> tuple[PyTree, tuple]:
        after = []
        for layer, state in zip(*layers, strict=True):
            x, state = step(x, layer, state)
            after.append(state)
        return x, tuple(after)

    period: tuple = ()
    if stack.period:
        x, period = jax.lax.scan(partial(turn, scanned), x, (stack.period, states.period))
    # Outside of a scan, XLA could merge what is computed again with the forward pass.
    single = remat(step, policy, prevent_cse=True)
    x, rest = turn(single, x, (stack.rest, states.rest))
    return x, Cycle(period, rest)


def layers_of(stack: Stack, count: int) -> tuple[PyTree, ...]:
    """The `count` layers one by one, in their order; from a part of a stack, parts of layers."""

    def row(layer: PyTree, i: int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[i], layer)

    if stack is None:
        return ()
    if not isinstance(stack, Cycle):
        return tuple(row(stack, i) for i in range(count))
    turns = (count - len(stack.rest)) // max(1, len(stack.period))
    period = (row(layer, i) for i in range(turns) for layer in stack.period)
    return (*period, *stack.rest)


def unrolled(stack: Stack, count: int) -> Stack:
    """The same layers one by one: none is to be taken out of a stack any more."""
    return None if stack is None else Cycle((), layers_of(stack, count))


def restacked(like: Stack, layers: Sequence[PyTree]) -> Stack:
    """The inverse of `layers_of`, in the form of `like`."""

    def stacked(parts: Sequence[PyTree]) -> PyTree:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    if like is None:
        return None
    if not isinstance(like, Cycle):
        return stacked(layers)
    period, whole = len(like.period), len(layers) - len(like.rest)
    return Cycle(
        tuple(stacked(layers[i:whole:period]) for i in range(period)), tuple(layers[whole:])
    )
