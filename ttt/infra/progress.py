"""How far a loop is, as a line (live in a terminal, now and then in a log file), and its costs."""

import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

_LOG_SECONDS = 10.0
_LIVE_SECONDS = 0.1
_WINDOW = 50


class _Line:
    """A line that is shown anew: live in a terminal, else printed, as a context manager."""

    def __init__(self, console: Console, clock: Callable[[], float], *, transient: bool = False):
        self._console, self._clock = console, clock
        self._live = None
        if console.is_terminal and not console.quiet:
            self._live = Live(
                console=console,
                auto_refresh=False,
                transient=transient,
                redirect_stdout=not transient,  # which would go to standard error
                redirect_stderr=not transient,
            )
        self._interval = _LIVE_SECONDS if self._live else _LOG_SECONDS

    def __enter__(self) -> Self:
        """Take over the terminal's last line."""
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Give it back, the last state left to read."""
        if self._live:
            self._live.stop()

    def _show(self, line: str) -> None:
        if self._live:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)


class Progress(_Line):
    """Progress of a loop of `total` steps, as a context manager."""

    def __init__(
        self,
        total: int,
        what: str,
        *,
        start: int = 0,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Nothing is shown before the first `update`, and nothing at all if `quiet`.

        what: the first word of the line.
        start: steps done before this loop (a resumed run).
        clock: seconds.
        """
        self._total, self._what, self._start = total, what, start
        super().__init__(console or Console(quiet=quiet), clock)
        self._shown = -float("inf")
        # (time, step, tokens so far) at the end of the last steps. Speeds are taken between two of
        # them, so the first step, which waits for the compiler, never counts.
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW)

    def update(
        self, step: int, *, loss: float | None = None, tokens: int = 0, mfu: float | None = None
    ) -> None:
        """Show that `step` steps are done, the last with this loss, this many tokens, this MFU."""
        now = self._clock()
        so_far = self._marks[-1][2] if self._marks else 0
        self._marks.append((now, step, so_far + tokens))
        if now - self._shown >= self._interval or step >= self._total:
            self._shown = now
            self._show(self._line(step, loss, mfu))

    def _line(self, step: int, loss: float | None, mfu: float | None) -> str:
        parts = [f"{self._what} {step:>{len(str(self._total))}}/{self._total}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        (then, first, before), (now, last, after) = self._marks[0], self._marks[-1]
        if last > first and now > then:
            if after > before:
                parts.append(f"{(after - before) / (now - then):,.0f} tokens/s")
                if mfu is not None:
                    parts.append(f"MFU {mfu:.1%}")
            left = (self._total - step) * (now - then) / (last - first)
            parts.append(f"{timedelta(seconds=round(left))} left")
        if self._start:
            parts.append(f"resumed at {self._start}")
        return "  ".join(parts)


class Bar(_Line):
    """Progress of jobs one after another, each counted in its unit, as a context manager.

    Called as `bar(what, done, total, unit)`, from any thread; total: None if it is not known.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        """On standard error, unless a console is given; clock: seconds."""
        super().__init__(console or Console(stderr=True), clock, transient=True)
        self._what = ""
        self._shown = clock()
        self._marks: deque[tuple[float, int]] = deque()

    def __call__(self, what: str, done: int, total: int | None, unit: str) -> None:
        """Show that `done` of `total` are done of the job `what`."""
        now = self._clock()
        if what != self._what:
            self._what = what
            self._marks.clear()
        if self._marks and now - self._marks[-1][0] < self._interval:
            return
        self._marks.append((now, done))
        while now - self._marks[0][0] > 3 * _LOG_SECONDS and len(self._marks) > 2:
            self._marks.popleft()
        if now - self._shown >= self._interval:
            self._shown = now
            self._show(self._line(done, total, unit))

    def say(self, line: str) -> None:
        """Write a line to standard output, above the progress."""
        if self._live:
            self._live.update(Text(""), refresh=True)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def _line(self, done: int, total: int | None, unit: str) -> str:
        divisor, digits, unit = (1e6, 1, "MB") if unit == "bytes" else (1, 0, unit)

        def amount(count: float) -> str:
            return f"{count / divisor:,.{digits}f}"

        of = f" of {amount(total)}" if total else ""
        parts = [self._what, f"{amount(done)}{of} {unit}"]
        (then, before), (now, last) = self._marks[0], self._marks[-1]
        if now > then and last > before:
            speed = (last - before) / (now - then)
            parts.append(f"{amount(speed)} {unit}/s")
            if total:
                parts.append(f"{timedelta(seconds=round((total - done) / speed))} left")
        return "  ".join(parts)


class Spent:
    """Where time goes: seconds by name, in all and since they were last taken."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """clock: seconds."""
        self._clock = clock
        self.total: dict[str, float] = defaultdict(float)
        self._recent: dict[str, float] = defaultdict(float)

    def __str__(self) -> str:
        """The largest first."""
        largest_first = sorted(self.total.items(), key=lambda item: -item[1])
        return ", ".join(f"{what} {seconds:.1f}" for what, seconds in largest_first)

    @contextmanager
    def __call__(self, what: str) -> Generator[None]:
        """Count the time inside as spent on `what`."""
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            self.total[what] += seconds
            self._recent[what] += seconds

    def take(self, *names: str) -> dict[str, float]:
        """What was spent on `names` (none: on all) since it was last taken; 0 for all else."""
        taken = defaultdict(float)
        for name in names or tuple(self._recent):
            taken[name] = self._recent.pop(name, 0.0)
        return taken
