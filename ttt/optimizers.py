"""The outer optimizer and its schedule (METHOD.md section 4) from their configuration."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, PyTree
from optax import contrib

from ttt.core import tree
from ttt.knobs import OptimizerOuterConfig

_MUON_RMS = 0.2


def make_schedule(config: OptimizerOuterConfig) -> optax.Schedule:
    """Learning rate by step: linear from init_lr to lr in lr_warmup_steps, then as `schedule` says.

    `cosine`, as published: at once down to end_lr, reached at lr_decay_steps. `wsd`: lr up to
    lr_decay_start, then down to end_lr at lr_decay_steps by 1 - √x, the shape that Hägele et al.
    2024 (arXiv 2405.18392) measured as the best of several; x: the part of the decay that is over.
    Warm-up, stable part and decay by this name: Hu et al. 2024 (MiniCPM, arXiv 2404.06395).
    """
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=config.init_lr,
            peak_value=config.lr,
            warmup_steps=config.lr_warmup_steps,
            decay_steps=config.lr_decay_steps,
            end_value=config.end_lr,
        )
    warmup, start = config.lr_warmup_steps, config.lr_decay_start
    decay_steps = max(1, config.lr_decay_steps - start)

    def decay(since_start: ArrayLike) -> ArrayLike:
        over = jnp.clip(since_start / decay_steps, 0.0, 1.0)
        return config.lr - (config.lr - config.end_lr) * jnp.sqrt(over)

    rise = optax.linear_schedule(config.init_lr, config.lr, warmup)
    return optax.join_schedules([rise, optax.constant_schedule(config.lr), decay], [warmup, start])


def make_optimizer(config: OptimizerOuterConfig) -> optax.GradientTransformation:
    """Clip by global norm, then `optimizer_type`; first moments in float32 or bfloat16.

    `muon`: the matrices of the blocks by Muon, all else (embedding, head, norms, biases) by AdamW.
    """
    clip = config.clip_gradient
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        _adamw(config)
        if config.optimizer_type == "adamw"
        else optax.partition({"adamw": _adamw(config), "muon": _muon(config)}, _by_muon_or_adamw),
    )


def _moment_type(config: OptimizerOuterConfig) -> DTypeLike:
    return jnp.bfloat16 if config.bf16_momentum else jnp.float32


def _adamw(config: OptimizerOuterConfig) -> optax.GradientTransformation:
    def decayed(params: PyTree) -> PyTree[bool]:
        embedding = tree.select(params, ["**.wte.**"])
        return jax.tree.map(lambda is_embedding: config.emb_wd or not is_embedding, embedding)

    return optax.adamw(
        make_schedule(config),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decayed,
        mu_dtype=_moment_type(config),
    )


# ---- Muon ------------------------------------------------------------------------------


def _muon(config: OptimizerOuterConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) with the update's size and decay of Liu et al. 2025.

    Nesterov momentum 0.95, five Newton-Schulz steps for each matrix of each layer, then times
    0.2 · √max(in, out): the root mean square of AdamW's updates, so that one `lr` and one
    `weight_decay` serve both (arXiv 2502.16982).
    """

    def axes(matrices: PyTree) -> PyTree:
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), matrices)

    def sized(updates: PyTree, params: PyTree | None) -> PyTree:
        return jax.tree.map(lambda x: _MUON_RMS * math.sqrt(max(x.shape[-2:])) * x, updates)

    return optax.chain(
        contrib.scale_by_muon(mu_dtype=_moment_type(config), weight_dimension_numbers=axes),
        optax.stateless(sized),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(make_schedule(config)),
    )


def _by_muon_or_adamw(params: PyTree) -> PyTree[str]:
    """Which of the two trains each parameter."""
    labels = {
        name: "muon" if "_blocks." in name and _axes_of_one_layer(name, leaf) == 2 else "adamw"
        for name, leaf in tree.named_leaves(params).items()
    }
    return tree.with_leaves(params, labels)


def _axes_of_one_layer(name: str, leaf: Array) -> int:
    """Axes of a block's weight without that of the layers, which a stack's leaves have first."""
    return leaf.ndim - (not tree.is_single(name))
