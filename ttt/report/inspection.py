"""What a configuration amounts to, as scripts/01_config_inspect.py shows it. No JAX."""

import math
from dataclasses import asdict, replace
from typing import Any

from ttt import mixers
from ttt.errors import UserError
from ttt.figures import gigabytes
from ttt.knobs import Config
from ttt.plan import flops
from ttt.plan.memory import learning_memory
from ttt.plan.memory_plan import AUTO, Hardware, MemoryPlan, choose, remedies, setting
from ttt.plan.parameters import count, counts, selected
from ttt.plan.sharding import DeviceSharding

type Sections = dict[str, dict[str, Any]]
"""Section -> name -> value."""


def inspect(
    config: Config, devices: int, memory_gb: float, beside: Config | None = None
) -> Sections:
    """Plan, FLOPs and bytes of a run on such devices (0 GB: no limit).

    Attention is cuDNN's where an NVIDIA GPU would have it. `beside` is a run with full attention
    whose training FLOPs are shown for comparison. Raises UserError where the devices do not divide
    a microbatch; what does not fit is listed under "plan", with its remedies.
    """
    if not 0 <= memory_gb < math.inf:
        raise UserError(f"memory_gb={memory_gb}: must be a number of GB, or 0 for no limit; set it")
    limit = memory_gb or config.backend.memory_gb
    gpu = config.backend.platform in ("auto", "cuda") and config.model.compute_dtype == "bf16"
    hardware = Hardware(
        devices,
        int(limit * 1e9) if limit else 10**18,
        "as asked" if limit else "no limit given",
        "cudnn" if gpu else "blocks",
    )
    plan = choose(config, hardware)
    program = config.model.attention
    rows: dict[str, Any] = {
        "attention": hardware.attention if program == "auto" else program,
        **{key: setting(plan.config, key) for key in AUTO},
        "memory": f"{gigabytes(plan.memory.total)} per device",
        "budget": gigabytes(hardware.budget) if limit else hardware.source,
        "fits": "yes" if plan.fits else "no" if plan.hopeless else "perhaps",
    }
    if not plan.fits:
        rows |= {
            f"with {change}": f"{gigabytes(other.memory.total)} per device"
            for change, other in remedies(config, plan)
        }
    resolved = replace(plan.config.model, attention=rows["attention"])
    return {"plan": rows} | _costs(
        replace(plan, config=replace(plan.config, model=resolved)), beside
    )


def _costs(plan: MemoryPlan, beside: Config | None) -> Sections:
    model, training = plan.config.model, plan.config.training
    tokens = training.global_batch_size * training.seq_length
    learned = flops.learned(training)
    step, program = flops.model_flops(model, training), flops.hardware_flops(model, training)
    per_token = {
        "forward": flops.forward_flops(model, training.seq_length).total,
        "evaluation": flops.reading_flops(model, training.seq_length, learned).total,
        "training": step.total,
        "training, as run": program.total,
    }
    if beside is not None and not mixers.windows_apart(model):
        other = flops.model_flops(beside.model, beside.training).total
        per_token |= {"training, full attention": other, "of full attention": step.total / other}
    sections = {
        "run": {
            "name": training.exp_name,
            "model": model.name,
            "mode": training.train_mode,
            "mixer": model.seq_modeling_block or ", ".join(model.layer_types),
        },
        "parameters": counts(model),
        "tokens": {
            "per sequence": training.seq_length,
            "per step": tokens,
            "steps": training.total_steps,
            "in total": tokens * training.total_steps,
        },
        "FLOPs per token": per_token,
        "FLOPs per token of training, by part": {k: float(v) for k, v in asdict(step).items()},
        "FLOPs": {
            "per step": tokens * step.total,
            "per step, as run": tokens * program.total,
            "in total": tokens * training.total_steps * step.total,
        },
        "memory per device": asdict(plan.memory) | {"peak": plan.memory.total},
    }
    if learned:
        devices = DeviceSharding.of(plan.config, plan.hardware.devices)
        learning = learning_memory(model, training, devices)
        sections["parameters"]["fast"] = count(selected(model, learned))
        sections["memory per device, learning by part"] = asdict(learning)
    return sections


def readable(section: str, value: Any) -> str:
    """A value of `inspect` for a reader: bytes as MB, counts with commas, FLOPs in short."""
    if section.startswith("memory"):
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value
