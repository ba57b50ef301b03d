"""Intervals around what few samples can tell: documents, shares, a handful of seeds. No JAX.

Tokens of one document are not independent, so documents are what is drawn anew, whole ones. How
often these intervals hold what they should was simulated (tools/interval_coverage.py,
docs/measurements.md).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 1000
"""Draws of a bootstrap, unless other settings say so."""
_ENTRIES = 1 << 22
"""Numbers of a bootstrap that are in memory together."""


class Interval(NamedTuple):
    """An estimate and the bounds of its 95 % interval."""

    value: Float[np.ndarray, "*shape"]
    low: Float[np.ndarray, "*shape"]
    high: Float[np.ndarray, "*shape"]


def bootstrap(
    sums: Float[np.ndarray, "N ..."],
    counts: Float[np.ndarray, "N ..."],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean over all that N documents hold, Σ sums / Σ counts, and its percentile interval.

    A difference of two runs takes the sums of both less each other: the same documents are then
    drawn for both. All that follows the first axis is drawn together. Where nothing is counted all
    three are NaN; one document says nothing of what documents vary by: the bounds are NaN.
    """
    from scipy import stats  # most of what imports this module needs no scipy

    n, shape = len(sums), sums.shape[1:]
    both = np.stack([np.reshape(x, (n, -1)) for x in (sums, counts)], axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.divide(*both.sum(axis=0))
    if n < 2:
        return Interval(value.reshape(shape), *np.full((2, *shape), np.nan))
    instead = np.nan_to_num(value)

    def ratio(documents: Int[np.ndarray, "... N"], axis: int) -> Float[np.ndarray, "bins ..."]:
        """How often each document was drawn is enough: no document is copied."""
        del axis  # the last
        draws = documents.reshape(-1, n)
        places = draws + n * np.arange(len(draws))[:, None]
        times = np.bincount(places.ravel(), minlength=draws.size).reshape(draws.shape)
        total, count = np.moveaxis(np.tensordot(times.astype(np.float64), both, axes=1), 1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = total / count
        drawn = np.where(np.isnan(drawn), instead, drawn)  # a draw that counts nothing says nothing
        return drawn.T.reshape(-1, *documents.shape[:-1])

    found = stats.bootstrap(
        (np.arange(n),),
        ratio,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _ENTRIES // n),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    bounds = (np.where(np.isnan(value), np.nan, x) for x in found.confidence_interval)
    return Interval(*(x.reshape(shape) for x in (value, *bounds)))


def nested(
    sums: Float[np.ndarray, "S N ..."],
    counts: Float[np.ndarray, "N ..."],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean over S seeds of Σ sums / Σ counts over the N documents that all of them read.

    What the documents vary by is a bootstrap of the seeds' mean, the same documents for all seeds
    of a draw. What seeds vary by is Student's t over them: to draw 2 to 5 seeds anew gives too
    narrow an interval (docs/measurements.md). Both are added in squares, each side of its own
    (Zou and Donner, Statistics in Medicine 27(10), 2008). One seed: documents alone.
    """
    documents = bootstrap(np.mean(sums, axis=0), counts, resamples=resamples, seed=seed)
    if len(sums) == 1:
        return documents
    with np.errstate(invalid="ignore", divide="ignore"):
        seeds = student(np.sum(sums, axis=1) / np.sum(counts, axis=0))
    value = documents.value
    low = value - np.hypot(value - documents.low, seeds.value - seeds.low)
    return Interval(value, low, value + np.hypot(documents.high - value, seeds.high - seeds.value))


def median(samples: Float[np.ndarray, " N"]) -> tuple[float, float, float]:
    """Median of N >= 1 independent samples and its interval, exact from their order.

    The bounds are samples themselves; they are NaN for fewer than 6, which cannot reach 95 %.
    """
    from scipy.stats import quantile_test

    bounds = quantile_test(np.asarray(samples, np.float64)).confidence_interval(0.95)
    return float(np.median(samples)), float(bounds.low), float(bounds.high)


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
