"""How devices share a training step, as numbers and as rules (`ttt.infra.mesh.Rule`). No JAX.

Along `state` every product of a block is split as its neighbours need it: by columns into heads and
MLP units, then by rows back to the width, with one sum over devices behind each. Along `data`, with
`fsdp`, the other axis of each matrix is divided, for storage alone: it is whole where it is used.
Each weight says itself which axes divide it (`ttt.mixers.Weight`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from ttt.errors import UserError
from ttt.knobs import Config, ModelConfig, TrainingConfig
from ttt.mixers import Weight
from ttt.plan.parameters import Parameter, parameters


def rules(model: ModelConfig, sharding: str) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """The rules of `backend.sharding`: (glob, mesh axes), for every parameter that is divided.

    One rule serves a weight of a block in every stack, on disk too. Norm gains have none: they are
    small.
    """
    axes = {
        f"**.{parameter.name.rpartition('_blocks.')[2]}": _axes(parameter.weight, sharding)
        for parameter in parameters(model)
        if parameter.weight.axes
    }
    return tuple(axes.items())


def _axes(weight: Weight, sharding: str) -> tuple[str | None, ...]:
    return tuple(None if a == "data" and sharding != "fsdp" else a for a in weight.axes)


@dataclass(frozen=True)
class DeviceSharding:
    """Devices that share a training step, and how: `backend.sharding` and `state_parallel`."""

    devices: int = 1
    sharding: str = "replicated"
    state_parallel: int = 1

    @classmethod
    def of(cls, config: Config, devices: int) -> "DeviceSharding":
        """So many devices, sharing as the configuration says."""
        return cls(devices, config.backend.sharding, config.backend.state_parallel)

    @property
    def data(self) -> int:
        """Those among which sequences are divided; UserError unless `state_parallel` divides."""
        if self.devices % self.state_parallel:
            raise UserError(
                f"backend.state_parallel={self.state_parallel} does not divide {self.devices} "
                "devices: choose a divisor"
            )
        return self.devices // self.state_parallel

    def sequences(self, training: TrainingConfig) -> int:
        """Those of a microbatch on one device; UserError if the devices do not divide it."""
        microbatch = training.global_batch_size // training.accum_steps
        if self.devices < 1 or microbatch % self.data:
            raise UserError(
                f"devices={self.devices}: they share {microbatch} sequences at a time "
                "(global_batch_size / accum_steps); take a number of devices that divides it, or "
                "change the batch"
            )
        return microbatch // self.data

    def held(self, parameters: Iterable[Parameter], *, whole: bool = False) -> int:
        """Numbers of these that each device holds; `whole`: while it uses them."""
        sizes = {"data": self.data, "state": self.state_parallel, None: 1}
        sharding = "replicated" if whole else self.sharding
        return sum(
            parameter.size // prod(sizes[axis] for axis in _axes(parameter.weight, sharding))
            for parameter in parameters
        )


ONE_DEVICE = DeviceSharding()
