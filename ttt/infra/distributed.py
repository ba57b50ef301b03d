"""What must happen before JAX starts its backend: platform, devices, compile cache, processes."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ttt.entry import UNUSED_GPU, gpu_is_visible
from ttt.errors import UserError
from ttt.knobs import BackendConfig

# Platforms of the config under the names of JAX's devices, and what installs them.
_DEVICE_NAMES = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
_REMEDIES = {
    "cpu": "start a new process",
    "cuda": "on a machine with an NVIDIA GPU, run `uv run --extra cuda13 …` (or cuda12)",
    "tpu": "on a TPU machine, run `uv run --extra tpu …`",
}
# Seconds of compilation below which a program is not worth a file in the cache.
_MIN_COMPILE_SECONDS = 1.0
# Seconds without a sign of life after which a process counts as dead and all others end, and those
# that a process which ends waits for the others.
_HEARTBEAT_SECONDS = 40
_SHUTDOWN_SECONDS = 10
# Words in the errors of gloo, NCCL and the coordinator when another process is gone.
_LOST = ("Gloo", "Connection closed", "Connection reset", "NCCL", "UNAVAILABLE", "coordination")


def start(backend: BackendConfig) -> None:
    """Start JAX as `backend` says, before any other use of it. A second call is harmless.

    Raises UserError where the platform is missing, or where JAX already runs otherwise.
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
        _join(backend)
    if platform != "auto":
        _check(platform)
    elif not jax.config.jax_platforms and jax.default_backend() == "cpu" and gpu_is_visible():
        logging.getLogger(__name__).warning(UNUSED_GPU)
    if not is_first():  # one process logs for all
        logging.getLogger("ttt").setLevel(logging.WARNING)


def is_first() -> bool:
    """Whether this process logs and writes for all."""
    return jax.process_index() == 0


def from_first(number: int) -> int:
    """The number that the first process passes. Every process calls it, at the same point."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def wait_for_all() -> None:
    """Return when every process has called this."""
    from_first(0)


def is_loss_of_peer(error: Exception) -> bool:
    """Whether an error of a computation means that another process is gone."""
    return jax.process_count() > 1 and any(word in str(error) for word in _LOST)


def first_does[R](action: Callable[[], R]) -> R | None:
    """Let the first process alone act; its UserError ends all processes."""
    fault: UserError | None = None
    result = None
    if is_first():
        try:
            result = action()
        except UserError as error:
            fault = error
    if from_first(fault is not None):
        raise fault or UserError("the first process refuses: see its message")
    return result


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Each flag as true if it is in any process. Every process calls it, at the same steps."""
    gathered = multihost_utils.process_allgather(np.asarray(flags))
    return tuple(gathered.any(axis=0).tolist())


def largest(number: int) -> int:
    """The largest number that a process has. Every process calls it, at the same steps."""
    return int(multihost_utils.process_allgather(np.asarray(number)).max())


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


def _join(backend: BackendConfig) -> None:
    address = backend.coordinator_address
    try:
        jax.distributed.initialize(  # None: as the cluster says
            address or None,
            backend.num_processes if address else None,
            backend.process_id if address else None,
            # Under Slurm JAX gives each process only the device of its number by default.
            [] if _has_the_node() else None,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        where = f"at {address}" if address else "and finds none here"
        raise UserError(
            f"backend.distributed=true, but JAX cannot join a cluster {where} ({error}): start "
            "one process per host under Slurm (+deploy=submitit), or give every process "
            "backend.coordinator_address=HOST:PORT, num_processes and process_id, or set "
            "backend.distributed=false"
        ) from error


def _has_the_node() -> bool:
    """Whether Slurm started one process on each node: all devices of the node are its own."""
    tasks = os.environ.get("SLURM_NTASKS")
    return tasks is not None and tasks == os.environ.get("SLURM_STEP_NUM_NODES")


def _check(platform: str) -> None:
    try:
        present = jax.devices()[0].platform
    except RuntimeError as error:
        raise UserError(
            f"backend.platform={platform} does not start ({error}): {_REMEDIES[platform]}, "
            "or set backend.platform=cpu"
        ) from error
    if present != _DEVICE_NAMES[platform]:
        raise UserError(
            f"backend.platform={platform}, but JAX has only {present} here: {_REMEDIES[platform]}, "
            "or set backend.platform=auto"
        )
