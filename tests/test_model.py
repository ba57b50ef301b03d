"""The network and its losses against the NumPy oracle and finite differences."""

from dataclasses import asdict, replace
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from builders import GROUPED, HYBRID, MODEL, TRAINING, full_attention, random_tokens, sequence_loss

from ttt.core.batch import from_tokens
from ttt.core.tree import count, named_leaves, with_leaves
from ttt.errors import UserError
from ttt.model import loop, published
from ttt.model.inner_loop import InnerRule
from ttt.model.transformer import Learning, MetaModel

PLAIN = replace(TRAINING, train_mode="pretrain")
EXACT = {"compute_dtype": "fp64", "param_dtype": "fp64", "state_dtype": "fp64"}
CASES = {
    "meta": (MODEL, TRAINING),
    "meta, no clipping, warming up": (
        MODEL,
        replace(
            TRAINING,
            optimizer_inner=replace(TRAINING.optimizer_inner, clip_gradient=0.0),
            ilr_init=0.1,
            ilr_warmup_steps=5,
        ),
    ),
    "meta, window below chunk": (replace(MODEL, sliding_window_size=5), TRAINING),
    "meta, one block in all": (replace(MODEL, num_hidden_layers=1, suffix_len=1), TRAINING),
    "meta, no norms, own head": (
        replace(
            MODEL,
            qk_norm=False,
            pre_norm=False,
            post_norm=False,
            tie_word_embeddings=False,
            initializer_range=0.1,
        ),
        TRAINING,
    ),
    "sliding window": (replace(MODEL, prime=False, suffix_len=0), PLAIN),
    "prime MLPs that stand still": (MODEL, PLAIN),
    "full attention": (full_attention(), PLAIN),
    "hybrid": (HYBRID, PLAIN),
    "hybrid of grouped attention": (replace(HYBRID, **GROUPED), PLAIN),
    "meta, grouped attention, norms before alone": (
        replace(MODEL, **GROUPED, post_norm=False, qk_norm=False),
        TRAINING,
    ),
    "full attention in windows of a chunk": (replace(full_attention(), mini_batch_size=8), PLAIN),
}


def make_model(config, seed=0):
    """A model with norm gains away from 1, where a forgotten gain would not show."""

    @jax.jit
    def make():
        model = MetaModel(config, key=jax.random.key(seed))
        noise = jax.random.normal(jax.random.key(seed + 1), (64,))
        leaves = {
            name: leaf
            * (1 + 0.3 * noise[: leaf.shape[-1]])
            .astype(leaf.dtype)
            .reshape((1,) * (leaf.ndim - 1) + (-1,))
            if "norm" in name or "ln_f" in name
            else 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape).astype(leaf.dtype)
            if name.endswith(".bias")  # starts at 0, where a forgotten one would not show
            else leaf
            for name, leaf in named_leaves(model).items()
        }
        return with_leaves(model, leaves)

    return make()


def sequence(model, length=32, seed=0):
    return from_tokens(random_tokens(length + 1, seed=seed, model=model), model.bos_token_id)


@partial(jax.jit, static_argnames="training")
def score(model, batch, training, scale=1.0):
    return sequence_loss(model, batch, training, scale)


@partial(jax.jit, static_argnames="training")
def outer_gradient(model, batch, training):
    return jax.grad(lambda model: sequence_loss(model, batch, training, 1.0).loss)(model)


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_oracles_to_float64(float64, case):
    config, training = CASES[case]
    model = make_model(replace(config, **EXACT))
    tokens = random_tokens(33)
    scale = loop.inner_scale(training, 2)
    got = score(model, from_tokens(tokens, config.bos_token_id), training, scale)
    params = {name: np.asarray(x) for name, x in published.to_published(model).items()}
    losses, nll = oracle.sequence_loss(params, asdict(config), asdict(training), tokens, step=2)
    np.testing.assert_allclose(got.chunk_losses, losses, rtol=1e-9)
    np.testing.assert_allclose(got.token_nll, nll, rtol=1e-9)


@pytest.mark.parametrize(
    "case",
    [
        "meta",
        "meta, window below chunk",
        "meta, no norms, own head",
        "meta, grouped attention, norms before alone",
        "hybrid of grouped attention",
    ],
)
def test_the_outer_gradient_is_that_of_the_oracle_by_finite_differences(float64, case):
    config, training = CASES[case]
    model = make_model(replace(config, **EXACT))
    tokens = random_tokens(33)
    batch = from_tokens(tokens, config.bos_token_id)
    gradient = outer_gradient(model, batch, training)
    params = {name: np.asarray(x) for name, x in published.to_published(model).items()}
    draw = np.random.default_rng(0)
    direction = {name: draw.normal(size=x.shape) for name, x in params.items()}
    slope = oracle.directional_derivative(
        lambda p: oracle.sequence_loss(p, asdict(config), asdict(training), tokens, step=None)[
            0
        ].mean(),
        params,
        direction,
        1e-6,
    )
    got = sum(np.vdot(g, direction[name]) for name, g in published.to_published(gradient).items())
    np.testing.assert_allclose(got, slope, rtol=1e-6)


@pytest.mark.parametrize(
    ("group", "other"),
    [
        (3, {"remat_prefix": "block", "remat_suffix": "dots"}),  # of four chunks: and one behind it
        (2, {"remat_prefix": "dots", "remat_suffix": "block"}),
        (
            2,
            {
                "remat_prefix": "chunk",
                "remat_suffix": "chunk",
                "attention_block": 4,
                "loss_block": 16,
            },
        ),
    ],
)
def test_rematerialisation_changes_no_gradient(group, other):
    def gradient(config, training):
        return outer_gradient(make_model(config), sequence(MODEL), training)

    plain = gradient(MODEL, TRAINING)
    other = gradient(replace(MODEL, **other), replace(TRAINING, inner_remat_freq=group))
    for name, expected in named_leaves(plain).items():
        np.testing.assert_allclose(
            named_leaves(other)[name], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
        )


@cache
def batch_gradient(config, training, form, attention):
    """Loss and gradient of a batch of two, as one vector."""
    model = make_model(replace(config, attention=attention))
    batch = from_tokens(random_tokens(2, 33), config.bos_token_id)
    chosen = replace(training, inner_gradient=form)

    def loss(model):
        return jnp.mean(loop.batch_losses(model, batch, chosen, 0.7).loss)

    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    return value, np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradient)])


@pytest.mark.parametrize(
    ("case", "group"),
    [
        ("meta", 3),  # of four chunks: the one behind the group is a second copy of the program
        ("meta, no clipping, warming up", 2),
        ("meta, window below chunk", 2),
        ("meta, one block in all", 2),
    ],
)
def test_both_forms_of_the_gradient_agree_over_a_batch(case, group):
    config, training = CASES[case]
    training = replace(training, inner_remat_freq=group)
    value, gradient = batch_gradient(config, training, "forward_over_reverse", "blocks")
    twin_value, twin = batch_gradient(config, training, "reverse_over_reverse", "naive")
    np.testing.assert_allclose(value, twin_value, rtol=1e-6)
    assert np.linalg.norm(gradient - twin) < 1e-4 * np.linalg.norm(twin)


def test_in_bf16_the_fast_form_is_as_near_to_float32_as_the_plain_one():
    half = replace(MODEL, compute_dtype="bf16")
    groups, and_rest = (replace(TRAINING, inner_remat_freq=group) for group in (2, 3))
    _, exact = batch_gradient(MODEL, and_rest, "forward_over_reverse", "blocks")
    _, fast = batch_gradient(half, groups, "forward_over_reverse", "blocks")
    _, plain = batch_gradient(half, groups, "reverse_over_reverse", "naive")
    assert np.linalg.norm(fast - exact) < 1.5 * np.linalg.norm(plain - exact)


def test_no_loss_depends_on_a_later_token_at_chunk_borders_and_between():
    model, tokens = make_model(MODEL), random_tokens(33)

    def nll(tokens):
        return score(model, from_tokens(tokens, MODEL.bos_token_id), TRAINING).token_nll

    before = nll(tokens)
    for changed in (7, 8, 9, 12, 16, 31):
        later = tokens.copy()
        later[changed] = (later[changed] + 3) % MODEL.vocab_size
        after = nll(later)
        # Token `changed` is the target of position changed − 1 and the input of position `changed`.
        np.testing.assert_array_equal(before[: changed - 1], after[: changed - 1])
        assert before[changed] != after[changed]


def test_learning_reaches_beyond_the_window_and_rate_zero_does_not():
    config = replace(MODEL, num_hidden_layers=1, suffix_len=1, sliding_window_size=4)
    model, tokens = make_model(config), random_tokens(33)
    later = tokens.copy()
    later[2] = (later[2] + 3) % config.vocab_size

    def difference(scale):
        a, b = (
            score(model, from_tokens(t, config.bos_token_id), TRAINING, scale).token_nll
            for t in (tokens, later)
        )
        return np.abs(a - b)[16:].max()

    assert difference(1.0) > 1e-4
    assert difference(0.0) == 0


def test_rate_zero_is_the_plain_loss_of_the_same_network():
    model, batch = make_model(MODEL), sequence(MODEL)
    np.testing.assert_allclose(
        score(model, batch, TRAINING, 0.0).token_nll,
        score(model, batch, PLAIN).token_nll,
        rtol=1e-4,
    )


@pytest.mark.parametrize("learning", [None, Learning(TRAINING.spec_inner, InnerRule(0.5, 1.0))])
def test_the_loss_of_one_sequence_is_its_row_of_the_batch(learning):
    model, batch = make_model(MODEL), from_tokens(random_tokens(2, 33), MODEL.bos_token_id)
    one = eqx.filter_jit(model.loss_for_sequence)(jax.tree.map(lambda x: x[1], batch), learning)
    both = model.loss(batch) if learning is None else model.loss_while_learning(batch, learning)
    np.testing.assert_allclose(one.chunk_losses, both.chunk_losses[1], rtol=1e-5)
    np.testing.assert_allclose(one.token_nll, both.token_nll[1], rtol=1e-4)


def test_an_empty_chunk_counts_zero_and_its_gradient_is_finite():
    model, tokens = make_model(MODEL), random_tokens(33)
    tokens[9:17] = MODEL.bos_token_id
    batch = from_tokens(tokens, MODEL.bos_token_id)
    got = score(model, batch, TRAINING)
    assert got.chunk_losses[1] == 0
    np.testing.assert_allclose(got.loss, np.sum(got.chunk_losses) / 4, rtol=1e-6)
    gradient = outer_gradient(model, batch, TRAINING)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_bf16_computes_near_float32_and_keeps_its_parameters_in_float32():
    batch = sequence(MODEL)
    wide, half = (make_model(replace(MODEL, compute_dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    assert half.embed(batch.inputs).dtype == jnp.bfloat16
    got, expected = score(half, batch, TRAINING), score(wide, batch, TRAINING)
    assert got.token_nll.dtype == jnp.float32
    np.testing.assert_allclose(got.loss, expected.loss, rtol=0.03)
    assert got.loss != expected.loss


def test_fast_weights_are_the_prime_mlps_of_the_suffix_in_the_state_dtype():
    model = make_model(replace(MODEL, state_dtype="bf16"))
    fast, slow = model.fast_weights(TRAINING.spec_inner)
    names = named_leaves(fast)
    assert len(names) == 3
    assert all(".suffix_blocks.feed_forward_prime.w" in name for name in names)
    assert {leaf.dtype for leaf in names.values()} == {jnp.dtype(jnp.bfloat16)}
    assert count(fast) + count(slow) == count(model)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (("**.feed_forward_primed.**",), "matches no parameter"),
        (("**.feed_forward.**",), "prefix_blocks.feed_forward.w1.weight"),
        (("**",), "wte.weight"),
    ],
)
def test_fast_weights_outside_the_suffix_are_refused(spec, said):
    with pytest.raises(UserError, match=said):
        make_model(MODEL).fast_weights(spec)


@pytest.mark.parametrize(
    ("tied", "spec"),
    [
        (True, ("**.suffix_blocks.feed_forward.w2.**", "**.ln_f.**")),
        (False, ("**.lm_head.**",)),
    ],
)
def test_any_late_parameter_can_be_fast(tied, spec):
    config = replace(MODEL, tie_word_embeddings=tied)
    model, batch = make_model(config), jax.tree.map(lambda x: x[None], sequence(config))
    learned = eqx.filter_jit(model.loss_while_learning)(batch, Learning(spec, InnerRule(0.5, 1.0)))
    learned, plain = learned.chunk_losses[0], model.loss(batch).chunk_losses[0]
    np.testing.assert_allclose(learned[0], plain[0], rtol=1e-5)
    assert np.all(np.abs(learned[1:] - plain[1:]) > 1e-5)


@pytest.mark.parametrize("suffix_len", [0, 1, 3])
def test_published_names_and_back(suffix_len):
    config = replace(MODEL, suffix_len=suffix_len, prime=suffix_len > 0)
    model = make_model(config)
    arrays = published.to_published(model)
    assert arrays["language_model.model.h.blocks.feed_forward.w1.weight"].shape == (3, 16, 24)
    prime = "language_model.model.h.prime_storage.feed_forward_prime.w2.weight"
    assert (arrays[prime].shape == (suffix_len, 24, 16)) if suffix_len else prime not in arrays
    back = published.from_published(jax.eval_shape(lambda: model), arrays)
    jax.tree.map(np.testing.assert_array_equal, back, model)


def test_a_mixed_stack_is_published_in_the_order_of_its_layers():
    model = make_model(HYBRID)
    arrays = published.to_published(model)
    blocks = model.language_model.model.h.prefix_blocks
    layers = [*((turn, i) for turn in range(2) for i in range(3))]
    for name, part in (("wq", "seq_modeling_block.wq"), ("w2", "feed_forward.w2")):
        stored = arrays[f"language_model.model.h.blocks.{part}.weight"]
        for row, (turn, i) in zip(stored, layers, strict=False):
            own = named_leaves(blocks.period[i])[f"{part}.weight"][turn]
            np.testing.assert_array_equal(row, own, err_msg=name)
        np.testing.assert_array_equal(stored[6], named_leaves(blocks.rest[0])[f"{part}.weight"])
    back = published.from_published(jax.eval_shape(lambda: model), arrays)
    jax.tree.map(np.testing.assert_array_equal, back, model)


def test_a_plain_parent_of_the_same_shapes_fits_a_mixed_stack():
    plain = make_model(replace(HYBRID, layer_types=(), seq_modeling_block="SWA"))
    arrays = published.to_published(plain)
    like = jax.eval_shape(lambda: make_model(HYBRID))
    again = published.to_published(published.from_published(like, arrays))
    assert arrays.keys() == again.keys()
    jax.tree.map(np.testing.assert_array_equal, again, arrays)


def test_blocks_of_models_with_and_without_suffix_exchange_by_name():
    meta = make_model(MODEL)
    plain_config = replace(MODEL, suffix_len=0, prime=False)
    plain = MetaModel(plain_config, key=jax.random.key(9))
    arrays = published.to_published(meta)
    assert set(published.to_published(plain)) < set(arrays)
    taken = published.from_published(plain, arrays)
    wq = named_leaves(taken)["language_model.model.h.prefix_blocks.seq_modeling_block.wq.weight"]
    suffix = meta.language_model.model.h.suffix_blocks
    np.testing.assert_array_equal(wq[1:], suffix.seq_modeling_block.wq.weight)
