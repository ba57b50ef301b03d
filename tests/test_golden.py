"""Every golden case, in full or trimmed: numbers of an independent implementation."""

from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import MODEL, TRAINING, sequence_loss
from golden import TRIMMED, cases, folder, kept, like_expected, read

from ttt.config import upgraded
from ttt.core.batch import from_tokens
from ttt.infra import checkpoint
from ttt.knobs import ModelConfig, OptimizerInnerConfig, OptimizerOuterConfig, TrainingConfig
from ttt.model import loop, published
from ttt.model.transformer import MetaModel

CASES = cases(folder())

# ‖a − b‖ / ‖b‖ of the worst array, as the folder's README asks; None: rounding drives them apart.
FLOAT32 = SimpleNamespace(loss=1e-6, nll=1e-6, grad=1e-5, train=1e-6, norm=1e-4, params=1e-4)
BF16 = SimpleNamespace(loss=2e-4, nll=5e-3, grad=4e-2, train=2e-3, norm=None, params=None)

AS_USERS_RUN_IT = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT",
}
"""The optimisations of XLA and LLVM that other tests do without (conftest.py)."""


def configs(case: dict) -> tuple[ModelConfig, TrainingConfig]:
    """What the case states, over the test defaults for what has no influence."""
    model = asdict(MODEL) | {"prime": False, "suffix_len": 0} | case["base_model"] | case["model"]
    stated = case["base_training"] | case["training"]
    for name in ("num_key_value_heads", "head_dim"):  # the cases follow from the heads
        del model[name]
    model = upgraded({"model": model})["model"]
    training = asdict(TRAINING) | stated
    for name, kind in {
        "optimizer_inner": OptimizerInnerConfig,
        "optimizer_outer": OptimizerOuterConfig,
    }.items():
        training[name] = kind(**asdict(getattr(TRAINING, name)) | stated.get(name, {}))
    training["spec_inner"] = tuple(training["spec_inner"])
    return ModelConfig(**model), TrainingConfig(**training)


def load(golden, name: str) -> SimpleNamespace:
    """A case's configuration, arrays and starting model."""
    about, arrays = read(golden, name)
    model, training = configs(about)
    like = jax.eval_shape(lambda: MetaModel(model, key=jax.random.key(0)))
    start = published.from_published(like, taken(arrays, "param."))
    batches = from_tokens(arrays["tokens"], model.bos_token_id)
    return SimpleNamespace(
        arrays=arrays,
        training=training,
        model=start,
        batches=batches,
        tolerance=BF16 if model.compute_dtype == "bf16" else FLOAT32,
    )


def taken(arrays: dict, prefix: str) -> dict:
    """Arrays whose names start with `prefix`, without it."""
    return {
        name.removeprefix(prefix): jnp.asarray(array)
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def error(got, expected) -> float:
    """Relative error ‖a − b‖ / ‖b‖, over what is kept of the expected array."""
    expected = np.asarray(expected, np.float64)
    got = np.asarray(like_expected(got, expected), np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def worst(got: dict, expected: dict) -> float:
    """The largest relative error over arrays with the same names."""
    return max(error(got[name], expected[name]) for name in got)


@pytest.fixture(params=CASES)
def case(request, golden):
    """One golden case."""
    return load(golden, request.param)


def test_all_seven_cases_are_there():
    assert len(CASES) == 7
    assert cases(TRIMMED) == CASES


@pytest.mark.skipif(folder() == TRIMMED, reason="only the trimmed golden set is there")
@pytest.mark.parametrize("name", CASES)
def test_the_trimmed_set_is_the_full_one_with_parts_of_its_arrays(golden, name):
    (about, whole), (about_trimmed, trimmed) = read(golden, name), read(TRIMMED, name)
    assert about.items() <= about_trimmed.items()
    assert trimmed.keys() == whole.keys()
    for key, array in trimmed.items():
        start = key == "tokens" or key.startswith("param.")
        np.testing.assert_array_equal(array, whole[key] if start else kept(whole[key]))


@partial(jax.jit, static_argnames="training", compiler_options=AS_USERS_RUN_IT)
def scored_with_gradient(model, sequence, scale, training):
    def loss(model):
        scored = sequence_loss(model, sequence, training, scale)
        return scored.loss, scored

    (_, scored), gradient = jax.value_and_grad(loss, has_aux=True)(model)
    return scored, gradient


def test_loss_and_exact_gradient_of_a_sequence(case):
    sequence = jax.tree.map(lambda x: x[0, 0], case.batches)
    scale = loop.inner_scale(case.training, 0)
    # One sequence knows no microbatches: cases that differ in nothing else share the program.
    training = replace(case.training, accum_steps=1)
    scored, gradient = scored_with_gradient(case.model, sequence, scale, training)
    assert error(scored.chunk_losses, case.arrays["sequence.loss"]) < case.tolerance.loss
    assert error(scored.token_nll, case.arrays["sequence.token_nll_loss"]) < case.tolerance.nll
    expected = taken(case.arrays, "sequence.grad.")
    # A norm that is switched off is no parameter of ours; theirs exists and has no influence.
    absent = expected.keys() - published.to_published(gradient).keys()
    assert all("norm" in name and not expected[name].any() for name in absent)
    assert worst(published.to_published(gradient), expected) < case.tolerance.grad


def test_eight_training_steps(case):
    training = case.training
    step = jax.jit(loop.make_train_step(training))
    state, metrics = loop.start_from(case.model, training), []
    for i in range(len(case.batches.inputs)):
        batch = jax.tree.map(
            lambda x, i=i: x[i].reshape(training.accum_steps, -1, x.shape[-1]), case.batches
        )
        state, metric = step(state, batch)
        metrics.append(metric)
    losses, norms = zip(*[(m.loss, m.gradient_norm) for m in metrics], strict=True)
    assert error(losses, case.arrays["train.loss"]) < case.tolerance.train
    if case.tolerance.norm is not None:
        assert error(norms, case.arrays["train.grad_norm"]) < case.tolerance.norm
        parameters = published.to_published(state.model)
        assert worst(parameters, taken(case.arrays, "train.param.")) < case.tolerance.params


def test_every_parameter_of_the_published_checkpoint_is_the_golden_one(golden):
    folder = golden / "published_checkpoint"
    case = load(golden, "e2e_meta")
    assert checkpoint.Checkpoints(folder).latest() == 7
    stored = checkpoint.read_flat(folder / "7", "model_weights")
    like = published.to_published(case.model)
    arrays, account = checkpoint.account(like, stored)
    assert len(account.restored) == len(like)
    assert not account.initialised + account.unused
    model = published.from_published(case.model, jax.tree.map(jnp.asarray, arrays))
    for name, array in published.to_published(model).items():
        np.testing.assert_array_equal(array, case.arrays[f"param.{name}"])


def test_the_published_optimizer_state_restores_into_ours(golden):
    case = load(golden, "e2e_meta")
    state = jax.eval_shape(lambda: loop.start_from(case.model, case.training))
    like = jax.eval_shape(published.to_stored, state.opt_state)
    restored = checkpoint.Checkpoints(golden / "published_checkpoint").restore(
        7, {"opt_state": like}
    )
    moments = published.from_stored(state.opt_state, restored["opt_state"])
    assert jax.tree.structure(moments) == jax.tree.structure(state.opt_state)
