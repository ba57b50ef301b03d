"""Rotary position embedding (arXiv 2104.09864) on interleaved pairs."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ttt.core.precision import at_least_float32


def rotate(
    x: Float[Array, "T H K"], positions: Int[Array, " T"], theta: float
) -> Float[Array, "T H K"]:
    """Turn each pair (x[2i], x[2i+1]) by position · theta^(−2i/K), in at least float32."""
    head_dim = x.shape[-1]
    wide = at_least_float32(x)
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=wide.dtype) / head_dim)
    angles = jnp.outer(positions.astype(wide.dtype), frequencies)[:, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
