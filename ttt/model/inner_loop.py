"""Test-time training as pure functions, generic in the loss.

A loss takes (fast weights, carry, chunk) and gives (loss, (carry, aux)). The carry goes from chunk
to chunk (caches), the chunk is what is read now. The gradient of a step is that of the fast weights
alone: carry and chunk are inputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ttt.core.scan import scan_in_groups
from ttt.core.tree import squared_norm

type Loss = Callable[[PyTree, PyTree, PyTree], tuple[Float[Array, ""], tuple[PyTree, Any]]]


class InnerRule(NamedTuple):
    """One step of gradient descent: W − rate · clip(g)."""

    rate: Float[Array, ""] | float
    """η · m(s): the inner learning rate after the outer loop's warm-up; 0 switches learning off."""
    clip: float
    """Bound of the norm of g over all fast weights together; 0: none."""


class Reading(NamedTuple):
    """What a fold over chunks leaves."""

    fast: PyTree
    carry: PyTree
    losses: Float[Array, " N"]
    """Loss of each chunk, by the weights that had not seen it."""
    gradient_norms: Float[Array, " N"]
    """Norm of each inner gradient before clipping."""
    aux: PyTree


def warmup_scale(
    step: Int[Array, ""] | int, *, rate: float, initial: float, warmup_steps: int
) -> Float[Array, ""]:
    """m(s): the share of the inner rate at outer step s, rising to 1 over `warmup_steps`."""
    if warmup_steps == 0 or rate == 0:
        return jnp.ones(())
    progress = jnp.minimum(1.0, (step + 1) / warmup_steps)
    return (initial + (rate - initial) * progress) / rate


def norm_of(gradient: PyTree) -> Float[Array, ""]:
    """Global norm; at a zero gradient its derivative is 0, not NaN."""
    square = squared_norm(gradient)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def descend(fast: PyTree, gradient: PyTree, rule: InnerRule) -> tuple[PyTree, Float[Array, ""]]:
    """The fast weights after one step, and the gradient's norm before clipping."""
    norm = norm_of(gradient)
    factor = jnp.asarray(rule.rate, norm.dtype)
    if rule.clip:
        factor = factor * jnp.where(norm < rule.clip, 1, rule.clip / jnp.where(norm > 0, norm, 1))
    fast = jax.tree.map(lambda w, g: w - factor.astype(w.dtype) * g, fast, gradient)
    return fast, norm


def learn(
    loss: Loss, fast: PyTree, carry: PyTree, chunk: PyTree, rule: InnerRule
) -> tuple[PyTree, PyTree, tuple[Float[Array, ""], Float[Array, ""], PyTree]]:
    """Score one chunk, then take the step on it: (fast', carry', (loss, gradient norm, aux))."""
    (value, (carry, aux)), gradient = jax.value_and_grad(loss, has_aux=True)(fast, carry, chunk)
    fast, norm = descend(fast, gradient, rule)
    return fast, carry, (value, norm, aux)


def read(
    loss: Loss, fast: PyTree, carry: PyTree, chunks: PyTree, rule: InnerRule, *, group: int = 1
) -> Reading:
    """Read N chunks (leading axis of `chunks`), learning from each after it has been scored.

    The derivative is exact, in second order, through all steps and carries; the backward pass
    stores fast weights and carry once per `group` chunks and recomputes the rest.
    """

    def step(state: tuple[PyTree, PyTree], chunk: PyTree) -> tuple[tuple[PyTree, PyTree], PyTree]:
        fast, carry, out = learn(loss, *state, chunk, rule)
        return (fast, carry), out

    (fast, carry), (losses, norms, aux) = scan_in_groups(step, (fast, carry), chunks, group)
    return Reading(fast, carry, losses, norms, aux)
