"""The outer optimizer: schedules in closed form, Muon against NumPy in float64, its memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from builders import GROUPED, HYBRID, MODEL, TRAINING

from ttt.core import tree
from ttt.model import loop
from ttt.model.transformer import MetaModel
from ttt.optimizers import make_optimizer, make_schedule
from ttt.plan.memory import memory
from ttt.plan.parameters import parameters

WSD = replace(
    TRAINING.optimizer_outer,
    schedule="wsd",
    lr_warmup_steps=4,
    lr_decay_start=10,
    lr_decay_steps=26,
)
MUON = replace(TRAINING.optimizer_outer, optimizer_type="muon", emb_wd=False)


def rates(config, steps: int) -> list[float]:
    return [float(make_schedule(config)(step)) for step in range(steps)]


def test_wsd_rises_stays_and_falls_by_one_minus_the_root():
    rise = [WSD.init_lr + (WSD.lr - WSD.init_lr) * step / 4 for step in range(4)]
    fall = [WSD.end_lr + (WSD.lr - WSD.end_lr) * (1 - np.sqrt(k / 16)) for k in range(17)]
    expected = [*rise, *[WSD.lr] * 6, *fall, WSD.end_lr]
    np.testing.assert_allclose(rates(WSD, 28), expected, rtol=1e-6, atol=1e-7 * WSD.lr)


@pytest.mark.parametrize("warmup", [0, 4])
def test_wsd_without_a_decay_stays_and_its_stable_part_is_lr_to_the_bit(warmup):
    stable = replace(WSD, lr_warmup_steps=warmup, lr_decay_start=26)
    assert rates(stable, 27)[warmup:] == [np.float32(WSD.lr)] * (27 - warmup)
    assert rates(WSD, 11)[4:] == rates(stable, 11)[4:]


# ---- Muon ------------------------------------------------------------------------------


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five quintic steps from the matrix over its Frobenius norm (Jordan et al. 2024)."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_updates(gradients: list[np.ndarray], param: np.ndarray) -> list[np.ndarray]:
    """Parameters after each step, for one matrix; the gradients do not depend on it."""
    momentum, beta, found = np.zeros_like(param), 0.95, []
    for step, gradient in enumerate(gradients):
        momentum = beta * momentum + (1 - beta) * gradient
        nesterov = beta * momentum / (1 - beta ** (step + 2)) + (1 - beta) * gradient / (
            1 - beta ** (step + 1)
        )
        update = 0.2 * np.sqrt(max(param.shape)) * newton_schulz(nesterov)
        rate = oracle.learning_rate(vars(MUON), step)
        param = param - rate * (update + MUON.weight_decay * param)
        found.append(param)
    return found


@pytest.mark.parametrize("model", [MODEL, replace(HYBRID, **GROUPED, tie_word_embeddings=False)])
def test_muon_trains_every_matrix_of_a_block_by_itself_and_adamw_all_else(model):
    start = MetaModel(model, key=jax.random.key(0))
    names = tree.named_leaves(start)
    rng = np.random.default_rng(0)
    steps = [{name: rng.normal(size=x.shape) for name, x in names.items()} for _ in range(3)]

    optimizer = make_optimizer(MUON)

    @jax.jit
    def step_of(model, state, gradient):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, model)
            return optax.apply_updates(model, updates), state

    trained, state = start, optimizer.init(start)
    for step in steps:
        gradient = tree.with_leaves(start, {name: jnp.float32(x) for name, x in step.items()})
        trained, state = step_of(trained, state, gradient)
    ours = tree.named_leaves(trained)

    clipped = [oracle.clip_by_global_norm(step, MUON.clip_gradient) for step in steps]
    matrices = {p.name for p in parameters(model) if p.in_muon}
    params, moments = {n: np.asarray(x, np.float64) for n, x in names.items()}, None
    by_adamw = params
    for step, gradient in enumerate(steps):
        by_adamw, moments, _ = oracle.adamw_step(by_adamw, gradient, moments, step, vars(MUON))
    for name, leaf in ours.items():
        single = tree.is_single(name)
        if tree.without_place(name) not in matrices:
            np.testing.assert_allclose(leaf, by_adamw[name], rtol=1e-4, atol=1e-6)
            continue
        layers = [None] if single else range(len(leaf))
        for layer in layers:
            of = [g[name] if single else g[name][layer] for g in clipped]
            param = params[name] if single else params[name][layer]
            expected = muon_updates(of, param)[-1]
            own = np.asarray(leaf if single else leaf[layer])
            np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_plan_counts_the_bytes_of_the_optimizers_state(kind, momentum):
    outer = replace(TRAINING.optimizer_outer, optimizer_type=kind, bf16_momentum=momentum)
    training = replace(TRAINING, optimizer_outer=outer)
    state = jax.eval_shape(
        lambda: loop.start_from(MetaModel(MODEL, key=jax.random.key(0)), training)
    )
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state) if x.size > 3)
    assert memory(MODEL, training).optimizer == held
