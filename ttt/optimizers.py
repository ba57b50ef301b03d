"""The outer optimizer (METHOD.md section 4) from its configuration."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ttt.core.tree import select
from ttt.knobs import OptimizerOuterConfig


def make_schedule(config: OptimizerOuterConfig) -> optax.Schedule:
    """Linear warm-up from init_lr to lr, then a cosine to end_lr at lr_decay_steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.init_lr,
        peak_value=config.lr,
        warmup_steps=config.lr_warmup_steps,
        decay_steps=config.lr_decay_steps,
        end_value=config.end_lr,
    )


def make_optimizer(config: OptimizerOuterConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; the first moment in float32 or bfloat16."""

    def decayed(params: PyTree) -> PyTree[bool]:
        embedding = select(params, ["**.wte.**"])
        return jax.tree.map(lambda is_embedding: config.emb_wd or not is_embedding, embedding)

    clip = config.clip_gradient
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(
            make_schedule(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decayed,
            mu_dtype=jnp.bfloat16 if config.bf16_momentum else jnp.float32,
        ),
    )
