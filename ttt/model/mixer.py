"""What the network asks of anything that mixes tokens."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


class AbstractMixer(eqx.Module):
    """Mixes the tokens of one sequence. Three ways of reading it agree.

    Whole: `mixer(x)`. Piece by piece: `state, y = step(state, x)` over consecutive pieces, from
    `init_state`. Token by token behind a kept state: `open` gives the state free slots, `put` fills
    them in order, and `close(opened, n)` gives the state after the first n. A slot may be filled
    again; what is behind it must then be filled again too. The kept state stays as it is: one can
    go on from it twice.

    States are named pytrees; nothing is hidden. A mixer of attention writes keys and values into
    slots behind its cache. A recurrence keeps its start state and, per slot, what its chunk formula
    needs of the token (docs/design.md): neither needs the states between two tokens.
    """

    @abstractmethod
    def init_state(self, context: int, dtype: jnp.dtype) -> PyTree:
        """The state before the first token of a sequence of at most `context` tokens."""

    @abstractmethod
    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The whole sequence at once."""

    @abstractmethod
    def prefill(self, x: Float[Array, "T D"], context: int) -> tuple[PyTree, Float[Array, "T D"]]:
        """The first T tokens of a sequence of at most `context`, and the state after them.

        As `step` from `init_state`, for long stretches; not differentiable in reverse mode.
        """

    @abstractmethod
    def step(self, state: PyTree, x: Float[Array, "C D"]) -> tuple[PyTree, Float[Array, "C D"]]:
        """The next C tokens."""

    @abstractmethod
    def open(self, state: PyTree, slots: int) -> PyTree:
        """The state with empty slots for the next tokens behind it."""

    @abstractmethod
    def put(
        self, opened: PyTree, x: Float[Array, "N D"], slot: Int[Array, ""]
    ) -> tuple[PyTree, Float[Array, "N D"]]:
        """N tokens into the slots from `slot` on (from 0); they see nothing behind their own."""

    @abstractmethod
    def close(self, opened: PyTree, tokens: int) -> PyTree:
        """The state after the tokens in the first `tokens` slots; those behind are dropped."""
