"""How much a text repeats itself, in its own tokens. No JAX."""

import numpy as np
from jaxtyping import Int

NGRAMS = (1, 2, 4, 8)
SPAN = 64


def distinct(tokens: Int[np.ndarray, " N"], n: int) -> float:
    """Share of n-grams that are different (distinct-n, Li et al. 2016); 1 where there is none."""
    grams = [tuple(tokens[i : i + n].tolist()) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated(tokens: Int[np.ndarray, " N"], span: int = SPAN) -> float:
    """Share of tokens that occur among the `span` before them (rep-w, Welleck et al. 2020)."""
    last: dict[int, int] = {}
    hits = 0
    for place, token in enumerate(tokens.tolist()):
        hits += token in last and place - last[token] <= span
        last[token] = place
    return hits / max(1, len(tokens) - 1)


def longest_repeat(tokens: Int[np.ndarray, " N"]) -> int:
    """Tokens of the longest stretch that occurs twice (overlaps count); takes N log² N steps.

    Equal n-grams have equal numbers. Numbers of grams of n and of m tokens give those of n + m.
    """

    def joined(first: np.ndarray, size: int, second: np.ndarray) -> np.ndarray:
        """Numbers of the grams of `size` tokens and then those of `second`, at every place."""
        count = max(0, len(second) - size)
        pairs = first[:count].astype(np.int64) * (len(tokens) + 1) + second[size:]
        return np.unique(pairs, return_inverse=True)[1]

    def repeats(grams: np.ndarray) -> bool:
        return len(set(grams.tolist())) < len(grams)

    doubled = [np.unique(tokens, return_inverse=True)[1]]  # grams of 1, 2, 4, … tokens
    while repeats(doubled[-1]):
        doubled.append(joined(doubled[-1], 2 ** (len(doubled) - 1), doubled[-1]))
    grams, size = np.zeros(len(tokens) + 1, int), 0
    for power in reversed(range(len(doubled) - 1)):
        longer = joined(grams, size, doubled[power])
        if repeats(longer):
            grams, size = longer, size + 2**power
    return size
