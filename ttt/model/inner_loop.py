"""Test-time training as pure functions, generic in the loss, and its exact second-order gradient.

A loss takes (fast weights, slow weights, carry, chunk) of a batch of sequences and gives (losses,
(carry, aux)), where each sequence depends on its own fast weights, carry and chunk. The carry goes
from chunk to chunk (caches), the chunk is what is read now, the slow weights are the same in every
chunk and sequence. The gradient of a step is that of the fast weights alone: all else is input.
`read` folds it over the chunks. The loss of one sequence becomes that of a batch by
`jax.vmap(loss, in_axes=(0, None, 0, 0))`; taking batches lets it share work with slow weights.

Two forms of its derivative agree to rounding. `reverse_over_reverse` lets JAX differentiate the
steps. `forward_over_reverse` is METHOD.md section 6: the backward pass of a chunk is one forward-
mode derivative of one reverse pass, so no second-order tape is stored, and a first-order kernel
inside the loss needs no double backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ttt.core.precision import at_least_float32
from ttt.core.scan import scan_in_groups
from ttt.core.tree import squared_norm

type Loss = Callable[
    [PyTree, PyTree, PyTree, PyTree], tuple[Float[Array, " B"], tuple[PyTree, PyTree]]
]


class InnerRule(eqx.Module):
    """One step of gradient descent: W − rate · clip(g)."""

    rate: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    """η · m(s): the inner learning rate after the outer loop's warm-up; 0 switches learning off."""
    clip: float = eqx.field(static=True)
    """Bound of the norm of g over all fast weights together; 0: none."""


class Outcome(NamedTuple):
    """Of one chunk of one sequence; with leading axes of several."""

    loss: Float[Array, "*lead"]
    """By weights that had not seen the chunk."""
    gradient_norm: Float[Array, "*lead"]
    """Of the inner gradient before clipping; a metric, not to be differentiated."""
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
    factor = rule.rate.astype(norm.dtype)
    if rule.clip:
        factor = factor * jnp.where(norm < rule.clip, 1, rule.clip / jnp.where(norm > 0, norm, 1))
    fast = jax.tree.map(lambda w, g: w - factor.astype(w.dtype) * g, fast, gradient)
    return fast, jax.lax.stop_gradient(norm)


@jax.named_scope("inner_loop")
def learn(
    loss: Loss, fast: PyTree, slow: PyTree, carry: PyTree, chunk: PyTree, rule: InnerRule
) -> tuple[PyTree, PyTree, Outcome]:
    """Score a chunk of every sequence, then take the step on it: (fast', carry', outcome)."""

    def total(fast: PyTree) -> tuple[Float[Array, ""], tuple[PyTree, PyTree, PyTree]]:
        values, (carry_after, aux) = loss(fast, slow, carry, chunk)
        return jnp.sum(values), (values, carry_after, aux)

    # A sequence's loss depends on no other's weights: the sum's gradient holds each one's own.
    (_, (values, carry_after, aux)), gradient = jax.value_and_grad(total, has_aux=True)(fast)
    fast, norms = jax.vmap(descend, in_axes=(0, 0, None))(fast, gradient, rule)
    return fast, carry_after, Outcome(values, norms, aux)


def read(
    loss: Loss,
    fast: PyTree,
    slow: PyTree,
    carry: PyTree,
    chunks: PyTree,
    rule: InnerRule,
    *,
    group: int = 1,
    gradient: str = "forward_over_reverse",
) -> tuple[PyTree, PyTree, Outcome]:
    """Read N chunks of B sequences, learning from each chunk after it has been scored.

    fast, carry: leaves [B, ...]; chunks: [N, B, ...]; slow: no such axes.
    Returns (fast, carry) after the last chunk, and outcomes [N, B, ...].

    The derivative is exact, in second order, through all steps and carries. The backward pass has
    fast weights and carry once per `group` chunks, and recomputes the others.
    """
    fold = {"forward_over_reverse": _fold, "reverse_over_reverse": _plain_fold}[gradient]
    steps = jax.tree.leaves(chunks)[0].shape[0]
    group = min(group, steps)
    whole = steps // group * group
    fast, carry, first = fold(loss, group, fast, slow, carry, _part(chunks, 0, whole), rule)
    if whole == steps:
        return fast, carry, first
    rest = _part(chunks, whole, steps)
    fast, carry, last = fold(loss, steps - whole, fast, slow, carry, rest, rule)
    return fast, carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, last)


def _plain_fold(
    loss: Loss,
    group: int,
    fast: PyTree,
    slow: PyTree,
    carry: PyTree,
    chunks: PyTree,
    rule: InnerRule,
) -> tuple[PyTree, PyTree, Outcome]:
    def step(state: tuple[PyTree, PyTree], chunk: PyTree) -> tuple[tuple[PyTree, PyTree], Outcome]:
        fast, carry, out = learn(loss, state[0], slow, state[1], chunk, rule)
        return (fast, carry), out

    (fast, carry), outcomes = scan_in_groups(step, (fast, carry), chunks, group)
    return fast, carry, outcomes


# ---- forward over reverse ----------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fold(
    loss: Loss,
    group: int,
    fast: PyTree,
    slow: PyTree,
    carry: PyTree,
    chunks: PyTree,
    rule: InnerRule,
) -> tuple[PyTree, PyTree, Outcome]:
    (fast, carry), outcomes = _steps(loss, (fast, carry), slow, chunks, rule)
    return fast, carry, outcomes


def _fold_forward(
    loss: Loss,
    group: int,
    fast: PyTree,
    slow: PyTree,
    carry: PyTree,
    chunks: PyTree,
    rule: InnerRule,
) -> tuple[tuple[PyTree, PyTree, Outcome], tuple]:
    """The fold; its residuals are the inputs, the state before each group, and scalars."""

    def run(state: tuple[PyTree, PyTree], chunks: PyTree) -> tuple[tuple[PyTree, PyTree], PyTree]:
        after, outcomes = _steps(loss, state, slow, chunks, rule)
        return after, (state, outcomes)

    grouped = _grouped(chunks, group)
    (fast, carry), (states, outcomes) = jax.lax.scan(run, (fast, carry), grouped)
    residuals = (states, fast, slow, grouped, outcomes.gradient_norm, rule)
    outcomes = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outcomes)
    return (fast, carry, outcomes), residuals


def _fold_backward(loss: Loss, group: int, residuals: tuple, cotangents: tuple) -> tuple:
    states, fast, slow, grouped, norms, rule = residuals
    d_fast, d_carry, d_outcomes = cotangents
    d_carry = eqx.filter(d_carry, _is_differentiable)
    d_outcomes = _grouped(d_outcomes, group)

    def run(later: tuple, inputs: tuple) -> tuple[tuple, PyTree]:
        """One group: its states once more, then its chunks from last to first."""
        number, chunks, norms, d_outcomes = inputs
        before = _states_before(loss, states, number, slow, chunks, rule)

        def back_from(later: tuple, inputs: tuple) -> tuple[tuple, PyTree]:
            position, *rest = inputs
            return back(later, (before(position), *rest))

        xs = (jnp.arange(group, dtype=jnp.int32), chunks, norms, d_outcomes)
        return jax.lax.scan(back_from, later, xs, reverse=True)

    def back(later: tuple, inputs: tuple) -> tuple[tuple, PyTree]:
        """One chunk."""
        fast_after, d_fast, d_slow, d_carry, d_rate = later
        (fast, carry), chunk, norm, d_outcome = inputs
        direction, d_rate_here = jax.vmap(_descend_transposed, in_axes=(0, 0, 0, 0, None))(
            fast, fast_after, d_fast, norm, rule
        )
        cotangent = (d_outcome.loss, d_carry, d_outcome.aux)
        by_fast, by_slow, d_carry, d_chunk = _second_order(
            loss, fast, slow, carry, chunk, direction, cotangent
        )
        d_fast = jax.tree.map(jnp.add, d_fast, by_fast)
        d_slow = jax.tree.map(jnp.add, d_slow, by_slow)
        return (fast, d_fast, d_slow, d_carry, d_rate + jnp.sum(d_rate_here)), d_chunk

    d_slow = jax.tree.map(jnp.zeros_like, slow)
    later = (fast, d_fast, d_slow, d_carry, jnp.zeros_like(rule.rate))
    inputs = (jnp.arange(len(norms), dtype=jnp.int32), grouped, norms, d_outcomes)
    (_, d_fast, d_slow, d_carry, d_rate), d_chunks = jax.lax.scan(run, later, inputs, reverse=True)
    d_chunks = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), d_chunks)
    return d_fast, d_slow, d_carry, d_chunks, InnerRule(d_rate, rule.clip)


_fold.defvjp(_fold_forward, _fold_backward)


@jax.named_scope("inner_loop")
def _second_order(
    loss: Loss,
    fast: PyTree,
    slow: PyTree,
    carry: PyTree,
    chunk: PyTree,
    direction: PyTree,
    cotangent: tuple[PyTree, PyTree, PyTree],
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """Cotangents of (fast, slow, carry, chunk) by ONE forward-mode derivative of ONE reverse pass.

    With R(fast, c) the reverse pass of the chunk for the cotangent c of (loss, carry', aux),
    d/dε R(fast + ε·direction, (1, 0, 0) + ε·cotangent) is the first-order part R(fast, cotangent)
    plus the second-order part ∂²loss · direction, since R is linear in c.
    """
    carry, carry_rest = eqx.partition(carry, _is_differentiable)
    chunk, chunk_rest = eqx.partition(chunk, _is_differentiable)

    def outputs(fast: PyTree, slow: PyTree, carry: PyTree, chunk: PyTree) -> tuple:
        value, (carry, aux) = loss(
            fast, slow, eqx.combine(carry, carry_rest), eqx.combine(chunk, chunk_rest)
        )
        return value, eqx.filter(carry, _is_differentiable), aux

    def reverse(fast: PyTree, cotangent: tuple) -> tuple:
        return jax.vjp(outputs, fast, slow, carry, chunk)[1](cotangent)

    value, d_carry, d_aux = cotangent
    unit = (
        jnp.ones_like(value),
        jax.tree.map(jnp.zeros_like, d_carry),
        jax.tree.map(jnp.zeros_like, d_aux),
    )
    return jax.jvp(reverse, (fast, unit), (direction, cotangent))[1]


def _descend_transposed(
    fast: PyTree, fast_after: PyTree, d_after: PyTree, norm: Float[Array, ""], rule: InnerRule
) -> tuple[PyTree, Float[Array, ""]]:
    """Cotangents of (gradient, rate) from that of `descend`'s result.

    A clipped gradient is known by its direction, which is that of the step, fast − fast_after.
    """
    rate = rule.rate.astype(norm.dtype)
    step = jax.tree.map(lambda w, after: at_least_float32(w - after), fast, fast_after)
    along = _inner_product(step, d_after)
    length = _inner_product(step, step)
    clipped = (norm >= rule.clip) & (length > 0) if rule.clip else jnp.zeros((), bool)
    bound = rule.clip / jnp.where(clipped, norm, 1)
    factor = -rate * jnp.where(clipped, bound, 1)
    project = jnp.where(clipped, along / jnp.where(length > 0, length, 1), 0)
    direction = jax.tree.map(
        lambda w, d, s: (factor * (at_least_float32(d) - project * s)).astype(w.dtype),
        fast,
        d_after,
        step,
    )
    return direction, (-along / rate).astype(rule.rate.dtype)


def _inner_product(a: PyTree, b: PyTree) -> Float[Array, ""]:
    products = jax.tree.map(lambda x, y: jnp.sum(x * at_least_float32(y)), a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


def _steps(
    loss: Loss, state: tuple[PyTree, PyTree], slow: PyTree, chunks: PyTree, rule: InnerRule
) -> tuple[tuple[PyTree, PyTree], Outcome]:
    def step(state: tuple[PyTree, PyTree], chunk: PyTree) -> tuple[tuple[PyTree, PyTree], Outcome]:
        fast, carry, out = learn(loss, state[0], slow, state[1], chunk, rule)
        return (fast, carry), out

    return jax.lax.scan(step, state, chunks)


def _states_before(
    loss: Loss,
    stored: tuple[PyTree, PyTree],
    group: Int[Array, ""],
    slow: PyTree,
    chunks: PyTree,
    rule: InnerRule,
) -> Callable[[Int[Array, ""]], tuple[PyTree, PyTree]]:
    """Position in a group -> (fast, carry) before that chunk.

    `stored` holds those before the first chunk of every group, from which the others of the group
    are computed again, once.
    """
    steps = jax.tree.leaves(chunks)[0].shape[0]
    if steps == 1:
        return lambda position: _at(stored, group)

    def step(state: tuple[PyTree, PyTree], chunk: PyTree) -> tuple[tuple[PyTree, PyTree], PyTree]:
        fast, carry, _ = learn(loss, state[0], slow, state[1], chunk, rule)
        return (fast, carry), (fast, carry)

    _, later = jax.lax.scan(step, _at(stored, group), _part(chunks, 0, steps - 1))

    # Stored and recomputed states stay apart, and the index of the stored one varies with the
    # position: else XLA would hold a copy of it throughout the group.
    def before(position: Int[Array, ""]) -> tuple[PyTree, PyTree]:
        first = position == 0
        state = _at(stored, jnp.where(first, group, 0))
        again = _at(later, jnp.maximum(position - 1, 0))
        return jax.tree.map(partial(jnp.where, first), state, again)

    return before


def _is_differentiable(leaf: Any) -> bool:
    return eqx.is_inexact_array(leaf)


def _at(stacked: PyTree, position: Int[Array, ""]) -> PyTree:
    return jax.tree.map(lambda x: x[position], stacked)


def _part(chunks: PyTree, start: int, stop: int) -> PyTree:
    return jax.tree.map(lambda x: x[start:stop], chunks)


def _grouped(chunks: PyTree, group: int) -> PyTree:
    return jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), chunks)
