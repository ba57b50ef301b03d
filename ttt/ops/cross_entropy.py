"""Next-token loss from hidden states, without logits of the whole sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ttt.core.batch import AnyArray
from ttt.core.precision import at_least_float32


def token_nll(
    hidden: Float[Array, "T D"], head: Float[Array, "D V"], targets: Int[AnyArray, " T"]
) -> Float[Array, " T"]:
    """−log p of each target in nats; logits in the dtype of `hidden`, log-softmax in float32."""
    logits = at_least_float32(hidden @ head.astype(hidden.dtype))
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def token_nll_in_blocks(
    hidden: Float[Array, "T D"], head: Float[Array, "D V"], targets: Int[AnyArray, " T"], block: int
) -> Float[Array, " T"]:
    """`token_nll` with the logits of `block` tokens at a time; T must be a multiple of `block`."""

    @jax.checkpoint
    def one(part: tuple[Array, Array]) -> Array:
        return token_nll(part[0], head, part[1])

    parts = (hidden.reshape(-1, block, hidden.shape[-1]), targets.reshape(-1, block))
    return jax.lax.map(one, parts).reshape(-1)


def masked_mean(values: Float[Array, " T"], mask: Bool[AnyArray, " T"]) -> Float[Array, ""]:
    """Mean over the positions where `mask` holds; 0 where it holds nowhere."""
    count = jnp.sum(mask).astype(values.dtype)
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(count, 1)
