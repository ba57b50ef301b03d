"""A request to stop, as a signal: received at once, followed where the run can stop.

SIGTERM and SIGUSR1 come from clusters, Ctrl-C (SIGINT) from a terminal. Under submitit its own
signal (SIGUSR2 unless configured otherwise) counts too: submitit would leave in the middle of a
step. The run ends with `Stopped`, and ttt/entry.py hands the signal back to submitit.
"""

import logging
import os
import signal
import threading
from typing import Any, Self

_logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""The signals that ask any run to stop."""

INTERRUPTED = 130
"""Exit code after a second Ctrl-C."""


class StopRequest:
    """Listens for a request to stop while it is entered, as a context manager.

    The main thread may be inside a compilation or a step for minutes, and Python runs its handlers
    only between two instructions of that thread. So a thread of its own reads the signals from a
    pipe, which the C handler fills at once. Outside of the main thread it receives nothing.
    """

    def __init__(self):
        self.signal_number: int | None = None
        """The first signal; None: none yet."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over."""
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end)
        for number in (*SIGNALS, *_submitit_signal()):
            self._before[number] = signal.signal(
                number, lambda number, frame: self._receive(number)
            )
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back to whoever handled them before."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # the thread reads the end of the pipe
        self._thread.join()
        os.close(self._read_end)

    @property
    def name(self) -> str:
        """The first signal, as a user knows it."""
        if self.signal_number is None:
            return "another process"
        number = signal.Signals(self.signal_number)
        return "Ctrl-C" if number == signal.SIGINT else number.name

    def _listen(self) -> None:
        warned = False
        while byte := os.read(self._read_end, 1):
            number = byte[0]
            if number not in self._before:
                continue
            if warned and number == signal.SIGINT:
                os._exit(INTERRUPTED)
            self._receive(number)
            if not warned:
                warned = True
                _logger.warning(
                    "asked to stop by %s: finishing the step and saving; a second Ctrl-C stops at "
                    "once and loses the steps since the last checkpoint",
                    self.name,
                )

    def _receive(self, number: int) -> None:
        if self.signal_number is None:
            self.signal_number = number


def _submitit_signal() -> tuple[int, ...]:
    """The signal by which submitit's jobs learn that their time is up, inside of such a job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return ()
    name = f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"
    return (signal.Signals[name],) if name in signal.Signals.__members__ else ()
