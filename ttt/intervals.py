"""Intervals around what few samples can tell: sequences, shares, a handful of seeds. No JAX."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Interval(NamedTuple):
    """An estimate and the bounds of its 95 % interval."""

    value: Float[np.ndarray, "*shape"]
    low: Float[np.ndarray, "*shape"]
    high: Float[np.ndarray, "*shape"]


def bootstrap(
    sums: Float[np.ndarray, "N ..."],
    counts: Float[np.ndarray, "N ..."],
    *,
    resamples: int,
    seed: int,
) -> Interval:
    """Mean over all that N sequences hold, Σ sums / Σ counts, and its percentile interval.

    Sequences are drawn anew with replacement, whole ones, because tokens of one sequence are not
    independent. Where nothing is counted all three are NaN; with one sequence the bounds meet.
    """
    # `scipy.stats.bootstrap` draws in another order, which would change recorded intervals, and
    # keeps every resampled sequence, [resamples, N, …], where counts of draws are enough.
    n = len(sums)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    total, count = (np.tensordot(weights, x.astype(np.float64), axes=1) for x in (sums, counts))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.sum(sums, axis=0, dtype=np.float64) / np.sum(counts, axis=0, dtype=np.float64)
        drawn = total / count
    drawn = np.where(np.isnan(drawn), value, drawn)  # a draw that counts nothing says nothing
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return Interval(value, low, high)


def share(hits: int, n: int) -> tuple[float, float, float]:
    """Share of `hits` in n >= 1 trials and its Wilson interval, which holds for few trials too."""
    from scipy.stats import binomtest  # most of what imports this module needs no scipy

    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return hits / n, float(low), float(high)


def student(samples: Float[np.ndarray, "N ..."]) -> Interval:
    """Mean of N >= 1 independent samples (seeds, or differences paired by seed) and its t-interval.

    One sample says nothing of its spread: the bounds are NaN.
    """
    n = len(samples)
    value = np.mean(samples, axis=0)
    if n == 1:
        return Interval(value, value * np.nan, value * np.nan)
    from scipy.special import stdtrit  # `scipy.stats.t.interval` is NaN where all samples agree

    half = stdtrit(n - 1, 0.975) * np.std(samples, axis=0, ddof=1) / math.sqrt(n)
    return Interval(value, value - half, value + half)
