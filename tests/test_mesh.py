"""Starting JAX and dividing batches, on eight pretended devices in a process of their own."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from ttt.config import BackendConfig
from ttt.core.batch import Batch
from ttt.errors import UserError
from ttt.infra import distributed, mesh

EIGHT_DEVICES = """
import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from ttt.config import BackendConfig
from ttt.core.batch import Batch
from ttt.errors import UserError
from ttt.infra import distributed, mesh

backend = BackendConfig("auto", distributed=False, fake_devices=8, compilation_cache_dir="")
distributed.start(backend)
distributed.start(backend)
assert [device.platform for device in jax.devices()] == ["cpu"] * 8

devices = mesh.data_mesh()
assert devices.shape == {"data": 8}
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
        distributed.start(BackendConfig("cpu", False, late, ""))
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
    devices = mesh.data_mesh()
    tokens = np.zeros((jax.device_count(), 2), np.int32)
    batch = mesh.shard_batch(devices, Batch(tokens, tokens, tokens == 0))
    assert batch.targets.shape == tokens.shape


def backend(**changes) -> BackendConfig:
    settings = {
        "platform": "auto",
        "distributed": False,
        "fake_devices": 0,
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
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"backend\.distributed=true.*distributed=false"):
        distributed.start(backend(distributed=True))
