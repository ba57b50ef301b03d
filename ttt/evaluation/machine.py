"""Where runs are measured: devices, and the models and engines that lie on them."""

from collections import OrderedDict

from jax.sharding import Mesh

from ttt.inference.engine import Engine
from ttt.infra.mesh import replicate
from ttt.model.trained import TrainedModel
from ttt.model.transformer import MetaModel

_KEPT = 2
"""Runs on the devices at once: the measured one, and one that judges it."""


class Machine:
    """Puts runs on the devices when they are asked for, and lets old ones go."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._models: OrderedDict[str, MetaModel] = OrderedDict()
        self._engines: dict[tuple[str, bool, int], Engine] = {}

    def model(self, run: TrainedModel, context: int) -> MetaModel:
        """The run for sequences of `context` tokens, whole on every device."""
        return run.at(context, self._weights(run))

    def engine(self, run: TrainedModel, context: int, *, learn: bool = True) -> Engine:
        """An engine for sequences of up to `context` tokens, compiled once for its run."""
        learn = learn and run.learns
        model = self._weights(run)
        # Without full attention an engine serves every length.
        key = (run.name, learn, context if run.window is None else 0)
        if key not in self._engines:
            self._engines[key] = Engine(model, run.training, context=context, learn=learn)
        return self._engines[key]

    def _weights(self, run: TrainedModel) -> MetaModel:
        if run.name not in self._models:
            while len(self._models) >= _KEPT:
                name, _ = self._models.popitem(last=False)
                self._engines = {k: v for k, v in self._engines.items() if k[0] != name}
            self._models[run.name] = replicate(self.mesh, run.model)
        self._models.move_to_end(run.name)
        return self._models[run.name]


def in_batches(count: int, most: int) -> list[list[int]]:
    """Numbers 0 … count − 1 in batches of one size, the last filled up with its last number.

    One size, so that one compiled program serves; as few as `most` allows, and as even.
    """
    batches = -(-count // most)
    size = -(-count // batches)
    rows = [min(i, count - 1) for i in range(batches * size)]
    return [rows[i : i + size] for i in range(0, len(rows), size)]
