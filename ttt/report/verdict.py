"""Whether a warm start passes the gate: holds, does not hold, or cannot be told. No JAX.

The gate: at least 30 % less training wall-clock at no more than 0.01 nats above B1's held-out loss,
for the same number of trained tokens, with intervals paired over seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ttt.infra.plan_manifest import label
from ttt.report.compare import REFERENCE, Estimate, no_merit
from ttt.report.frame import rows_of

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"
MOST_ABOVE = 0.01
"""Nats per token by which the loss may exceed that of B1."""
LEAST_SAVED = 0.30
"""Share of B1's training time that has to be saved."""


@dataclass(frozen=True)
class Verdict:
    """An answer and what it rests on."""

    answer: str
    """One of HOLDS, FAILS, UNKNOWN."""
    evidence: tuple[str, ...]
    path: str = ""
    """Empty: of the whole plan."""
    candidate: bool = True
    """Whether it counts towards the whole: a path that ends in TTT-E2E and did not begin so."""


def judge(comparisons: pd.DataFrame) -> list[Verdict]:
    """One of each path but B1, of the token-matched comparison."""
    rows = rows_of(comparisons)
    return [
        _of_path(row, [other for other in rows if other.path == row.path])
        for row in rows
        if row.matching == "tokens" and row.path != REFERENCE
    ]


def overall(verdicts: Sequence[Verdict], why_none: str = "") -> Verdict:
    """Holds if it does for one candidate; does not hold if it does for none of them.

    why_none: why there are no comparisons at all.
    """
    candidates = [verdict for verdict in verdicts if verdict.candidate]
    if not candidates:
        why = why_none or "no token-matched path of the plan leads to TTT-E2E from another method"
        return Verdict(UNKNOWN, (why,))
    by_answer: dict[str, list[str]] = {HOLDS: [], FAILS: [], UNKNOWN: []}
    for verdict in candidates:
        by_answer[verdict.answer].append(verdict.path)
    lines = [f"{answer}: {', '.join(paths)}" for answer, paths in by_answer.items() if paths]
    if by_answer[HOLDS] and len(candidates) > 1:
        lines.append(
            f"{len(candidates)} paths were tried, each against its own 95 % interval: nothing was "
            "corrected for the number of trials"
        )
    answer = next(answer for answer in (HOLDS, UNKNOWN, FAILS) if by_answer[answer])
    return Verdict(answer, tuple(lines))


def without_merit(runs: pd.DataFrame) -> list[str]:
    """Trained models whose held-out loss is not below the count model's, in words."""
    return [
        f"{run.name}: {text} of the count model"
        for run in rows_of(runs)
        if run.runtime_mode == "jax" and (text := no_merit(run))
    ]


def _of_path(row: Any, all_matchings: Sequence[Any]) -> Verdict:
    loss, of_loss = _loss(row.delta)
    time, of_time = _time(row)
    evidence = [of_loss, of_time]
    if row.problems:
        answer = UNKNOWN
        evidence += [f"spoiled: {problem}" for problem in row.problems]
    elif FAILS in (loss, time):
        answer = FAILS
    else:
        sure = UNKNOWN not in (loss, time) and not row.without_merit
        answer = HOLDS if sure else UNKNOWN
    evidence += [f"nothing is won with it: {text}" for text in row.without_merit]
    evidence += [
        f"beside it, {label(c.matching)}: loss {interval(c.delta, '+.4f')} nats"
        for c in all_matchings
        if c.matching != row.matching and c.delta
    ]
    return Verdict(answer, tuple(evidence), row.path, row.method == "e2e")


def _loss(delta: Estimate | None) -> tuple[str, str]:
    text = f"loss: {interval(delta, '+.4f')} nats against B1, at most +{MOST_ABOVE} asked"
    return _answer(delta, text, lambda bound: bound <= MOST_ABOVE)


def _time(row: Any) -> tuple[str, str]:
    saving = row.saving
    text = f"training time: {interval(saving, '.1%')} saved, at least {LEAST_SAVED:.0%} asked"
    if row.mixed:
        return UNKNOWN, f"{text}: MIXED DEVICES ({'; '.join(row.devices)}), so it cannot be told"
    return _answer(saving, text, lambda bound: bound >= LEAST_SAVED)


def _answer(
    estimate: Estimate | None, text: str, is_good: Callable[[float], bool]
) -> tuple[str, str]:
    """Where both bounds of an interval lie on one side, in a word and a sentence."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return UNKNOWN, f"{text}: {UNKNOWN}"
    sides = {is_good(estimate.low), is_good(estimate.high)}
    if len(sides) == 2:
        return UNKNOWN, f"{text}: the interval has both sides of it, so it cannot be told"
    answer = HOLDS if True in sides else FAILS
    return answer, f"{text}: {answer}"


def interval(estimate: Estimate | None, form: str) -> str:
    """A mean with its interval and the number of seeds, or why there is none."""
    if estimate is None:
        return "unknown"
    seeds = f"{estimate.n} seeds" if estimate.n > 1 else "one seed, no interval"
    if estimate.documents:
        seeds += f" and {estimate.documents} documents"
    return f"{estimate:{form}} ({seeds})"
