"""Slurm and background jobs that are checked before they are queued and reported until they end.

The launchers of hydra-submitit-launcher check nothing, show a refusal by Slurm as a traceback, and
wait through `sacct`, which fails where Slurm keeps no accounts: they then wait for ever for a job
that left no result. Their failed jobs end with exit code 0, a success for Slurm.
"""

import atexit
import logging
import math
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher
from omegaconf import OmegaConf, open_dict

from ttt.config import resolve
from ttt.errors import RunError, UserError

_logger = logging.getLogger(__name__)

_PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
_QUERY_SECONDS = 15.0
"""Between two calls of `squeue`, which serves many users."""
_LATE_SECONDS = 30.0
"""How long after a job's end its result may come: files travel slowly between hosts."""
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
_ENDED |= {"OUT_OF_MEMORY", "TIMEOUT", "gone"}
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
            # What is registered last is called first, and submitit has written the error by then.
            atexit.register(_leave)
            for kind in (UserError, RunError):  # by the name that `_message` looks for
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
        if missing := [program for program in _PROGRAMS if shutil.which(program) is None]:
            raise UserError(
                f"+deploy=submitit hands the run to Slurm, but this machine has no "
                f"{', '.join(missing)}: start it on a login node of the cluster, or leave "
                "+deploy=submitit away to train here, on all devices of this machine"
            )
        submitted = self._submit(job_overrides, initial_job_idx)
        jobs = {
            " ".join([f"job {job.job_id}", *own]): job
            for job, own in zip(submitted, _differing(job_overrides), strict=True)
        }
        for name, job in jobs.items():
            _logger.info("%s, log: %s", name, job.paths.stdout)
        _logger.info(
            "this command waits for the end and may be left with Ctrl-C: what is queued stays; "
            "`scancel %s` ends it",
            submitted[0].job_id.split("_")[0],
        )
        return _results(jobs)

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

    A job may wait in the queue for days before it could report a typing error.
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
    shared = set.intersection(*map(set, job_overrides))
    return [[each for each in overrides if each not in shared] for overrides in job_overrides]


def _results(jobs: Mapping[str, Any]) -> list[JobReturn]:
    """What every job returned, once all have ended; a RunError that lists those which failed.

    jobs: submitit's, by the name that users see.
    """
    states = _wait(list(jobs.values()))
    returned, failed = [], []
    for name, job in jobs.items():
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
    for rank, task in enumerate(tasks):  # the first with a message: it ended the others
        if _has_result(task) and (error := task.exception()) is not None:
            where = f" on rank {rank}" if len(tasks) > 1 else ""
            raise RunError(f"failed{where}: {_message(str(error))}")
    if all(map(_has_result, tasks)):
        return tasks[0].result()
    message = f"ended as {state.lower() or 'unknown'}, without a result"
    if (log := tasks[0].paths.stdout).exists():
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        message = "\n".join([f"{message}; its log ends with", *lines])
    raise RunError(message)


def _message(trace: str) -> str:
    """The message of our own errors; of any other the whole traceback."""
    for kind in (UserError, RunError):
        name = f"\n{kind.__module__}.{kind.__qualname__}: "
        if name in trace:
            return trace.rsplit(name, 1)[1].split("\n-----", 1)[0].strip()
    return trace


def _wait(jobs: Sequence[Any]) -> dict[str, str]:
    """Wait until every job has left its results, or ended without; their last states by id."""
    last: dict[str, str] = {}
    ended_at: dict[str, float] = {}
    asked_at = -math.inf
    while jobs := [job for job in jobs if not _is_over(job, ended_at.get(job.job_id))]:
        if time.monotonic() - asked_at >= _QUERY_SECONDS:
            asked_at = time.monotonic()
            states = _states()
            for number in [job.job_id for job in jobs]:
                # Slurm forgets a job minutes after its end; a new one it knows at once.
                state = last.get(number, "") if states is None else states.get(number, "gone")
                if state != last.get(number, ""):
                    _logger.info("job %s: %s", number, state.lower())
                last[number] = state
                if state not in _ENDED:  # queued again, perhaps
                    ended_at.pop(number, None)
                else:
                    ended_at.setdefault(number, asked_at)
        time.sleep(1.0)
    return last


def _is_over(job: Any, ended_at: float | None) -> bool:
    """Whether a job has left all results that it will leave; ended_at: None while it runs."""
    results = [_has_result(job.task(rank)) for rank in range(job.num_tasks)]
    late = ended_at is not None and time.monotonic() - ended_at > _LATE_SECONDS
    return all(results) or late or (ended_at is not None and any(results))


def _has_result(task: Any) -> bool:
    return task.paths.result_pickle.exists()


def _states() -> dict[str, str] | None:
    """State of each of this user's jobs by id (ARRAY_INDEX in an array); None: no answer."""
    command = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = (line.partition("|") for line in ran.stdout.splitlines())
    return {number: state for number, _, state in lines}
