"""A training step fitted into memory: every `auto` becomes the cheapest choice that fits.

Cheap is what has the fewest hardware FLOPs (`flops.hardware_flops`); among equals, what keeps most
comes first. What a user has set is honoured. Nothing here changes a run's numbers beyond the order
of its sums. No JAX: what the machine has is asked elsewhere (ttt/plan/hardware.py).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

from ttt.errors import UserError
from ttt.figures import gigabytes
from ttt.knobs import REMAT_POLICIES, Config
from ttt.plan.flops import hardware_flops
from ttt.plan.memory import Memory, memory
from ttt.plan.sharding import DeviceSharding

TOLERANCE = 1.25
"""How far an actual peak may lie from its prediction (tests/test_costs.py): a step is refused only
where it needs more than so many times the budget."""

AUTO = {"model.remat_prefix": "auto", "model.remat_suffix": "auto", "training.inner_remat_freq": 0}
"""What can be chosen -> the value that asks for it."""
_LEARNING_ALONE = ("model.remat_suffix", "training.inner_remat_freq")
# What a refusal proposes where nothing is in blocks yet.
_SMALL_ATTENTION_BLOCK = 256
_SMALL_LOSS_BLOCK = 16384


@dataclass(frozen=True)
class Hardware:
    """The machine that a run is planned for."""

    devices: int
    """All that take part."""
    budget: int
    """Bytes that a step may take on each of them."""
    source: str
    """Where the budget comes from, in words."""
    attention: str = "blocks"
    """The program that `model.attention=auto` stands for there."""


@dataclass(frozen=True)
class MemoryPlan:
    """A configuration without `auto`, and what it is predicted to need."""

    config: Config
    hardware: Hardware
    memory: Memory
    chosen: Mapping[str, Any]
    """Settings that were `auto`."""

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the budget."""
        return self.memory.total <= self.hardware.budget

    @property
    def hopeless(self) -> bool:
        """Whether it is beyond the budget by more than the prediction's error."""
        return self.memory.total > TOLERANCE * self.hardware.budget

    def describe(self) -> str:
        """One line: predicted peak, its largest parts, the budget, what was chosen."""
        count, budget = self.hardware.devices, gigabytes(self.hardware.budget)
        chosen = _overrides({k: v for k, v in self.chosen.items() if _matters(self.config, k)})
        return (
            f"memory: {gigabytes(self.memory.total)} predicted on each of {count} device"
            f"{'s' if count > 1 else ''} ({_parts(self.memory)}), {budget} to use "
            f"({self.hardware.source}); {f'chosen: {chosen}' if chosen else 'nothing to choose'}"
        )


def fit(config: Config, hardware: Hardware) -> MemoryPlan:
    """`choose`, but raise a UserError with remedies where no choice can fit.

    A plan that exceeds the budget by no more than the prediction's error passes: see
    `MemoryPlan.fits`.
    """
    plan = choose(config, hardware)
    if not plan.hopeless:
        return plan
    needed = f"{gigabytes(plan.memory.total)} on each device ({_parts(plan.memory)})"
    least = math.ceil(plan.memory.total / TOLERANCE / 1e7) / 100
    raise UserError(
        f"a training step is predicted to need {needed}, with all that is auto at its smallest; "
        f"it must not need more than {TOLERANCE} x {gigabytes(hardware.budget)} "
        f"({hardware.source}).\n{advice(config, plan)}\n"
        f"To try it all the same, set backend.memory_gb={least}"
    )


def choose(config: Config, hardware: Hardware) -> MemoryPlan:
    """The cheapest settings whose predicted peak fits; where none does, those with the lowest peak.

    Raises UserError if the devices do not divide a microbatch.
    """
    options = [(option, _with(config, option)) for option in _options(config)]
    plans = []
    for option, chosen in sorted(options, key=lambda each: _flops(each[1])):
        plan = MemoryPlan(chosen, hardware, predict(chosen, hardware), option)
        if plan.fits:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.memory.total)


def predict(config: Config, hardware: Hardware) -> Memory:
    """The peak of a training step of a `config` without `auto`."""
    model = config.model
    if model.attention == "auto":
        model = replace(model, attention=hardware.attention)
    return memory(model, config.training, DeviceSharding.of(config, hardware.devices))


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
    choices = {key: values_of[key] for key, auto in AUTO.items() if setting(config, key) == auto}
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
    return hardware_flops(config.model, config.training).total


def _matters(config: Config, key: str) -> bool:
    return config.training.train_mode == "meta" or key not in _LEARNING_ALONE


def setting(config: Config, key: str) -> Any:
    """The value at a dotted key, such as `model.remat_prefix`."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, settings: Mapping[str, Any]) -> Config:
    """`config` with other values at dotted keys."""
    for key, value in settings.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


# ---- where nothing fits --------------------------------------------------------------------


def advice(config: Config, plan: MemoryPlan) -> str:
    """What a user can do about a plan for `config` that does not fit."""
    if fitting := remedies(config, plan):
        listed = [f"  {change}: {gigabytes(other.memory.total)}" for change, other in fitting]
        return "\n".join(["By the same prediction these fit, each by itself:", *listed])
    state = plan.memory.parameters + plan.memory.optimizer + plan.memory.gradients
    return (
        "No setting that leaves the run's numbers as they are makes it fit (parameters, optimizer "
        f"and gradients alone take {gigabytes(state)}): take a device with more memory, a smaller "
        "model or a shorter training.seq_length"
    )


def remedies(config: Config, plan: MemoryPlan) -> list[tuple[str, MemoryPlan]]:
    """(overrides or devices, the plan with them) of changes that fit by the same prediction."""
    settings, devices = _changes(config, plan.hardware)
    together = {key: value for changes in settings for key, value in changes[-1].items()}

    def first_that_fits(changes: list[dict[str, Any]]) -> list[tuple[str, MemoryPlan]]:
        plans = ((each, choose(_with(config, each), plan.hardware)) for each in changes)
        fitting = ((_overrides(each), other) for each, other in plans if other.fits)
        return list(islice(fitting, 1))

    more = (choose(config, replace(plan.hardware, devices=count)) for count in devices)
    alone = [fit for changes in settings for fit in first_that_fits(changes)]
    fitting = ((f"{other.hardware.devices} devices", other) for other in more if other.fits)
    alone += islice(fitting, 1)
    return alone or first_that_fits([together])


def _changes(config: Config, hardware: Hardware) -> tuple[list[list[dict[str, Any]]], list[int]]:
    """(series of settings, numbers of devices) that save more and more memory."""
    model, training, backend = config.model, config.training, config.backend
    data = DeviceSharding.of(config, hardware.devices).data
    microbatch = training.global_batch_size // training.accum_steps
    parts = [n for n in range(2, microbatch + 1) if microbatch % n == 0]
    freed = {k: v for k, v in AUTO.items() if setting(config, k) != v and _matters(config, k)}
    series: list[list[dict[str, Any]]] = [[freed]] if freed else []
    if model.attention_block == 0 and model.mini_batch_size % _SMALL_ATTENTION_BLOCK == 0:
        series.append([{"model.attention_block": _SMALL_ATTENTION_BLOCK}])
    if model.loss_block == 0 and model.vocab_size > _SMALL_LOSS_BLOCK:
        series.append([{"model.loss_block": _SMALL_LOSS_BLOCK}])
    if data > 1 and backend.sharding == "replicated":
        series.append([{"backend.sharding": "fsdp"}])
    smaller = [training.accum_steps * n for n in parts if microbatch // n % data == 0]
    if smaller:
        series.append([{"training.accum_steps": steps} for steps in smaller])
    return series, [n * backend.state_parallel for n in parts if n > data]


def _overrides(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


# For parts of Memory whose names say little.
_WORDS = {
    "kept_blocks": "kept by blocks",
    "block": "backward pass of a block",
    "gathered": "weights made whole for use",
    "learning": "learning while reading",
}


def _parts(memory: Memory) -> str:
    """The three largest parts of the peak."""
    parts = sorted(memory.at_peak().items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{_WORDS.get(name, name)} {gigabytes(size)}" for name, size in parts)
