"""How often 95 % intervals around a loss hold the true one, by simulation (docs/measurements.md).

    uv run --exact python tools/interval_coverage.py

A document of n tokens (log-normal, spread 1.2) has a loss of its own around the true mean (spread
0.5 nats) and noise of its tokens (2 nats / √n). A seed's model is off by a seed effect, and by
something else on every document (0.05 nats).
"""

import argparse
from typing import NamedTuple

import numpy as np
from scipy import stats

from ttt.figures import markdown_table
from ttt.intervals import Interval, bootstrap, nested, student

TRUE = 3.0


class Coverage(NamedTuple):
    """Share of the intervals that hold the truth, and their mean width."""

    covered: float
    width: float


def draw(rng: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss and tokens of each document."""
    tokens = np.maximum(1, rng.lognormal(6, 1.2, documents)).astype(int).astype(float)
    noise = rng.normal(0, 2 / np.sqrt(tokens))
    return TRUE + rng.normal(0, 0.5, documents) + noise, tokens


def share(intervals: list[tuple[float, float]]) -> Coverage:
    """Of the intervals that hold the truth."""
    low, high = np.transpose(intervals)
    return Coverage(float(np.mean((low <= TRUE) & (high >= TRUE))), float(np.mean(high - low)))


def ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    """Mean over tokens."""
    return sums.sum(axis) / counts.sum(axis)


def over_documents(
    documents: int, trials: int, *, resamples: int, all_kinds: bool = False
) -> dict[str, Coverage]:
    """Of one model on so many documents; `percentile` is the one in use."""
    found: dict[str, list] = {"percentile": []}
    for trial in range(trials):
        loss, tokens = draw(np.random.default_rng([documents, trial]), documents)
        options = {"n_resamples": resamples, "paired": True, "rng": np.random.default_rng(trial)}
        for method in ("basic", "BCa") if all_kinds else ():
            drawn = stats.bootstrap((loss * tokens, tokens), ratio, method=method, **options)
            found.setdefault(method, []).append(tuple(drawn.confidence_interval))
        _, *bounds = bootstrap(loss * tokens, tokens, resamples=resamples, seed=trial)
        found["percentile"].append(tuple(map(float, bounds)))
    return {kind: share(intervals) for kind, intervals in found.items()}


def over_seeds(
    seeds: int, documents: int, spread: float, trials: int, *, resamples: int
) -> dict[str, Coverage]:
    """Of a method with so many seeds, of effects with that spread; `squares` is the one in use."""
    found: dict[str, list] = {}
    for trial in range(trials):
        rng = np.random.default_rng([seeds, documents, trial])
        loss, tokens = draw(rng, documents)
        losses = loss + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.05, (seeds, documents))
        sums = losses * tokens
        kinds = {
            "squares": nested(sums, tokens, resamples=resamples, seed=trial),
            "t over seeds": student(sums.sum(axis=1) / tokens.sum()),
            "documents alone": bootstrap(sums.mean(axis=0), tokens, resamples=resamples),
            "bootstrap of both": bootstrap_of_both(rng, sums, tokens, resamples),
        }
        for kind, (_, *bounds) in kinds.items():
            found.setdefault(kind, []).append(tuple(map(float, bounds)))
    return {kind: share(intervals) for kind, intervals in found.items()}


def bootstrap_of_both(
    rng: np.random.Generator, sums: np.ndarray, tokens: np.ndarray, resamples: int
) -> Interval:
    """Seeds drawn anew, and documents, the same ones for all seeds of a draw."""
    seeds, documents = sums.shape
    times = rng.multinomial(documents, np.full(documents, 1 / documents), size=resamples)
    losses = (times @ sums.T) / (times @ tokens)[:, None]
    chosen = rng.integers(0, seeds, (resamples, seeds))
    drawn = np.take_along_axis(losses, chosen, axis=1).mean(axis=1)
    return Interval(drawn.mean(), *np.quantile(drawn, [0.025, 0.975]))


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=500)
    asked = parser.parse_args()
    rows = []
    for documents in (20, 60, 250):
        found = over_documents(documents, asked.trials, resamples=asked.resamples, all_kinds=True)
        rows.append([str(documents), *(f"{found[kind].covered:.3f}" for kind in sorted(found))])
    print(markdown_table(["documents", *sorted(found)], rows, 1, aligned=True))
    rows = []
    for documents in (60, 250):
        for seeds in (2, 3, 5):
            for spread in (0.0, 0.1, 0.3):
                found = over_seeds(
                    seeds, documents, spread, asked.trials, resamples=asked.resamples
                )
                shares = (f"{found[kind].covered:.3f}" for kind in found)
                rows.append([str(documents), str(seeds), str(spread), *shares])
    print(markdown_table(["documents", "seeds", "seed effect", *found], rows, 3, aligned=True))


if __name__ == "__main__":
    main()
