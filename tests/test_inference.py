"""The engine against the training loss, token for token; states as values; sampling; errors."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from builders import MODEL, TRAINING, full_attention, random_tokens, sequence_loss

from ttt.core.batch import from_tokens
from ttt.errors import UserError
from ttt.inference.engine import Engine
from ttt.inference.sampling import Sampling
from ttt.inference.state import join, select
from ttt.model.transformer import MetaModel

T = 4 * MODEL.mini_batch_size
PLAIN = replace(TRAINING, train_mode="pretrain")
KINDS = {
    "e2e": (MODEL, TRAINING),
    "swa": (replace(MODEL, suffix_len=0, prime=False), PLAIN),
    "fa": (full_attention(), PLAIN),
}


@cache
def model_of(kind: str) -> MetaModel:
    return MetaModel(KINDS[kind][0], key=jax.random.key(0))


@cache
def engine_of(kind: str, learn: bool = True) -> Engine:
    return Engine(model_of(kind), KINDS[kind][1], context=T + 1, learn=learn)


@cache
def tokens_of(seed: int = 0) -> np.ndarray:
    return random_tokens(T + 1, seed=seed)


@cache
def training_nll(kind: str, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """−log p of tokens 1 … T as the training loss has them."""
    config, training = KINDS[kind]
    batch = from_tokens(tokens_of(seed), config.bos_token_id)
    score = jax.jit(lambda model: sequence_loss(model, batch, training, scale).token_nll)
    return np.asarray(score(model_of(kind)))


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.all(x == y)), a, b)))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# ---- the oracle --------------------------------------------------------------------------


def test_every_split_into_prompt_and_written_text_gives_the_training_loss_of_each_token(kind):
    engine, tokens = engine_of(kind), tokens_of()
    for cut in range(1, T + 2):
        state, read = engine.read(engine.start(1), [tokens[:cut]])
        state, written = engine.write(state, T + 1 - cut, given=[tokens[cut:]])
        np.testing.assert_array_equal(written.tokens[0], tokens[cut:])
        found = np.concatenate([read[0], written.nll[0]])
        np.testing.assert_allclose(found, training_nll(kind), atol=1e-5, err_msg=f"cut at {cut}")
        assert engine.steps(state)[0] == (4 if kind == "e2e" else 0)


def test_a_prompt_in_pieces_is_the_prompt(kind):
    engine, tokens = engine_of(kind), tokens_of()
    for sizes in ((1, 7, 1, 24), (9, 3, 20, 1), (5, 0, 28)):
        state, found, start = engine.start(1), [], 0
        for size in sizes:
            state, nll = engine.read(state, [tokens[start : start + size]])
            found.append(nll[0])
            start += size
        np.testing.assert_allclose(np.concatenate(found), training_nll(kind), atol=1e-5)


def test_sequences_of_unequal_lengths_do_not_notice_each_other(kind):
    engine = engine_of(kind)
    for cuts, more in (((17, 1), (6, 13)), ((8, 24), (0, 3))):
        prompts = [tokens_of(seed)[:cut] for seed, cut in enumerate(cuts)]
        state, read = engine.read(engine.start(2), prompts)
        starts = [cut + n for cut, n in zip(cuts, more, strict=True)]
        rest = [tokens_of(seed)[cuts[seed] : starts[seed]] for seed in range(2)]
        state, second = engine.read(state, rest)
        last = [tokens_of(seed)[start:] for seed, start in enumerate(starts)]
        state, written = engine.write(state, T + 1 - max(starts), given=last)
        for row in range(2):
            found = np.concatenate([read[row], second[row], written.nll[row]])
            wanted = training_nll(kind, row)[: len(found)]
            np.testing.assert_allclose(found, wanted, atol=1e-5)
            assert len(found) == starts[row] + T - max(starts)


def test_without_learning_the_weights_stand_still_and_plain_attention_is_left():
    engine, tokens = engine_of("e2e", learn=False), tokens_of()
    state, read = engine.read(engine.start(1), [tokens[:13]])
    state, written = engine.write(state, T - 12, given=[tokens[13:]])
    plain = Engine(model_of("e2e"), PLAIN, context=1)
    _, alone = plain.read(plain.start(1), [tokens])
    found = np.concatenate([read[0], written.nll[0]])
    np.testing.assert_allclose(found, training_nll("e2e", scale=0.0), atol=1e-5)
    np.testing.assert_allclose(found, alone[0], atol=1e-5)
    assert np.abs(found - training_nll("e2e")).max() > 1e-2
    assert engine.steps(state)[0] == 0


def test_learning_is_the_step_of_training_bit_for_bit_however_the_tokens_came_in():
    engine, tokens = engine_of("e2e"), tokens_of()
    whole, _ = engine.read(engine.start(1), [tokens])
    pieces, _ = engine.read(engine.start(1), [tokens[:11]])
    pieces, _ = engine.read(pieces, [tokens[11:]])
    assert equal(whole.fast, pieces.fast)
    assert not equal(whole.fast, engine.start(1).fast)


# ---- a state is a value ------------------------------------------------------------------


def test_a_fork_goes_on_from_a_state_that_was_used(kind):
    engine, tokens = engine_of(kind), tokens_of()
    state, _ = engine.read(engine.start(1), [tokens[:19]])
    first = engine.write(state, 13, Sampling(temperature=1.0), seed=1)[1]
    engine.read(state, [tokens[19:]])
    again = engine.write(state, 13, Sampling(temperature=1.0), seed=1)[1]
    np.testing.assert_array_equal(first.tokens[0], again.tokens[0])
    np.testing.assert_array_equal(first.nll[0], again.nll[0])


def test_joined_and_selected_sequences_go_on_as_alone():
    engine = engine_of("e2e")
    alone = [engine.read(engine.start(1), [tokens_of(s)[: 9 + 8 * s]])[0] for s in range(2)]
    both = select(join(alone), [1, 0])
    _, written = engine.write(both, 10)
    for row, which in enumerate((1, 0)):
        one = engine.write(alone[which], 10)[1]
        np.testing.assert_array_equal(written.tokens[row], one.tokens[0])


def test_a_state_of_another_model_is_refused(tmp_path):
    engine = engine_of("e2e")
    state, _ = engine.read(engine.start(1), [tokens_of()[:12]])
    engine.save(tmp_path / "a", state)
    other = Engine(MetaModel(MODEL, key=jax.random.key(1)), TRAINING, context=1)
    still = engine_of("e2e", learn=False)
    for wrong in (other, still):
        with pytest.raises(UserError, match="another model"):
            wrong.load(tmp_path / "a")


def test_saved_and_loaded_it_goes_on_bit_for_bit(kind, tmp_path):
    engine, tokens = engine_of(kind), tokens_of()
    state, _ = engine.read(engine.start(2), [tokens[:19], tokens[:5]])
    assert engine.save(tmp_path / "new" / "state", state) > 0
    loaded = Engine(model_of(kind), KINDS[kind][1], context=T + 1).load(tmp_path / "new" / "state")
    assert equal(loaded, state)
    here, there = (engine.write(s, 12, seed=3)[1] for s in (state, loaded))
    for row in range(2):
        np.testing.assert_array_equal(here.tokens[row], there.tokens[row])
        np.testing.assert_array_equal(here.nll[row], there.nll[row])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state"]
