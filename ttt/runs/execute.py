"""Runs of a plan, one after the other, as subprocesses of the command `train`.

Every run's output goes to `<experiments>/<exp_folder>/logs/NAME.log`; how far it is, is read from
its record. A run that does not end well, or for which a gate does not hold, ends the plan.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import IO, Any

from rich.console import Console

from ttt.config import differences, to_dict
from ttt.entry import ASKED_TO_STOP, UNUSED_GPU, cuda_extra, gpu_is_visible
from ttt.errors import RunError, Stopped, UserError
from ttt.infra.lock import RunLock
from ttt.infra.plan_manifest import PlanManifest
from ttt.infra.progress import Progress
from ttt.infra.record import RunRecord, StoredRun
from ttt.runs import gates, matching
from ttt.runs.pilot import check_data
from ttt.runs.plan import Plan, PlannedRun, PreparedPlan, config_of

TRAIN = (sys.executable, "-m", "ttt.train")
"""The command of a run, before its arguments."""

_POLL_SECONDS = 0.5
_LAST_LINES = 12
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def run(prepared: PreparedPlan, console: Console, train: Sequence[str] = TRAIN) -> None:
    """Run everything that is left and can run, from where the last call stopped.

    Raises UserError before anything is written if data is missing, or if the folder holds another
    plan or runs of another plan; RunError at the first run that fails or does not pass a gate; and
    Stopped or KeyboardInterrupt where a signal asked for an end.
    """
    if prepared.head["runtime_mode"] == "jax" and gpu_is_visible() and cuda_extra() is None:
        console.print(f"warning: {UNUSED_GPU}", soft_wrap=True, style="bold", markup=False)
    if prepared.make_data is not None:
        prepared.make_data(console)
    check_data([run for run in prepared.plan.runs if run.name not in prepared.absent])
    with RunLock(prepared.folder, named_by="--exp-folder") as lock:
        manifest = PlanManifest.open(prepared.folder, prepared.recorded, prepared.head)
        _Execution(prepared, manifest, console, train).run(lock)


class _Execution:
    """A plan under way in one folder."""

    def __init__(
        self,
        prepared: PreparedPlan,
        manifest: PlanManifest,
        console: Console,
        train: Sequence[str],
    ):
        self._prepared, self._folder, self._manifest = prepared, prepared.folder, manifest
        self._console, self._command = console, train
        self._began = time.monotonic()
        self._paces: dict[str, list[float]] = {}  # kind -> wall seconds per token of runs done now
        self._signal: int | None = None
        self._child: subprocess.Popen | None = None

    def run(self, lock: RunLock) -> None:
        """All runs; the wall-clock-matched ones are planned when the others are timed."""
        plan = self._plan()
        lock.make()
        with self._listening():
            self._work(plan)
            if self._prepared.rest is not None and self._manifest.seconds_per_token is None:
                rows = [
                    (r.kind, r.name, r.tokens_per_step, self._record(r).metrics())
                    for r in self._prepared.timed
                ]
                self._manifest.freeze(matching.seconds_per_token(rows))
                self._print("seconds per token are measured; now the wall-clock-matched runs")
                self._work(self._plan())

    def _plan(self) -> Plan:
        """All that can be planned by now; UserError if a record on disk does not fit."""
        per_token, plan = self._manifest.seconds_per_token, self._prepared.plan
        if per_token is not None and self._prepared.rest is not None:
            plan = self._prepared.rest(per_token)
        self._manifest.adopt(
            [{**asdict(run), "tokens": run.tokens, "command": run.command} for run in plan.runs],
            [asdict(path) for path in plan.paths],
        )
        self._check_disk(plan)
        return plan

    def _record(self, run: PlannedRun) -> RunRecord:
        return RunRecord(self._folder / run.name)

    def _recorded(self, run: PlannedRun) -> str:
        """The status in a run's record; `absent` without one."""
        record = self._record(run)
        return record.run()["status"] if (record.folder / "run.json").exists() else "absent"

    def _check_disk(self, plan: Plan) -> None:
        """Refuse records of other plans, and those that the manifest does not describe."""
        faults = []
        for run in plan.runs:
            recorded, status = self._recorded(run), self._manifest.status(run.name)
            if recorded == "absent":
                if status == "finished":
                    faults.append(f"{run.name}: the manifest says finished, but there is no record")
            elif status == "pending" and not self._prepared.skip_existing:
                faults.append(
                    f"{run.name}: has a record ({recorded}), but not of this plan; "
                    "--skip-existing takes it as it is if its settings are the plan's"
                )
            elif changed := _changed(self._record(run).settings(), to_dict(config_of(run))):
                changes = (f"{key} {was} -> {now}" for key, (was, now) in changed.items())
                faults.append(f"{run.name}: has a record of other settings: {', '.join(changes)}")
        if faults:
            listed = "\n".join(f"  {fault}" for fault in faults)
            raise UserError(
                f"{self._folder} holds runs that the plan cannot use:\n{listed}\nChoose another "
                "--exp-folder, or move them away."
            )

    def _work(self, plan: Plan) -> None:
        """Every run that is not done, in order."""
        left, done = [], 0
        for run in plan.runs:
            if self._recorded(run) == "finished":
                self._judge(run)  # again, if the last call stopped before
                done += 1
            elif run.name not in self._prepared.absent:
                left.append(run)
        total = len(plan.runs)
        if done:
            self._print(f"{done} of {total} runs are finished already")
        for position, run in enumerate(left):
            number = plan.runs.index(run) + 1
            time_left = self._time_left(left[position:])
            self._print(
                f"run {number} of {total}: {run.name} ({run.steps} steps, {run.tokens:,} tokens"
                f"{time_left})"
            )
            self._manifest.note(run.name, "running")
            began = time.monotonic()
            self._train(run)
            pace = (time.monotonic() - began) / run.tokens
            self._paces.setdefault(run.kind, []).append(pace)
            self._judge(run)
            if self._signal is not None:  # as the run ended
                self._stop(run)

    def _judge(self, run: PlannedRun) -> None:
        """Write the gates of a finished run down; raise RunError if one does not hold."""
        record = self._record(run)
        stored = StoredRun(record.folder, record.run(), record.settings(), record.metrics())
        verdicts = gates.check(run, stored)
        self._manifest.note(run.name, "finished", verdicts)
        for gate in verdicts:
            if gate.holds is False:
                raise RunError(
                    f"{run.name}: the gate {gate.name!r} does not hold: {gate.said}. No run starts "
                    f"from it. Look at {record.folder} and {self._log(run)}; the verdicts are in "
                    f"{self._manifest.path}."
                )

    def _train(self, run: PlannedRun) -> None:
        """The run's command, to its end."""
        log = self._log(run)
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {run.command}\n".encode())
            file.flush()
            code = self._watch(run, file)
        recorded = self._recorded(run)
        if code == 0 and recorded == "finished":
            return
        if self._signal is not None or code == ASKED_TO_STOP:
            self._manifest.note(run.name, "interrupted")
            self._stop(run)
        self._manifest.note(run.name, "failed")
        end = "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
        raise RunError(
            f"{run.name} ended with exit code {code}, its record says {recorded}. The plan stops "
            f"here. The whole output is in {log}; its end:\n{end}\nCorrect the cause and give "
            "the same command again: it continues from here."
        )

    def _watch(self, run: PlannedRun, log: IO[bytes]) -> int:
        """Start the command, show how far it is, return its exit code."""
        command = [*self._command, *run.arguments]
        # Its own process group: a terminal's Ctrl-C would reach it twice, and the second ends it
        # at once.
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
        try:
            if self._signal is not None:
                self._child.send_signal(self._signal)
            step = 0
            with Progress(run.steps, "  step", console=self._console) as progress:
                while True:
                    try:
                        code = self._child.wait(_POLL_SECONDS)
                    except subprocess.TimeoutExpired:
                        code = None
                    now, loss = self._record(run).last_step()
                    if now > step:
                        tokens = (now - step) * run.tokens_per_step
                        progress.update(now, loss=loss, tokens=tokens)
                        step = now
                    if code is not None:
                        return code
        finally:
            if self._child.poll() is None:  # an error of our own: leave no process behind
                self._child.terminate()
                self._child.wait()
            self._child = None

    @contextmanager
    def _listening(self) -> Generator[None]:
        """Hand requests to stop on to the run that is under way."""

        def receive(number: int, frame: Any) -> None:
            if self._signal is None:
                self._print(f"{signal.Signals(number).name}: the run is asked to save and stop …")
            self._signal = self._signal or number
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(number)

        before = {number: signal.signal(number, receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, run: PlannedRun) -> None:
        """End as the signal demands, with a message on how to continue."""
        message = (
            f"the plan stopped in {run.name}; its output is in {self._log(run)}. The same command "
            "continues from there."
        )
        if self._signal == signal.SIGINT:
            self._print(message)
            raise KeyboardInterrupt
        raise Stopped(message, self._signal or 0)

    def _log(self, run: PlannedRun) -> Path:
        return self._folder / "logs" / f"{run.name}.log"

    def _time_left(self, left: Sequence[PlannedRun]) -> str:
        """Time that has passed, and what these runs may take at the pace so far."""
        if not self._paces:
            return ""
        passed = timedelta(seconds=round(time.monotonic() - self._began))
        paces = {kind: fmean(values) for kind, values in self._paces.items()}
        usual = fmean(chain(*self._paces.values()))
        seconds = sum(run.tokens * paces.get(run.kind, usual) for run in left)
        return f"; {passed} gone, about {timedelta(seconds=round(seconds))} left"

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


def _changed(stored: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings as (on disk, planned) where they differ; another number of steps is another run."""
    changed = differences(stored, planned)
    steps = (stored["training"]["total_steps"], planned["training"]["total_steps"])
    return changed | ({"training.total_steps": steps} if steps[0] != steps[1] else {})
