"""The outer loop: one training step over a batch, and the evaluation of a batch."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from ttt.core import compiling, tree
from ttt.core.batch import Batch
from ttt.core.scan import mean_over
from ttt.infra.mesh import DATA_AXIS, Layout, device_mesh, divide_batch
from ttt.knobs import Config, TrainingConfig
from ttt.model.inner_loop import InnerRule, warmup_scale
from ttt.model.transformer import Gather, Learning, MetaModel, SequenceLoss, as_it_is
from ttt.optimizers import make_optimizer, make_schedule
from ttt.plan import sharding


def lay_out(config: Config) -> Layout:
    """Where a run's state and batches lie on all devices; a UserError where they cannot."""
    rules = sharding.rules(config.model, config.backend.sharding)
    layout = Layout(device_mesh(config.backend.state_parallel), rules)
    layout.check(jax.eval_shape(lambda: init_state(config)))
    return layout


class TrainState(NamedTuple):
    """All that a step changes."""

    model: MetaModel
    opt_state: PyTree
    step: Int[Array, ""]
    """Outer steps taken."""


class StepMetrics(NamedTuple):
    """Of one outer step."""

    loss: Float[Array, ""]
    """Mean over the batch before the step, in nats per token."""
    gradient_norm: Float[Array, ""]
    """√(Σg² + 1e−5) of the outer gradient, before clipping."""
    learning_rate: Float[Array, ""]
    inner_rate: Float[Array, ""]
    """η · m(s)."""
    inner_gradient_norm: Float[Array, ""]
    """Mean over chunks and sequences, before clipping."""
    first_chunk_loss: Float[Array, ""]
    last_chunk_loss: Float[Array, ""]


def inner_scale(training: TrainingConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """m(s), what multiplies the inner learning rate at outer step s; evaluation uses 1."""
    return warmup_scale(
        step,
        rate=training.optimizer_inner.lr,
        initial=training.ilr_init,
        warmup_steps=training.ilr_warmup_steps,
    )


def batch_losses(
    model: MetaModel,
    batch: Batch,
    training: TrainingConfig,
    scale: Float[Array, ""] | float,
    gather: Gather = as_it_is,
) -> SequenceLoss:
    """The losses of B sequences [B, T], as `train_mode` says; `scale` is that of the inner rate."""
    if training.train_mode == "pretrain":
        return model.loss(batch, gather)
    inner = training.optimizer_inner
    learning = Learning(
        training.spec_inner,
        InnerRule(inner.lr * scale, inner.clip_gradient),
        training.inner_remat_freq,
        training.inner_gradient,
    )
    return model.loss_while_learning(batch, learning, gather)


def init_state(config: Config) -> TrainState:
    """A fresh model from `model_seed`, with its optimizer's state."""
    model = MetaModel(config.model, key=jax.random.key(config.training.model_seed))
    return start_from(model, config.training)


def start_from(
    model: MetaModel, training: TrainingConfig, layout: Layout | None = None
) -> TrainState:
    """A model at step 0 with a fresh optimizer, whose moments are made where they are to lie.

    layout: None: the default device.
    """

    def moments(model: MetaModel) -> PyTree:
        trained = eqx.filter(model, tree.select(model, training.spec_outer))
        return make_optimizer(training.optimizer_outer).init(trained)

    step = jnp.zeros((), jnp.int32)
    if layout is None:
        return TrainState(model, moments(model), step)
    shardings = layout.shardings(jax.eval_shape(moments, model))
    return TrainState(model, jax.jit(moments, out_shardings=shardings)(model), layout.place(step))


def make_gradient(
    training: TrainingConfig, layout: Layout | None = None
) -> Callable[[MetaModel, Batch, Float[Array, ""]], tuple[SequenceLoss, MetaModel]]:
    """(model, batch [accum, B, T], scale) -> mean losses, and the gradient of what is trained.

    With a layout whose `data` axis has several devices, each differentiates the loss of its own
    sequences on its own, and the gradients are averaged once in the end: nothing that belongs to a
    sequence, its fast weights above all, ever leaves its device.
    """

    def local(
        model: MetaModel, batch: Batch, scale: Float[Array, ""], gather: Gather
    ) -> tuple[SequenceLoss, MetaModel]:
        trained, frozen = eqx.partition(model, tree.select(model, training.spec_outer))

        def batch_loss(trained: MetaModel, batch: Batch) -> tuple[Float[Array, ""], SequenceLoss]:
            model = eqx.combine(trained, frozen)
            losses = batch_losses(model, batch, training, scale, gather)
            return jnp.mean(losses.loss), jax.tree.map(lambda x: jnp.mean(x, axis=0), losses)

        (_, losses), gradient = mean_over(
            lambda batch: jax.value_and_grad(batch_loss, has_aux=True)(trained, batch), batch
        )
        return losses, gradient

    if layout is None or layout.data == 1:
        return lambda model, batch, scale: local(model, batch, scale, as_it_is)

    def shared(
        model: MetaModel, batch: Batch, scale: Float[Array, ""]
    ) -> tuple[SequenceLoss, MetaModel]:
        losses, gradient = local(model, batch, scale, layout.whole)
        return jax.lax.pmean(losses, DATA_AXIS), layout.mean_gradient(gradient)

    def gradient(
        model: MetaModel, batch: Batch, scale: Float[Array, ""]
    ) -> tuple[SequenceLoss, MetaModel]:
        trained = eqx.filter(model, tree.select(model, training.spec_outer))
        return jax.shard_map(
            shared,
            mesh=layout.mesh,
            in_specs=(layout.data_specs(model), PartitionSpec(None, DATA_AXIS), PartitionSpec()),
            out_specs=(PartitionSpec(), layout.data_specs(trained)),
            axis_names={DATA_AXIS},
            check_vma=False,  # it would sum gradients wherever they meet, inside of every loop
        )(model, batch, scale)

    return gradient


def make_train_step(
    training: TrainingConfig, layout: Layout | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """One outer step over a batch [accum, B, T], to be jitted with its state donated.

    layout: where state and batch lie; None: on one device.
    """
    optimizer = make_optimizer(training.optimizer_outer)
    schedule = make_schedule(training.optimizer_outer)
    inner = training.optimizer_inner
    mean_gradient = make_gradient(training, layout)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        scale = inner_scale(training, state.step)
        trained, frozen = eqx.partition(state.model, tree.select(state.model, training.spec_outer))
        losses, gradient = mean_gradient(state.model, batch, scale)
        gradient_norm = jnp.sqrt(tree.squared_norm(gradient) + 1e-5)
        # optax mixes integer counts with floats, which our strict promotion (in tests) refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
            learning_rate = schedule(optax.tree.get_all_with_path(state.opt_state, "count")[-1][1])
        new = (optax.apply_updates(trained, updates), opt_state)
        # A step whose numbers are not finite changes nothing, the optimizer's counts included.
        good = jnp.isfinite(losses.loss) & jnp.isfinite(gradient_norm)
        trained, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), new, (trained, state.opt_state)
        )
        model = eqx.combine(trained, frozen)
        metrics = StepMetrics(
            loss=losses.loss,
            gradient_norm=gradient_norm,
            learning_rate=jnp.asarray(learning_rate, jnp.float32),
            inner_rate=inner.lr * scale,
            inner_gradient_norm=jnp.mean(losses.gradient_norms),
            first_chunk_loss=losses.chunk_losses[0],
            last_chunk_loss=losses.chunk_losses[-1],
        )
        return TrainState(model, opt_state, state.step + 1), metrics

    return train_step


class Scores(NamedTuple):
    """Of the sequences of one batch."""

    loss: Float[np.ndarray, " B"]
    """Mean over chunks of the masked mean, as in training."""
    token_nll: Float[np.ndarray, "B T"]
    """−log p of every target, in nats, masked or not."""
    loss_mask: Float[np.ndarray, "B T"]
    """1 where a target counts."""


def make_scores(
    training: TrainingConfig, layout: Layout
) -> Callable[[MetaModel, Batch, Float[Array, ""]], tuple[Float[Array, " B"], Float[Array, "B T"]]]:
    """(model, batch [B, T], scale) -> the sequences' losses and the NLLs of their tokens.

    Each device along `data` scores its own sequences.
    """

    def local(
        model: MetaModel, batch: Batch, scale: Float[Array, ""], gather: Gather
    ) -> tuple[Array, Array]:
        losses = batch_losses(model, batch, training, scale, gather)
        return losses.loss, losses.token_nll

    if layout.data == 1:
        return lambda model, batch, scale: local(model, batch, scale, as_it_is)

    def scores(model: MetaModel, batch: Batch, scale: Float[Array, ""]) -> tuple[Array, Array]:
        return jax.shard_map(
            partial(local, gather=layout.whole),
            mesh=layout.mesh,
            in_specs=(layout.data_specs(model), PartitionSpec(DATA_AXIS), PartitionSpec()),
            out_specs=PartitionSpec(DATA_AXIS),
            axis_names={DATA_AXIS},
            check_vma=False,
        )(model, batch, scale)

    return scores


Score = Callable[..., Scores]
"""(model, batch, learn=…) -> the scores of the batch, as `Evaluator` gives them."""


class Evaluator:
    """Scores batches, learning or not. Every process passes the same batch."""

    def __init__(self, training: TrainingConfig, layout: Layout):
        """layout: where models and batches lie."""
        self._mesh = layout.mesh
        self._batch_size = -(-training.eval_batch_size // layout.data) * layout.data

        # The inner rate is an argument, so that learning on and off are one compiled program.
        self._score = jax.jit(
            make_scores(training, layout),
            out_shardings=NamedSharding(layout.mesh, PartitionSpec()),
            compiler_options=compiling.options(),
        )

    def __call__(self, model: MetaModel, batch: Batch, *, learn: bool = True) -> Scores:
        """Scores of a batch [b, T] of at most `eval_batch_size` sequences.

        It is filled up to a size that the devices can share evenly.
        """
        sequences = len(batch.inputs)
        missing = self._batch_size - sequences
        batch = jax.tree.map(
            lambda x: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]), batch
        )
        loss, nll = self._score(model, divide_batch(self._mesh, batch), jnp.float32(learn))
        loss, nll = np.asarray(loss)[:sequences], np.asarray(nll)[:sequences]
        return Scores(loss, nll, np.asarray(batch.loss_mask, np.float32)[:sequences])
