"""Where metrics go while a run is under way: the run record, and Weights & Biases if asked for."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ttt.infra.record import RunRecord, masked_arguments

_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes metrics as they come."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step, in ascending order of steps."""

    def finish(self, status: str) -> None:
        """Close: finished, failed or interrupted."""


class RecordTracker:
    """Writes to the run record on disk, which is the truth."""

    def __init__(self, record: RunRecord):
        """record: a started one."""
        self._record = record

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        self._record.log(step, **metrics)

    def finish(self, status: str) -> None:
        """Close the attempt in `run.json`."""
        self._record.finish(status)


class WandbTracker:
    """Mirrors metrics to Weights & Biases; whatever fails there is logged once and never raised."""

    def __init__(
        self,
        *,
        entity: str,
        project: str,
        name: str,
        run_id: str,
        folder: str | Path,
        config: Mapping[str, Any],
        key: str = "",
    ):
        """Open the W&B run `run_id`, or go on with it.

        entity, key: empty for what W&B itself finds (WANDB_API_KEY, its login). WANDB_MODE=offline
            needs neither key nor network.
        folder: where W&B puts its own files.
        config: settings to show, secrets masked.
        """
        self._run = None
        try:
            import wandb  # costs seconds, and most runs do without

            if key:
                # The environment is the one way in that leaves no copy in W&B's files.
                os.environ["WANDB_API_KEY"] = key
            # W&B uploads the command line, and reads it whenever it pleases.
            sys.argv[:] = masked_arguments(sys.argv)
            self._run = wandb.init(
                entity=entity or None,
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=dict(config),
            )
        except Exception as error:
            self._lose(error)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of a step."""
        if self._run is None:
            return
        try:
            self._run.log(dict(metrics), step=step)
        except Exception as error:
            self._lose(error)

    def finish(self, status: str) -> None:
        """Close the W&B run."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=0 if status == "finished" else 1)
        except Exception as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._run = None
        told = f"{type(error).__name__}: {error}"
        if key := os.environ.get("WANDB_API_KEY"):
            told = told.replace(key, "***")
        _logger.warning("W&B is lost; the run goes on, its record on disk is complete (%s)", told)


class CompositeTracker:
    """Several trackers as one; put the run record first."""

    def __init__(self, *trackers: Tracker):
        """trackers: called in this order."""
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Pass on to all."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def finish(self, status: str) -> None:
        """Pass on to all."""
        for tracker in self._trackers:
            tracker.finish(status)
