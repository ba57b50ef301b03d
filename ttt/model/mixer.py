"""What the network asks of anything that mixes tokens."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


class AbstractMixer(eqx.Module):
    """Mixes the tokens of one sequence, whole or piece by piece: the two agree.

    `state, y = step(state, x)` over consecutive pieces of a sequence, from `init_state`, gives the
    pieces of `__call__` on the whole. The state is a named pytree; nothing is hidden.

    One by one, tokens go into a room of fixed size behind a state: `room` or `open` make it, `put`
    fills it, `close` makes its tokens a part of the state. `open` with C tokens is `room`, C times
    `put`; `step` is `open` and `close`. What `put` writes is small and in place.
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

    @abstractmethod
    def open(self, state: PyTree, x: Float[Array, "C D"]) -> tuple[PyTree, Float[Array, "C D"]]:
        """The next C tokens, put into a room of C places that stays open."""

    @abstractmethod
    def room(self, state: PyTree, tokens: int) -> PyTree:
        """`state` with empty room for the next `tokens`."""

    @abstractmethod
    def put(
        self, opened: PyTree, x: Float[Array, "1 D"], place: Int[Array, ""]
    ) -> tuple[PyTree, Float[Array, "1 D"]]:
        """One token at a place of the room, from 0; it sees nothing behind that place."""

    @abstractmethod
    def close(self, opened: PyTree, tokens: int) -> PyTree:
        """The state after the first `tokens` of the room; what stands behind them is dropped."""
