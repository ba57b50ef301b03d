"""Whether a warm start passes the gate: holds, does not hold, or cannot be told. No JAX.

The gate: at least 30 % less training wall-clock at no more than 0.01 nats above B1's held-out loss,
for the same number of trained tokens, with intervals paired over seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ttt.infra.plan_manifest import MATCHINGS
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
    said = [f"{answer}: {', '.join(paths)}" for answer, paths in by_answer.items() if paths]
    if by_answer[HOLDS] and len(candidates) > 1:
        said.append(
            f"{len(candidates)} paths were tried, each against its own 95 % interval: nothing was "
            "corrected for the number of trials"
        )
    answer = next(answer for answer in (HOLDS, UNKNOWN, FAILS) if by_answer[answer])
    return Verdict(answer, tuple(said))


def without_merit(runs: pd.DataFrame) -> list[str]:
    """Trained models whose held-out loss is not below the count model's, in words."""
    return [
        f"{run.name}: {text} of the count model"
        for run in rows_of(runs)
        if run.runtime_mode == "jax" and (text := no_merit(run))
    ]


def _of_path(found: Any, all_matchings: Sequence[Any]) -> Verdict:
    loss, said_loss = _loss(found.delta)
    time, said_time = _time(found)
    evidence = [said_loss, said_time]
    if found.problems:
        answer = UNKNOWN
        evidence += [f"spoiled: {problem}" for problem in found.problems]
    elif FAILS in (loss, time):
        answer = FAILS
    else:
        sure = UNKNOWN not in (loss, time) and not found.without_merit
        answer = HOLDS if sure else UNKNOWN
    evidence += [f"nothing is won with it: {text}" for text in found.without_merit]
    evidence += [
        f"beside it, {MATCHINGS.get(c.matching, c.matching)}: loss {told(c.delta, '+.4f')} nats"
        for c in all_matchings
        if c.matching != found.matching and c.delta
    ]
    return Verdict(answer, tuple(evidence), found.path, found.method == "e2e")


def _loss(delta: Estimate | None) -> tuple[str, str]:
    said = f"loss: {told(delta, '+.4f')} nats against B1, at most +{MOST_ABOVE} asked"
    return _answer(delta, said, lambda bound: bound <= MOST_ABOVE)


def _time(found: Any) -> tuple[str, str]:
    saving = found.saving
    said = f"training time: {told(saving, '.1%')} saved, at least {LEAST_SAVED:.0%} asked"
    if found.mixed:
        return UNKNOWN, f"{said}: MIXED DEVICES ({'; '.join(found.devices)}), so it cannot be told"
    return _answer(saving, said, lambda bound: bound >= LEAST_SAVED)


def _answer(
    estimate: Estimate | None, said: str, is_good: Callable[[float], bool]
) -> tuple[str, str]:
    """Where both bounds of an interval lie on one side, in a word and a sentence."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return UNKNOWN, f"{said}: {UNKNOWN}"
    sides = {is_good(estimate.low), is_good(estimate.high)}
    if len(sides) == 2:
        return UNKNOWN, f"{said}: the interval has both sides of it, so it cannot be told"
    answer = HOLDS if True in sides else FAILS
    return answer, f"{said}: {answer}"


def told(estimate: Estimate | None, form: str) -> str:
    """A mean with its interval and the number of seeds, or why there is none."""
    if estimate is None:
        return "unknown"
    if estimate.low is None:
        return f"{estimate.mean:{form}} (one seed, no interval)"
    bounds = f"[{estimate.low:{form}}, {estimate.high:{form}}]"
    return f"{estimate.mean:{form}} {bounds} ({estimate.n} seeds)"
