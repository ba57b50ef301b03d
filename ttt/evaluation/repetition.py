"""How much a text repeats itself, in its own tokens. No JAX."""

from collections.abc import Sequence

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


def longest_repeat(tokens: Sequence[int] | Int[np.ndarray, " N"]) -> int:
    """Tokens of the longest stretch that occurs twice (overlaps count); by a suffix automaton.

    Time and memory grow with N, not with N².
    """
    lengths, links = [0], [-1]
    edges: list[dict[int, int]] = [{}]
    last = longest = 0
    for token in map(int, tokens):
        new = len(lengths)
        lengths.append(lengths[last] + 1)
        links.append(0)
        edges.append({})
        state = last
        while state != -1 and token not in edges[state]:
            edges[state][token] = new
            state = links[state]
        if state != -1:
            target = edges[state][token]
            if lengths[target] == lengths[state] + 1:
                links[new] = target
            else:
                copy = len(lengths)
                lengths.append(lengths[state] + 1)
                links.append(links[target])
                edges.append(dict(edges[target]))
                while state != -1 and edges[state].get(token) == target:
                    edges[state][token] = copy
                    state = links[state]
                links[target] = links[new] = copy
        # The longest suffix of what has been read that occurred before ends here too.
        longest = max(longest, lengths[links[new]])
        last = new
    return longest
