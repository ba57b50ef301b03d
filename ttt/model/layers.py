"""Layers with published names; weights are [in, out], cast to their input's dtype where used."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ttt.core.batch import AnyArray
from ttt.core.precision import at_least_float32


def normal(
    key: PRNGKeyArray, shape: tuple[int, ...], scale: float, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """Draws from N(0, scale²), in float32 first: a seed means the same weights in every dtype."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Linear(eqx.Module):
    """x · weight, plus a bias (which starts at 0) if there is one."""

    weight: Float[Array, "in out"]
    bias: Float[Array, " out"] | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        scale: float,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        self.weight = normal(key, (inputs, outputs), scale, dtype)
        self.bias = jnp.zeros(outputs, dtype) if bias else None

    def __call__(self, x: Float[Array, "*lead in"]) -> Float[Array, "*lead out"]:
        """In the dtype of x."""
        y = x @ self.weight.astype(x.dtype)
        if self.bias is None:
            return y
        return y + self.bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Embedding(eqx.Module):
    """One row per token id."""

    weight: Float[Array, "V D"]

    def __init__(self, rows: int, width: int, *, scale: float, dtype: jnp.dtype, key: PRNGKeyArray):
        self.weight = normal(key, (rows, width), scale, dtype)

    def __call__(self, ids: Int[AnyArray, " T"], dtype: jnp.dtype) -> Float[Array, "T D"]:
        """Rows looked up, then cast to `dtype`."""
        return self.weight[ids].astype(dtype)


class RMSNorm(eqx.Module):
    """gain · x · rsqrt(mean(x²) + eps) over the last axis, computed in at least float32."""

    weight: Float[Array, " D"]
    eps: float = eqx.field(static=True)

    def __init__(self, width: int, *, eps: float, dtype: jnp.dtype):
        self.weight = jnp.ones(width, dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """Same shape and dtype as x."""
        wide = at_least_float32(x)
        gain = self.weight.astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (gain * wide * scale).astype(x.dtype)


class SwiGLU(eqx.Module):
    """w2(silu(x·w1) ⊙ (x·w3)) (arXiv 2002.05202)."""

    w1: Linear
    w2: Linear
    w3: Linear

    def __init__(
        self, width: int, inner: int, *, scale: float, dtype: jnp.dtype, key: PRNGKeyArray
    ):
        gate, down, up = jax.random.split(key, 3)
        self.w1 = Linear(width, inner, scale=scale, dtype=dtype, key=gate)
        self.w2 = Linear(inner, width, scale=scale, dtype=dtype, key=down)
        self.w3 = Linear(width, inner, scale=scale, dtype=dtype, key=up)

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """In the dtype of x."""
        return self.w2(self.units(x))

    def units(self, x: Float[Array, "*lead in"]) -> Float[Array, "*lead F"]:
        """What the hidden units say, before the down-projection."""
        return jax.nn.silu(self.w1(x)) * self.w3(x)


def for_compute[T: PyTree](module: T, dtype: jnp.dtype) -> T:
    """`module` with all weights but norm gains in `dtype`, as they are cast to when used."""

    def cast(part: PyTree) -> PyTree:
        if isinstance(part, RMSNorm):
            return part
        return jax.tree.map(lambda weight: weight.astype(dtype), part)

    return jax.tree.map(cast, module, is_leaf=lambda part: isinstance(part, RMSNorm))
