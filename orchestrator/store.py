"""The run directory: every path in it, reading, atomic writing, and who owns it.

Launchers, callback, status, aggregation and report meet only here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from orchestrator.naming import with_suffix
from orchestrator.processes import boot_id, hostname, is_alive
from orchestrator.record import (
    PREEMPTED,
    Attempt,
    RecordError,
    RunRecord,
    RunState,
    decode,
    encode,
    from_plain,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

RECORD = "run.json"
CLAIM = ".claim"
SWEEPS = ".sweeps"
ATTEMPTS = "attempts"
# Logs and curves of a run's further ranks, where it has several.
RANKS = "ranks"
# What an earlier attempt leaves behind and a later one writes anew.
_ATTEMPT_FILES = (RECORD, "train_stdout.log", "train_stderr.log", "metrics.jsonl", RANKS)


@dataclass(frozen=True)
class RunDir:
    """The file-system contract of one run."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / RECORD

    @property
    def stdout(self) -> Path:
        return self.path / "train_stdout.log"

    @property
    def stderr(self) -> Path:
        return self.path / "train_stderr.log"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def arrays(self) -> Path:
        return self.path / "arrays.npz"

    @property
    def claim(self) -> Path:
        return self.path / CLAIM

    @property
    def attempts(self) -> Path:
        return self.path / ATTEMPTS

    def read(self) -> RunRecord:
        """The record.

        Raises:
            FileNotFoundError: there is none yet.
            RecordError: it cannot be read as one; the text names the file.
        """
        try:
            return decode(read_bytes(self.record))
        except RecordError as error:
            msg = f"{self.record}: {error}"
            raise RecordError(msg) from error

    def try_read(self) -> RunRecord | None:
        """The record, or None where there is none that can be read."""
        with contextlib.suppress(OSError, RecordError):
            return self.read()
        return None

    def try_read_anew(self) -> RunRecord | None:
        """The same past what a file server's client remembers; OSError without a directory."""
        with os.scandir(self.path):  # a directory that is opened is looked at anew
            pass
        return self.try_read()

    def write(self, record: RunRecord) -> None:
        """Replace the record atomically; a final state is on the disk before this returns."""
        write_atomic(self.record, encode(record), durable=record.state.is_final)

    def begin_attempt(self, keep: Collection[str] = ()) -> tuple[Attempt, ...]:
        """Make room for another attempt; the caller holds the lock.

        What the last one left moves to ``attempts/<n>/``. A finished run that is done again
        starts in an empty directory; after a failure checkpoints and arrays stay where a
        task that resumes will look for them, and where it has said that its state is saved
        (`orchestrator.Preempted`) its curve goes on, too.

        Args:
            keep: names of what stays in any case.

        Returns:
            All attempts so far, for the new record.
        """
        earlier = self.try_read()
        if earlier is not None and earlier.never_began:
            return earlier.attempts
        whole = earlier is not None and earlier.state is RunState.COMPLETED
        error = None if earlier is None else earlier.error
        goes_on = error is not None and error.type == PREEMPTED
        self.set_aside(whole=whole, but=(*keep, *((self.metrics.name,) if goes_on else ())))
        return () if earlier is None else earlier.with_last_attempt()

    def set_aside(self, *, whole: bool, but: Collection[str] = ()) -> None:
        """Move the last attempt's record, logs and curve to ``attempts/<n>/``.

        Args:
            whole: move everything else, too.
            but: the names of what stays.
        """
        names = (
            [entry.name for entry in os.scandir(self.path) if entry.name not in (CLAIM, ATTEMPTS)]
            if whole
            else [name for name in _ATTEMPT_FILES if (self.path / name).exists()]
        )
        names = [name for name in names if name not in but]
        if not names:
            return
        self.attempts.mkdir(exist_ok=True)
        target = _next_number(self.attempts)
        # The record last: whatever interrupts this, the run is never without one.
        for name in sorted(names, key=lambda name: name == RECORD):
            shutil.move(self.path / name, target / name)


def _next_number(parent: Path) -> Path:
    number = 1
    while True:
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:
            number += 1
        else:
            return parent / str(number)


def read_bytes(path: Path | str) -> bytes:
    """A small file's content; twice as fast as ``open`` for many of them."""
    # Not blocking: somebody's named pipe must not hold up a whole walk.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        data = os.read(descriptor, size + 1)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file so that a reader sees all of the old content or all of the new.

    Args:
        path: the file; its directory is made if missing.
        data: the new content.
        durable: wait until the content is on the disk.

    Raises:
        OSError: the disk is full, the directory is read-only, …; the old content is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, flags, 0o666)
    try:
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)  # noqa: PTH105 - hot
        if durable:
            _sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_runs(root: Path | str) -> Iterator[RunDir]:
    """Every run directory at or below ``root``, in name order; nothing below a run is entered.

    Hidden directories are not entered: ``.hydra``, ``.sweeps``, ``.git``.
    """
    try:
        with os.scandir(root) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError:  # not a directory, not readable, gone, a stale handle: the walk goes on
        return
    names = {entry.name for entry in found}
    if RECORD in names:
        yield RunDir(Path(root))
    elif CLAIM not in names:  # else a run that is just being started
        for entry in found:
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                yield from find_runs(entry.path)


_TAIL_BYTES = 65_536


def last_metrics(run: RunDir) -> dict[str, float]:
    """The last value of every metric in the end of a curve, for a run that could not say.

    Reads at most the last 64 KB; lines that are not whole are passed over.
    """
    metrics: dict[str, float] = {}
    # The last line may be half a line, which can look like a whole number.
    for line in tail(run.metrics, _TAIL_BYTES).rpartition(b"\n")[0].splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            step = msgspec.json.decode(line)
            if isinstance(step, dict):
                metrics.update(from_plain(step))
    return {
        name: float(value)
        for name, value in metrics.items()
        if name not in ("step", "timestamp") and isinstance(value, (int, float))
    }


def tail(path: Path, max_bytes: int) -> bytes:
    """The last bytes of a file; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
            return file.read()
    except OSError:
        return b""


def completed_runs(root: Path) -> Iterator[tuple[RunDir, RunRecord]]:
    """The COMPLETED runs below ``root``: what resume looks in."""
    for run in find_runs(root):
        record = run.try_read()
        if record is not None and record.state is RunState.COMPLETED and record.fingerprint:
            yield run, record


def observed_state(record: RunRecord, run: RunDir | None = None) -> RunState:
    """The state as the machine shows it: RUNNING whose process is gone reads LOST.

    While the run's directory is locked, if it is given, somebody is still at work on its end.
    A run of another host is taken at its word, since its processes cannot be seen here.
    """
    if record.state is not RunState.RUNNING or record.host != hostname() or record.pid is None:
        return record.state
    same_boot = record.boot_id == boot_id()
    if same_boot and is_alive(record.pid, record.pid_started):
        return RunState.RUNNING
    at_work = run is not None and same_boot and RunLock.is_held(run)
    return RunState.RUNNING if at_work else RunState.LOST


def own_directory(path: Path, fingerprint: str) -> Path:
    """The directory of the run with this fingerprint: ``path``, or ``path-<8 digits>``.

    The first run to ask owns ``path`` for good, by a file that appears at once and whole;
    a run with another fingerprint gets the longer name. Asking again gives the same answer.

    Raises:
        OSError: the directory cannot be made or written.
    """
    for candidate in _candidates(path, fingerprint):
        if (_owner(candidate, fingerprint) or _claim(candidate, fingerprint)) == fingerprint:
            return candidate
    msg = f"{path} and its longer names belong to other runs"
    raise FileExistsError(msg)


def planned_directory(path: Path, fingerprint: str) -> Path:
    """What `own_directory` would answer now, without making anything."""
    candidates = _candidates(path, fingerprint)
    free = (c for c in candidates if _owner(c, fingerprint) in (fingerprint, None))
    return next(free, candidates[-1])


def _candidates(path: Path, fingerprint: str) -> tuple[Path, ...]:
    # Eight digits may, once in four billion, be those of two runs.
    names = (path.name, with_suffix(path.name, fingerprint), f"{path.name[:160]}-{fingerprint}")
    return tuple(path.with_name(name) for name in names)


def _owner(path: Path, fingerprint: str) -> str | None:
    """The fingerprint that owns a directory; None where it is free."""
    run = RunDir(path)
    with contextlib.suppress(FileNotFoundError):
        # (Empty where whoever made it died just then: nobody's.)
        if owner := read_bytes(run.claim).decode("ascii", "replace").strip():
            return owner
    if not run.record.exists():
        return None
    record = run.try_read()
    mine = record is not None and record.fingerprint == fingerprint
    return None if mine else "somebody else's run.json"


def _claim(path: Path, fingerprint: str) -> str | None:
    """Own a free directory; the answer is the owner, who may have been faster."""
    path.mkdir(parents=True, exist_ok=True)
    claim = RunDir(path).claim
    temporary = path / f"{CLAIM}.{os.getpid()}.tmp"
    temporary.write_text(fingerprint + "\n", encoding="ascii")
    try:
        os.link(temporary, claim)
    except FileExistsError:
        if not read_bytes(claim).strip():
            os.replace(temporary, claim)  # noqa: PTH105
    except OSError:  # no hard links here: the file appears at once, its content just after
        with contextlib.suppress(FileExistsError), claim.open("x", encoding="ascii") as file:
            file.write(fingerprint + "\n")
    finally:
        temporary.unlink(missing_ok=True)
    return _owner(path, fingerprint)


class RunLock:
    """Says that a process is working in a run directory, until that process ends.

    The kernel drops the lock with the last process that holds it, however it dies.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, run: RunDir) -> RunLock | None:
        """Take the lock of a run directory that is owned; None where somebody holds it.

        Raises:
            OSError: nobody owns the directory, see `own_directory`.
        """
        descriptor = os.open(run.claim, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            # No locks on this file system: ownership of the name is all there is.
            return cls(descriptor)
        return cls(descriptor)

    @classmethod
    def is_held(cls, run: RunDir) -> bool:
        """Whether somebody works in a run directory now."""
        with contextlib.suppress(OSError):
            lock = cls.acquire(run)
            if lock is None:
                return True
            lock.release()
        return False

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
