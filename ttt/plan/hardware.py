"""The hardware that this process runs on, and what is known of accelerators."""

import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ttt.core.precision import Precision
from ttt.knobs import Config, ModelConfig, TrainingConfig
from ttt.ops.dot_attention import choose
from ttt.plan.flops import model_flops
from ttt.plan.memory_plan import Hardware

MARGIN = 0.9
"""The share of a device's memory that a step may take, where the user does not say."""
_PROC_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# Dense bf16 operations per second as the makers state them, by what a device's kind contains; the
# first that matches.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,  # GH200 too
    "B200": 2.25e15,  # GB200 too
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def find_hardware(config: Config) -> Hardware:
    """All devices of all processes, and the memory that each may take; the same on every process.

    JAX must have been started (`ttt.infra.distributed.start`).
    """
    budget, source = _budget(config.backend.memory_gb)
    attention = choose(config.model.attention, Precision.of(config.model).compute)
    return Hardware(jax.device_count(), budget, source, attention)


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


def speed(
    model: ModelConfig, training: TrainingConfig, seconds: float, devices: int, kind: str
) -> dict[str, float]:
    """Of a training step that takes so long: model TFLOP/s of a device, and MFU if it is known.

    kind: of the devices, as in `peak_flops`.
    """
    tokens = training.global_batch_size * training.seq_length
    rate = tokens * model_flops(model, training).total / seconds / devices
    peak = peak_flops(kind, model.compute_dtype)
    return {"model_tflops_per_second": rate / 1e12} | ({"mfu": rate / peak} if peak else {})


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Operations per second that a device can do in `dtype`, such as bf16; None if not known.

    `device_kind` is what JAX calls the device, such as "NVIDIA H200".
    """
    known = (peak for name, peak in _PEAKS.items() if name in device_kind)
    return next(known, None) if dtype == "bf16" else None
