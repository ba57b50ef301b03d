"""The command line around an entry point: Hydra, exit codes, errors in a user's words. No JAX."""

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
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

UNUSED_GPU = (
    "this machine has an NVIDIA GPU, but JAX computes on the CPU: start with `uv run --exact "
    "--extra cuda13 …` (or cuda12; --exact without the extra removes JAX's CUDA plugin), or set "
    "backend.platform=cpu if the CPU is meant"
)
"""The warning where `gpu_is_visible` and JAX does not use it."""
_DRIVER = Path("/proc/driver/nvidia/gpus")


def gpu_is_visible() -> bool:
    """Whether this process may use an NVIDIA GPU, whatever JAX finds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    if _DRIVER.is_dir():
        return any(_DRIVER.iterdir())
    if shutil.which("nvidia-smi") is None:  # the driver of WSL and some containers has no /proc
        return False
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return "GPU " in done.stdout


def cuda_extra() -> str | None:
    """The extra of this environment that brings JAX's CUDA plugin; None: it has none."""
    extras = ("cuda13", "cuda12")
    return next((e for e in extras if importlib.util.find_spec(f"jax_{e}_plugin")), None)


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
