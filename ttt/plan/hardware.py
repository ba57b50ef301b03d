"""The machine that this process runs on, as ttt/plan/fit.py asks for it."""

import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ttt.core.precision import Precision
from ttt.knobs import Config
from ttt.ops.dot_attention import choose
from ttt.plan.fit import Machine

MARGIN = 0.9
"""The share of a device's memory that a step may take, where the user does not say."""
_PROC_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def machine(config: Config) -> Machine:
    """All devices of all processes, and the memory that each may take; the same on every process.

    JAX must have been started (`ttt.infra.distributed.start`).
    """
    budget, source = _budget(config.backend.memory_gb)
    attention = choose(config.model.attention, Precision.of(config.model).compute)
    return Machine(jax.device_count(), budget, source, attention)


def _budget(memory_gb: float) -> tuple[int, str]:
    """Bytes per device, and where they come from."""
    if memory_gb:
        return int(memory_gb * 1e9), f"backend.memory_gb={memory_gb:g}"
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        size, source = limit, f"of {device.device_kind}"
    else:
        size = available_memory() // jax.local_device_count()
        source = "of the machine's available memory"
    if jax.process_count() > 1:  # all must compile the same program
        size = int(np.min(multihost_utils.process_allgather(np.float32(size))))
        source += ", the least of all hosts"
    return int(MARGIN * size), f"{MARGIN:.0%} {source}"


def available_memory() -> int:
    """Bytes that this machine can still give to processes, as far as it tells."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = [pages]
    if _PROC_MEMINFO.exists():
        lines = dict(line.split(":") for line in _PROC_MEMINFO.read_text().splitlines())
        sizes.append(1024 * int(lines["MemAvailable"].split()[0]))
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        sizes.append(int(limit))
    return min(sizes)
