"""Tables of who uses the GPUs of this machine, shared by all launchers of all its users.

Each GPU has a file of records (see ``docs/leases.md``). A record counts while it is locked, and
the kernel drops the lock with the last duplicate of the holder's descriptor, however holders
end. The first record is the table's mutex: locked while somebody reads, decides and adds; it
then names that process. Linux only; not for several threads at a time.
"""

from __future__ import annotations

import contextlib
import enum
import os
import string
import struct
import time
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.queue.lease_file import (
    DIRECTORY,
    RECORD_SIZE,
    RECORDS,
    LeaseError,
    RecordFile,
    check_platform,
    explained,
    open_directory,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DIRECTORY", "Entry", "Kind", "Lease", "LeaseError", "LeaseTables"]

# magic, kind, launcher, root, uid, limit, reserved, since; then the CRC of all that.
_RECORD = struct.Struct("<8sIIIIIqd80x")
_CRC = struct.Struct("<I")
_MAGIC = b"orchles1"
_MOST, _MOST_BYTES = 2**32 - 1, 2**63 - 1
_NOTHING = bytes(RECORD_SIZE)
_MUTEX, _MUTEX_KIND = 0, 0
# How often a record that makes no sense is read again: it may just be being written.
_LOOKS = 4
_SAFE = frozenset(string.ascii_letters + string.digits + "-_")


class Kind(enum.IntEnum):
    """What an entry says of its holder: it runs a job on the GPU, or waits to."""

    RUN = 1
    WAIT = 2


@dataclass(frozen=True)
class Entry:
    """A lease as others see it."""

    kind: Kind
    # The launcher, and the keeper of its job (0: not known yet).
    launcher: int
    root: int
    uid: int
    # The most jobs on this GPU, its own included, that it accepts while it is there.
    limit: int
    # Bytes that are promised to the job and do not show as used memory yet.
    reserved: int
    # Seconds of the monotonic clock.
    since: float
    # Whether it was added through these tables.
    mine: bool


class Lease:
    """An entry of our own; it lasts until the last duplicate of its descriptor is closed."""

    def __init__(self, table: _Table, index: int, file: RecordFile, entry: Entry) -> None:
        self.uuid = table.uuid
        self._table = table
        self._index = index
        self._file = file
        self._entry = entry

    def fileno(self) -> int:
        """The descriptor to pass on to who shall keep the lease alive; -1 once released."""
        return self._file.descriptor

    def update(self, *, reserved: int | None = None, root: int | None = None) -> None:
        """Tell others; what the disk does not take stays as it was. Nothing once released."""
        entry = replace(
            self._entry,
            reserved=self._entry.reserved if reserved is None else reserved,
            root=self._entry.root if root is None else root,
        )
        if self._file.descriptor >= 0 and entry != self._entry:
            with contextlib.suppress(OSError):
                self._file.write(self._index, _pack(entry.kind, entry))
                self._entry = entry

    def release(self) -> None:
        """End the lease, even if others have duplicates of its descriptor."""
        if self._file.descriptor >= 0:
            with contextlib.suppress(OSError):
                self._file.write(self._index, _NOTHING)
            self.drop()

    def drop(self) -> None:
        """Close our descriptor only: the lease lasts while others have duplicates of it."""
        self._file.close()
        if self._table.leases.get(self._index) is self:
            del self._table.leases[self._index]


@dataclass(eq=False)
class _Table:
    uuid: str
    file: RecordFile
    leases: dict[int, Lease] = field(default_factory=dict)


class LeaseTables:
    """The tables of some GPUs.

    Args:
        uuids: the GPUs.
        directory: where the tables are; made if missing. None: `DIRECTORY`.

    Raises:
        LeaseError: the directory or a table cannot be used, or not safely.
    """

    def __init__(self, uuids: Sequence[str], directory: Path | None = None) -> None:
        check_platform()
        self._locked = False
        self._tables: dict[str, _Table] = {}
        path = (directory or DIRECTORY).absolute()
        self._directory = open_directory(path)
        try:
            # Everybody locks in the same order.
            for uuid in sorted(set(uuids)):
                file = RecordFile.open(self._directory, path / _file_name(uuid))
                self._tables[uuid] = _Table(uuid, file)
        except BaseException:
            self.close()
            raise

    def try_lock(self) -> bool:
        """Take the mutexes of all tables, or none of them; never waits."""
        taken: list[RecordFile] = []
        for table in self._tables.values():
            with explained(table.file.path):
                if not table.file.try_lock(_MUTEX):
                    for file in taken:
                        file.unlock(_MUTEX)
                    return False
            taken.append(table.file)
        self._locked = True
        me = Entry(Kind.RUN, os.getpid(), 0, os.getuid(), 0, 0, time.monotonic(), mine=True)
        self._name_holder(_pack(_MUTEX_KIND, me))
        return True

    def unlock(self) -> None:
        """Let go of the mutexes; does nothing if we have none."""
        if self._locked:
            self._locked = False
            self._name_holder(_NOTHING)
            for table in self._tables.values():
                table.file.unlock(_MUTEX)

    def _name_holder(self, record: bytes) -> None:
        for table in self._tables.values():
            with contextlib.suppress(OSError):  # a full disk: only `holder_hint` reads it
                table.file.write(_MUTEX, record)

    def holder_hint(self) -> str:
        """In a few words who has a mutex that we could not take, as far as that is known."""
        for file in (table.file for table in self._tables.values()):
            if file.is_locked(_MUTEX):
                found = _unpack(file.read(_MUTEX))
                if found is None or not Path(f"/proc/{found[1].launcher}").exists():
                    return f"by a process that left no name; see fuser -v {file.path}"
                return f"by process {found[1].launcher} of user {found[1].uid}, as {file.path} says"
        return "by nobody any more"

    def entries(self, uuid: str) -> list[Entry]:
        """All that live. Exact while we have the mutex; else of about now.

        A record that makes no sense but is locked counts as a job that accepts no other and has
        no memory promised. Nobody honest leaves one: who dies leaves no lock.
        """
        table = self._tables[uuid]
        found: list[Entry] = []
        for index, record in enumerate(table.file.read_all()):
            if index == _MUTEX or record.count(0) == len(record):
                continue
            if index in table.leases or table.file.is_locked(index):
                found += _living(table, index, record)
        return found

    def add(self, uuid: str, kind: Kind, *, limit: int, reserved: int, since: float) -> Lease:
        """Add an entry; we must have the mutex.

        Raises:
            LeaseError: the table is full, or the disk.
        """
        assert self._locked, "the tables are not locked"
        table = self._tables[uuid]
        entry = Entry(kind, os.getpid(), 0, os.getuid(), limit, reserved, since, mine=True)
        with explained(table.file.path):
            index, file = _add(table.file, _pack(kind, entry))
        lease = table.leases[index] = Lease(table, index, file, entry)
        return lease

    def close(self) -> None:
        """Let go of the tables. Leases that were not released last while others hold them."""
        self.unlock()
        self.close_inherited()

    def close_inherited(self) -> None:
        """In a forked child: close everything, and change nothing for the parent."""
        self._locked = False
        for table in self._tables.values():
            for lease in list(table.leases.values()):
                lease.drop()
            table.file.close()
        self._tables.clear()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def _file_name(uuid: str) -> str:
    """No two GPUs have the same."""
    codes = uuid.encode()
    return "".join(chr(c) if chr(c) in _SAFE else f"%{c:02x}" for c in codes) + ".leases"


def _add(table: RecordFile, record: bytes) -> tuple[int, RecordFile]:
    """Lock the first record that is free, and write it."""
    file = table.again()
    try:
        index = _lock_free(file)
        file.write(index, record)
    except BaseException:
        file.close()
        raise
    return index, file


def _lock_free(file: RecordFile) -> int:
    for index in range(_MUTEX + 1, RECORDS):
        if file.try_lock(index):
            return index
    msg = f"The lease table {file.path} is full ({RECORDS - 1} entries)"
    raise LeaseError(msg)


def _living(table: _Table, index: int, record: bytes) -> list[Entry]:
    """The entry of a record that is locked; none if it is just being released."""
    mine = index in table.leases
    for _ in range(_LOOKS):
        found = _unpack(record)
        if found is not None and found[0] in tuple(Kind):
            return [replace(found[1], kind=Kind(found[0]), mine=mine)]
        record = table.file.read(index)
        if record.count(0) == len(record):
            return []
    return [Entry(Kind.RUN, 0, 0, 0, 1, 0, 0.0, mine)]


def _pack(kind: int, entry: Entry) -> bytes:
    limit, reserved = min(entry.limit, _MOST), min(entry.reserved, _MOST_BYTES)
    who = (entry.launcher, entry.root, entry.uid)
    content = _RECORD.pack(_MAGIC, kind, *who, limit, reserved, entry.since)
    return content + _CRC.pack(zlib.crc32(content))


def _unpack(record: bytes) -> tuple[int, Entry] | None:
    """The kind, as a number, and the rest; None for what was not packed by `_pack`."""
    content, crc = record[: -_CRC.size], record[-_CRC.size :]
    if len(record) != RECORD_SIZE or crc != _CRC.pack(zlib.crc32(content)):
        return None
    magic, kind, launcher, root, uid, limit, reserved, since = _RECORD.unpack(content)
    if magic != _MAGIC:
        return None
    return kind, Entry(Kind.RUN, launcher, root, uid, limit, reserved, since, mine=False)
