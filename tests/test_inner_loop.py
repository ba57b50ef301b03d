"""Test-time training on losses whose answer is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt.core.scan import mean_over, scan_in_groups
from ttt.model import inner_loop
from ttt.model.inner_loop import InnerRule


def quadratic(fast, carry, chunk):
    """½·a·(w − x)² with a carry that counts and weighs the next loss."""
    weight, target = chunk
    loss = 0.5 * (1 + carry) * weight * jnp.sum((fast["w"] - target) ** 2)
    return loss, (carry + 0.1, fast["w"])


CHUNKS = (jnp.array([1.0, 0.5, 2.0, 1.5, 0.7]), jnp.linspace(-1, 1, 15).reshape(5, 3))


def closed_form(w, rate):
    losses = []
    weights, targets = (np.asarray(part, np.float64) for part in CHUNKS)
    for i, (a, x) in enumerate(zip(weights, targets, strict=True)):
        a = (1 + 0.1 * i) * a
        losses.append(0.5 * a * np.sum((w - x) ** 2))
        w = w - rate * a * (w - x)
    return np.array(losses), w


def test_reading_a_quadratic_gives_the_closed_form():
    start = np.array([0.3, -0.2, 0.5])
    reading = inner_loop.read(
        quadratic, {"w": jnp.array(start)}, jnp.zeros(()), CHUNKS, InnerRule(0.3, 0.0)
    )
    losses, w = closed_form(start, 0.3)
    np.testing.assert_allclose(reading.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(reading.fast["w"], w, rtol=1e-5)
    np.testing.assert_allclose(reading.carry, 0.5, rtol=1e-6)
    np.testing.assert_allclose(reading.aux[0], start)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 9])
def test_derivatives_through_the_steps_are_those_of_the_closed_form(group):
    def total(w, rate):
        rule = InnerRule(rate, 0.0)
        reading = inner_loop.read(quadratic, {"w": w}, jnp.zeros(()), CHUNKS, rule, group=group)
        return jnp.sum(reading.losses)

    start, rate, eps = np.array([0.3, -0.2, 0.5]), 0.3, 1e-6
    by_w, by_rate = jax.grad(total, argnums=(0, 1))(jnp.array(start), rate)
    for i, direction in enumerate(np.eye(3)):
        up, down = (
            closed_form(start + eps * direction, rate),
            closed_form(start - eps * direction, rate),
        )
        np.testing.assert_allclose(by_w[i], (up[0].sum() - down[0].sum()) / (2 * eps), rtol=1e-4)
    up, down = closed_form(start, rate + eps), closed_form(start, rate - eps)
    np.testing.assert_allclose(by_rate, (up[0].sum() - down[0].sum()) / (2 * eps), rtol=1e-4)


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
    fast = {"w": jnp.array([0.3, -0.2, 0.5])}
    reading = inner_loop.read(quadratic, fast, jnp.zeros(()), CHUNKS, InnerRule(0.0, 1.0))
    np.testing.assert_array_equal(reading.fast["w"], fast["w"])


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
