"""Files of fixed-size records that all users of a machine share, and locks on single records.

Anybody may write in the directory, so nothing in it is trusted to be what it should be. Locks
are *open file description locks*: two descriptors conflict even in one process, and a lock
lasts until the last duplicate of its descriptor is closed. 64-bit Linux only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

DIRECTORY = Path("/tmp/orchestrator-leases")  # noqa: S108 - everybody's, and opened with care
RECORD_SIZE = 128
RECORDS = 1024

# Constants and structure of <fcntl.h>, the same on every 64-bit Linux.
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hhqqi4x")
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_EVERYBODY = 0o666
# What may not be opened may just be being made, by a user with a strict umask.
_ATTEMPTS, _PAUSE_S = 20, 0.01


class LeaseError(SweepError):
    """GPUs cannot be shared through the tables, or not safely."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. Use another directory with hydra.launcher.lease_dir=PATH, or share no GPUs "
            "with other sweeps with hydra.launcher.leases=false."
        )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise what the system says as a `LeaseError` that names the file."""
    try:
        yield
    except OSError as error:
        msg = f"The GPU leases in {path} cannot be used: {error.strerror or error}"
        raise LeaseError(msg) from error


def check_platform() -> None:
    """Raise `LeaseError` where there are no such locks."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        msg = f"GPU leases need a 64-bit Linux, and this is {sys.platform}"
        raise LeaseError(msg)


def open_directory(path: Path) -> int:
    """A descriptor of the directory, which is made if missing.

    Raises:
        LeaseError: it is none, cannot be opened, or anybody may replace what is in it.
    """
    with explained(path):
        descriptor = _patiently(lambda: _make_and_open(path))
    status = os.fstat(descriptor)
    anybody = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    if anybody and status.st_uid not in (0, os.geteuid()):
        os.close(descriptor)
        msg = (
            f"The lease directory {path} belongs to user {status.st_uid} and anybody may replace "
            "what is in it; expected one with the sticky bit (chmod 1777)"
        )
        raise LeaseError(msg)
    # Cleaners of temporary files (systemd-tmpfiles) leave a locked directory alone.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def _make_and_open(path: Path) -> int:
    made = False
    with suppress(FileExistsError):
        os.mkdir(path, 0o1777)  # noqa: PTH102
        made = True
    try:
        descriptor = os.open(path, _OPEN_DIRECTORY)
    except NotADirectoryError as error:  # for a link, too
        is_what = "a symbolic link" if path.is_symlink() else "not a directory"
        msg = f"The lease directory {path} is {is_what}; expected a directory"
        raise LeaseError(msg) from error
    if made and os.fstat(descriptor).st_uid == os.geteuid():
        os.fchmod(descriptor, 0o1777)  # whatever the umask
    return descriptor


def _patiently(action: Callable[[], T]) -> T:
    for _ in range(_ATTEMPTS - 1):
        with suppress(PermissionError):
            return action()
        time.sleep(_PAUSE_S)
    return action()


class RecordFile:
    """An open file of records. It never grows beyond `RECORDS`, and is never made shorter."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def open(cls, directory: int, path: Path) -> RecordFile:
        """Open the file of this name in an opened directory; it is made if missing.

        Raises:
            LeaseError: it is not a file of its own, or cannot be opened.
        """
        with explained(path):
            file = cls(path, _patiently(lambda: _open_or_make(directory, path)))
            try:
                file._check()
                file.is_locked(0)  # fails now where there are no locks
            except BaseException:
                file.close()
                raise
            return file

    def _check(self) -> None:
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            what = "has other names" if stat.S_ISREG(status.st_mode) else "is not a regular file"
            msg = f"The lease table {self.path} {what}; expected a file with this name only"
            raise LeaseError(msg)
        if status.st_uid == os.geteuid() and status.st_mode & _EVERYBODY != _EVERYBODY:
            os.fchmod(self.descriptor, _EVERYBODY)  # whatever the umask was

    def again(self) -> RecordFile:
        """The same file, even if it was removed, with locks apart from ours."""
        path = f"/proc/self/fd/{self.descriptor}"
        return RecordFile(self.path, os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def read(self, index: int) -> bytes:
        return os.pread(self.descriptor, RECORD_SIZE, index * RECORD_SIZE)

    def read_all(self) -> list[bytes]:
        """All records that were ever written; the last may be cut short."""
        size = min(os.fstat(self.descriptor).st_size, RECORDS * RECORD_SIZE)
        data = os.pread(self.descriptor, size, 0)
        return [data[at : at + RECORD_SIZE] for at in range(0, len(data), RECORD_SIZE)]

    def write(self, index: int, record: bytes) -> None:
        # One call for one record: a kill leaves the old one or the new one.
        os.pwrite(self.descriptor, record, index * RECORD_SIZE)

    def try_lock(self, index: int) -> bool:
        """Lock a record; False where another descriptor has it. Never waits."""
        try:
            self._fcntl(_F_OFD_SETLK, fcntl.F_WRLCK, index)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def unlock(self, index: int) -> None:
        self._fcntl(_F_OFD_SETLK, fcntl.F_UNLCK, index)

    def is_locked(self, index: int) -> bool:
        """Whether another descriptor has a lock on a record."""
        return self._fcntl(_F_OFD_GETLK, fcntl.F_WRLCK, index) != fcntl.F_UNLCK

    def _fcntl(self, command: int, kind: int, index: int) -> int:
        flock = _FLOCK.pack(kind, os.SEEK_SET, index * RECORD_SIZE, RECORD_SIZE, 0)
        answer: int = _FLOCK.unpack(fcntl.fcntl(self.descriptor, command, flock))[0]
        return answer


def _open_or_make(directory: int, path: Path) -> int:
    for _ in range(_ATTEMPTS):
        # First without O_CREAT: in a sticky directory the kernel refuses that for others' files.
        with suppress(FileNotFoundError):
            return _open(directory, path, _OPEN)
        with suppress(FileExistsError):
            return _open(directory, path, _OPEN | os.O_CREAT | os.O_EXCL)
    raise FileExistsError(errno.EEXIST, "it appears and disappears")


def _open(directory: int, path: Path, flags: int) -> int:
    try:
        return os.open(path.name, flags, _EVERYBODY, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            msg = f"The lease table {path} is a symbolic link; expected a file"
            raise LeaseError(msg) from error
        raise
