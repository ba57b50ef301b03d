"""Starts from a parent of another kind: the same function where it must be, and in words where not.

The parent is full attention; the child slides over a window and has prime MLPs.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import HYBRID, MODEL, TRAINING, full_attention, random_tokens
from test_train import configure, record_of, store, weights_of  # noqa: F401 (fixtures)

from ttt import train
from ttt.core.batch import from_tokens
from ttt.errors import UserError
from ttt.knobs import PRIME_INITS
from ttt.model import loop, published
from ttt.model.transformer import MetaModel
from ttt.training import start, warm_start

CHUNK = MODEL.mini_batch_size
PLAIN = replace(TRAINING, train_mode="pretrain")


@pytest.fixture(scope="module")
def parent() -> MetaModel:
    """Full attention with gains that are not all 1, on sequences of two chunks."""
    model = MetaModel(replace(full_attention(), mini_batch_size=2 * CHUNK), key=jax.random.key(1))
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        tree,
        [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)],
    )


@pytest.fixture(scope="module")
def warm(parent):
    """Start a child from the parent, as `how` says."""
    fresh = MetaModel(replace(MODEL, sliding_window_size=2 * CHUNK), key=jax.random.key(0))
    stored = published.to_published(fresh) | published.to_published(parent)
    child = published.from_published(fresh, stored)
    return lambda how: warm_start.begin(jax.tree.map(jnp.copy, child), how).model


@pytest.fixture(scope="module")
def batch():
    return from_tokens(random_tokens(3, 2 * CHUNK + 1), MODEL.bos_token_id)


@pytest.fixture(scope="module")
def reading():
    """(model, batch, scale of the inner rate) -> token NLLs and inner gradient norms."""

    @jax.jit
    def read(model, batch, scale):
        losses = loop.batch_losses(model, batch, TRAINING, scale)
        return losses.token_nll, losses.gradient_norms

    return read


@pytest.fixture(scope="module")
def parents_nll(parent, batch):
    return np.asarray(jax.jit(lambda m: loop.batch_losses(m, batch, PLAIN, 1.0).token_nll)(parent))


@pytest.mark.parametrize("how", warm_start.PRESERVING)
def test_a_preserving_start_computes_what_the_parent_did(how, warm, batch, reading, parents_nll):
    nll, _ = reading(warm(how), batch, 0.0)
    np.testing.assert_allclose(nll, parents_nll, atol=2e-5)


@pytest.mark.parametrize("how", sorted(set(PRIME_INITS) - set(warm_start.PRESERVING)))
def test_the_others_do_not(how, warm, batch, reading, parents_nll):
    nll, _ = reading(warm(how), batch, 0.0)
    assert np.abs(nll - parents_nll).max() > 1e-2


@pytest.mark.parametrize(
    ("how", "pre_norm"), [("inherit", False), ("copy", True), ("zero_down", True)]
)
def test_without_post_norms_the_function_is_kept_and_the_inner_gradient_alive(
    how, pre_norm, batch, reading
):
    config = replace(MODEL, sliding_window_size=2 * CHUNK, pre_norm=pre_norm, post_norm=False)
    fresh = MetaModel(config, key=jax.random.key(0))
    no_prime = MetaModel(replace(config, prime=False), key=jax.random.key(1))
    stored = published.to_published(fresh) | published.to_published(no_prime)
    begun = warm_start.begin(published.from_published(fresh, stored), how)
    read = jax.jit(lambda model: loop.batch_losses(model, batch, PLAIN, 1.0).token_nll)
    np.testing.assert_allclose(read(begun.model), read(no_prime), atol=1e-6)
    _, gradient_norms = reading(begun.model, batch, 1.0)
    assert np.min(gradient_norms) > 1e-3
    assert np.max(gradient_norms) < 100  # no norm behind the MLP multiplies it by 1/√eps
    down = "prime_storage.feed_forward_prime.w2.weight"
    is_new = [name for name in begun.initialised if name.endswith(down)]
    assert bool(is_new) == (how != "inherit")


@pytest.mark.parametrize("how", PRIME_INITS)
def test_every_new_and_every_moved_weight_is_told(how, warm, parent):
    begun = warm_start.begin(warm("random"), how)
    targets = [line.split(" -> ")[1] for line in begun.moved]
    prime = [n for n in published.to_published(begun.model) if ".prime_storage." in n]
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(begun.model)]
    assert len(set(buffers)) == len(buffers)  # a training step gives them all away
    assert set(prime) <= {*begun.initialised, *targets}
    assert not set(begun.initialised) & set(targets)
    assert all(".prime_storage." in name or name.endswith("[-2:]") for name in begun.initialised)


def test_every_way_to_begin_gives_other_weights(warm):
    def weights(how: str) -> bytes:
        begun = warm_start.begin(warm("random"), how).model
        return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(begun))

    assert set(warm_start.PRESERVING) < set(PRIME_INITS)
    assert len({weights(how) for how in PRIME_INITS}) == len(PRIME_INITS)


def test_a_silent_prime_mlp_is_deaf_and_a_zero_output_explodes(warm, batch, reading):
    """Why the parent's own MLP is taken: the norm behind the MLP multiplies by 1/√eps at zero."""
    norms = {how: float(np.mean(reading(warm(how), batch, 1.0)[1])) for how in PRIME_INITS}
    assert norms["zero_gain"] == norms["copy"] == 0.0
    assert norms["zero_down"] > 20 * norms["random"]
    assert 0.02 < norms["inherit"] / norms["random"] < 50


def test_units_that_say_the_same_can_go_without_a_trace():
    rng = np.random.default_rng(0)
    few, down = rng.normal(size=(500, 6)), rng.normal(size=(9, 4))
    units = np.concatenate([few, 0.5 * few[:, :3]], axis=1)  # three repeat others
    kept, fitted = warm_start.fewer_units(units.T @ units / len(units), down, 6)
    assert kept.tolist() == sorted(kept.tolist())
    error = np.abs(units[:, kept] @ fitted - units @ down).max()
    assert error < 0.02 * np.abs(units @ down).max()


def test_the_fit_beats_leaving_units_out():
    rng = np.random.default_rng(1)
    units, down = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 8)), rng.normal(size=(8, 4))
    units += 0.1 * rng.normal(size=units.shape)
    kept, fitted = warm_start.fewer_units(units.T @ units / len(units), down, 5)
    left_out = np.square(units[:, kept] @ down[kept] - units @ down).mean()
    assert np.square(units[:, kept] @ fitted - units @ down).mean() < 0.1 * left_out


def test_the_layers_of_a_hybrid_are_narrowed_in_their_order():
    model = MetaModel(HYBRID, key=jax.random.key(3))
    stored, ids = published.to_published(model), random_tokens(2, HYBRID.mini_batch_size)
    units = HYBRID.intermediate_size
    narrow = warm_start.narrow(model, ids, units)  # all units stay, so the matrices do too
    for w in ("w1", "w3"):
        name = f"language_model.model.h.blocks.feed_forward.{w}.weight"
        np.testing.assert_array_equal(narrow[name], stored[name])


def test_a_narrowed_parent_comes_closer_than_its_first_units(parent, batch, parents_nll):
    width = 16
    config = replace(parent.config, intermediate_size=width)
    like = MetaModel(config, key=jax.random.key(0))
    stored = published.to_published(parent)
    narrow = stored | warm_start.narrow(parent, random_tokens(8, 2 * CHUNK, seed=9), width)
    w = "language_model.model.h.blocks.feed_forward"
    first = stored | {
        f"{w}.w1.weight": stored[f"{w}.w1.weight"][..., :width],
        f"{w}.w3.weight": stored[f"{w}.w3.weight"][..., :width],
        f"{w}.w2.weight": stored[f"{w}.w2.weight"][:, :width],
    }
    read = jax.jit(lambda model: loop.batch_losses(model, batch, PLAIN, 1.0).token_nll)
    by_importance, by_place = (
        float(np.abs(read(published.from_published(like, x)) - parents_nll).mean())
        for x in (narrow, first)
    )
    assert by_importance < 0.8 * by_place


@pytest.mark.parametrize(
    "sizes",
    [["model.width_policy=full", "model.intermediate_size=48"], ["model.intermediate_size=32"]],
    ids=["full", "narrow"],
)
def test_under_fsdp_no_array_of_the_state_ever_lies_whole_on_one_device(tmp_path, sizes):
    script = Path(__file__).with_name("warm_on_four.py")
    cache = f"backend.compilation_cache_dir={jax.config.jax_compilation_cache_dir}"
    command = [sys.executable, str(script), str(tmp_path), *sizes, cache]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# ---- through the command ---------------------------------------------------------------

WARM = ["model.width_policy=full", "training.total_steps=1", "training.load_part=params"]
FA = {"experiment": "pretrain/pretrain-tiny-fa"}
SWA = {"experiment": "pretrain/pretrain-tiny-swa"}


@pytest.fixture
def fa_parent(configure):  # noqa: F811
    """A trained parent, and what a child of it is configured by."""
    own = ["model.suffix_len=0", "training.seq_length=16", "training.total_steps=2"]
    config = configure(*own, "training.optimizer_outer.lr_decay_steps=2", **FA)
    train.run(config)
    return ["training.resume_exp_name=pretrain-tiny-fa", *WARM]


def start_of(config) -> dict:
    return record_of(config).run()["attempts"][0]["start"]


def test_a_window_and_then_learning_start_at_the_parents_loss(configure, fa_parent):  # noqa: F811
    swa = configure("training.exp_name=swa", "model.suffix_len=0", *fa_parent, **SWA)
    train.run(swa)
    name = "training.resume_exp_name"
    e2e = configure("training.exp_name=e2e", *fa_parent[1:], f"{name}=swa")
    direct = configure("training.exp_name=direct", *fa_parent)
    for config, context in ((swa, 16), (e2e, 64), (direct, 16)):
        if config is not swa:
            train.run(config)
        start = start_of(config)
        assert start["preserving"], start["why"]
        assert start["context"] == context
        assert start["warm_loss"] == pytest.approx(start["parent_loss"], abs=1e-6)
        account = record_of(config).run()["attempts"][0]["restored"]
        assert not account["narrowed"]
        assert not account["unused"]
        assert not account["changed"]
        assert bool(account["initialised"]) == (config is not swa)
        rows = record_of(config).metrics()
        assert rows[0] == pytest.approx(
            {"step": 0, "start_loss": start["loss"], "split": "val"}
            | {
                key: start["loss_without_learning"]
                for key in ("start_loss_without_learning",)
                if config is not swa
            }
        )
    assert start["loss"] != start["loss_without_learning"]  # the parent's MLP goes on learning


def test_a_narrowed_start_says_what_it_is(configure, fa_parent):  # noqa: F811
    narrow = ["model.width_policy=narrow", "model.intermediate_size=24", "training.exp_name=child"]
    child = configure(*fa_parent, *narrow)
    train.run(child)
    account, start = record_of(child).run()["attempts"][0]["restored"], start_of(child)
    stack = "language_model.model.h.blocks.feed_forward"
    assert sorted(account["narrowed"]) == [f"{stack}.{w}.weight" for w in ("w1", "w2", "w3")]
    assert set(account["narrowed"]) < set(account["restored"])
    assert not start["preserving"]
    assert "narrowed" in start["why"]
    assert start["warm_loss"] != start["parent_loss"]
    assert weights_of(child)[f"{stack}.w1.weight"].shape == (2, 16, 24)


def test_without_a_policy_that_fits_another_width_is_refused(configure, fa_parent):  # noqa: F811
    full = ["model.width_policy=full", "model.intermediate_size=24", "training.exp_name=child"]
    with pytest.raises(UserError, match=r"width 32, these 24: keep .*width_policy=narrow"):
        train.run(configure(*fa_parent, *full))


def test_other_heads_are_refused_though_every_shape_fits(configure, fa_parent):  # noqa: F811
    with pytest.raises(UserError, match=r"num_attention_heads=1: .* was trained with 2"):
        train.run(configure(*fa_parent, "training.exp_name=x", "model.num_attention_heads=1"))


@pytest.mark.parametrize(
    ("key", "value"), [("num_key_value_heads", 1), ("head_dim", 4), ("num_attention_heads", 1)]
)
def test_heads_are_compared_by_number_groups_and_width(key, value, tmp_path):
    with pytest.raises(UserError, match=rf"model.{key}={value}: .* was trained with"):
        start.check_heads(MODEL, replace(MODEL, **{key: value}), tmp_path)


def test_a_window_in_some_layers_bounds_what_parent_and_child_see_alike(tmp_path):
    plain = replace(MODEL, prime=False, suffix_len=0, sliding_window_size=16)
    full = replace(full_attention(plain), mini_batch_size=32)
    mixed = replace(plain, layer_types=("sliding_attention", "full_attention"))
    contexts = {}
    for name, model in (("full", full), ("mixed", mixed)):
        parent = SimpleNamespace(config=full, training=TRAINING, learns=False)
        child = SimpleNamespace(model=model, training=TRAINING)
        contexts[name] = start.common_context(parent, child)
        assert start.changes(parent, child) == {}  # within them it is the same function
    assert contexts == {"full": 32, "mixed": 16}


def test_biases_are_part_of_the_function():
    parent = SimpleNamespace(config=MODEL, training=TRAINING, learns=False)
    child = SimpleNamespace(model=replace(MODEL, attention_bias=True), training=TRAINING)
    assert start.changes(parent, child) == {"model.attention_bias": [False, True]}


def test_another_window_and_chunk_change_nothing_within_both(configure):  # noqa: F811
    short = ["model.suffix_len=0", "training.total_steps=1"]
    train.run(configure(*short, "size.chunk=8", "size.window=48", **SWA))
    child = configure("training.exp_name=c", "training.resume_exp_name=pretrain-tiny-swa", *WARM)
    train.run(child)
    start = start_of(child)
    assert (start["context"], start["preserving"], start["why"]) == (16, True, "")
    assert start["warm_loss"] == pytest.approx(start["parent_loss"], abs=1e-6)


def test_a_changed_function_is_told(configure, fa_parent):  # noqa: F811
    child = configure(*fa_parent, "training.exp_name=child", "model.rope_theta=500")
    train.run(child)
    account, start = record_of(child).run()["attempts"][0]["restored"], start_of(child)
    assert account["changed"] == {"model.rope_theta": [10000.0, 500.0]}
    assert not start["preserving"]
    assert "rope_theta: 10000.0 -> 500.0" in start["why"]
