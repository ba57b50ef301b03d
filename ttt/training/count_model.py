"""A smoothed count model of the next token: what counting alone can foresee. NumPy, no JAX.

n-grams with Witten and Bell's interpolation (IEEE Trans. Inf. Theory 37(4), 1991): with c the
counts, c(h) those of a context h, and k(h) how many different tokens were seen after it,

    p(w | h) = (c(h, w) + k(h) · p(w | h′)) / (c(h) + k(h)),

h′ being h without its oldest token. A context that was never seen passes its question on to h′, and
the unigram falls back on 1 / V. So every probability is above 0, and each row sums to 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

ORDER = 2
"""Tokens of the longest n-gram, unless another is given: a pair."""


class Table(NamedTuple):
    """Counts of what occurred, in ascending order of the keys."""

    keys: Int[np.ndarray, " entries"]
    counts: Int[np.ndarray, " entries"]

    def find(
        self, keys: Int[np.ndarray, " N"]
    ) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
        """Place of each key, and whether the table has it: if not, its place means nothing."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return place, self.keys[place] == keys

    def plus(self, keys: Int[np.ndarray, " N"]) -> "Table":
        """With these occurrences too, in any order."""
        new = Table(*np.unique(keys, return_counts=True))
        place, known = self.find(new.keys)
        counts = self.counts.copy()
        counts[place[known]] += new.counts[known]
        late = new.keys[~known]
        where = np.searchsorted(self.keys, late)
        return Table(
            np.insert(self.keys, where, late), np.insert(counts, where, new.counts[~known])
        )


@dataclass(frozen=True)
class CountModel:
    """Counts of n-grams of 1 to `order` tokens; `plus` gives a model that has counted more.

    An n-gram's key holds its ids as digits in base V, the oldest first: its context is key // V.
    It fits 63 bits as long as V to the power of `order` does.
    """

    vocab_size: int
    tables: tuple[Table, ...]
    """[n - 1]: of n tokens."""

    @classmethod
    def empty(cls, vocab_size: int, order: int = ORDER) -> "CountModel":
        """Nothing counted: every token has probability 1 / V."""
        none = Table(np.zeros(0, np.int64), np.zeros(0, np.int64))
        return cls(vocab_size, (none,) * order)

    def plus(
        self,
        inputs: Int[np.ndarray, "B T"],
        targets: Int[np.ndarray, "B T"],
        mask: Bool[np.ndarray, "B T"],
    ) -> "CountModel":
        """After reading these sequences as well; targets count where `mask` holds."""
        tables = [
            table.plus(self._keys(inputs, targets, n)[mask[:, max(0, n - 2) :]])
            for n, table in enumerate(self.tables, start=1)
        ]
        return CountModel(self.vocab_size, tuple(tables))

    def nll(
        self, inputs: Int[np.ndarray, "B T"], targets: Int[np.ndarray, "B T"]
    ) -> Float[np.ndarray, "B T"]:
        """−log p of every target, in nats."""
        p = np.full(targets.shape, 1 / self.vocab_size)
        for n, (table, (contexts, kinds)) in enumerate(
            zip(self.tables, self._contexts, strict=True), 1
        ):
            if not len(table.keys):
                break
            # The first targets of a sequence have shorter contexts: theirs stay as they are.
            first = max(0, n - 2)
            keys = self._keys(inputs, targets, n)
            lower = p[:, first:]
            place, known = table.find(keys.ravel())
            count = np.where(known, table.counts[place], 0).reshape(keys.shape)
            place, known = contexts.find(keys.ravel() // self.vocab_size)
            kinds, total = (
                np.where(known, x[place], 0).reshape(keys.shape) for x in (kinds, contexts.counts)
            )
            seen = np.maximum(total + kinds, 1)
            p[:, first:] = np.where(total > 0, (count + kinds * lower) / seen, lower)
        return -np.log(p)

    @property
    def tokens(self) -> int:
        """How many were counted."""
        return int(self.tables[0].counts.sum())

    def arrays(self) -> dict[str, Any]:
        """All that there is to save: `vocab_size`, `order`, and `order_N.keys` and `.counts`.

        Orders of which nothing was counted are left out.
        """
        tables = enumerate(self.tables, start=1)
        return {
            "vocab_size": np.asarray(self.vocab_size),
            "order": np.asarray(len(self.tables)),
            **{f"order_{n}": table._asdict() for n, table in tables if len(table.keys)},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> "CountModel":
        """The inverse of `arrays`."""
        empty = cls.empty(int(arrays["vocab_size"]), int(arrays["order"]))
        orders = (arrays.get(f"order_{n}") for n in range(1, len(empty.tables) + 1))
        tables = (
            Table(order["keys"], order["counts"]) if order else none
            for order, none in zip(orders, empty.tables, strict=True)
        )
        return cls(empty.vocab_size, tuple(tables))

    def _keys(
        self, inputs: Int[np.ndarray, "B T"], targets: Int[np.ndarray, "B T"], n: int
    ) -> Int[np.ndarray, "B t"]:
        """Of the n-grams that end in each target that has n - 1 tokens before it."""
        first = max(0, n - 2)
        keys = targets[:, first:].astype(np.int64)
        for back in range(n - 1):
            digit = inputs[:, first - back : inputs.shape[1] - back].astype(np.int64)
            keys = keys + digit * self.vocab_size ** (back + 1)
        return keys

    @cached_property
    def _contexts(self) -> tuple[tuple[Table, Int[np.ndarray, " entries"]], ...]:
        """For each order the contexts, counted by all tokens after them, and by different ones."""
        contexts = []
        for table in self.tables:
            keys, starts, kinds = np.unique(
                table.keys // self.vocab_size, return_index=True, return_counts=True
            )
            counts = np.add.reduceat(table.counts, starts) if len(starts) else table.counts
            contexts.append((Table(keys, counts), kinds))
        return tuple(contexts)
