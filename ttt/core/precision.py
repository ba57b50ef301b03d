"""Three dtypes and the borders where they change.

Parameters are stored in `param`, matrix products run in `compute` (weights are cast where they are
used), fast weights and the test-time step live in `state`. Statistics, softmax and losses take at
least float32, whatever the inputs.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from ttt.knobs import ModelConfig

# fp64 is for tests, under jax_enable_x64; no configuration passes with it.
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp64": jnp.float64}


@dataclass(frozen=True)
class Precision:
    """The dtypes of stored parameters, matrix products, and fast weights."""

    param: jnp.dtype
    compute: jnp.dtype
    state: jnp.dtype

    @classmethod
    def of(cls, model: ModelConfig) -> "Precision":
        """The dtypes that a model's configuration names."""
        names = (model.param_dtype, model.compute_dtype, model.state_dtype)
        return cls(*(jnp.dtype(DTYPES[name]) for name in names))


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Half precision to float32; float32 and float64 stay as they are."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
