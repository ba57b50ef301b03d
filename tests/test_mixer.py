"""One contract over all mixers: whole, piece by piece and token by token give the same."""

import itertools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import GROUPED, MODEL, full_attention

from ttt import mixers
from ttt.model.pattern import MAKERS

CONFIGS = {
    f"{name}{suffix}": (name, replace(config, **changes))
    for name, config in (
        ("sliding_attention", MODEL),
        ("full_attention", full_attention()),
    )
    for suffix, changes in (("", {}), (", grouped", GROUPED), (", naive", {"attention": "naive"}))
}
CONTEXT = 40


@pytest.fixture(params=CONFIGS, scope="module")
def mixer(request):
    """With biases that are not zero and gains that are not one, where it has any."""
    name, config = CONFIGS[request.param]
    mixer = MAKERS[name](config, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), mixer
    )


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (32, MODEL.hidden_size))


@eqx.filter_jit
def whole(mixer, x):
    return mixer(x)


@eqx.filter_jit
def fresh(mixer, x):
    return mixer.init_state(CONTEXT, x.dtype)


@eqx.filter_jit
def prefill(mixer, x):
    return mixer.prefill(x, CONTEXT)


@eqx.filter_jit
def step(mixer, state, x):
    return mixer.step(state, x)


@eqx.filter_jit
def step_of_each(mixer, states, x):
    return jax.vmap(mixer.step)(states, x)


@eqx.filter_jit
def open_slots(mixer, state):
    return mixer.open(state, 8)


@eqx.filter_jit
def put(mixer, opened, x, slot):
    return mixer.put(opened, x, slot)


@eqx.filter_jit
def close(mixer, opened, valid):
    return mixer.close(opened, valid)


def read(mixer, state, x, pieces):
    """Outputs and state after consecutive pieces."""
    outputs, start = [], 0
    for size in pieces:
        state, y = step(mixer, state, x[start : start + size])
        outputs.append(y)
        start += size
    return state, jnp.concatenate(outputs)


def go_on(mixer, state, x):
    """What a state is worth: the outputs of the tokens behind it."""
    return step(mixer, state, x)[1]


def test_every_mixer_is_under_the_contract():
    assert {name for name, _ in CONFIGS.values()} == mixers.MIXERS.keys() == MAKERS.keys()


@pytest.mark.parametrize("pieces", [(8, 8, 8, 8), (3, 1, 20, 8), (32,)])
def test_any_pieces_give_the_whole(mixer, x, pieces):
    _, y = read(mixer, fresh(mixer, x), x, pieces)
    np.testing.assert_allclose(y, whole(mixer, x), atol=2e-5)


@pytest.mark.parametrize("length", [8, 16, 24])
def test_prefill_is_the_whole_and_its_state_that_of_pieces(mixer, x, length):
    state, y = prefill(mixer, x[:length])
    np.testing.assert_allclose(y, whole(mixer, x)[:length], atol=2e-5)
    after, _ = read(mixer, fresh(mixer, x), x[:length], [8] * (length // 8))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), state, after)
    behind = x[24:]
    np.testing.assert_allclose(go_on(mixer, state, behind), go_on(mixer, after, behind), atol=2e-5)


@pytest.mark.parametrize("before", [0, 5, 16])
def test_token_by_token_is_the_piece(mixer, x, before):
    state = fresh(mixer, x)
    if before:
        state, _ = step(mixer, state, x[:before])
    piece, behind = x[before : before + 8], x[before + 8 : before + 12]
    after, wanted = step(mixer, state, piece)
    opened = open_slots(mixer, state)
    for slot in range(8):
        opened, y = put(mixer, opened, piece[slot : slot + 1], jnp.int32(slot))
        np.testing.assert_allclose(y[0], wanted[slot], atol=2e-5)
    closed = close(mixer, opened, 8)
    np.testing.assert_allclose(go_on(mixer, closed, behind), go_on(mixer, after, behind), atol=2e-5)


@pytest.mark.parametrize("valid", [0, 3, 8])
def test_only_the_tokens_that_turn_out_valid_count(mixer, x, valid):
    state, _ = step(mixer, fresh(mixer, x), x[:13])
    guessed = jnp.concatenate([x[13 : 13 + valid], jnp.full((8 - valid, x.shape[1]), 9.0)])
    opened, y = put(mixer, open_slots(mixer, state), guessed, jnp.int32(0))
    after, wanted = (
        read(mixer, state, x[13 : 13 + valid], [valid] if valid else [])
        if valid
        else (
            state,
            y[:0],
        )
    )
    np.testing.assert_allclose(y[:valid], wanted, atol=2e-5)
    closed = close(mixer, opened, valid)
    behind = x[20:24]
    np.testing.assert_allclose(go_on(mixer, closed, behind), go_on(mixer, after, behind), atol=2e-5)


def test_a_slot_can_be_filled_again(mixer, x):
    state, _ = step(mixer, fresh(mixer, x), x[:11])
    piece = x[11:19]
    _, wanted = step(mixer, state, piece)
    opened, _ = put(mixer, open_slots(mixer, state), piece.at[3:].set(9.0), jnp.int32(0))
    for start, stop in ((3, 4), (4, 7), (7, 8)):
        opened, y = put(mixer, opened, piece[start:stop], jnp.int32(start))
        np.testing.assert_allclose(y, wanted[start:stop], atol=2e-5)


def test_one_goes_on_twice_from_a_kept_state(mixer, x):
    state, _ = step(mixer, fresh(mixer, x), x[:9])
    kept = jax.tree.map(jnp.copy, state)
    opened, _ = put(mixer, open_slots(mixer, state), x[9:17] + 1, jnp.int32(0))
    close(mixer, opened, 5)
    step(mixer, state, x[9:17] - 1)
    jax.tree.map(np.testing.assert_array_equal, state, kept)
    np.testing.assert_array_equal(go_on(mixer, state, x[9:17]), go_on(mixer, kept, x[9:17]))


def test_neighbours_in_the_batch_change_nothing(mixer, x):
    state, _ = step(mixer, fresh(mixer, x), x[:8])
    alone = step(mixer, state, x[8:16])
    other, _ = step(mixer, fresh(mixer, x), 5 * x[16:24])
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), state, other)
    beside = step_of_each(mixer, states, jnp.stack([x[8:16], 7 * x[24:]]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], atol=2e-5), alone, beside)


def test_no_output_depends_on_a_later_token(mixer, x):
    changed = x.at[19].add(1.0)
    before, after = whole(mixer, x), whole(mixer, changed)
    np.testing.assert_array_equal(before[:19], after[:19])
    assert np.abs(before[19:] - after[19:]).max() > 1e-3


def test_reach_is_what_the_description_says(mixer, x, request):
    name, config = CONFIGS[request.node.callspec.params["mixer"]]
    window = mixers.MIXERS[name].of(config).window
    changed = np.flatnonzero(np.any(whole(mixer, x) != whole(mixer, x.at[4].add(1.0)), axis=1))
    np.testing.assert_array_equal(changed, np.arange(4, 32 if window is None else 4 + window))


def test_weights_and_state_are_those_of_the_description(mixer, x, request):
    name, config = CONFIGS[request.node.callspec.params["mixer"]]
    described = mixers.MIXERS[name].of(config)
    leaves = jax.tree_util.tree_leaves_with_path(mixer)
    shapes = {jax.tree_util.keystr(p, simple=True, separator="."): v.shape for p, v in leaves}
    assert shapes == {name: weight.shape for name, weight in described.weights().items()}
    state = jax.eval_shape(lambda: mixer.init_state(CONTEXT, x.dtype))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == x.dtype)
    assert numbers == described.state_size(CONTEXT)


def test_gradients_are_finite_in_first_and_second_order(mixer, x):
    def loss(mixer, x):
        once = jnp.sum(mixer(x) ** 2)
        if mixer.window is None:  # read in pieces at inference alone
            return once
        state, y = mixer.step(mixer.init_state(CONTEXT, x.dtype), x[:16])
        return once + jnp.sum(y**2) + jnp.sum(mixer.step(state, x[16:])[1] ** 3)

    def slope(mixer, x):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(mixer, x)))

    @jax.jit
    def gradients(mixer, x):
        return jax.grad(loss, (0, 1))(mixer, x), jax.grad(slope, (0, 1))(mixer, x)

    first, second = gradients(mixer, x)
    for gradient in jax.tree.leaves((first, second)):
        assert np.all(np.isfinite(gradient))
    assert all(np.any(g != 0) for g in jax.tree.leaves(first))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [("a", 1), ("aaa", 1), ("ab", 2), ("aba", 2), ("aaaaab", 6), ("aaaaabaa", 6), ("abab", 2)],
)
def test_a_period_is_the_shortest_that_repeats(names, wanted):
    assert mixers.period(names) == wanted
    repeated = itertools.islice(itertools.cycle(names[:wanted]), len(names))
    assert "".join(repeated) == names
