"""Eight devices that share a step, in processes of their own (eight_devices.py): numbers, text."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from builders import MODEL, TRAINING, full_attention

from ttt.core import tree
from ttt.infra.mesh import Layout, device_mesh
from ttt.model import loop
from ttt.plan import sharding
from ttt.plan.memory import memory
from ttt.plan.parameters import parameters
from ttt.plan.sharding import DeviceSharding

WAYS = {
    "fa": ("replicated", "both"),
    "swa": ("tensors", "fsdp"),
    "hybrid": ("both",),
    "e2e": ("replicated", "fsdp", "both"),
}
CASES = [(method, way) for method, ways in WAYS.items() for way in ways]
ALONG_STATE = ("[4,2]<=[8]", "mesh['data'=4,'state'=2] {'state'}")


@pytest.fixture(scope="module")
def reports():
    """Method -> report, each made once."""
    made = {}

    def of(method: str) -> dict:
        if method not in made:
            command = [sys.executable, "eight_devices.py", method]
            # With LLVM's optimisations: without them rounding alone passes the bounds below.
            environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
            how = {"cwd": Path(__file__).parent, "env": environment, "timeout": 600}
            ran = subprocess.run(command, capture_output=True, text=True, **how)
            assert ran.returncode == 0, ran.stderr
            made[method] = json.loads(ran.stdout)
        return made[method]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("method", WAYS)
def test_eight_devices_train_and_evaluate_as_one_does(reports, method):
    report = reports(method)
    assert tuple(report) == WAYS[method]
    for way in WAYS[method]:
        assert report[way]["parameters"] < 1e-5
        assert report[way]["metrics"] < 1e-5
    assert report[WAYS[method][-1]]["scores"] < 1e-5


@pytest.mark.slow
def test_eight_devices_orthogonalise_shared_matrices_as_one_does(reports):
    report = reports("muon")["both"]
    assert report["parameters"] < 1e-5
    # Parameters, one moment of all, and another of the embedding and the norms.
    assert report["held"] == report["predicted"]
    assert report["arguments"] < 0.9 * 3 * 4 * report["predicted"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fa", "e2e"])
def test_whole_copies_average_their_gradients_once_and_do_nothing_else(reports, method):
    report = reports(method)["replicated"]
    assert [c["kind"] for c in report["collectives"]] == ["all-reduce"]
    assert report["in loops"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["swa", "e2e"])
def test_shared_weights_are_gathered_and_their_gradients_scattered(reports, method):
    kinds = [c["kind"] for c in reports(method)["fsdp"]["collectives"]]
    assert set(kinds) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert kinds.count("all-gather") == kinds.count("reduce-scatter")  # none is gathered twice


@pytest.mark.slow
@pytest.mark.parametrize(("method", "way"), CASES)
def test_no_message_leaves_the_inner_loop_of_a_sequence_but_to_those_who_share_it(
    reports, method, way
):
    report = reports(method)[way]
    inner = [c for c in report["collectives"] if "inner_loop" in c["from"]]
    assert bool(inner) == (method == "e2e" and way == "both")
    for collective in inner:
        assert collective["kind"] == "all-reduce"
        assert collective["groups"] in ALONG_STATE
    assert not report["all fast weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "way"), [case for case in CASES if case[1] != "replicated"])
def test_tensors_are_not_gathered_along_state(reports, method, way):
    for collective in reports(method)[way]["collectives"]:
        if collective["groups"] in ALONG_STATE:
            assert collective["kind"] == "all-reduce"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "way"), CASES)
def test_a_device_holds_what_the_plan_says(reports, method, way):
    report = reports(method)[way]
    assert report["held"] == report["predicted"]
    # Parameters and two moments; beside them counters and the batch.
    assert report["arguments"] == pytest.approx(3 * 4 * report["predicted"], rel=0.05, abs=4000)


# ---- the rules -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", [MODEL, full_attention(), replace(MODEL, tie_word_embeddings=False)]
)
@pytest.mark.parametrize("how", ["replicated", "fsdp"])
def test_every_rule_finds_an_array_and_every_matrix_a_rule(model, how):
    state = jax.eval_shape(
        lambda: loop.start_from(loop.MetaModel(model, key=jax.random.key(0)), TRAINING)
    )
    rules = sharding.rules(model, how)
    Layout(device_mesh(), rules).check(state, large=64)  # norms of 3 layers have 48 numbers


def test_a_matrix_that_nobody_gave_a_rule_is_named():
    state = jax.eval_shape(lambda: loop.MetaModel(MODEL, key=jax.random.key(0)))
    rules = [rule for rule in sharding.rules(MODEL, "fsdp") if "w3" not in rule[0]]
    with pytest.raises(ValueError, match=r"suffix_blocks\.feed_forward_prime\.w3\.weight .* rule"):
        Layout(device_mesh(), tuple(rules)).check(state, large=64)
    untied = replace(MODEL, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight matches nothing"):
        Layout(device_mesh(), sharding.rules(untied, "fsdp")).check(state)


def test_biases_are_divided_as_the_outputs_they_belong_to():
    biased = replace(MODEL, attention_bias=True)
    found = dict(sharding.rules(biased, "fsdp"))
    assert found.keys() - dict(sharding.rules(MODEL, "fsdp")).keys() == {
        f"**.seq_modeling_block.{w}.bias" for w in ("wq", "wk", "wv")
    }
    assert found["**.seq_modeling_block.wk.bias"] == ("state",)
    assert found["**.seq_modeling_block.wk.weight"] == ("data", "state")
    assert found["**.seq_modeling_block.wo.weight"] == ("state", "data")


# ---- the prediction --------------------------------------------------------------------------


def test_fully_sharded_state_takes_a_share_of_the_memory_and_what_is_in_use():
    training = replace(TRAINING, global_batch_size=16, accum_steps=2)
    deep = replace(MODEL, num_hidden_layers=8)
    whole = memory(deep, training, DeviceSharding(8))
    shared = memory(deep, training, DeviceSharding(8, "fsdp"))
    norms = sum(p.size for p in parameters(deep) if "norm" in p.name or "ln_f" in p.name)
    assert shared.parameters - 4 * norms == (whole.parameters - 4 * norms) // 8
    assert shared.optimizer == 2 * shared.parameters
    assert shared.gradients == 2 * shared.parameters
    assert whole.gathered == 0 < shared.gathered < 2 * whole.parameters
    assert shared.learning == whole.learning
    pairs = memory(deep, training, DeviceSharding(8, "replicated", 2))
    assert pairs.kept_blocks == 2 * whole.kept_blocks  # four places for the sequences


def test_one_device_holds_every_parameter_of_the_model():
    model = jax.eval_shape(lambda: loop.MetaModel(MODEL, key=jax.random.key(0)))
    assert DeviceSharding().held(parameters(MODEL)) == tree.count(model)
