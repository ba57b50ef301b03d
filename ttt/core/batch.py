"""The one type that the loader and the model share."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

AnyArray = jax.Array | np.ndarray
"""Tokens come from the loader in NumPy and reach the model as they are, or traced."""


class Batch(NamedTuple):
    """Tokens to read and to predict, of one sequence or with any leading axes.

    A NamedTuple, so a pytree to JAX; the loader fills it with NumPy arrays.
    """

    inputs: Int[AnyArray, "*lead T"]
    targets: Int[AnyArray, "*lead T"]
    """The token after each input."""
    loss_mask: Bool[AnyArray, "*lead T"]
    """False where the target starts another document (`bos_token_id`): it cannot be foreseen."""


def from_tokens(tokens: Int[AnyArray, "*lead tokens"], bos_token_id: int) -> Batch:
    """Cut T+1 tokens into T inputs and T targets; targets equal to `bos_token_id` do not count."""
    tokens = tokens.astype(np.int32)
    targets = tokens[..., 1:]
    return Batch(tokens[..., :-1], targets, targets != bos_token_id)
