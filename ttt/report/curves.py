"""What the pictures show, as numbers: loss by position, and loss against what was spent. No JAX."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ttt.evaluation.result import log_edges
from ttt.intervals import Interval, student
from ttt.report.comparisons import Branch, Estimate, reference_of
from ttt.report.records import Curve, Run

POINTS = 80
"""Of a stage's training curve, once smoothed."""


@dataclass(frozen=True)
class PositionCurve:
    """Held-out loss of a path's last run by position, in logarithmic bins; means over seeds."""

    path: str
    matching: str
    context: int
    edges: np.ndarray
    """[bins + 1], in tokens."""
    loss: Interval
    """[bins]"""
    difference: Interval | None
    """Less B1's, paired by seed; None for B1, and where B1 or its context is not there."""
    seeds: int


@dataclass(frozen=True)
class CostCurve:
    """Training loss along a path, stage by stage, against what all stages so far have cost."""

    path: str
    matching: str
    tokens: np.ndarray
    """[stages, POINTS], trained by the path so far."""
    hours: np.ndarray
    """[stages, POINTS], device-hours of the path's training so far."""
    loss: np.ndarray
    """[stages, POINTS], training loss, smoothed, mean over seeds."""
    ends: tuple[tuple[float, float, Estimate], ...]
    """Tokens, device-hours and held-out loss at the end of every stage."""
    seeds: int


def positions(found: Sequence[Branch]) -> tuple[list[PositionCurve], list[str]]:
    """A curve for each path and matching, and the runs that lack what it takes."""
    curves, missing = [], []
    for own in _grouped(found):
        usable = [b for b in own if _measured(b)]
        missing += [b.last.name for b in own if b not in usable]
        lengths = {len(b.last.positions.nll) for b in usable if b.last.positions}
        if len(lengths) == 1:
            curves.append(_positions(usable, found, lengths.pop()))
        elif lengths:
            missing.append(f"{own[0].path} (contexts {sorted(lengths)})")
    return curves, missing


def costs(found: Sequence[Branch]) -> tuple[list[CostCurve], list[str]]:
    """A curve for each path and matching, and the runs that lack what it takes."""
    curves, missing = [], []
    for own in _grouped(found):
        usable = [b for b in own if all(map(_spent, b.runs)) and len(b.runs) == len(own[0].runs)]
        missing += [run.name for b in own if b not in usable for run in b.runs if not _spent(run)]
        if usable:
            curves.append(_costs(usable))
    return curves, missing


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a twentieth of the curve around each point; at the ends over what is there."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), half)
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def _grouped(found: Sequence[Branch]) -> list[list[Branch]]:
    keys = dict.fromkeys((b.path, b.matching) for b in found)
    return [[b for b in found if (b.path, b.matching) == key] for key in keys]


def _measured(branch: Branch | None) -> bool:
    run = branch.last if branch else None
    return run is not None and run.status == "finished" and run.positions is not None


def _positions(own: Sequence[Branch], found: Sequence[Branch], context: int) -> PositionCurve:
    edges = log_edges(context)
    pairs = [(b, reference_of(b, found)) for b in own]
    less = [
        _binned(b, edges) - _binned(r, edges)
        for b, r in pairs
        if r is not None
        and r.path != b.path
        and _measured(r)
        and r.last.context == b.last.context
        and r.last.evaluated_on == b.last.evaluated_on
    ]
    return PositionCurve(
        path=own[0].path,
        matching=own[0].matching,
        context=context,
        edges=edges,
        loss=student(np.stack([_binned(b, edges) for b in own])),
        difference=student(np.stack(less)) if less else None,
        seeds=len(own),
    )


def _binned(branch: Branch, edges: np.ndarray) -> np.ndarray:
    """Mean loss in each bin; NaN where nothing counts."""
    positions = branch.last.positions
    if positions is None:
        raise ValueError(f"{branch.last.name} has no loss by position")
    nll, count = (
        np.add.reduceat(x.astype(float), edges[:-1]) for x in (positions.nll, positions.count)
    )
    with np.errstate(invalid="ignore"):
        return nll / count


def _spent(run: Run) -> bool:
    """Whether it tells what it cost and what came of it."""
    needed = (run.curve, run.validation_loss, run.tokens, run.device_hours)
    return run.status == "finished" and None not in needed


def _costs(own: Sequence[Branch]) -> CostCurve:
    each = [[_resampled(run.curve) for run in b.runs if run.curve is not None] for b in own]
    tokens, hours = (
        np.array([[0.0, *accumulate(getattr(run, name) for run in b.runs)] for b in own])
        for name in ("tokens", "device_hours")
    )  # [seeds, stages + 1]
    stacked = np.array(each)  # [seeds, stages, 3, POINTS]
    return CostCurve(
        path=own[0].path,
        matching=own[0].matching,
        tokens=np.mean(stacked[:, :, 0] + tokens[:, :-1, None], axis=0),
        hours=np.mean(stacked[:, :, 1] + hours[:, :-1, None], axis=0),
        loss=np.mean(stacked[:, :, 2], axis=0),
        ends=tuple(
            (
                float(tokens[:, stage + 1].mean()),
                float(hours[:, stage + 1].mean()),
                estimate,
            )
            for stage in range(len(own[0].runs))
            if (estimate := Estimate.of([b.runs[stage].validation_loss or 0.0 for b in own]))
        ),
        seeds=len(own),
    )


def _resampled(curve: Curve) -> np.ndarray:
    """[3, POINTS]: tokens, hours and smoothed loss at even distances in steps.

    So that seeds whose stages took different numbers of steps can be averaged.
    """
    at = np.linspace(curve.step[0], curve.step[-1], POINTS)
    columns = curve.tokens, curve.hours, smoothed(curve.loss)
    return np.array([np.interp(at, curve.step, column) for column in columns])
