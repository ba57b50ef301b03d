"""Array functions against their naive twins and closed forms, in values and derivatives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt.ops import cross_entropy, dot_attention
from ttt.ops.rotary import rotate


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_rotation_is_multiplication_by_a_complex_unit():
    x, positions = draw(2, 5, 8), jnp.array([0, 1, 7, 100, 4000])
    pairs = np.asarray(x, np.float64).reshape(2, 5, 4, 2)
    angle = np.asarray(positions)[None, :, None] * 500.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(2, 5, 8)
    np.testing.assert_allclose(rotate(x, positions, 500.0), expected, atol=2e-3)
    np.testing.assert_allclose(rotate(x[:, :3], positions[:3], 500.0), expected[:, :3], atol=5e-6)


def test_scores_of_rotated_vectors_depend_on_distance_alone():
    q, k = draw(1, 1, 8), draw(1, 1, 8, seed=1)

    def score(at_q, at_k):
        return jnp.vdot(rotate(q, jnp.array([at_q]), 1e4), rotate(k, jnp.array([at_k]), 1e4))

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.parametrize(
    ("length", "past", "window", "block"),
    [
        (24, 8, 8, 8),
        (24, 5, 5, 8),
        (24, 40, 40, 8),
        (7, 9, 9, 8),
        (12, 3, 3, 12),
        (16, 0, None, 8),
        (12, 6, None, 12),
    ],
)
@pytest.mark.parametrize("first", [0, 2])
def test_attention_in_blocks_is_masked_attention_in_values_and_all_derivatives(
    float64, length, past, window, block, first
):
    q, k, v = (draw(2, length + extra, 4, seed=seed) for seed, extra in enumerate((0, past, past)))
    first = min(first, past)
    mask = dot_attention.window_mask(length, past, window, first)

    def derivatives(attend):
        def loss(qkv):
            return jnp.sum(jnp.sin(3 * attend(*qkv)))

        def slope(qkv):
            return sum(jnp.sum(g**3) for g in jax.grad(loss)(qkv))

        def every(qkv, direction):
            reverse, forward_over_reverse = jax.jvp(jax.grad(loss), (qkv,), (direction,))
            return attend(*qkv), reverse, forward_over_reverse, jax.grad(slope)(qkv)

        return jax.jit(every)((q, k, v), (k[:, :length], v, k))

    naive = derivatives(lambda q, k, v: dot_attention.attend_naive(q, k, v, mask))
    blocks = derivatives(
        lambda q, k, v: dot_attention.attend(q, k, v, first=first, window=window, block=block)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), blocks, naive)


def test_window_of_one_returns_the_values():
    q, k, v = (draw(2, 8 + past, 4, seed=seed) for seed, past in enumerate((0, 1, 1)))
    y = dot_attention.attend(q, k, v, first=0, window=1, block=4)
    np.testing.assert_allclose(y, v[:, 1:], rtol=1e-6)


def test_no_array_of_all_pairs_is_made():
    q = draw(1, 96, 4)
    k = jnp.pad(q, ((0, 0), (16, 0), (0, 0)))

    def gradient(q, k):
        attended = dot_attention.attend(q, k, k, first=16, window=16, block=8)
        return jnp.sum(attended**2)

    compiled = jax.jit(jax.grad(gradient, (0, 1))).lower(q, k).compile().as_text()
    assert "24,8]" in compiled
    assert not any(f"{a},{b}]" in compiled for a, b in [(96, 96), (96, 112), (112, 96)])


def nll_inputs():
    return draw(6, 4), draw(9, 4, seed=1), jnp.array([0, 8, 3, 3, 1, 5], jnp.int32)


def test_token_nll_is_minus_the_log_softmax():
    hidden, table, targets = nll_inputs()
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(p[np.arange(6), targets])
    got = cross_entropy.token_nll_naive(hidden, table, targets)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("block", [2, 3, 4, 8, 9, 100])
def test_token_nll_in_blocks_is_naive_in_value_and_all_derivatives(float64, block):
    hidden, table, targets = nll_inputs()
    inputs, direction = (hidden, table), (draw(6, 4, seed=2), draw(9, 4, seed=3))

    def derivatives(nll):
        def loss(inputs):
            return jnp.sum(jnp.sin(nll(*inputs, targets)))

        def slope(inputs):
            return sum(jnp.sum(g**3) for g in jax.grad(loss)(inputs))

        def every(inputs, direction):
            reverse, forward_over_reverse = jax.jvp(jax.grad(loss), (inputs,), (direction,))
            return nll(*inputs, targets), reverse, forward_over_reverse, jax.grad(slope)(inputs)

        return jax.jit(every)(inputs, direction)

    blocks = derivatives(lambda *inputs: cross_entropy.token_nll(*inputs, block=block))
    naive = derivatives(cross_entropy.token_nll_naive)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), blocks, naive
    )


@pytest.mark.parametrize(("block", "tokens"), [(0, 1), (4, 1), (0, 2), (4, 2)])
def test_sequences_are_scored_in_pieces(float64, block, tokens, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_TOKENS", tokens)
    hidden, table, targets = nll_inputs()
    hidden, targets = hidden.reshape(2, 3, -1), targets.reshape(2, 3)

    def of(nll):
        return jax.value_and_grad(lambda h, w: jnp.sum(nll(h, w, targets) ** 2), argnums=(0, 1))(
            hidden, table
        )

    whole = of(jax.vmap(cross_entropy.token_nll_naive, in_axes=(0, None, 0)))
    pieces = of(lambda *inputs: cross_entropy.whole_nll(*inputs, block=block))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), pieces, whole)


def test_a_sequence_of_odd_length_is_scored_in_as_few_pieces_as_an_even_one():
    table = jnp.zeros((8, 4))

    def pieces(length):
        inputs = (jnp.zeros((2, length, 4)), table, jnp.zeros((2, length), jnp.int32))
        text = str(jax.make_jaxpr(cross_entropy.whole_nll)(*inputs))
        return [int(count) for count in re.findall(r"length=(\d+)", text)]

    assert pieces(2047) == pieces(2048) == [2]
    assert pieces(4097) == [5]


def test_sequences_share_one_gradient_of_the_table():
    hidden, table, targets = draw(3, 8, 4), draw(96, 4), jnp.zeros((3, 8), jnp.int32)

    def gradient(table):
        return jax.grad(lambda w: jnp.sum(cross_entropy.batch_nll(hidden, w, targets, block=24)))(
            table
        )

    compiled = jax.jit(gradient).lower(table).compile().as_text()
    assert "4,24,4]" in compiled
    assert "3,24,4]" not in compiled


def test_no_array_of_tokens_by_vocabulary_is_made_in_blocks():
    hidden, table, targets = draw(32, 4), draw(96, 4), jnp.zeros(32, jnp.int32)

    def gradient(hidden, table):
        return jax.grad(
            lambda h, w: jnp.sum(cross_entropy.token_nll(h, w, targets, block=24)), (0, 1)
        )(hidden, table)

    compiled = jax.jit(gradient).lower(hidden, table).compile().as_text()
    assert "32,24]" in compiled
    assert "32,96]" not in compiled


def test_masked_mean_counts_only_valid_positions_and_is_zero_without_any():
    values = jnp.array([1.0, 2.0, 6.0])
    assert cross_entropy.masked_mean(values, jnp.array([True, False, True])) == 3.5
    assert cross_entropy.masked_mean(values, jnp.zeros(3, bool)) == 0
    gradient = jax.grad(cross_entropy.masked_mean)(values, jnp.zeros(3, bool))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ("slots", "start", "block"), [(24, 0, 8), (24, 13, 8), (21, 14, 8), (9, 2, 9)]
)
def test_attention_to_a_cache_that_fills_is_masked_attention(slots, start, block):
    q, k, v = draw(2, 7, 4), draw(2, slots, 4, seed=1), draw(2, slots, 4, seed=2)
    own = start + jnp.arange(7)
    mask = jnp.arange(slots)[None] <= own[:, None]
    wanted = dot_attention.attend_naive(q, k, v, mask)
    found = jax.jit(lambda start: dot_attention.attend_growing(q, k, v, start=start, block=block))(
        jnp.int32(start)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)
