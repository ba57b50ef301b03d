"""A training step fitted into memory: every `auto` becomes the cheapest choice that fits.

Cheap is what has the fewest hardware FLOPs (`costs.hardware_flops`); among equals, what keeps most
comes first. What a user has set is honoured. Nothing here changes a run's numbers beyond the order
of its sums. No JAX: what the machine has is asked elsewhere (ttt/plan/hardware.py).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ttt.errors import UserError
from ttt.knobs import REMAT_POLICIES, Config
from ttt.plan import costs

TOLERANCE = 1.25
"""How far an actual peak may lie from its prediction (tests/test_costs.py): a step is refused only
where it needs more than so many times the budget."""

# What can be chosen, and the value that asks for it.
_AUTO = {"model.remat_prefix": "auto", "model.remat_suffix": "auto", "training.inner_remat_freq": 0}
_LEARNING_ALONE = ("model.remat_suffix", "training.inner_remat_freq")
# What a refusal proposes where nothing is in blocks yet.
_SMALL_ATTENTION_BLOCK = 256
_SMALL_LOSS_BLOCK = 16384


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    devices: int
    """All that take part."""
    budget: int
    """Bytes that a step may take on each of them."""
    source: str
    """Where the budget comes from, in words."""
    attention: str = "blocks"
    """The program that `model.attention=auto` stands for there."""


@dataclass(frozen=True)
class Plan:
    """A configuration without `auto`, and what it is predicted to need."""

    config: Config
    machine: Machine
    memory: costs.Memory
    chosen: Mapping[str, Any]
    """Settings that were `auto`."""

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the budget."""
        return self.memory.total <= self.machine.budget

    @property
    def hopeless(self) -> bool:
        """Whether it is beyond the budget by more than the prediction's error."""
        return self.memory.total > TOLERANCE * self.machine.budget

    def describe(self) -> str:
        """One line: predicted peak, its largest parts, the budget, what was chosen."""
        machine, count = self.machine, self.machine.devices
        chosen = " ".join(
            f"{key}={value}" for key, value in self.chosen.items() if _matters(self.config, key)
        )
        return (
            f"memory: {gigabytes(self.memory.total)} predicted on each of {count} device"
            f"{'s' if count > 1 else ''} ({_parts(self.memory)}), {gigabytes(machine.budget)} to "
            f"use ({machine.source}); {f'chosen: {chosen}' if chosen else 'nothing to choose'}"
        )


def fit(config: Config, machine: Machine) -> Plan:
    """`choose`, but raise a UserError with remedies where no choice can fit.

    A plan that exceeds the budget by no more than the prediction's error passes: see `Plan.fits`.
    """
    plan = choose(config, machine)
    if plan.hopeless:
        raise UserError(_refusal(config, plan))
    return plan


def choose(config: Config, machine: Machine) -> Plan:
    """The cheapest settings whose predicted peak fits; where none does, those with the lowest peak.

    Raises UserError if the devices do not divide a microbatch.
    """
    smallest = None
    for option in sorted(_options(config), key=lambda option: _flops(_with(config, option))):
        plan = _planned(config, option, machine)
        if plan.fits:
            return plan
        if smallest is None or plan.memory.total < smallest.memory.total:
            smallest = plan
    if smallest is None:
        raise ValueError("no setting to choose from")
    return smallest


def predict(config: Config, machine: Machine) -> costs.Memory:
    """The peak of a training step of a `config` without `auto`."""
    model = config.model
    if model.attention == "auto":
        model = replace(model, attention=machine.attention)
    return costs.memory(model, config.training, costs.devices_of(config, machine.devices))


def gigabytes(size: float) -> str:
    """Bytes for a reader, three digits."""
    return f"{size / 1e9:.3g} GB" if size < 999.5e9 else f"{size / 1e9:,.0f} GB"


# ---- the choices -------------------------------------------------------------------------


def _options(config: Config) -> Iterator[dict[str, Any]]:
    """Every way to set what is `auto`; of those that cost alike, the one that keeps most first."""
    meta = config.training.train_mode == "meta"
    prefix = config.model.num_hidden_layers > config.model.suffix_len or not meta
    values_of: dict[str, Iterable[Any]] = {
        "model.remat_prefix": REMAT_POLICIES if prefix else ("none",),
        "model.remat_suffix": REMAT_POLICIES if meta else ("none",),
        "training.inner_remat_freq": _groups(config) if meta else (1,),
    }
    choices = {key: values_of[key] for key, auto in _AUTO.items() if _get(config, key) == auto}
    for values in product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _groups(config: Config) -> list[int]:
    """Chunks to a stored carry that are worth a try.

    Up to the root of the number of chunks, where the fewest states are stored; divisors of it, for
    a smaller last group is a second program to compile.
    """
    chunks = config.training.seq_length // config.model.mini_batch_size
    return [group for group in range(1, math.isqrt(chunks) + 1) if chunks % group == 0]


def _flops(config: Config) -> float:
    return costs.hardware_flops(config.model, config.training).total


def _planned(config: Config, option: Mapping[str, Any], machine: Machine) -> Plan:
    config = _with(config, option)
    return Plan(config, machine, predict(config, machine), option)


def _matters(config: Config, key: str) -> bool:
    return config.training.train_mode == "meta" or key not in _LEARNING_ALONE


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, settings: Mapping[str, Any]) -> Config:
    """`config` with other values at dotted keys."""
    for key, value in settings.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


# ---- where nothing fits --------------------------------------------------------------------


def _refusal(config: Config, plan: Plan) -> str:
    machine = plan.machine
    needed = f"{gigabytes(plan.memory.total)} on each device ({_parts(plan.memory)})"
    least = math.ceil(plan.memory.total / TOLERANCE / 1e7) / 100
    return (
        f"a training step is predicted to need {needed}, with all that is auto at its smallest; "
        f"it must not need more than {TOLERANCE} x {gigabytes(machine.budget)} "
        f"({machine.source}).\n{advice(config, plan)}\n"
        f"To try it all the same, set backend.memory_gb={least}"
    )


def advice(config: Config, plan: Plan) -> str:
    """What a user can do about a plan for `config` that does not fit."""
    found = [
        f"  {change}: {gigabytes(other.memory.total)}" for change, other in remedies(config, plan)
    ]
    if found:
        return "\n".join(["By the same prediction these fit, each by itself:", *found])
    state = plan.memory.parameters + plan.memory.optimizer + plan.memory.gradients
    return (
        "No setting that leaves the run's numbers as they are makes it fit (parameters, optimizer "
        f"and gradients alone take {gigabytes(state)}): take a device with more memory, a smaller "
        "model or a shorter training.seq_length"
    )


def remedies(config: Config, plan: Plan) -> list[tuple[str, Plan]]:
    """(overrides or devices, the plan with them) of changes that fit by the same prediction."""
    alone = [_first_that_fits(config, plan.machine, way) for way in _ways(config, plan)]
    if found := [remedy for remedy in alone if remedy]:
        return found
    together: dict[str, Any] = {}
    for way in _ways(config, plan):
        *_, (settings, machine) = way
        if machine == plan.machine:
            together |= settings
    both = _first_that_fits(config, plan.machine, [(together, plan.machine)])
    return [both] if both else []


# For parts of costs.Memory whose names say little.
_WORDS = {
    "kept_blocks": "kept by blocks",
    "block": "backward pass of a block",
    "gathered": "weights made whole for use",
    "learning": "learning while reading",
}

type _Way = list[tuple[dict[str, Any], Machine]]


def _ways(config: Config, plan: Plan) -> list[_Way]:
    """Series of changes that save more and more memory."""
    model, training, machine = config.model, config.training, plan.machine
    data = costs.devices_of(config, machine.devices).data
    ways: list[_Way] = []
    freed = {
        key: auto
        for key, auto in _AUTO.items()
        if _get(config, key) != auto and _matters(config, key)
    }
    if freed:
        ways.append([(freed, machine)])
    blocks: dict[str, int] = {}
    if model.attention_block == 0 and model.mini_batch_size % _SMALL_ATTENTION_BLOCK == 0:
        blocks["model.attention_block"] = _SMALL_ATTENTION_BLOCK
    if model.loss_block == 0 and model.vocab_size > _SMALL_LOSS_BLOCK:
        blocks["model.loss_block"] = _SMALL_LOSS_BLOCK
    ways += [[({key: size}, machine)] for key, size in blocks.items()]
    microbatch = training.global_batch_size // training.accum_steps
    parts = [n for n in range(2, microbatch + 1) if microbatch % n == 0]
    more = [
        ({"training.accum_steps": training.accum_steps * n}, machine)
        for n in parts
        if microbatch // n % data == 0
    ]
    state = config.backend.state_parallel
    devices = [({}, replace(machine, devices=n * state)) for n in parts if n > data]
    if data > 1 and config.backend.sharding == "replicated":
        ways.append([({"backend.sharding": "fsdp"}, machine)])
    return [*ways, *(way for way in (more, devices) if way)]


def _first_that_fits(config: Config, machine: Machine, way: _Way) -> tuple[str, Plan] | None:
    for settings, there in way:
        plan = choose(_with(config, settings), there)
        if plan.fits:
            shown = [f"{key}={value}" for key, value in settings.items()]
            if there != machine:
                shown.append(f"{there.devices} devices")
            return " ".join(shown), plan
    return None


def _parts(memory: costs.Memory) -> str:
    """The three largest parts of the peak."""
    parts = sorted(memory.at_peak().items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{_WORDS.get(name, name)} {gigabytes(size)}" for name, size in parts)


# ---- for scripts/01_config_inspect.py --------------------------------------------------------


def inspect(
    config: Config, devices: int, memory_gb: float, beside: Config | None = None
) -> dict[str, dict[str, Any]]:
    """`costs.summary` of a configuration with its plan for such devices (0 GB: no limit).

    Attention is cuDNN's where an NVIDIA GPU would have it. Raises UserError where the devices do
    not divide a microbatch; what does not fit is told under "plan", with its remedies.
    """
    if not 0 <= memory_gb < math.inf:
        raise UserError(f"memory_gb={memory_gb}: must be a number of GB, or 0 for no limit; set it")
    limit = memory_gb or config.backend.memory_gb
    gpu = config.backend.platform in ("auto", "cuda") and config.model.compute_dtype == "bf16"
    machine = Machine(
        devices,
        int(limit * 1e9) if limit else 10**18,
        "as asked" if limit else "no limit given",
        "cudnn" if gpu else "blocks",
    )
    plan = choose(config, machine)
    program = config.model.attention
    told: dict[str, Any] = {
        "attention": machine.attention if program == "auto" else program,
        **{key: _get(plan.config, key) for key in _AUTO},
        "memory": f"{gigabytes(plan.memory.total)} per device",
        "budget": gigabytes(machine.budget) if limit else machine.source,
        "fits": "yes" if plan.fits else "no" if plan.hopeless else "perhaps",
    }
    if not plan.fits:
        told |= {
            f"with {change}": f"{gigabytes(other.memory.total)} per device"
            for change, other in remedies(config, plan)
        }
    resolved = replace(plan.config, model=replace(plan.config.model, attention=told["attention"]))
    return {"plan": told} | costs.summary(resolved, devices, beside=beside)
