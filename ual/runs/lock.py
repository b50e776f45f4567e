"""The lock of a folder: one process at a time writes there. Its file names the host and the process."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ual.errors import UserError

FILE = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """The lock of a folder. It ends with its process, however that ends.

    It is a POSIX record lock. Forked workers do not inherit it, and NFS and most cluster file systems respect
    it between machines. If another process of this machine has died with the lock, or one of another
    machine, the file remains, and `acquire` says whose lock is taken over.

    Args:
        folder: is created if it is absent.
        what: uses the folder, in a message: "a run".
    """

    def __init__(self, folder: Path, what: str) -> None:
        self._path, self._what = folder / FILE, what
        self._file: int | None = None
        self._created: list[Path] = []

    def acquire(self) -> str | None:
        """Acquire the lock; return a sentence if it is taken over, or cannot protect the folder.

        Raises:
            UserError: another process has the lock; or the folder cannot be written.
        """
        folder = self._path.parent
        self._created = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before, supported = self._open()
        except OSError as error:
            self.release()
            raise UserError(
                f"cannot write to {folder}: {error.strerror or error}", place="configuration, output_dir"
            ) from error
        if not supported:
            return f"the file system of {folder} has no locks: do not start a second process in this folder"
        if not before:
            return None
        return f"{_whose(before)} ended without releasing the lock of {folder}: it is taken over"

    def release(self) -> None:
        """Release the lock, and remove the folders that `acquire` created if nothing was written there."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
        for folder in self._created:
            try:
                folder.rmdir()
            except OSError:
                break
        self._created = []

    def _open(self) -> tuple[dict[str, Any], bool]:
        """Lock the file; return the owner that it named, and whether the file system has locks."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            supported = True
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = _read(file)
                if error.errno not in _UNSUPPORTED:
                    os.close(file)
                    raise self._refusal(owner) if error.errno in _HELD else error from error
                supported = False
            if _same(file, self._path):
                break
            os.close(file)  # its owner has removed it meanwhile
        self._file, owner = file, _read(file)
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        os.pwrite(file, mine, 0)
        os.ftruncate(file, len(mine))
        return owner, supported

    def _refusal(self, owner: dict[str, Any]) -> UserError:
        return UserError(
            f"{_whose(owner)} uses this folder for {self._what}",
            place=str(self._path.parent),
            remedy="wait until it has ended, or stop it",
        )


@contextmanager
def holding(folder: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a folder; say whose it was, if it is taken over.

    Raises:
        UserError: as `Lock.acquire`.
    """
    lock = Lock(folder, what)
    try:
        if note := lock.acquire():
            say(note)
        yield
    finally:
        lock.release()


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read(file: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(file, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _whose(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on host {owner.get('host')}"
