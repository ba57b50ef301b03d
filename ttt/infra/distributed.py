"""What must happen before JAX wakes its backend: platform, devices, compile cache, processes."""

from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ttt.config import BackendConfig
from ttt.errors import UserError

# Platforms of the config under the names of JAX's devices, and what installs them.
_DEVICE_NAMES = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
_REMEDIES = {
    "cpu": "start a new process",
    "cuda": "on a machine with an NVIDIA GPU, run `uv run --extra cuda13 …` (or cuda12)",
    "tpu": "on a TPU machine, run `uv run --extra tpu …`",
}
# Seconds of compilation below which a program is not worth a file in the cache.
_MIN_COMPILE_SECONDS = 1.0


def start(backend: BackendConfig) -> None:
    """Start JAX as `backend` says, before any other use of it. A second call is harmless.

    Raises UserError where the platform is not there, or where JAX runs otherwise already.
    """
    if backend.compilation_cache_dir:
        cache = str(Path(backend.compilation_cache_dir).expanduser())
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    platform = "cpu" if backend.fake_devices else backend.platform
    if platform != "auto":
        # The CPU stays in reach as a second platform, for arrays kept in host memory.
        jax.config.update("jax_platforms", "cpu" if platform == "cpu" else f"{platform},cpu")
    if backend.fake_devices:
        _fake_devices(backend.fake_devices)
    if backend.distributed and not jax.distributed.is_initialized():
        _join()
    if platform != "auto":
        _check(platform)


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Each flag as true if it is in any process. Every process calls it, at the same steps."""
    if jax.process_count() == 1:
        return flags
    gathered = multihost_utils.process_allgather(np.asarray(flags))
    return tuple(bool(flag) for flag in gathered.any(axis=0))


def _fake_devices(count: int) -> None:
    if jax.config.jax_num_cpu_devices == count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise UserError(
            f"backend.fake_devices={count} comes too late, JAX runs on "
            f"{jax.device_count()} devices already: start a new process"
        ) from error


def _join() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise UserError(
            f"backend.distributed=true, but JAX finds no cluster to join ({error}): start one "
            "process per host under Slurm (+deploy=submitit), or set backend.distributed=false"
        ) from error


def _check(platform: str) -> None:
    try:
        found = jax.devices()[0].platform
    except RuntimeError as error:
        raise UserError(
            f"backend.platform={platform} does not start ({error}): {_REMEDIES[platform]}, "
            "or set backend.platform=cpu"
        ) from error
    if found != _DEVICE_NAMES[platform]:
        raise UserError(
            f"backend.platform={platform}, but JAX has only {found} here: {_REMEDIES[platform]}, "
            "or set backend.platform=auto"
        )
