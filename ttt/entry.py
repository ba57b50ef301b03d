"""The command line around an entry point: Hydra, exit codes, errors in a user's words. No JAX."""

import functools
import os
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from ttt.config import Config, config_dir, explain, resolve
from ttt.errors import UserError


@contextmanager
def exit_codes() -> Generator[None]:
    """Exit with 2 for a user's mistake, 130 if interrupted, 1 and a traceback otherwise."""
    try:
        yield
    except UserError as error:
        _leave(2, f"error: {error}")
    except HydraException as error:
        _leave(2, f"error: {explain(error)}")
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except Exception:
        _leave(1, traceback.format_exc())


def _leave(code: int, message: str) -> None:
    sys.stderr.write(message.rstrip() + "\n")
    sys.exit(code)


class Job:
    """What Hydra runs for each job; a class, so that launchers can send it to other processes."""

    def __init__(self, run: Callable[[Config], int | None]):
        functools.update_wrapper(self, run)  # Hydra names the job after the module of `run`
        self.run = run

    def __call__(self, cfg: DictConfig) -> None:
        """Check the composed `cfg` and run it."""
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            self._work(cfg)  # Hydra goes on with the other jobs and reports this one in the end
        else:
            with exit_codes():
                self._work(cfg)

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
