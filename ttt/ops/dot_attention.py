"""Softmax attention of one sequence, full and within a sliding window.

Shapes: queries [Tq, H, K], keys and values [Tk, H, K]. Scores are scaled by 1/√K; softmax runs in
float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ttt.core.precision import at_least_float32

Heads = Float[Array, "Tq H K"]
Keys = Float[Array, "Tk H K"]


def masked(q: Heads, k: Keys, v: Keys, mask: Bool[Array, "Tq Tk"]) -> Heads:
    """Attention where `mask` allows it; every query must see a key."""
    wide = at_least_float32(q[:0]).dtype
    scores = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights.astype(v.dtype), v)


def causal(q: Heads, k: Heads, v: Heads) -> Heads:
    """Each query sees the keys up to its own position."""
    return masked(q, k, v, jnp.tri(q.shape[0], dtype=bool))


def window_mask(queries: int, window: int, seen: Int[Array, ""] | int) -> Bool[Array, "C keys"]:
    """[C, W + C]: which of W cached and C new keys each of C new queries sees.

    Query i stands at key slot W + i and sees the W slots that end there. Only the last `seen`
    cached slots hold keys.
    """
    slots = jnp.arange(window + queries, dtype=jnp.int32)
    query, key = slots[window:, None], slots[None, :]
    return (key > query - window) & (key <= query) & (key >= window - jnp.minimum(seen, window))


def sliding_window_naive(q: Heads, k: Heads, v: Heads, window: int) -> Heads:
    """Query t sees keys t − window < j ≤ t; one mask over all pairs."""
    query, key = jnp.arange(q.shape[0])[:, None], jnp.arange(q.shape[0])[None, :]
    return masked(q, k, v, (key <= query) & (key > query - window))


def sliding_window(q: Heads, k: Heads, v: Heads, window: int, block: int) -> Heads:
    """Query t sees keys t − window < j ≤ t, without work outside the band.

    `block` queries at a time meet the `window + block` keys that they can see.

    The sequence's length must be a multiple of `block`, or at most `window`, where the band is the
    causal triangle.
    """
    length = q.shape[0]
    if length <= min(window, block):
        return causal(q, k, v)
    padding = ((window, 0), (0, 0), (0, 0))
    k, v = jnp.pad(k, padding), jnp.pad(v, padding)

    # The scores of a block are recomputed in the backward pass: kept, they would be length ·
    # (window + block).
    @jax.checkpoint
    def attend(start: Int[Array, ""]) -> Float[Array, "B H K"]:
        def band(x: Array, size: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size)

        mask = window_mask(block, window, start)
        return masked(band(q, block), band(k, window + block), band(v, window + block), mask)

    return jax.lax.map(attend, jnp.arange(0, length, block, dtype=jnp.int32)).reshape(q.shape)
