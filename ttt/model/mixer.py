"""What the network asks of anything that mixes tokens."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class AbstractMixer(eqx.Module):
    """Mixes the tokens of one sequence, whole or piece by piece: the two agree.

    `state, y = step(state, x)` over consecutive pieces of a sequence, from `init_state`, gives the
    pieces of `__call__` on the whole. The state is a named pytree; nothing is hidden.
    """

    @abstractmethod
    def init_state(self, context: int, dtype: jnp.dtype) -> PyTree:
        """The state before the first token of a sequence of at most `context` tokens."""

    @abstractmethod
    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The whole sequence at once."""

    @abstractmethod
    def step(self, state: PyTree, x: Float[Array, "C D"]) -> tuple[PyTree, Float[Array, "C D"]]:
        """The next C tokens."""
