"""Other commands as child processes that stop as their parent is asked to."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttt.config import checkpoint_root
from ttt.errors import Stopped
from ttt.infra.record import RunRecord

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def call(command: Sequence[str], **options: Any) -> int:
    """Run a command to its end and return its exit code; options: of `subprocess.Popen`.

    A signal goes to the command, which may take its time; then KeyboardInterrupt or Stopped is
    raised here.
    """
    received: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        received.append(number)
        child.send_signal(number)

    # Its own process group: a terminal's Ctrl-C would reach it twice, and the second ends it at
    # once.
    child = subprocess.Popen(command, process_group=0, **options)
    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.terminate()
            child.wait()
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise Stopped("stopped as asked; the same command goes on from here", received[0])
    return code


def measure(
    command: str, arguments: Sequence[str], log: Path, checkpoints: Path | str | None
) -> int:
    """`evaluate` or `benchmark` with these arguments, its output into `log`; returns its exit code.

    checkpoints: their root; None: the usual one. `+run=` finds runs below it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    root = str(Path(checkpoints or checkpoint_root()).expanduser().absolute())
    with log.open("w") as file:
        file.write(f"$ {shlex.join(['uv', 'run', command, *arguments])}\n")
        file.flush()
        return call(
            [sys.executable, "-m", f"ttt.{command}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=os.environ | {"TTT_CHECKPOINTS": root},
        )


def is_finished(record: Path) -> bool:
    """Whether a record, such as of an evaluation, says that all of it was done."""
    return (record / "run.json").exists() and RunRecord(record).run()["status"] == "finished"
