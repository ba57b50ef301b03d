"""How a command ends other than well; it imports nothing, so that every module may."""


class UserError(Exception):
    """A mistake in what was asked for; the message says value, rule and remedy. Exit code 2."""


class RunError(Exception):
    """A run that cannot go on; the message says why, what is safe and what to do. Exit code 1."""


class Stopped(Exception):  # noqa: N818 - no error: what was asked for was done
    """A run that was asked to stop, and can go on later; the message says how. Exit code 75."""

    def __init__(self, message: str, signal_number: int):
        """signal_number: what asked."""
        super().__init__(message)
        self.signal_number = signal_number
