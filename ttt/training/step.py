"""The network's training step: planned for the memory, compiled, fed with batches."""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ttt.core import compiling, tree
from ttt.core.batch import Batch
from ttt.infra.mesh import Layout, shard_batch
from ttt.knobs import Config
from ttt.model import loop
from ttt.model.loop import TrainState
from ttt.plan import hardware, memory_plan
from ttt.training.run import TrainingRun, stop_if_asked

logger = logging.getLogger(__name__)


def make_step(
    run: TrainingRun, layout: Layout
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """(state, this process's batch [B, T]) -> the next state and its metrics.

    The first call compiles `ttt.model.loop.make_train_step`.
    """
    config, compiled = run.config, None

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        nonlocal compiled
        with run.spent("data_wait"):
            batch = place(config, batch, layout)
        if compiled is None:
            with run.spent("compile"):
                compiled = compile_step(config, state, batch, layout)
            stop_if_asked(run, int(state.step))
        with run.spent("step"):
            state, metrics = compiled(state, batch)
            return state, {name: float(value) for name, value in metrics._asdict().items()}

    return step


def place(config: Config, batch: Batch, layout: Layout) -> Batch:
    """A process's [B, T] as microbatches [accum, B/accum, T], divided over the devices."""
    accum = config.training.accum_steps
    parts = jax.tree.map(lambda x: x.reshape(accum, -1, x.shape[-1]), batch)
    return shard_batch(layout.mesh, parts, batch_axis=1)


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
    """The training step for these shapes; what it takes is logged."""
    parameters = tree.count(state.model)
    logger.info(
        "%s: %.2fM parameters, %s mode, %s tokens per step; compiling the training step …",
        config.training.exp_name,
        parameters / 1e6,
        config.training.train_mode,
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
    if memory := compiled.memory_analysis():  # not every backend has it
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


def speed(config: Config, seconds: float) -> dict[str, float]:
    """Model TFLOP/s of a device in a step of so many seconds, and MFU if its peak is known."""
    kind = jax.local_devices()[0].device_kind
    return hardware.speed(config.model, config.training, seconds, jax.device_count(), kind)
