"""The network as `train` trains it: its start, its compiled step, its losses, what it saves."""

import logging
import time
from dataclasses import dataclass

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ttt import mixers
from ttt.core import compiling, tree
from ttt.core.batch import Batch
from ttt.dataloader.lm_dataset import Source
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.mesh import Layout, check_divides, shard_batch
from ttt.knobs import Config
from ttt.model import loop
from ttt.model.loop import Evaluator, Scores, TrainState
from ttt.model.transformer import MetaModel
from ttt.plan import hardware, memory_plan
from ttt.training.start import Start, as_items, find_start, warm_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network:
    """The learner of `runtime_mode=jax`: the network of `config.model`."""

    config: Config
    """With every `auto` chosen."""
    layout: Layout
    evaluator: Evaluator

    @classmethod
    def of(cls, config: Config) -> "Network":
        """On all devices; a UserError where they cannot share it, or where it cannot fit."""
        training = config.training
        layout = loop.lay_out(config)
        check_divides(layout.mesh, training.global_batch_size // training.accum_steps)
        config = fit_memory(config)
        return cls(config, layout, Evaluator(training, layout))

    @property
    def learns(self) -> bool:
        """Whether test-time training is on."""
        return self.config.training.train_mode == "meta"

    @property
    def window(self) -> int:
        """That of sliding attention, else all of the sequence."""
        return mixers.window(self.config.model) or self.config.training.seq_length

    def find_start(
        self, train: Source, evaluation: Source, checkpoints: Checkpoints, own: int | None
    ) -> Start:
        """From disk, or fresh weights."""
        return find_start(self.config, train, evaluation, checkpoints, own, self.layout)

    def warm_loss(self, start: Start, evaluation: Source) -> float | None:
        """Learning only if the parent does."""
        return warm_loss(self.config, start, evaluation, self.layout)

    def place(self, batch: Batch) -> Batch:
        """A host's [B, T] as microbatches [accum, B/accum, T], divided over the devices."""
        parts = jax.tree.map(
            lambda x: x.reshape(self.config.training.accum_steps, -1, x.shape[-1]), batch
        )
        return shard_batch(self.layout.mesh, parts, batch_axis=1)

    def compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        """The compiled step."""
        return compile_step(self.config, state, batch, self.layout)

    def items(self, state: TrainState) -> dict[str, PyTree]:
        """In the published layout."""
        return as_items(state)

    def score(self, model: MetaModel, batch: Batch, *, learn: bool = True) -> Scores:
        """On the devices."""
        return self.evaluator(model, batch, learn=learn)

    def speed(self, seconds: float) -> dict[str, float]:
        """Model TFLOP/s of a device, and MFU if its peak is known."""
        kind = jax.local_devices()[0].device_kind
        model, training = self.config.model, self.config.training
        return hardware.speed(model, training, seconds, jax.device_count(), kind)


def fit_memory(config: Config) -> Config:
    """`config` with every `auto` chosen for this machine's memory; a UserError if nothing fits."""
    fitted = memory_plan.fit(config, hardware.find_hardware(config))
    logger.info("%s", fitted.describe())
    if not fitted.fits:
        logger.warning("it may not fit. %s", memory_plan.advice(config, fitted))
    return fitted.config


def compile_step(
    config: Config, state: TrainState, batch: Batch, layout: Layout
) -> jax.stages.Compiled:
    """The training step for these shapes, with a word on what it takes."""
    parameters = tree.count(state.model)
    logger.info(
        "%s: %.2fM parameters, %s mode, %s tokens per step; compiling the training step …",
        *(config.training.exp_name, parameters / 1e6, config.training.train_mode),
        f"{batch.inputs.size:,}",
    )
    began = time.monotonic()
    step = jax.jit(
        loop.make_train_step(config.training, layout),
        donate_argnums=0,
        out_shardings=(layout.shardings(state), NamedSharding(layout.mesh, PartitionSpec())),
        compiler_options=compiling.options(),
    )
    compiled = step.lower(state, batch).compile()
    logger.info("compiled in %.0f s", time.monotonic() - began)
    if memory := compiled.memory_analysis():  # not every backend tells
        predicted = memory_plan.predict(config, hardware.find_hardware(config)).total
        actual = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        logger.info(
            "a step needs %.0f MB beside the %.0f MB of its state; %.0f MB were predicted in all, "
            "%+.0f %% of what XLA reserves",
            memory.temp_size_in_bytes / 1e6,
            memory.argument_size_in_bytes / 1e6,
            predicted / 1e6,
            100 * (predicted / actual - 1),
        )
    return compiled
