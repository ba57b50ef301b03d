"""Test-time training on losses whose answer is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt.core.scan import mean_over, scan_in_groups
from ttt.knobs import INNER_GRADIENTS
from ttt.model import inner_loop
from ttt.model.inner_loop import InnerRule

FORMS = INNER_GRADIENTS


def quadratic(fast, slow, carry, chunk):
    """½·a·(w − x)², weighed by a slow weight and by a carry that counts the chunks."""
    weight, target = chunk
    loss = 0.5 * slow * (1 + carry["count"]) * weight * jnp.sum((fast["w"] - target) ** 2)
    return loss, ({"count": carry["count"] + 0.1, "seen": carry["seen"] + 1}, fast["w"])


quadratics = jax.vmap(quadratic, in_axes=(0, None, 0, 0))


CHUNKS = (np.array([1.0, 0.5, 2.0, 1.5, 0.7]), np.linspace(-1, 1, 15).reshape(5, 3))
START = np.array([0.3, -0.2, 0.5])


def closed_form(w, rate, slow=1.0, clip=0.0):
    """Losses, and the weights before each chunk and after the last."""
    losses, weights = [], [w]
    for i, (a, x) in enumerate(zip(*CHUNKS, strict=True)):
        a = slow * (1 + 0.1 * i) * a
        losses.append(0.5 * a * np.sum((w - x) ** 2))
        gradient = a * (w - x)
        w = w - rate * gradient * (min(1, clip / np.linalg.norm(gradient)) if clip else 1)
        weights.append(w)
    return np.array(losses), np.array(weights)


def read_one(w, rate=0.3, slow=1.0, clip=0.0, **options):
    """Read the chunks as a batch of one sequence."""
    carry = {"count": jnp.zeros(1), "seen": jnp.zeros(1, jnp.int32)}
    chunks = jax.tree.map(lambda x: jnp.asarray(x)[:, None], CHUNKS)
    return inner_loop.read(
        quadratics,
        {"w": jnp.asarray(w)[None]},
        jnp.asarray(slow),
        carry,
        chunks,
        InnerRule(rate, clip),
        **options,
    )


def test_reading_a_quadratic_gives_the_closed_form():
    fast, carry, read = read_one(START)
    losses, weights = closed_form(START, 0.3)
    np.testing.assert_allclose(read.loss[:, 0], losses, rtol=1e-5)
    np.testing.assert_allclose(fast["w"][0], weights[-1], rtol=1e-5)
    np.testing.assert_allclose(carry["count"], 0.5, rtol=1e-6)
    assert carry["seen"] == 5
    np.testing.assert_allclose(read.aux[:, 0], weights[:-1], rtol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [1, 2, 3, 5, 9])
def test_derivatives_through_the_steps_are_those_of_the_closed_form(float64, form, group, clip):
    def total(w, rate, slow):
        _, _, read = read_one(w, rate, slow, clip, group=group, gradient=form)
        return jnp.sum(read.loss) + jnp.sum(jnp.sin(read.aux))

    def expected(w, rate, slow):
        losses, weights = closed_form(w, rate, slow, clip)
        return losses.sum() + np.sin(weights[:-1]).sum()

    inputs = (START, 0.3, 1.2)
    by_w, by_rate, by_slow = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*map(jnp.asarray, inputs))
    eps = 1e-6
    for got, i, direction in [
        *((by_w[j], 0, np.eye(3)[j]) for j in range(3)),
        (by_rate, 1, 1.0),
        (by_slow, 2, 1.0),
    ]:
        up, down = (
            expected(*(x + sign * eps * direction if k == i else x for k, x in enumerate(inputs)))
            for sign in (1, -1)
        )
        np.testing.assert_allclose(got, (up - down) / (2 * eps), rtol=1e-6)


def test_sequences_of_a_batch_learn_apart():
    starts = np.stack([START, -START])
    carry = {"count": jnp.zeros(2), "seen": jnp.zeros(2, jnp.int32)}
    chunks = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2, axis=1), CHUNKS)
    fast, _, read = inner_loop.read(
        quadratics, {"w": jnp.asarray(starts)}, jnp.ones(()), carry, chunks, InnerRule(0.3, 0.4)
    )
    for i, start in enumerate(starts):
        losses, weights = closed_form(start, 0.3, clip=0.4)
        np.testing.assert_allclose(read.loss[:, i], losses, rtol=1e-5)
        np.testing.assert_allclose(fast["w"][i], weights[-1], rtol=1e-5)


def test_a_clipped_step_has_the_length_of_rate_times_bound_over_all_leaves():
    fast = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    gradient = {"a": jnp.full(2, 3.0), "b": jnp.full(3, -4.0)}
    moved, norm = inner_loop.descend(fast, gradient, InnerRule(0.5, 2.0))
    np.testing.assert_allclose(norm, np.sqrt(2 * 9 + 3 * 16), rtol=1e-6)
    np.testing.assert_allclose(inner_loop.norm_of(moved), 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(moved["b"] / moved["a"][0], 4 / -3.0 * np.ones(3), rtol=1e-6)


def test_a_gradient_within_the_bound_is_not_clipped():
    moved, _ = inner_loop.descend({"w": jnp.ones(4)}, {"w": jnp.full(4, 0.1)}, InnerRule(1.0, 0.3))
    np.testing.assert_allclose(moved["w"], 0.9, rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_zero_gradient_has_a_finite_derivative(clip):
    def after(w):
        moved, _ = inner_loop.descend({"w": w}, {"w": w * 0}, InnerRule(1.0, clip))
        return jnp.sum(moved["w"])

    np.testing.assert_allclose(jax.grad(after)(jnp.ones(3)), 1.0)


def test_rate_zero_leaves_the_fast_weights_alone():
    fast, _, _ = read_one(START, 0.0, clip=1.0)
    np.testing.assert_array_equal(fast["w"][0], jnp.asarray(START))


@pytest.mark.parametrize("form", FORMS)
def test_rate_zero_has_the_first_order_gradient(float64, form):
    def total(w, slow):
        return jnp.sum(read_one(w, 0.0, slow, 1.0, gradient=form)[2].loss)

    by_w, by_slow = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.asarray(START), jnp.asarray(1.0))
    weights, targets = CHUNKS[0] * (1 + 0.1 * np.arange(5)), CHUNKS[1]
    np.testing.assert_allclose(by_w, (weights[:, None] * (START - targets)).sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(by_slow, closed_form(START, 0.0)[0].sum(), rtol=1e-6)


def test_inner_warmup_goes_from_its_start_to_one():
    def scale(step):
        return float(inner_loop.warmup_scale(step, rate=2.0, initial=0.5, warmup_steps=4))

    np.testing.assert_allclose(scale(0), (0.5 + 1.5 / 4) / 2)
    np.testing.assert_allclose([scale(3), scale(4), scale(1000)], 1.0)
    assert inner_loop.warmup_scale(0, rate=2.0, initial=0.5, warmup_steps=0) == 1


@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_a_scan_in_groups_is_a_scan(group):
    def step(carry, x):
        return jnp.sin(carry * x), carry + x

    xs = jnp.arange(1.0, 8.0)

    def total(scan, start):
        carry, ys = scan(start)
        return carry + jnp.sum(ys**2)

    plain = jax.value_and_grad(lambda c: total(lambda c: jax.lax.scan(step, c, xs), c))(0.4)
    grouped = jax.value_and_grad(lambda c: total(lambda c: scan_in_groups(step, c, xs, group), c))(
        0.4
    )
    np.testing.assert_allclose(grouped, plain, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_mean_over_is_the_mean(steps):
    xs = jnp.arange(2.0 * steps).reshape(steps, 2)
    mean = mean_over(lambda x: {"square": x**2, "sum": jnp.sum(x)}, xs)
    np.testing.assert_allclose(mean["square"], np.mean(np.asarray(xs) ** 2, axis=0))
    np.testing.assert_allclose(mean["sum"], np.mean(np.sum(np.asarray(xs), axis=1)))
