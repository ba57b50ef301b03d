"""What the pictures show, as numbers: loss by position, and loss against what was spent. No JAX."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd

from ttt.evaluation.result import log_edges
from ttt.intervals import Interval, student
from ttt.report.compare import Estimate, alike, estimate
from ttt.report.frame import Curve, rows_of

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


def positions(branches: pd.DataFrame) -> tuple[list[PositionCurve], list[str]]:
    """A curve for each path and matching, and the runs that lack what it takes."""
    curves, missing = [], []
    by_index = {branch.Index: branch for branch in rows_of(branches)}
    for own in _grouped(branches):
        usable = [b for b in own if _measured(b)]
        missing += [b.name for b in own if not _measured(b)]
        lengths = {len(b.arrays["learning_nll"]) for b in usable}
        if len(lengths) > 1:
            missing.append(f"{own[0].path} (contexts {sorted(lengths)})")
        if len(lengths) != 1:
            continue
        edges = log_edges(lengths.pop())
        pairs = [(b, by_index.get(b.reference)) for b in usable]
        less = [
            _binned(b, edges) - _binned(r, edges)
            for b, r in pairs
            if r is not None and r.path != b.path and _measured(r) and alike(b, r)
        ]
        curves.append(
            PositionCurve(
                path=own[0].path,
                matching=own[0].matching,
                context=int(edges[-1]),
                edges=edges,
                loss=student(np.stack([_binned(b, edges) for b in usable])),
                difference=student(np.stack(less)) if less else None,
                seeds=len(usable),
            )
        )
    return curves, missing


def costs(branches: pd.DataFrame) -> tuple[list[CostCurve], list[str]]:
    """A curve for each path and matching, and the runs that lack what it takes."""
    curves, missing = [], []
    for own in _grouped(branches):
        missing += [run.name for b in own for run in b.runs if not _spent(run)]
        usable = [b for b in own if all(map(_spent, b.runs)) and len(b.runs) == len(own[0].runs)]
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


def _grouped(branches: pd.DataFrame) -> list[list[Any]]:
    if branches.empty:
        return []
    groups = branches.groupby(["path", "matching"], sort=False)
    return [rows_of(own) for _, own in groups]


def _measured(branch: Any) -> bool:
    return branch.status == "finished" and bool(branch.arrays)


def _binned(branch: Any, edges: np.ndarray) -> np.ndarray:
    """Mean loss in each bin; NaN where nothing counts."""
    nll, count = (
        np.add.reduceat(branch.arrays[name].astype(float), edges[:-1])
        for name in ("learning_nll", "learning_count")
    )
    with np.errstate(invalid="ignore"):
        return nll / count


def _spent(run: Any) -> bool:
    """Whether it tells what it cost and what came of it."""
    needed = (run.curve, run.validation_loss, run.tokens, run.device_hours)
    return run.status == "finished" and all(value is not None for value in needed)


def _costs(own: Sequence[Any]) -> CostCurve:
    stacked = np.array([[_resampled(run.curve) for run in b.runs] for b in own])
    tokens, hours = (
        np.array([[0.0, *accumulate(getattr(run, name) for run in b.runs)] for b in own])
        for name in ("tokens", "device_hours")
    )  # [seeds, stages + 1]; `stacked` is [seeds, stages, 3, POINTS]
    losses = [[run.validation_loss for run in b.runs] for b in own]
    ends = zip(
        tokens.mean(axis=0)[1:].tolist(),
        hours.mean(axis=0)[1:].tolist(),
        [mean for of_stage in zip(*losses, strict=True) if (mean := estimate(of_stage))],
        strict=True,
    )
    return CostCurve(
        path=own[0].path,
        matching=own[0].matching,
        tokens=np.mean(stacked[:, :, 0] + tokens[:, :-1, None], axis=0),
        hours=np.mean(stacked[:, :, 1] + hours[:, :-1, None], axis=0),
        loss=np.mean(stacked[:, :, 2], axis=0),
        ends=tuple(ends),
        seeds=len(own),
    )


def _resampled(curve: Curve) -> np.ndarray:
    """[3, POINTS]: tokens, hours and smoothed loss at even distances in steps.

    So that seeds whose stages took different numbers of steps can be averaged.
    """
    at = np.linspace(curve.step[0], curve.step[-1], POINTS)
    columns = curve.tokens, curve.hours, smoothed(curve.loss)
    return np.array([np.interp(at, curve.step, column) for column in columns])
