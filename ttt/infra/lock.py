"""One run to a folder: locks that the system releases when their process ends, however it ends."""

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
    """Keeps a second run out of the folders of a run, as a context manager.

    `flock` on a file `.lock` in each folder: it ends with the process, so nothing has to be cleaned
    up after a crash, and the file itself means nothing. On NFS (version 4, or 3 with lockd) the
    lock also holds between hosts; on a file system without locks there is only a warning.
    """

    def __init__(self, *folders: Path, active: bool = True, named_by: str = "training.exp_name"):
        """Bind to folders; nothing is made.

        active: false in all processes of a run but one.
        named_by: the setting that names the folders, for the error message.
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
        """Release all locks."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held = {}

    def make(self) -> None:
        """Make and lock the other folders too, and write this process into all locks.

        Raises UserError if another run was faster, or if a folder cannot be written to.
        """
        for folder in self._folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _not_writable(folder, error) from error
            self._take(folder)
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        for descriptor in self._held.values():
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, owner, 0)
            except OSError as error:  # only the message of a second run needs it
                _logger.debug("the lock does not name its owner: %s", error)

    def _take(self, folder: Path) -> None:
        path = folder.resolve() / LOCK_FILE
        if path in self._held:
            return
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _not_writable(folder, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise UserError(
                f"another run works in {folder} ({owner}), and two would spoil each other's "
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

        An unmounted disk leaves an empty folder, and writing there would fill another disk.
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
                    "command again; it continues from the last checkpoint in it."
                )


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {folder} ({error.strerror}), where a run keeps its record or its "
        "checkpoints: make it writable, or set deploy_paths.experiments and "
        "deploy_paths.checkpoint to another place."
    )


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is unknown"
