"""Runs of a plan, one after the other, as subprocesses of the command `train`.

Every run's output goes to `<experiments>/<exp_folder>/logs/NAME.log`; how far it is, is read from
its record. A run that does not end well, or for which a gate does not hold, ends the plan.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from ttt.entry import ASKED_TO_STOP
from ttt.errors import RunError, Stopped, UserError
from ttt.infra.lock import RunLock
from ttt.infra.plan_manifest import PlanManifest
from ttt.infra.progress import Progress
from ttt.infra.record import RunRecord
from ttt.runs import compose, gates, records
from ttt.runs.plan import Plan, PlannedRun, PlanRequest, build

TRAIN = (sys.executable, "-m", "ttt.train")
"""The command of a run, before its arguments."""

_POLL_SECONDS = 0.5
_LAST_LINES = 12
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass
class Execution:
    """A plan under way in one folder."""

    request: PlanRequest
    matchings: tuple[str, ...]
    folder: Path
    """`<experiments>/<exp_folder>`."""
    flags: dict[str, Any]
    head: dict[str, Any]
    skip_existing: bool
    console: Console
    train: Sequence[str] = TRAIN
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        self._began = self.clock()
        self._paces: dict[str, list[float]] = {}  # kind -> wall seconds per token of runs done now
        self._signal: int | None = None
        self._child: subprocess.Popen | None = None

    def run(self) -> None:
        """From where the last call stopped to the end.

        Raises UserError before anything is written if the folder holds another plan or runs that
        are none of this one's, RunError at the first run that fails or does not pass a gate, and
        Stopped or KeyboardInterrupt where a signal asked for an end.
        """
        with RunLock(self.folder, named_by="--exp-folder") as lock:
            manifest = PlanManifest.open(self.folder, self.flags, self.head)
            plan = self._plan(manifest)
            manifest.adopt(*records.entries(plan))
            self._check_disk(plan, manifest)
            lock.make()
            with self._listening():
                self._work(plan, manifest)
                if "wall_clock" in self.matchings and manifest.seconds_per_token is None:
                    timed = build(self.request, ["tokens"], compose.facts)
                    manifest.freeze(records.measure(timed.runs, self.folder))
                    self._say("seconds per token are measured; now the wall-clock-matched runs")
                    plan = self._plan(manifest)
                    manifest.adopt(*records.entries(plan))
                    self._check_disk(plan, manifest)
                    self._work(plan, manifest)

    def _plan(self, manifest: PlanManifest) -> Plan:
        """All that can be planned by now."""
        per_token = manifest.seconds_per_token
        known = [how for how in self.matchings if how != "wall_clock" or per_token is not None]
        return build(self.request, known, compose.facts, per_token)

    def _check_disk(self, plan: Plan, manifest: PlanManifest) -> None:
        """Refuse records that are none of this plan's, or no longer what the manifest says."""
        faults = []
        for run in plan.runs:
            recorded, changed = records.compared(self.folder, run)
            status = manifest.status(run.name)
            if recorded == "absent":
                if status == "finished":
                    faults.append(f"{run.name}: finished says the manifest, but its record is gone")
            elif status == "pending" and not self.skip_existing:
                faults.append(
                    f"{run.name}: is there ({recorded}), but not by this plan; "
                    "--skip-existing takes it as it is if its settings are the plan's"
                )
            elif changed:
                changes = (f"{key} {was} -> {now}" for key, (was, now) in changed.items())
                faults.append(f"{run.name}: is there with other settings: {', '.join(changes)}")
        if faults:
            listed = "\n".join(f"  {fault}" for fault in faults)
            raise UserError(
                f"{self.folder} holds runs that the plan cannot use:\n{listed}\nChoose another "
                "--exp-folder, or move them away."
            )

    def _work(self, plan: Plan, manifest: PlanManifest) -> None:
        """Every run that is not done, in order."""
        left = [run for run in plan.runs if not self._done(run, manifest)]
        total = len(plan.runs)
        if len(left) < total:
            self._say(f"{total - len(left)} of {total} runs are finished already")
        for run in left:
            number = plan.runs.index(run) + 1
            self._say(f"run {number} of {total}: {run.name} ({self._clock_line(run, left)})")
            manifest.note(run.name, "running")
            began = self.clock()
            self._train(run, manifest)
            pace = (self.clock() - began) / run.tokens
            self._paces.setdefault(run.kind, []).append(pace)
            self._judge(run, manifest)
            if self._signal is not None:  # as the run ended
                self._stop(run)

    def _done(self, run: PlannedRun, manifest: PlanManifest) -> bool:
        """Whether a run's record is finished; then its gates are looked at, if they were not."""
        if records.compared(self.folder, run)[0] != "finished":
            return False
        self._judge(run, manifest)
        return True

    def _judge(self, run: PlannedRun, manifest: PlanManifest) -> None:
        """Write the gates of a finished run down; raise RunError if one does not hold."""
        verdicts = gates.check(run, records.evidence(self.folder / run.name))
        manifest.note(run.name, "finished", verdicts)
        for gate in verdicts:
            if gate.holds is False:
                raise RunError(
                    f"{run.name}: the gate {gate.name!r} does not hold: {gate.said}. Nothing is "
                    f"built upon it. Look at {self.folder / run.name} and {self._log(run)}; the "
                    f"verdicts are in {manifest.path}."
                )

    def _train(self, run: PlannedRun, manifest: PlanManifest) -> None:
        """The run's command, to its end."""
        log = self._log(run)
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {run.command}\n".encode())
            file.flush()
            code = self._watch(run, [*self.train, *run.arguments], file)
        recorded, _ = records.compared(self.folder, run)
        if code == 0 and recorded == "finished":
            return
        if self._signal is not None or code == ASKED_TO_STOP:
            manifest.note(run.name, "interrupted")
            self._stop(run)
        manifest.note(run.name, "failed")
        end = "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
        raise RunError(
            f"{run.name} ended with exit code {code}, its record says {recorded}. The plan stops "
            f"here. The whole output is in {log}; its end:\n{end}\nMend the cause and give the "
            "same command again: it goes on from here."
        )

    def _watch(self, run: PlannedRun, command: Sequence[str], log: Any) -> int:
        """Start the command, show how far it is, return its exit code."""
        # Its own process group: a terminal's Ctrl-C would reach it twice, and the second ends it
        # at once.
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
        try:
            if self._signal is not None:
                self._child.send_signal(self._signal)
            step = 0
            with Progress(run.steps, "  step", console=self.console) as progress:
                while True:
                    try:
                        code = self._child.wait(_POLL_SECONDS)
                    except subprocess.TimeoutExpired:
                        code = None
                    now, loss = RunRecord(self.folder / run.name).last_step()
                    if now > step:
                        tokens = (now - step) * run.tokens_per_step
                        progress.update(now, loss=loss, tokens=tokens)
                        step = now
                    if code is not None:
                        return code
        finally:
            if self._child.poll() is None:  # an error of our own: leave nobody behind
                self._child.terminate()
                self._child.wait()
            self._child = None

    @contextmanager
    def _listening(self) -> Generator[None]:
        """Hand requests to stop on to the run that is under way."""

        def hear(number: int, frame: Any) -> None:
            if self._signal is None:
                self._say(f"{signal.Signals(number).name}: the run is asked to save and stop …")
            self._signal = self._signal or number
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(number)

        before = {number: signal.signal(number, hear) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, run: PlannedRun) -> None:
        """Leave as a signal asked, with a word on how to go on."""
        message = (
            f"the plan stopped in {run.name}; its output is in {self._log(run)}. The same command "
            "goes on from there."
        )
        if self._signal == signal.SIGINT:
            self._say(message)
            raise KeyboardInterrupt
        raise Stopped(message, self._signal or 0)

    def _log(self, run: PlannedRun) -> Path:
        return self.folder / "logs" / f"{run.name}.log"

    def _clock_line(self, run: PlannedRun, left: Sequence[PlannedRun]) -> str:
        """Time that has passed, and what may be left from this run on, at the pace so far."""
        passed = timedelta(seconds=round(self.clock() - self._began))
        if not self._paces:
            return f"{run.steps} steps, {run.tokens:,} tokens"
        paces = {kind: fmean(values) for kind, values in self._paces.items()}
        usual = fmean(chain(*self._paces.values()))
        ahead = left[left.index(run) :]
        seconds = sum(other.tokens * paces.get(other.kind, usual) for other in ahead)
        about = timedelta(seconds=round(seconds))
        return f"{run.steps} steps, {run.tokens:,} tokens; {passed} gone, about {about} left"

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)
