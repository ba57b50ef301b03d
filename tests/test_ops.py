"""Array functions against their naive twins and closed forms, in values and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt.ops import cross_entropy, dot_attention
from ttt.ops.rotary import rotate


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_rotation_is_multiplication_by_a_complex_unit():
    x, positions = draw(5, 2, 8), jnp.array([0, 1, 7, 100, 4000])
    pairs = np.asarray(x, np.float64).reshape(5, 2, 4, 2)
    angle = np.asarray(positions)[:, None, None] * 500.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(5, 2, 8)
    np.testing.assert_allclose(rotate(x, positions, 500.0), expected, atol=2e-3)
    np.testing.assert_allclose(rotate(x[:3], positions[:3], 500.0), expected[:3], atol=5e-6)


def test_scores_of_rotated_vectors_depend_on_distance_alone():
    q, k = draw(1, 1, 8), draw(1, 1, 8, seed=1)

    def score(at_q, at_k):
        return jnp.vdot(rotate(q, jnp.array([at_q]), 1e4), rotate(k, jnp.array([at_k]), 1e4))

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.parametrize(
    ("length", "window", "block"), [(24, 5, 8), (24, 8, 8), (24, 40, 8), (7, 9, 8), (12, 3, 12)]
)
def test_banded_attention_is_masked_attention_in_values_and_two_derivatives(
    float64, length, window, block
):
    q, k, v = (draw(length, 2, 4, seed=seed) for seed in range(3))

    def derivatives(attend):
        def loss(qkv):
            return jnp.sum(jnp.sin(3 * attend(*qkv)))

        def slope(qkv):
            return sum(jnp.sum(g**3) for g in jax.grad(loss)(qkv))

        return jax.jit(lambda qkv: (attend(*qkv), jax.grad(loss)(qkv), jax.grad(slope)(qkv)))

    naive = derivatives(lambda q, k, v: dot_attention.sliding_window_naive(q, k, v, window))
    banded = derivatives(lambda q, k, v: dot_attention.sliding_window(q, k, v, window, block))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
        banded((q, k, v)),
        naive((q, k, v)),
    )


def test_window_of_one_returns_the_values():
    q, k, v = (draw(8, 2, 4, seed=seed) for seed in range(3))
    np.testing.assert_allclose(dot_attention.sliding_window(q, k, v, 1, 4), v, rtol=1e-6)


def test_token_nll_is_minus_the_log_softmax():
    hidden, head, targets = draw(6, 4), draw(4, 9, seed=1), jnp.array([0, 8, 3, 3, 1, 5])
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(p[np.arange(6), targets])
    np.testing.assert_allclose(cross_entropy.token_nll(hidden, head, targets), expected, rtol=1e-5)


def test_token_nll_in_blocks_equals_the_whole_in_value_and_gradient():
    hidden, head, targets = draw(6, 4), draw(4, 9, seed=1), jnp.array([0, 8, 3, 3, 1, 5])

    def of(nll):
        return jax.value_and_grad(lambda h, w: jnp.sum(nll(h, w) ** 2), argnums=(0, 1))(
            hidden, head
        )

    whole = of(lambda h, w: cross_entropy.token_nll(h, w, targets))
    blocks = of(lambda h, w: cross_entropy.token_nll_in_blocks(h, w, targets, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), blocks, whole)


def test_masked_mean_counts_only_valid_positions_and_is_zero_without_any():
    values = jnp.array([1.0, 2.0, 6.0])
    assert cross_entropy.masked_mean(values, jnp.array([True, False, True])) == 3.5
    assert cross_entropy.masked_mean(values, jnp.zeros(3, bool)) == 0
    gradient = jax.grad(cross_entropy.masked_mean)(values, jnp.zeros(3, bool))
    np.testing.assert_array_equal(gradient, 0)
