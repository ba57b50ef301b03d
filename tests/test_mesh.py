"""Starting JAX and dividing batches, on eight pretended devices in a process of their own."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from ttt.core.batch import Batch
from ttt.errors import UserError
from ttt.infra import distributed, mesh
from ttt.knobs import BackendConfig

EIGHT_DEVICES = """
import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from ttt.knobs import BackendConfig
from ttt.core.batch import Batch
from ttt.errors import UserError
from ttt.infra import distributed, mesh

def backend(platform, count):
    return BackendConfig(platform, False, "", 0, -1, "replicated", 1, count, 0.0, "")


distributed.start(backend("auto", 8))
distributed.start(backend("auto", 8))
assert [device.platform for device in jax.devices()] == ["cpu"] * 8

devices = mesh.device_mesh()
assert devices.shape == {"data": 8, "state": 1}
assert mesh.device_mesh(2).shape == {"data": 4, "state": 2}
tokens = np.arange(16 * 5, dtype=np.int32).reshape(16, 5)
batch = mesh.shard_batch(devices, Batch(tokens, tokens + 1, tokens > 3))
assert isinstance(batch, Batch)
assert batch.inputs.sharding.spec == P("data")
assert [shard.data.shape for shard in batch.inputs.addressable_shards] == [(2, 5)] * 8
np.testing.assert_array_equal(batch.inputs, tokens)
assert batch.loss_mask.dtype == bool

microbatches = mesh.shard_batch(devices, tokens.reshape(2, 8, 5), batch_axis=1)
assert {shard.data.shape for shard in microbatches.addressable_shards} == {(2, 1, 5)}

weights = mesh.replicate(devices, {"w": np.ones((5,), np.float32), "name": "text", "none": None})
assert weights["w"].is_fully_replicated
assert len(weights["w"].addressable_shards) == 8
assert (weights["name"], weights["none"]) == ("text", None)

# Auto axes: a plain jitted function takes both, and the mean crosses devices.
program = jax.jit(lambda w, x: (x.astype(w.dtype) * w).mean()).lower(weights["w"], batch.inputs)
assert "all-reduce" in program.compile().as_text()

for late in (4, 16):
    try:
        distributed.start(backend("cpu", late))
    except UserError as error:
        assert f"fake_devices={late} comes too late" in str(error)
    else:
        raise AssertionError("a started JAX took another number of devices")
try:
    mesh.shard_batch(devices, tokens[:12])
except UserError as error:
    assert "12 sequences cannot be divided evenly among 8 devices" in str(error)
else:
    raise AssertionError("12 sequences went onto 8 devices")

# On four places, each with two devices, a batch is there twice.
pairs = mesh.device_mesh(2)
batch = mesh.shard_batch(pairs, tokens)
assert [shard.index[0] for shard in batch.addressable_shards] == [
    slice(4 * i, 4 * i + 4, None) for i in range(4) for _ in range(2)
]
whole = mesh.divide_batch(pairs, tokens)
np.testing.assert_array_equal(whole, tokens)
assert whole.sharding.is_equivalent_to(batch.sharding, 2)
try:
    mesh.device_mesh(3)
except UserError as error:
    assert "state_parallel=3 does not divide the 8 devices" in str(error)
else:
    raise AssertionError("three devices share eight")

# Rules name the last axes, so that a stack and its moments follow the rule of a weight.
rules = (("**.w.weight", ("data", "state")), ("**.wte.weight", (None, "data")))
layout = mesh.Layout(pairs, rules)
tree = {
    "w": {"weight": np.zeros((3, 8, 4), np.float32)},
    "mu": {"w": {"weight": np.zeros((8, 4), np.float32)}},
    "wte": {"weight": np.zeros((5, 8), np.float32)},
    "norm": np.zeros(4, np.float32),
}
layout.check(tree, large=4)
placed = layout.place(tree)
assert placed["w"]["weight"].sharding.spec == P(None, "data", "state")
assert {s.data.shape for s in placed["w"]["weight"].addressable_shards} == {(3, 2, 2)}
assert {s.data.shape for s in placed["mu"]["w"]["weight"].addressable_shards} == {(2, 2)}
assert {s.data.shape for s in placed["wte"]["weight"].addressable_shards} == {(5, 2)}
assert placed["norm"].is_fully_replicated

# What is saved is joined outside of the devices' memory, each part where its device's process is.
for spec in (P(None, "data", "state"), P(None, None, "data"), P()):
    where = jax.sharding.NamedSharding(pairs, spec)
    numbers = np.arange(5 * 8 * 4, dtype=np.float32).reshape(5, 8, 4)
    parts = [jax.device_put(part, where) for part in (numbers[:2], numbers[2:])]
    joined = mesh.joined(parts)
    kinds = {x.sharding.memory_kind for x in jax.live_arrays() if x.shape == numbers.shape}
    assert kinds <= {"pinned_host"}
    if spec != P():
        assert joined.sharding.spec == spec
        assert not joined.is_fully_replicated
    np.testing.assert_array_equal(joined, numbers)
for wrong, large, fault in [
    ({"w": tree["w"]}, 4, "the rule **.wte.weight matches nothing"),
    (tree, 3, "norm [4] has no rule"),
    (tree | {"wte": {"weight": np.zeros((5, 6))}}, 4, "wte.weight: axis 1 of [5, 6] among 4"),
]:
    try:
        layout.check(wrong, large=large)
    except (ValueError, UserError) as error:
        assert fault in str(error), error
    else:
        raise AssertionError(fault)
"""


def test_eight_devices_share_a_batch_and_replicate_weights():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_one_device_is_a_mesh_too():
    devices = mesh.device_mesh()
    tokens = np.zeros((jax.device_count(), 2), np.int32)
    batch = mesh.shard_batch(devices, Batch(tokens, tokens, tokens == 0))
    assert batch.targets.shape == tokens.shape


def backend(**changes) -> BackendConfig:
    settings = {
        "platform": "auto",
        "distributed": False,
        "coordinator_address": "",
        "num_processes": 0,
        "process_id": -1,
        "sharding": "replicated",
        "state_parallel": 1,
        "fake_devices": 0,
        "memory_gb": 0.0,
        "compilation_cache_dir": "",
    }
    return BackendConfig(**(settings | changes))


@pytest.fixture
def jax_settings():
    """Puts the settings that `start` touches back."""
    names = (
        "jax_platforms",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("jax_settings")
def test_starting_on_the_cpu_twice_is_harmless():
    distributed.start(backend(platform="cpu"))
    distributed.start(backend(platform="cpu"))
    assert jax.devices()[0].platform == "cpu"


@pytest.mark.usefixtures("jax_settings")
def test_an_absent_platform_is_named_with_what_is_there_and_the_extra():
    present = jax.devices()[0].platform
    if present == "tpu":
        pytest.skip("this machine has a TPU")
    with pytest.raises(UserError, match=rf"platform=tpu.*only {present} here.*--extra tpu"):
        distributed.start(backend(platform="tpu"))


@pytest.mark.usefixtures("jax_settings")
def test_the_compilation_cache_goes_where_the_config_says(tmp_path):
    distributed.start(backend(compilation_cache_dir=str(tmp_path / "cache")))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")


@pytest.mark.usefixtures("jax_settings")
def test_a_cluster_that_is_not_there_is_a_user_error(monkeypatch):
    def initialize(*arguments, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"backend\.distributed=true.*distributed=false"):
        distributed.start(backend(distributed=True))
