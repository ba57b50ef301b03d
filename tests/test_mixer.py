"""One contract over all mixers: piece by piece gives what the whole gives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import MODEL, full_attention

from ttt.model.pattern import make_mixer

MIXERS = {"SWA": MODEL, "self_attention": full_attention()}


@pytest.fixture(params=MIXERS)
def mixer(request):
    return make_mixer(MIXERS[request.param], jax.random.key(0))


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (32, MODEL.hidden_size))


@pytest.mark.parametrize("pieces", [(8, 8, 8, 8), (3, 1, 20, 8), (32,)])
def test_steps_over_pieces_give_the_whole(mixer, x, pieces):
    state, outputs, start = mixer.init_state(len(x), x.dtype), [], 0
    for size in pieces:
        state, y = eqx.filter_jit(mixer.step)(state, x[start : start + size])
        outputs.append(y)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs), mixer(x), atol=1e-5)


def test_no_output_depends_on_a_later_token(mixer, x):
    changed = x.at[19].add(1.0)
    before, after = mixer(x), mixer(changed)
    np.testing.assert_array_equal(before[:19], after[:19])
    assert np.abs(before[19:] - after[19:]).max() > 1e-3


def test_sliding_window_forgets_what_full_attention_remembers(x):
    changed = x.at[4].add(1.0)
    reach = {
        name: np.flatnonzero(np.any(mixer(x) != mixer(changed), axis=1))
        for name, config in MIXERS.items()
        for mixer in [make_mixer(config, jax.random.key(0))]
    }
    np.testing.assert_array_equal(reach["SWA"], np.arange(4, 4 + MODEL.sliding_window_size))
    np.testing.assert_array_equal(reach["self_attention"], np.arange(4, 32))


@pytest.mark.parametrize("read", [8, 16])
def test_tokens_put_into_a_room_give_the_piece(mixer, x, read):
    state, _ = mixer.step(mixer.init_state(len(x), x.dtype), x[:read])
    piece = x[read : read + 8]
    after, wanted = mixer.step(state, piece)
    wrong = piece.at[3:].set(9.0)
    put = eqx.filter_jit(mixer.put)
    for opened, first in ((mixer.room(state, 8), 0), (mixer.open(state, wrong)[0], 3)):
        for place in range(first, 8):
            opened, y = put(opened, piece[place : place + 1], jnp.int32(place))
            np.testing.assert_allclose(y[0], wanted[place], atol=1e-5)
        closed, kept = mixer.close(opened, 8), mixer.close(opened, 0)
        for found, meant in ((closed, after), (kept, state)):
            filled = int(meant.seen) if mixer.window is None else mixer.window
            assert int(found.seen) == int(meant.seen)
            np.testing.assert_allclose(found.keys[:, :filled], meant.keys[:, :filled], atol=1e-5)
            np.testing.assert_allclose(
                found.values[:, :filled], meant.values[:, :filled], atol=1e-5
            )
