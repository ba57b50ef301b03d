"""The engine against the training loss, token for token; states as values; sampling; errors."""

import re
from dataclasses import replace
from functools import cache, partial
from unittest.mock import patch

import jax
import numpy as np
import pytest
from builders import HYBRID, MODEL, TRAINING, full_attention, random_tokens, sequence_loss

from ttt.core.batch import from_tokens
from ttt.errors import UserError
from ttt.inference import engine as engine_module
from ttt.inference.engine import Engine
from ttt.inference.sampling import Sampling, choose
from ttt.inference.state import join, select, size_in_bytes
from ttt.model.transformer import MetaModel
from ttt.plan import memory

T = 4 * MODEL.mini_batch_size
PLAIN = replace(TRAINING, train_mode="pretrain")
KINDS = {
    "e2e": (MODEL, TRAINING),
    "swa": (replace(MODEL, suffix_len=0, prime=False), PLAIN),
    "fa": (full_attention(), PLAIN),
    "hybrid": (replace(HYBRID, num_hidden_layers=4), PLAIN),
}


@cache
def model_of(kind: str) -> MetaModel:
    return MetaModel(KINDS[kind][0], key=jax.random.key(0))


def new_engine(kind: str, learn: bool = True) -> Engine:
    # Full attention reads in chunks of its own, which are to be as small as the others here.
    with patch.object(engine_module, "CHUNK_OF_FULL_ATTENTION", MODEL.mini_batch_size):
        return Engine(model_of(kind), KINDS[kind][1], context=T + 1, learn=learn)


engine_of = cache(new_engine)


@cache
def tokens_of(seed: int = 0) -> np.ndarray:
    return random_tokens(T + 1, seed=seed)


@cache
def training_nll(kind: str, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """−log p of tokens 1 … T as the training loss has them."""
    config, training = KINDS[kind]
    batch = from_tokens(tokens_of(seed), config.bos_token_id)
    return np.asarray(score(model_of(kind), batch, training, scale).token_nll)


@partial(jax.jit, static_argnames="training")
def score(model, batch, training, scale):
    return sequence_loss(model, batch, training, scale)


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


@pytest.mark.parametrize("kind", ["fa", "hybrid"])
def test_a_state_that_grows_is_filled_by_one_stretch(kind, monkeypatch):
    engine, tokens = engine_of(kind), tokens_of()
    pieces = engine_of(kind)._read  # compiled before: the stretch leaves nothing to it
    monkeypatch.setattr(engine, "_read", lambda *arguments: pytest.fail("read chunk by chunk"))
    state, (nll,) = engine.read(engine.start(1), [tokens])
    monkeypatch.setattr(engine, "_read", pieces)
    np.testing.assert_allclose(nll, training_nll(kind), atol=1e-5)
    monkeypatch.setattr(engine, "_stretch_of", lambda *arguments: 0)
    by_chunks, (again,) = engine.read(engine.start(1), [tokens])
    np.testing.assert_allclose(nll, again, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, by_chunks)


def test_the_engine_holds_one_copy_of_the_weights_beside_the_callers():
    model = jax.tree.map(lambda leaf: leaf + 0, model_of("e2e"))
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    engine = Engine(model, TRAINING, context=T + 1)
    state, _ = engine.read(engine.start(1), [tokens_of()[:20]])
    state, _ = engine.write(state, 16)
    held = sum(leaf.nbytes for leaf in jax.live_arrays()) - before
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert held < 1.25 * weights + size_in_bytes(state)
    jax.tree.map(np.testing.assert_array_equal, engine.learned(engine.start(1)), model)


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
    loaded = new_engine(kind).load(tmp_path / "new" / "state")
    assert equal(loaded, state)
    here, there = (engine.write(s, 12, seed=3)[1] for s in (state, loaded))
    for row in range(2):
        np.testing.assert_array_equal(here.tokens[row], there.tokens[row])
        np.testing.assert_array_equal(here.nll[row], there.nll[row])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state"]


# ---- choosing tokens ---------------------------------------------------------------------


def plain_probabilities(logits, occurred, sampling: Sampling) -> np.ndarray:
    """The rules one by one, in NumPy, as Hugging Face's processors have them."""
    logits = logits.astype(np.float64).copy()
    for token in np.flatnonzero(occurred):
        factor = sampling.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    logits /= sampling.temperature
    if sampling.top_k:
        logits[np.argsort(logits)[: -sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        order = np.argsort(logits)  # ascending; the likeliest stays
        p = np.exp(logits[order] - logits.max())
        drop = np.cumsum(p / p.sum()) <= 1 - sampling.top_p
        drop[-1] = False
        logits[order[drop]] = -np.inf
    p = np.exp(logits - logits.max())
    return p / p.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=3),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=2.0, top_k=5, top_p=0.8, repetition_penalty=1.7),
        Sampling(temperature=1.0, top_k=100, top_p=1e-6),
    ],
    ids=str,
)
def test_draws_follow_the_rules_of_hugging_face(sampling):
    rng = np.random.default_rng(0)
    logits = (2 * rng.standard_normal(10)).astype(np.float32)
    occurred = rng.random(10) < 0.5
    draws = 4000
    keys = jax.random.split(jax.random.key(0), draws)
    draw = jax.jit(
        jax.vmap(lambda key: choose(logits, occurred, key, sampling.values(), sampling.kind()))
    )
    wanted = plain_probabilities(logits, occurred, sampling)
    found = np.bincount(np.asarray(draw(keys)), minlength=10) / draws
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(wanted > 1e-4))
    np.testing.assert_allclose(found, wanted, atol=4 * np.sqrt(0.25 / draws))


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits = np.array([1.0, 2.0, -0.5, -0.4], np.float32)
    key = jax.random.key(0)

    def pick(sampling, occurred):
        return int(choose(logits, np.array(occurred), key, sampling.values(), sampling.kind()))

    assert pick(Sampling(), [True] * 4) == 1
    assert pick(Sampling(repetition_penalty=3.0), [False, True, False, False]) == 0
    # A negative logit is multiplied: the token that occurred falls behind.
    only_negative = Sampling(repetition_penalty=9.0)
    assert pick(only_negative, [True, True, False, False]) == 1


def test_greedy_text_is_the_argmax_of_what_reading_predicts():
    engine = engine_of("e2e")
    state, _ = engine.read(engine.start(1), [tokens_of()[:5]])
    _, written = engine.write(state, 14)
    again = engine.read(engine.start(1), [tokens_of()[:5]])[0]
    for token, nll in zip(written.tokens[0], written.nll[0], strict=True):
        assert token == np.argmax(again.logits[0])
        again, read = engine.read(again, [np.array([token])])
        np.testing.assert_allclose(read[0], [nll], atol=1e-5)


def test_a_seed_means_the_same_text_whatever_the_neighbours_and_in_pieces():
    engine, hot = engine_of("e2e"), Sampling(temperature=1.0)
    state, _ = engine.read(engine.start(2), [tokens_of()[:5], tokens_of(1)[:12]])
    alone = engine.write(select(state, [0]), 20, hot, seed=7)[1].tokens[0]
    both = engine.write(state, 20, hot, seed=7)[1].tokens
    np.testing.assert_array_equal(alone, both[0])
    first, head = engine.write(state, 9, hot, seed=7)
    tail = engine.write(first, 11, hot, seed=7)[1]
    np.testing.assert_array_equal(np.concatenate([head.tokens[1], tail.tokens[1]]), both[1])
    other = engine.write(state, 20, hot, seed=8)[1].tokens
    assert not np.array_equal(other[0], both[0])
    twins = engine.write(select(state, [0, 0]), 20, hot, seed=7)[1].tokens
    assert not np.array_equal(twins[0], twins[1])


def test_a_stop_token_ends_its_sequence_and_no_other():
    engine, hot = engine_of("e2e"), Sampling(temperature=1.0)
    state, _ = engine.read(engine.start(2), [tokens_of()[:5], tokens_of(1)[:12]])
    free = engine.write(state, 20, hot, seed=7)[1]
    stop = next(int(t) for t in free.tokens[0] if t not in free.tokens[1])
    end = int(np.flatnonzero(free.tokens[0] == stop)[0]) + 1
    heard = [[], []]

    def told(new):
        for row, ids in enumerate(new):
            heard[row] += ids.tolist()

    after, written = engine.write(state, 20, hot, seed=7, stop=[stop], on_progress=told)
    np.testing.assert_array_equal(written.tokens[0], free.tokens[0][:end])
    np.testing.assert_allclose(written.nll[0], free.nll[0][:end], atol=1e-5)
    np.testing.assert_array_equal(written.tokens[1], free.tokens[1])
    assert heard == [ids.tolist() for ids in written.tokens]
    # The state stands behind the stop token, and goes on from there.
    wanted, _ = engine.read(state, [written.tokens[0], written.tokens[1]])
    np.testing.assert_array_equal(after.seen, wanted.seen)
    np.testing.assert_allclose(after.logits, wanted.logits, atol=1e-4)


# ---- memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["e2e", "swa"])
def test_reading_and_writing_need_the_same_memory_at_any_context(kind):
    sizes = {
        context: size_in_bytes(jax.eval_shape(lambda e=e: e.start(1)))
        for context in (T, 1000 * T)
        for e in [Engine(model_of(kind), KINDS[kind][1], context=context)]
    }
    assert len(set(sizes.values())) == 1
    engine = engine_of(kind)
    far = engine.pretend(1, 1000 * T)
    assert size_in_bytes(far) == sizes[T]
    assert engine.steps(far)[0] == (1000 * T // 8 - 1 if kind == "e2e" else 0)


def test_a_token_copies_no_cache():
    """The compiled loop over single tokens holds no copy as large as a cache."""
    engine = engine_of("swa")
    writing = engine.begin(engine.pretend(1, 1))
    text = engine.lower_write(writing).compile().as_text()
    computations = {
        part.split()[0].removeprefix("%"): part
        for part in re.split(r"\n(?=%|ENTRY)", text)
        if part.startswith("%")
    }
    bodies = [computations[name] for name in set(re.findall(r"body=%([\w.\-]+)", text))]
    cache = f",{MODEL.sliding_window_size + MODEL.mini_batch_size},"
    (tokens,) = [body for body in bodies if cache in body and "conditional(" not in body]
    lines = [line for line in tokens.splitlines() if cache in line.split("(")[0]]
    assert lines
    assert [line for line in lines if " copy(" in line] == []


# ---- mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([[]], "prompt 0 is empty"),
        ([[3, MODEL.vocab_size]], f"has the id {MODEL.vocab_size}"),
        ([[-1]], "has the id -1"),
        ([[1], [2]], "2 prompts for a state of 1"),
        ([[3] * (T + 2)], f"context={T + 1}"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(prompts, says):
    engine = engine_of("fa")
    with pytest.raises(UserError, match=says):
        engine.read(engine.start(1), [np.array(p, int) for p in prompts])


def test_what_cannot_be_written_is_refused(tmp_path):
    engine = engine_of("fa")
    with pytest.raises(UserError, match="read a prompt first"):
        engine.write(engine.start(1), 3)
    state, _ = engine.read(engine.start(1), [np.array([3, 4])])
    with pytest.raises(UserError, match=f"{T + 2} tokens"):
        engine.write(state, T)
    with pytest.raises(UserError, match="stop tokens has the id 99"):
        engine.write(state, 3, stop=[99])
    for wrong in (
        Sampling(temperature=-1),
        Sampling(top_k=-1),
        Sampling(top_p=0),
        Sampling(repetition_penalty=0),
    ):
        with pytest.raises(UserError, match="change it"):
            engine.write(state, 3, wrong)
    with pytest.raises(UserError, match="no saved state"):
        engine.load(tmp_path / "none")
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(UserError, match="not a saved state"):
        engine.load(tmp_path / "junk")


def test_a_failed_save_leaves_the_older_state_whole(tmp_path, monkeypatch):
    engine = engine_of("swa")
    state, _ = engine.read(engine.start(1), [np.array([3, 4])])
    engine.save(tmp_path / "state", state)
    before = (tmp_path / "state").read_bytes()

    def broken(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(UserError, match="disk full"):
        engine.save(tmp_path / "state", state)
    assert (tmp_path / "state").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_bfloat16_caches_are_saved_and_loaded_bit_for_bit(tmp_path):
    half = replace(KINDS["swa"][0], compute_dtype="bf16")
    engine = Engine(MetaModel(half, key=jax.random.key(0)), PLAIN, context=T)
    state = engine.pretend(1, 9)
    state = jax.tree.map(lambda x: x + 3 if x.dtype == jax.numpy.bfloat16 else x, state)
    engine.save(tmp_path / "state", state)
    loaded = engine.load(tmp_path / "state")
    assert equal(loaded, state)
    assert loaded.prefix.rest[0].keys.dtype == jax.numpy.bfloat16


def test_a_large_model_reads_the_same_in_less_memory():
    bounds = {"_KEPT_WHILE_READING": 0, "_SHARE_WHILE_READING": 0, "_LOGITS_WHILE_READING": 512}
    with patch.multiple(memory, **bounds):
        engine = new_engine("e2e")
        small = memory.for_reading(MODEL, learns=True)
    assert (small.remat_suffix, small.loss_block) == ("block", 16)
    assert memory.for_reading(MODEL, learns=True).remat_suffix == "none"
    _, found = engine.read(engine.start(1), [tokens_of()])
    np.testing.assert_allclose(found[0], training_nll("e2e"), atol=1e-5)
    larger = replace(MODEL, mini_batch_size=1024, vocab_size=50_000, hidden_size=576)
    assert memory.for_reading(larger, learns=False).loss_block == 8192
    assert memory.for_reading(larger, learns=False).attention_block == 512
    assert memory.for_reading(larger, learns=True).remat_suffix == "dots"
