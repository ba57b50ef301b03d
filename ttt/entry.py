"""The command line around an entry point: Hydra, exit codes, errors in a user's words. No JAX."""

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from ttt.config import config_dir, explain, resolve
from ttt.errors import RunError, Stopped, UserError
from ttt.knobs import Config

ASKED_TO_STOP = 75
"""Exit code of a run that stopped when asked, and can go on: sysexits' "try again later"."""


@contextmanager
def exit_codes() -> Generator[None]:
    """Exit with 2 for a user's mistake, 75 if asked to stop, 130 if interrupted, 1 otherwise."""
    try:
        yield
    except Stopped as stopped:
        _hand_on(stopped.signal_number)
        _leave(0 if _follows() else ASKED_TO_STOP, str(stopped))
    except RunError as error:
        _leave(1, f"error: {error}")
    except UserError as error:
        _leave(2, f"error: {error}")
    except HydraException as error:
        overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
        _leave(2, f"error: {explain(error, overrides)}")
    except KeyboardInterrupt as interrupt:
        _leave(130, str(interrupt) or "interrupted")
    except Exception:
        _leave(1, traceback.format_exc())


def _leave(code: int, message: str) -> None:
    sys.stderr.write(message.rstrip() + "\n")
    sys.exit(code)


def _hand_on(number: int) -> None:
    """Give the signal to submitit if it waits for it: it requeues the job, and ends the process.

    number: 0 for none. On other ranks than 0 submitit does nothing.
    """
    # Of Ctrl-C the handler is Python's own, which would raise once more.
    waits = "SUBMITIT_EXECUTOR" in os.environ and number not in (0, signal.SIGINT)
    handler = signal.getsignal(number) if waits else None
    if callable(handler):
        signal.signal(number, signal.SIG_IGN)  # the same once more would requeue a second time
        handler(number, None)


def _follows() -> bool:
    """Whether this process is one of a Slurm job's that leave the job's fate to rank 0.

    They leave with 0: Slurm may take another code for a failure, and kill rank 0 before it has
    queued the job again.
    """
    return "SUBMITIT_EXECUTOR" in os.environ and os.environ.get("SLURM_PROCID", "0") != "0"


class Job:
    """What Hydra runs for each job; a class, so that launchers can send it to other processes."""

    def __init__(self, run: Callable[[Config], int | None]):
        functools.update_wrapper(self, run)  # Hydra names the job after the module of `run`
        self.run = run

    def __call__(self, cfg: DictConfig) -> None:
        """Check the composed `cfg` and run it."""
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            try:
                self._work(cfg)  # Hydra goes on with the other jobs and reports this one in the end
            except Stopped as stopped:  # whoever asks one job to stop wants none of the others
                with exit_codes():
                    raise stopped
        else:
            with exit_codes():
                self._work(cfg)

    def checkpoint(self, cfg: DictConfig) -> Any:
        """What submitit queues in place of this job when its time is up: the same once more.

        For jobs that are submitted as they are. Hydra's launchers queue themselves, with their
        command line. The state is in the run's checkpoints either way.
        """
        from submitit.helpers import DelayedSubmission  # costs time that most commands do without

        return DelayedSubmission(self, cfg)

    def _work(self, cfg: DictConfig) -> None:
        if code := self.run(resolve(cfg)):
            sys.exit(code)


def hydra_entry(run: Callable[[Config], int | None]) -> Callable[[], None]:
    """A command that composes the command line's overrides, checks them and calls `run`.

    `run` returns an exit code, None for 0; a code other than 0 ends a sweep at once.
    """
    command = hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")

    def main() -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands errors on instead of printing them
        with exit_codes():
            command(Job(run))()

    return main
