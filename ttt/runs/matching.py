"""What makes two paths comparable, as arithmetic: the pretraining absorbs the difference.

The reference path is trained as budgeted. Every other path keeps its later stages, and its
pretraining gets as many steps as make the whole path cost what the reference costs: in tokens, or
in seconds of training steps, each stage at its own measured seconds per token.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from ttt.errors import RunError, UserError

WARM_UP_ROWS = 2
"""First logged steps of a run that are not measured: the first waits for the compiler's caches."""


class Cost(NamedTuple):
    """A stage in a path, as far as matching goes."""

    kind: str
    steps: int
    tokens_per_step: int

    def total(self, per_token: Mapping[str, float] | None) -> float:
        """In seconds at these seconds per token, or in tokens without them."""
        return self.steps * self.of_a_step(per_token)

    def of_a_step(self, per_token: Mapping[str, float] | None) -> float:
        """In seconds, or in tokens."""
        return self.tokens_per_step * (1 if per_token is None else per_token[self.kind])


def pretrain_steps(
    path: str,
    stages: Sequence[Cost],
    reference: Sequence[Cost],
    per_token: Mapping[str, float] | None = None,
) -> int:
    """Steps of the path's first stage at which the path costs what the reference does.

    The nearest whole number, so the costs differ by half a pretraining step at most.
    per_token: seconds per token of each kind of stage; None matches tokens.
    Raises UserError where the later stages alone cost as much.
    """
    first, *later = stages
    target = sum(stage.total(per_token) for stage in reference)
    rest = sum(stage.total(per_token) for stage in later)
    steps = math.floor((target - rest) / first.of_a_step(per_token) + 0.5)
    if steps < 1:
        unit = "tokens" if per_token is None else "seconds of training steps"
        raise UserError(
            f"path {path}: its stages after pretraining take {rest:,.0f} {unit} and the reference "
            f"path {target:,.0f} in all; something must be left to pretrain on: lower adapt-steps "
            "(or leave this path out), or raise pretrain-steps"
        )
    return steps


def seconds_per_token(
    runs: Iterable[tuple[str, str, int, Iterable[Mapping[str, Any]]]],
) -> dict[str, dict[str, Any]]:
    """Kind of stage -> median `seconds` per token over all steps of its runs, `from` which.

    runs: of each its kind, name, tokens per step and lines of `metrics.jsonl`. The time of a step
    is that of the step itself, without waiting for data; lines of evaluations have none.
    Raises RunError for a kind without a timed step.
    """
    steps: dict[str, list[float]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for kind, name, tokens_per_step, rows in runs:
        seconds = [row["step_seconds"] for row in rows if "step_seconds" in row and "loss" in row]
        steps[kind] += [value / tokens_per_step for value in seconds[WARM_UP_ROWS:]]
        names[kind].append(name)
    for kind, values in steps.items():
        if not values:
            raise RunError(f"{kind}: the records of {', '.join(names[kind])} hold no timed step")
    return {
        kind: {"seconds": median(values), "from": sorted(names[kind]), "steps": len(values)}
        for kind, values in steps.items()
    }
