"""The plan: what `auto` becomes, what is refused, and that its proposals hold."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from builders import MODEL, TRAINING
from jax.extend.core import jaxprs_in_params

from ttt import figures
from ttt.config import compose, resolve
from ttt.core.batch import Batch
from ttt.errors import UserError
from ttt.knobs import Config
from ttt.model import loop
from ttt.model.transformer import MetaModel, run_blocks
from ttt.plan import hardware, memory_plan
from ttt.plan.flops import hardware_flops
from ttt.plan.memory_plan import Hardware, MemoryPlan, choose, fit, remedies

ROOT = Path(__file__).parents[1]
AUTO = {"model.remat_prefix", "model.remat_suffix", "training.inner_remat_freq"}
GB = 10**9


def experiment(name: str, *overrides: str) -> Config:
    return resolve(compose([f"+experiment={name}", *overrides]))


@pytest.fixture(scope="module")
def e2e() -> Config:
    return experiment("125m/extension/ext-125m-e2e-32K")


@pytest.fixture(scope="module")
def full() -> Config:
    return experiment("125m/extension/ext-125m-fa-32K")


def on(gigabytes: float, devices: int = 1, attention: str = "cudnn") -> Hardware:
    return Hardware(devices, int(gigabytes * GB), "a test", attention)


def flops(found: MemoryPlan) -> float:
    return hardware_flops(found.config.model, found.config.training).total


# ---- choices -----------------------------------------------------------------------------


def test_published_experiments_choose_and_the_tiny_ones_do_not(e2e):
    assert set(choose(e2e, on(141)).chosen) == AUTO
    tiny = experiment("tiny/pretrain/pretrain-tiny-e2e")
    found = choose(tiny, on(141))
    assert found.chosen == {}
    assert found.config == tiny


def test_with_room_for_everything_nothing_is_computed_again(e2e, full):
    for config in (e2e, full):
        found = choose(config, on(1e6))
        assert found.chosen == {
            "model.remat_prefix": "none",
            "model.remat_suffix": "none",
            "training.inner_remat_freq": 1,
        }


def test_settings_of_the_user_are_honoured_whatever_the_room(e2e):
    model = replace(e2e.model, remat_prefix="chunk")
    config = replace(e2e, model=model, training=replace(e2e.training, inner_remat_freq=2))
    for gigabytes in (1, 141, 1e6):
        found = choose(config, on(gigabytes))
        assert found.chosen.keys() == {"model.remat_suffix"}
        assert found.config.model.remat_prefix == "chunk"
        assert found.config.training.inner_remat_freq == 2


@pytest.mark.parametrize("gigabytes", [160, 200, 300])
def test_no_choice_that_fits_is_cheaper_than_the_chosen(e2e, gigabytes):
    machine = on(gigabytes)
    chosen = choose(e2e, machine)
    assert chosen.fits
    assert memory_plan.predict(chosen.config, machine) == chosen.memory
    others = [
        choose(
            replace(
                e2e,
                model=replace(e2e.model, remat_prefix=prefix, remat_suffix=suffix),
                training=replace(e2e.training, inner_remat_freq=group),
            ),
            machine,
        )
        for prefix in ("none", "dots", "attention", "block", "chunk")
        for suffix in ("none", "dots", "attention", "block", "chunk")
        for group in (1, 2, 4)
    ]
    assert flops(chosen) == min(flops(other) for other in others if other.fits)
    assert any(flops(other) < flops(chosen) for other in others)  # there was something to refuse


def test_a_larger_budget_never_costs_more(e2e, full):
    for config in (e2e, full):
        found = [choose(config, on(gigabytes)) for gigabytes in range(20, 800, 20)]
        work = [flops(each) for each in found if each.fits]
        assert work == sorted(work, reverse=True)
        assert work[0] > work[-1]


def test_devices_share_the_batch_and_so_the_choice(e2e):
    one, many = (choose(e2e, on(141, devices)) for devices in (1, 16))
    assert not one.fits
    assert many.fits
    assert flops(many) < flops(one)


def test_scores_take_no_memory_where_cudnn_attends(full):
    scores = 12 * 32768**2 * 4 * full.training.global_batch_size
    blocks, cudnn = (choose(full, on(141, attention=name)) for name in ("blocks", "cudnn"))
    assert blocks.memory.total - cudnn.memory.total > scores
    naive = replace(full, model=replace(full.model, attention="naive", attention_block=256))
    assert choose(naive, on(141)).memory.total > scores


# ---- refusals ----------------------------------------------------------------------------


def test_what_may_fit_within_the_predictions_error_passes_with_its_smallest_settings(e2e):
    smallest = choose(e2e, on(1)).memory.total
    tight = fit(e2e, Hardware(1, int(smallest / 1.2), "a test", "cudnn"))
    assert not tight.fits
    assert tight.memory.total == smallest
    with pytest.raises(UserError, match=r"must not need more than 1\.25 x"):
        fit(e2e, Hardware(1, int(smallest / 1.3), "a test", "cudnn"))


@pytest.mark.parametrize("gigabytes", [16, 40])
def test_proposals_fit_by_the_same_prediction(e2e, full, gigabytes):
    for config in (e2e, full):
        machine = on(gigabytes)
        found = remedies(config, choose(config, machine))
        assert found
        with pytest.raises(UserError) as refused:
            fit(config, machine)
        for change, other in found:
            size = figures.gigabytes(other.memory.total)
            assert f"  {change}: {size}" in str(refused.value)
            overrides = [part for part in change.split() if "=" in part]
            devices = 1 if overrides else int(change.split()[0])
            name = f"{config.model.name}/extension/{config.training.exp_name}"
            again = fit(experiment(name, *overrides), on(gigabytes, devices))
            assert again.fits
            assert again.memory == other.memory


def test_explicit_settings_are_among_what_can_be_given_up(full):
    wasteful = replace(full, model=replace(full.model, remat_prefix="none"))
    machine = on(300)
    found = dict(remedies(wasteful, choose(wasteful, machine)))
    assert found["model.remat_prefix=auto"].memory == choose(full, machine).memory


def test_where_nothing_helps_the_state_is_named(e2e):
    with pytest.raises(UserError, match=r"No setting .* gradients alone take 3\.69 GB"):
        fit(e2e, on(1))


def test_a_tiny_budget_is_refused_before_anything_is_compiled(tmp_path):
    command = [sys.executable, "-m", "ttt.train", "+experiment=tiny/pretrain/pretrain-tiny-e2e"]
    more = ["training.dummy_dataset=true", "backend.memory_gb=0.01"]
    ran = subprocess.run(
        [*command, *more, "backend.compilation_cache_dir=''"],
        cwd=tmp_path,
        env={
            "PATH": "",
            "JAX_PLATFORMS": "cpu",
            "JAX_LOG_COMPILES": "1",
            "PYTHONPATH": str(ROOT),
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert "backend.memory_gb=0.01" in ran.stderr
    assert "compil" not in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(tmp_path.rglob("run.json"))


# ---- the machine here ----------------------------------------------------------------------


def test_the_budget_is_the_users_or_most_of_the_available_memory(monkeypatch):
    config = experiment("tiny/pretrain/pretrain-tiny-e2e")
    monkeypatch.setattr(hardware, "available_memory", lambda: 10 * GB)
    found = hardware.find_hardware(config)
    assert (found.devices, found.attention) == (jax.device_count(), "blocks")
    assert found.budget == 9 * GB // jax.local_device_count()
    assert "available memory" in found.source
    asked = hardware.find_hardware(replace(config, backend=replace(config.backend, memory_gb=2.5)))
    assert (asked.budget, asked.source) == (2.5 * GB, "backend.memory_gb=2.5")


def test_available_memory_is_below_what_the_machine_or_its_container_has(monkeypatch, tmp_path):
    here_now = hardware.available_memory()
    assert here_now > 0
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "_CGROUP_LIMIT", limit)
    limit.write_text("max\n")
    assert hardware.available_memory() > 1_000_000
    limit.write_text("1000000\n")
    assert hardware.available_memory() == 1_000_000


# ---- nothing is computed a third time --------------------------------------------------------


def rematerialised(jaxpr, inside: bool = False) -> tuple[int, int]:
    """(rematerialised parts, those of them within another) of a program before differentiation."""
    parts = nested = 0
    for equation in jaxpr.eqns:
        own = equation.primitive.name in ("checkpoint", "remat2", "remat")
        parts, nested = parts + own, nested + (own and inside)
        for inner in jaxprs_in_params(equation.params):
            more, deeper = rematerialised(inner, inside or own)
            parts, nested = parts + more, nested + deeper
    return parts, nested


def outer_gradient(mode, policy):
    """The program of the outer gradient of a small batch."""
    model = replace(MODEL, remat_prefix=policy, remat_suffix=policy)
    training = replace(TRAINING, train_mode=mode, inner_remat_freq=2)
    ids = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct((2, 32), jnp.bool_))

    def loss(model, batch):
        return jnp.mean(loop.batch_losses(model, batch, training, 1.0).loss)

    return jax.make_jaxpr(jax.grad(loss))(shapes_of(model), batch).jaxpr


def shapes_of(model) -> MetaModel:
    return jax.eval_shape(lambda: MetaModel(model, key=jax.random.key(0)))


@pytest.mark.parametrize(
    ("policy", "parts"),
    [("none", (0, 0)), ("dots", (1, 0)), ("attention", (1, 0)), ("block", (1, 0))],
)
def test_a_block_is_rematerialised_once(policy, parts):
    blocks = shapes_of(MODEL).language_model.model.h.suffix_blocks
    x = jax.ShapeDtypeStruct((16, MODEL.hidden_size), jnp.float32)
    whole = jax.make_jaxpr(lambda b, x: run_blocks(b, x, policy, MODEL.mini_batch_size))(blocks, x)
    assert rematerialised(whole.jaxpr) == parts


def products(jaxpr) -> int:
    """Multiply-adds of all matrix products of a program, those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            lengths = [shape[i] for i in contracted]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(lengths)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(map(products, jaxprs_in_params(equation.params)))
    return total


@pytest.mark.parametrize("mode", ["meta", "pretrain"])
def test_chunks_within_a_rematerialised_block_run_no_product_a_third_time(mode):
    def of(policy):
        return products(outer_gradient(mode, policy))

    assert of("none") < of("block") == of("chunk")


@pytest.mark.parametrize("mode", ["meta", "pretrain"])
@pytest.mark.parametrize("policy", ["none", "block"])
def test_nothing_is_rematerialised_within_another_rematerialised_part(mode, policy):
    parts, nested = rematerialised(outer_gradient(mode, policy))
    assert nested == 0
    assert (parts > 1) == (policy != "none")  # one is that of the plain loss
