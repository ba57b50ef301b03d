"""The bins in which losses by position are told. No JAX."""

import numpy as np
from jaxtyping import Int

_FIRST_BIN = 16
"""Tokens of the first logarithmic bin; there are two to every doubling after it."""


def log_edges(length: int) -> Int[np.ndarray, " edges"]:
    """Borders of bins that widen with position: 0, 16, 23, 32, 45, 64, … , length.

    The same for every length but for the last, so that bins of several contexts can be compared.
    """
    grid = np.round(_FIRST_BIN * 2 ** np.arange(0, 40, 0.5)).astype(int)
    return np.concatenate([[0], grid[grid < length], [length]])
