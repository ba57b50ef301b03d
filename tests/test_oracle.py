"""The oracle against the golden values, finite differences, optax and what must hold of itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from golden import cases, folder, like_expected, read

CASES = cases(folder())
MODEL = {
    "vocab_size": 11,
    "bos_token_id": 1,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mini_batch_size": 4,
    "sliding_window_size": 6,
    "seq_modeling_block": "SWA",
    "suffix_len": 2,
    "prime": True,
    "rope_theta": 100.0,
    "rms_norm_eps": 1e-6,
    "qk_norm": True,
    "pre_norm": True,
    "post_norm": True,
    "tie_word_embeddings": True,
}
META = {
    "train_mode": "meta",
    "optimizer_inner": {"lr": 1.0, "clip_gradient": 0.0},
    "ilr_init": 0.25,
    "ilr_warmup_steps": 0,
}
PRETRAIN = {"train_mode": "pretrain"}
OUTER = {
    "lr": 0.03,
    "init_lr": 0.001,
    "end_lr": 0.002,
    "lr_warmup_steps": 3,
    "lr_decay_steps": 9,
    "b1": 0.9,
    "b2": 0.95,
    "weight_decay": 0.1,
    "emb_wd": False,
    "clip_gradient": 1.0,
}
LAST = MODEL["num_hidden_layers"] - 1


def random_params(model):
    """Every parameter that `model` can have, norm gains around 1."""
    width, inner = model["hidden_size"], model["intermediate_size"]
    head_dim = width // model["num_attention_heads"]
    linear = {"w1": (width, inner), "w2": (inner, width), "w3": (width, inner)}
    block = {f"seq_modeling_block.w{name}": (width, width) for name in "qkvo"}
    block |= {f"seq_modeling_block.{name}_norm": (head_dim,) for name in "qk"}
    block |= {f"feed_forward.{name}": shape for name, shape in linear.items()}
    block |= {f"{name}_norm": (width,) for name in ("seq", "seq_post", "ffn", "ffn_post")}
    prime = {f"feed_forward_prime.{name}": shape for name, shape in linear.items()}
    prime |= {f"{name}_norm": (width,) for name in ("ffn_prime", "ffn_prime_post")}
    layers, suffix = model["num_hidden_layers"], model["suffix_len"]
    shapes = {
        oracle.EMBEDDING: (model["vocab_size"], width),
        oracle.FINAL_NORM: (width,),
        oracle.HEAD: (width, model["vocab_size"]),
        **{f"{oracle.BLOCKS}{name}.weight": (layers, *shape) for name, shape in block.items()},
        **{f"{oracle.PRIMES}{name}.weight": (suffix, *shape) for name, shape in prime.items()},
    }
    rng = np.random.default_rng(0)
    return {
        name: ("norm" in name or "ln_f" in name) + 0.3 * rng.normal(size=shape)
        for name, shape in shapes.items()
    }


def random_tokens(length=16):
    """Token ids [length + 1] without a `bos_token_id`."""
    return np.random.default_rng(1).integers(2, MODEL["vocab_size"], length + 1)


def token_nll(model, training, tokens, **options):
    """-log p of every target under the random parameters."""
    return oracle.sequence_loss(random_params(model), model, training, tokens, **options)[1]


def relative_error(actual, expected):
    """‖actual - expected‖ / ‖expected‖."""
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def golden_case(name):
    """Arrays in float64, the model and the training of one case."""
    about, arrays = read(folder(), name)
    arrays = {key: a.astype(float) if a.dtype.kind == "f" else a for key, a in arrays.items()}
    return arrays, about["base_model"] | about["model"], about["base_training"] | about["training"]


def below(arrays, prefix):
    """Take what stands below a prefix, by the rest of the name."""
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


# Golden values


@pytest.mark.parametrize("case", CASES)
def test_chunk_losses_and_token_nll_are_golden(case):
    arrays, model, training = golden_case(case)
    losses, nll = oracle.sequence_loss(
        below(arrays, "param."), model, training, arrays["tokens"][0, 0]
    )
    bf16 = model["compute_dtype"] == "bf16"
    assert relative_error(losses, arrays["sequence.loss"]) < (2e-4 if bf16 else 1e-6)
    assert relative_error(nll, arrays["sequence.token_nll_loss"]) < (5e-3 if bf16 else 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_batch_losses_of_the_first_two_outer_steps_are_golden(case):
    arrays, model, training = golden_case(case)
    outer = training["optimizer_outer"]
    assert oracle.learning_rate(outer, 0) == 0, (
        "step 1 starts from the initial parameters only then"
    )
    params = below(arrays, "param.")
    for step in (0, 1):
        losses = [
            oracle.sequence_loss(params, model, training, tokens, step=step)[0].mean()
            for tokens in arrays["tokens"][step]
        ]
        tolerance = 2e-3 if model["compute_dtype"] == "bf16" else 1e-6
        assert np.mean(losses) == pytest.approx(arrays["train.loss"][step], rel=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_golden_outer_gradient_is_the_slope_along_random_directions(case):
    arrays, model, training = golden_case(case)
    params, expected = below(arrays, "param."), below(arrays, "sequence.grad.")
    assert params.keys() == expected.keys()

    def loss(params):
        return oracle.sequence_loss(params, model, training, arrays["tokens"][0, 0])[0].mean()

    tolerance = 4e-2 if model["compute_dtype"] == "bf16" else 1e-5
    rng = np.random.default_rng(2)
    for _ in range(2):
        # Every array has the same say: each adds a number of about 1 to the slope. Numbers whose
        # gradient the trimmed set leaves out stay where they are.
        direction = {}
        for name, g in expected.items():
            direction[name] = np.zeros(params[name].shape)
            like_expected(direction[name], g)[...] = rng.normal(size=g.shape) / (
                np.linalg.norm(g) or 1
            )
        slope = oracle.directional_derivative(loss, params, direction, eps=1e-7)
        inner_product = sum(
            np.sum(g * like_expected(direction[name], g)) for name, g in expected.items()
        )
        assert slope == pytest.approx(inner_product, abs=tolerance * np.sqrt(len(expected)))


# The inner gradient and the inner step


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"qk_norm": False, "pre_norm": False},
        {"post_norm": False, "tie_word_embeddings": False},
    ],
    ids=["default", "no-qk-or-pre-norm", "no-post-norm-untied"],
)
def test_inner_gradient_is_the_slope_of_a_later_chunks_loss(switches):
    model = MODEL | switches
    params, rng = random_params(model), np.random.default_rng(3)
    fast = oracle.fast_weights(params, model)
    h, targets = rng.normal(size=(2, 4, 8)), np.array([[5, 2, 3, 7], [4, 1, 9, 9]])
    nothing = np.zeros((0, 2, 4))
    pasts = {1: (nothing, nothing), 2: (nothing, nothing)}
    pasts = oracle.chunk_loss(h[0], targets[0], params, fast, pasts, model)[3]

    def loss(fast):
        return oracle.chunk_loss(h[1], targets[1], params, fast, pasts, model)[0]

    gradient = oracle.chunk_loss(h[1], targets[1], params, fast, pasts, model)[2]
    assert len(gradient) == 3 * MODEL["suffix_len"]
    for name, g in gradient.items():
        direction = {name: rng.normal(size=g.shape)}
        slope = oracle.directional_derivative(loss, fast, direction, eps=1e-5)
        assert slope == pytest.approx(np.sum(g * direction[name]), rel=1e-6, abs=1e-9)


def test_inner_clip_bounds_the_norm_over_all_layers_together():
    fast = {"0.w1": np.zeros(2), "1.w1": np.zeros(2)}
    gradient = {"0.w1": np.array([3.0, 0.0]), "1.w1": np.array([0.0, -4.0])}

    def after_step(bound):
        inner = {"lr": 2.0, "clip_gradient": bound}
        return oracle.inner_step(fast, gradient, META | {"optimizer_inner": inner}, step=0)

    for bound, scale in ((1.0, 0.2), (6.0, 1.0), (0.0, 1.0)):
        np.testing.assert_allclose(after_step(bound)["0.w1"], [-6 * scale, 0])
        np.testing.assert_allclose(after_step(bound)["1.w1"], [0, 8 * scale])


def test_inner_rate_warms_up_from_ilr_init_and_evaluation_uses_all_of_it():
    warm = META | {"ilr_warmup_steps": 3}
    rates = [oracle.inner_rate(warm, step) for step in (0, 1, 2, 7, None)]
    np.testing.assert_allclose(rates, [0.5, 0.75, 1, 1, 1])
    assert oracle.inner_rate(META, 0) == 1


def test_without_inner_steps_meta_is_pretraining():
    tokens = random_tokens()
    still = token_nll(MODEL, META, tokens, inner=False)
    np.testing.assert_allclose(still, token_nll(MODEL, PRETRAIN, tokens), rtol=1e-12)


def test_a_step_changes_only_later_chunks():
    tokens, chunk = random_tokens(), MODEL["mini_batch_size"]
    learning, still = (token_nll(MODEL, META, tokens, inner=inner) for inner in (True, False))
    np.testing.assert_array_equal(learning[:chunk], still[:chunk])
    assert np.all(learning[chunk:] != still[chunk:])


def test_a_chunk_without_valid_targets_counts_zero_and_teaches_nothing():
    tokens = random_tokens()
    tokens[1:5] = MODEL["bos_token_id"]
    params = random_params(MODEL)
    losses, learning = oracle.sequence_loss(params, MODEL, META, tokens)
    still = token_nll(MODEL, META, tokens, inner=False)
    assert losses[0] == 0
    np.testing.assert_array_equal(learning[4:8], still[4:8])
    assert np.all(learning[8:] != still[8:])


def test_chunk_loss_is_the_mean_over_valid_targets():
    tokens = random_tokens()
    tokens[6] = MODEL["bos_token_id"]
    losses, nll = oracle.sequence_loss(random_params(MODEL), MODEL, META, tokens)
    assert losses[1] == pytest.approx(nll[[4, 6, 7]].mean())
    assert losses[2] == pytest.approx(nll[8:12].mean())


# Who sees what


@pytest.mark.parametrize("training", [PRETRAIN, META], ids=["pretrain", "meta"])
def test_a_token_changes_no_earlier_score(training):
    tokens = random_tokens()
    before = token_nll(MODEL, training, tokens)
    for place in range(1, len(tokens)):
        other = tokens.copy()
        other[place] = 2 + (tokens[place] - 1) % (MODEL["vocab_size"] - 2)
        after = token_nll(MODEL, training, other)
        np.testing.assert_array_equal(after[: place - 1], before[: place - 1])
        assert np.all(after[place - 1 : place + 1] != before[place - 1 : place + 1])


def test_a_query_sees_exactly_the_window_across_chunk_borders():
    model = MODEL | {"num_hidden_layers": 1, "suffix_len": 1}
    tokens = random_tokens()
    other = tokens.copy()
    other[5] += 1 if tokens[5] < 10 else -1
    changed = token_nll(model, PRETRAIN, other) != token_nll(model, PRETRAIN, tokens)
    # Token 5 is the target at 4 and a key to queries 5 … 5 + W - 1.
    np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(4, 11))


def test_windows_of_self_attention_are_read_on_their_own():
    tokens = random_tokens()
    model = MODEL | {"seq_modeling_block": "self_attention"}
    nll = token_nll(model, PRETRAIN, tokens)
    for start in range(0, 16, 4):
        alone = token_nll(model, PRETRAIN, tokens[start : start + 5])
        np.testing.assert_allclose(nll[start : start + 4], alone, rtol=1e-12)


def test_chunks_of_plain_sliding_window_attention_only_group_the_mean():
    tokens = random_tokens()
    whole = token_nll(MODEL | {"mini_batch_size": 16}, PRETRAIN, tokens)
    np.testing.assert_allclose(token_nll(MODEL, PRETRAIN, tokens), whole, rtol=1e-12)


# The outer step


def test_adamw_step_is_optax():
    rng = np.random.default_rng(4)
    params = {oracle.EMBEDDING: rng.normal(size=(5, 3)), "other": rng.normal(size=7)}
    schedule = optax.warmup_cosine_decay_schedule(
        OUTER["init_lr"],
        OUTER["lr"],
        OUTER["lr_warmup_steps"],
        OUTER["lr_decay_steps"],
        OUTER["end_lr"],
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(OUTER["clip_gradient"]),
        optax.adamw(
            schedule,
            b1=OUTER["b1"],
            b2=OUTER["b2"],
            weight_decay=OUTER["weight_decay"],
            mask={oracle.EMBEDDING: OUTER["emb_wd"], "other": True},
        ),
    )
    theirs = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    their_state, state = optimizer.init(theirs), None
    for step in range(12):
        scale = 0.02 + 0.3 * (step % 3)  # some steps are clipped and some are not
        grads = {name: scale * rng.normal(size=p.shape) for name, p in params.items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        old = params
        params, state, reported = oracle.adamw_step(params, grads, state, step, OUTER)
        their_grads = {name: jnp.asarray(g, jnp.float32) for name, g in grads.items()}
        # Adam's bias correction in optax mixes an integer step into float32.
        with jax.numpy_dtype_promotion("standard"):
            updates, their_state = optimizer.update(their_grads, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        assert reported == pytest.approx(np.sqrt(norm**2 + 1e-5))
        for name, update in updates.items():
            assert relative_error(params[name] - old[name], update) < 1e-5
            np.testing.assert_allclose(params[name], theirs[name], atol=2e-6)
