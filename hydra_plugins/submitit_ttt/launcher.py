"""Slurm and background jobs that are checked before they are queued and reported until they end."""

import atexit
import logging
import math
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher
from omegaconf import OmegaConf, open_dict

from ttt.config import resolve
from ttt.errors import RunError, UserError

_logger = logging.getLogger(__name__)

_NEEDS = ("sbatch", "srun", "squeue", "scontrol")
_ASK_SECONDS = 15.0
"""Between two questions to Slurm, which serves many users."""
_LATE_SECONDS = 30.0
"""How long a job may be over before its result is given up: files travel slowly between hosts."""
_OVER = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
    "gone",
)
_RANK_0_SECONDS = 5.0
_LOG_LINES = 20


class SlurmTTTLauncher(SlurmLauncher):
    """One Slurm job for a single experiment, a job array for a sweep."""

    def __call__(
        self,
        sweep_overrides: list[str],
        job_dir_key: str,
        job_num: int,
        job_id: str,
        singleton_state: dict[type, Singleton],
    ) -> JobReturn:
        """Run inside of the job; raises what its task raised, so that Slurm sees the job fail."""
        done = super().__call__(sweep_overrides, job_dir_key, job_num, job_id, singleton_state)
        try:
            done.return_value = done.return_value  # raises the task's error
        except Exception as error:
            # What is registered last comes first, and submitit has noted the error by then.
            atexit.register(_leave)
            for kind in (UserError, RunError):  # by the name that `_essence` looks for
                if isinstance(error, kind):
                    raise kind(str(error)) from error
            raise
        return done

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Queue the jobs and wait for their ends, a RunError if one of them failed.

        Raises UserError where there is no Slurm, where it refuses the jobs, or where a job's
        configuration has faults; then nothing is queued.
        """
        check(self.config, self.hydra_context, job_overrides)
        if missing := [program for program in _NEEDS if shutil.which(program) is None]:
            raise UserError(
                f"+deploy=submitit hands the run to Slurm, but this machine has no "
                f"{', '.join(missing)}: start it on a login node of the cluster, or leave "
                "+deploy=submitit away to train here, on all devices of this machine"
            )
        jobs = self._submit(job_overrides, initial_job_idx)
        names = [
            f"job {job.job_id}" + "".join(f" {override}" for override in own)
            for job, own in zip(jobs, _differing(job_overrides), strict=True)
        ]
        for job, name in zip(jobs, names, strict=True):
            _logger.info("%s, log: %s", name, job.paths.stdout)
        number = jobs[0].job_id.split("_")[0]
        _logger.info(
            "this command waits for the end and may be left with Ctrl-C: what is queued stays; "
            "`scancel %s` ends it",
            number,
        )
        return _results(jobs, names)

    def _submit(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
        import submitit  # takes seconds, and Hydra imports this file for every command
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = submitit.AutoExecutor(
            folder=str(self.params["submitit_folder"]),
            cluster="slurm",
            slurm_max_num_timeout=self.params["max_num_timeout"],
        )
        general = set(OmegaConf.structured(BaseQueueConf).keys())
        executor.update_parameters(
            **{
                key if key in general else f"slurm_{key}": value
                for key, value in self.params.items()
                if key not in ("submitit_folder", "max_num_timeout")
            }
        )
        numbers = range(first, first + len(job_overrides))
        try:
            return executor.map_array(
                self,
                [list(overrides) for overrides in job_overrides],
                ["hydra.sweep.dir" for _ in numbers],
                list(numbers),
                [f"job_id_for_{number}" for number in numbers],
                [Singleton.get_state() for _ in numbers],
            )
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(
                f"Slurm refuses the job: {error}\nChange what it names with "
                "hydra.launcher.KEY=VALUE (such as partition, account, nodes, timeout_min)."
            ) from error


class LocalTTTLauncher(LocalLauncher):
    """Background processes on this machine."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Start the jobs and wait for them; raises UserError before, where they are faulty."""
        check(self.config, self.hydra_context, job_overrides)
        return super().launch(job_overrides, initial_job_idx)


def _leave() -> None:
    """End a failed process at once: JAX would wait for the others, which wait for this one.

    Slurm ends the others then. So rank 0, whose message counts, goes first.
    """
    if os.environ.get("SLURM_PROCID", "0") != "0":
        time.sleep(_RANK_0_SECONDS)
    os._exit(1)


def check(config: Any, context: Any, job_overrides: Sequence[Sequence[str]]) -> None:
    """Raise a UserError if a job has a faulty configuration, or two jobs would train in one folder.

    A queue is too long a way to a typing error.
    """
    taken: dict[tuple[str, str], Sequence[str]] = {}
    for overrides, own in zip(job_overrides, _differing(job_overrides), strict=True):
        composed = context.config_loader.load_sweep_config(config, list(overrides))
        with open_dict(composed):
            del composed["hydra"]
        training = resolve(composed).training
        folder = (training.exp_folder, training.exp_name)
        if config.hydra.job.name == "train" and folder in taken:
            key = own[-1].split("=")[0].lstrip("+") if own else "KEY"
            raise UserError(
                f"{' '.join(taken[folder])} and {' '.join(own)} would both train as "
                f"training.exp_name={folder[1]}, in one folder: put what differs into the name, "
                f"with the quotes, as in 'training.exp_name={folder[1]}-${{{key}}}'"
            )
        taken[folder] = own


def _differing(job_overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """Of each job what it does not share with all others."""
    shared = set.intersection(*map(set, job_overrides)) if len(job_overrides) > 1 else None
    return [
        [each for each in overrides if shared is not None and each not in shared]
        for overrides in job_overrides
    ]


def _results(jobs: list[Any], names: list[str]) -> list[JobReturn]:
    """What every job returned, once all have ended; a RunError that lists those which failed."""
    states = _wait(jobs)
    returned, failed = [], []
    for job, name in zip(jobs, names, strict=True):
        try:
            returned.append(_result(job, states.get(job.job_id, "")))
        except RunError as error:
            failed.append(f"{name} {error}\nlog: {job.paths.stdout}")
    if failed:
        raise RunError(f"{len(failed)} of {len(jobs)} jobs failed:\n" + "\n".join(failed))
    return returned


def _result(job: Any, state: str) -> JobReturn:
    """What rank 0 returned; raises RunError where a rank failed or left nothing."""
    tasks = [job.task(rank) for rank in range(job.num_tasks)]
    for rank, task in enumerate(tasks):  # first of all who says why: it took the others with it
        if _has_result(task) and (error := task.exception()) is not None:
            where = f" on rank {rank}" if len(tasks) > 1 else ""
            raise RunError(f"failed{where}: {_essence(str(error))}")
    if not all(map(_has_result, tasks)):
        raise RunError(f"ended as {state.lower() or 'unknown'}, without a result{_tail(tasks[0])}")
    return tasks[0].result()


def _essence(trace: str) -> str:
    """The message of our own errors; of any other the whole traceback."""
    for kind in (UserError, RunError):
        name = f"\n{kind.__module__}.{kind.__qualname__}: "
        if name in trace:
            return trace.rsplit(name, 1)[1].split("\n-----", 1)[0].strip()
    return trace


def _tail(task: Any) -> str:
    if not task.paths.stdout.exists():
        return ""
    lines = task.paths.stdout.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return "; its log ends with\n" + "\n".join(lines)


def _wait(jobs: list[Any]) -> dict[str, str]:
    """Until every job has left its results, or is over without; their last states by id."""
    reported: dict[str, str] = {}
    over_since: dict[str, float] = {}
    asked_at = -math.inf
    while jobs := [job for job in jobs if not _ended(job, over_since)]:
        if time.monotonic() - asked_at >= _ASK_SECONDS:
            asked_at = time.monotonic()
            states = _states()
            for number in [job.job_id for job in jobs]:
                # Slurm forgets a job minutes after its end; a new one it knows at once.
                state = reported.get(number, "") if states is None else states.get(number, "gone")
                if state != reported.get(number, ""):
                    _logger.info("job %s: %s", number, state.lower())
                reported[number] = state
                if state in _OVER:
                    over_since.setdefault(number, asked_at)
                else:  # queued again, perhaps
                    over_since.pop(number, None)
        time.sleep(1.0)
    return reported


def _ended(job: Any, over_since: dict[str, float]) -> bool:
    """Whether a job has left all results that it will leave."""
    results = [_has_result(job.task(rank)) for rank in range(job.num_tasks)]
    if all(results):
        return True
    since = over_since.get(job.job_id)
    if since is None:
        return False
    return any(results) or time.monotonic() - since > _LATE_SECONDS


def _has_result(task: Any) -> bool:
    return task.paths.result_pickle.exists()


def _states() -> dict[str, str] | None:
    """State of each of this user's jobs by id (ARRAY_INDEX in an array); None: no answer."""
    command = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if ran.returncode:
        return None
    lines = (line.partition("|") for line in ran.stdout.splitlines())
    return {number: state for number, _, state in lines}
