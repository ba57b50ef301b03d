"""What the pictures show, as numbers: loss by position, and loss against what was spent. No JAX."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from ttt.evaluation.result import log_edges
from ttt.intervals import Interval, nested, student
from ttt.report.compare import alike, document_sums, estimate_loss
from ttt.report.frame import rows_of

POINTS = 80
"""Of a stage's training curve, once smoothed."""


def positions(branches: pd.DataFrame) -> tuple[list[SimpleNamespace], list[str]]:
    """Held-out loss of every path's last run by position; and the runs that lack what it takes.

    For each path and matching: path, matching, context; edges [bins + 1] of logarithmic bins, in
    tokens; loss: `Interval` [bins] over so many seeds; difference: the same less B1's, paired by
    seed, None for B1 and where B1 or its context is not there; over: what intervals are over.
    """
    curves, missing = [], []
    for own in _grouped(branches):
        usable = [b for b in own if _measured(b)]
        missing += [b.name for b in own if not _measured(b)]
        lengths = {len(b.arrays["learning_nll"]) for b in usable}
        if len(lengths) > 1:
            missing.append(f"{own[0].path} (contexts {sorted(lengths)})")
        if len(lengths) != 1:
            continue
        edges = log_edges(lengths.pop())
        pairs = [
            (b, r)
            for b in usable
            if (r := b.reference) and r.path != b.path and _measured(r) and alike(b, r)
        ]
        loss, over = _interval(edges, usable)
        less, over = _interval(edges, *zip(*pairs, strict=True)) if pairs else (None, over)
        curves.append(
            SimpleNamespace(
                path=own[0].path,
                matching=own[0].matching,
                context=int(edges[-1]),
                edges=edges,
                loss=loss,
                difference=less,
                over=over,
                seeds=len(usable),
            )
        )
    return curves, missing


def costs(branches: pd.DataFrame) -> tuple[list[SimpleNamespace], list[str]]:
    """Training loss along every path against its cost so far; and the runs that lack what it takes.

    For each path and matching: path, matching; tokens, hours (device-hours of training) and loss
    (smoothed), each [stages, POINTS], means over so many seeds; ends: tokens, device-hours and
    held-out loss (`Estimate`) at the end of every stage.
    """
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


def _interval(
    edges: np.ndarray, runs: Sequence[Any], references: Sequence[Any] = ()
) -> tuple[Interval, str]:
    """Of the loss in each bin, or of what it is less the references'; and what it is over."""
    seeds = "seeds" if len(runs) > 1 else ""
    if sums := document_sums(runs, references):
        return nested(*sums), " and ".join(filter(None, (seeds, "documents")))
    losses = np.stack([_binned(run, edges) for run in runs])
    if references:
        losses = losses - np.stack([_binned(run, edges) for run in references])
    return student(losses), seeds


def _binned(branch: Any, edges: np.ndarray) -> np.ndarray:
    """Mean loss in each bin; NaN where nothing counts."""
    names = ("learning_nll", "learning_count")
    nll, count = (np.add.reduceat(branch.arrays[x].astype(float), edges[:-1]) for x in names)
    with np.errstate(invalid="ignore"):
        return nll / count


def _spent(run: Any) -> bool:
    """Whether it tells what it cost and what came of it."""
    needed = (run.curve, run.validation_loss, run.tokens, run.device_hours)
    return run.status == "finished" and all(value is not None for value in needed)


def _costs(own: Sequence[Any]) -> SimpleNamespace:
    runs = [b.runs for b in own]  # [seeds][stages]
    curves = np.array([[_resampled(run.curve) for run in stages] for stages in runs])
    spent = np.array([[(run.tokens, run.device_hours) for run in stages] for stages in runs])
    ends = np.cumsum(spent, axis=1)  # [seeds, stages, 2]; `curves` is [seeds, stages, 3, POINTS]
    curves[:, :, :2] += (ends - spent)[..., None]
    tokens, hours, loss = np.moveaxis(curves.mean(axis=0), 1, 0)
    losses = [estimate_loss(stage) for stage in zip(*runs, strict=True)]
    return SimpleNamespace(
        path=own[0].path,
        matching=own[0].matching,
        tokens=tokens,
        hours=hours,
        loss=loss,
        ends=[(*end, e) for end, e in zip(ends.mean(axis=0).tolist(), losses, strict=True)],
        seeds=len(own),
    )


def _resampled(curve: pd.DataFrame) -> np.ndarray:
    """[3, POINTS]: tokens, hours and smoothed loss at even distances in steps.

    So that seeds whose stages took different numbers of steps can be averaged.
    """
    at = np.linspace(curve["step"].iloc[0], curve["step"].iloc[-1], POINTS)
    columns = curve["tokens"], curve["hours"], smoothed(curve["loss"].to_numpy())
    return np.array([np.interp(at, curve["step"], column) for column in columns])
