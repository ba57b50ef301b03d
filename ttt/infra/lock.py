"""One run to a folder: locks that the system gives up when their process dies, however it dies."""

import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import Self

from ttt.errors import RunError, UserError

_logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


class RunLock:
    """Holds the folders of a run against a second run, as a context manager.

    `flock` on a file `.lock` in each folder: it ends with the process, so nothing has to be cleaned
    up after a crash; the file that stays is empty of meaning. On NFS (version 4, or 3 with lockd)
    the lock also holds between hosts; on a file system without locks a warning is all there is.
    """

    def __init__(self, *folders: Path, active: bool = True, named_by: str = "training.exp_name"):
        """Bind to folders; nothing is made.

        active: false in all processes of a run but one.
        named_by: the setting that names the folders, for whoever must choose others.
        """
        self._named_by = named_by
        self._folders = folders if active else ()
        self._held: dict[Path, int] = {}

    def __enter__(self) -> Self:
        """Lock the folders that exist; raises UserError if another run holds one of them."""
        try:
            for folder in self._folders:
                if folder.is_dir():
                    self._take(folder)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Let others in."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held = {}

    def make(self) -> None:
        """Make and lock the other folders too, and sign all locks.

        Raises UserError if another run was faster, or if a folder cannot be written to.
        """
        for folder in self._folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _no_place(folder, error) from error
            self._take(folder)
        for descriptor in self._held.values():
            _sign(descriptor)

    def _take(self, folder: Path) -> None:
        path = folder.resolve() / LOCK_FILE
        if path in self._held:
            return
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _no_place(folder, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"another run works in {folder} ({holder}), and two would spoil each other's "
                f"record and checkpoints: wait for it, stop it, or choose another {self._named_by}."
            ) from error
        except OSError as error:
            _logger.warning(
                "%s cannot be locked (%s): nothing keeps a second run out of it",
                folder,
                error.strerror,
            )
        self._held[path] = descriptor

    def check(self) -> None:
        """Raise a RunError if a folder vanished, or is no longer the one that was locked.

        Where a mount goes away the empty mount point stays, and writing there would fill the wrong
        disk.
        """
        for path, descriptor in self._held.items():
            try:
                same = os.path.samestat(os.stat(path), os.fstat(descriptor))
            except OSError:
                same = False
            if not same:
                raise RunError(
                    f"{path.parent} vanished or was replaced under the run (is the disk still "
                    "mounted?): nothing was written there. Bring it back and start the same "
                    "command again; it goes on from the last checkpoint in it."
                )


def _no_place(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {folder} ({error.strerror}), where a run keeps its record or its "
        "checkpoints: make it writable, or set deploy_paths.experiments and "
        "deploy_paths.checkpoint to another place."
    )


def _sign(descriptor: int) -> None:
    """Say who holds the lock, for the message of those who do not get it."""
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
    except OSError as error:
        _logger.debug("no name in the lock: %s", error)


def _holder(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it does not say who it is"
