"""Where metrics go during a run: the run record, and Weights & Biases if configured."""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ttt.infra.record import RunRecord, masked_arguments

_logger = logging.getLogger(__name__)


class Tracker:
    """Writes metrics to the run record, which is the truth, and to its mirror in W&B if any.

    Whatever fails in W&B is logged once and never raised.
    """

    def __init__(self, record: RunRecord):
        """record: to be started before the first call."""
        self._record = record
        self._mirror: Any = None

    def mirror(
        self, *, entity: str, project: str, name: str, config: Mapping[str, Any], key: str = ""
    ) -> None:
        """Open the W&B run of the record's id, or go on with it.

        entity, key: empty for what W&B itself finds (WANDB_API_KEY, its login). WANDB_MODE=offline
            needs neither key nor network.
        config: settings to show, secrets masked.
        """
        if key:
            # The environment is the one way in that leaves no copy in W&B's files.
            os.environ["WANDB_API_KEY"] = key
        # W&B uploads the command line, and reads it whenever it pleases.
        sys.argv[:] = masked_arguments(sys.argv)

        def open_run() -> None:
            import wandb  # costs seconds, and most runs do without

            self._mirror = wandb.init(
                entity=entity or None,
                project=project,
                name=name,
                id=self._record.run()["id"],
                resume="allow",
                dir=str(self._record.folder),
                config=dict(config),
            )

        self._try(open_run)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step, in ascending order of steps."""
        self._record.log(step, **metrics)
        if self._mirror is not None:
            self._try(lambda: self._mirror.log(dict(metrics), step=step))

    def finish(self, status: str) -> None:
        """Close the attempt: finished, failed or interrupted."""
        self._record.finish(status)
        if self._mirror is not None:
            self._try(lambda: self._mirror.finish(exit_code=0 if status == "finished" else 1))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._mirror = None
            message = f"{type(error).__name__}: {error}"
            if key := os.environ.get("WANDB_API_KEY"):
                message = message.replace(key, "***")
            _logger.warning(
                "W&B is lost; the run goes on, its record on disk is complete (%s)", message
            )
