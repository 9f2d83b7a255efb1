"""What launcher, job server, keeper and job say to each other.

All four are processes of one sweep on one machine, connected by socket pairs (and, for a
fresh interpreter, a file without a name) that nobody else can reach. Nothing of this is kept.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.record import PREEMPTED, ErrorInfo, RunRecord, RunState

if TYPE_CHECKING:
    from collections.abc import Sequence

_HEADER = struct.Struct("!Q")


@dataclass(frozen=True)
class JobRequest:
    """One run for the job server to start."""

    # Hydra's number of the job, and its overrides as typed.
    num: int
    overrides: tuple[str, ...]
    directory: str
    # The record to be, still PENDING; it holds name, fingerprint, device and command.
    record: RunRecord
    # Whether a COMPLETED record with the same fingerprint answers instead.
    resume: bool
    # Variables to set (or, None, to remove) before the task runs.
    env: dict[str, str | None] = field(default_factory=dict)
    threads: int = 1
    timeout_s: float | None = None
    kill_grace_s: float = 10.0
    # What the launcher has parsed of the overrides already, for the composer.
    parsed: Any = None
    # For a fresh interpreter: what it needs to find and call the task.
    payload: bytes | None = None
    # Whether Slurm ends it, by signals that reach the launcher and the job at the same time.
    in_allocation: bool = False


@dataclass(frozen=True)
class Stop:
    """Launcher to keeper: end the job. Said twice, it means at once."""

    # The name of a `keeper.Reason`.
    reason: str = "STOPPED"


@dataclass(frozen=True)
class Warn:
    """Launcher to keeper: the job's time is nearly up; tell it (SIGUSR2)."""


@dataclass(frozen=True)
class Usage:
    """Launcher to keeper: what was seen of the job's GPUs so far, for its record."""

    # The highest memory on any one of its GPUs, in GB.
    peak_gpu_memory_gb: float | None
    # Mean over time and GPUs, in percent.
    gpu_utilization: float | None


@dataclass(frozen=True)
class Started:
    """Keeper to launcher: the job runs; all that it starts descends from the keeper."""

    pid: int
    pid_started: float | None
    keeper: int


@dataclass(frozen=True)
class Exited:
    """Keeper to launcher: no process of the job is left; its slot is free."""

    # Whether the run has failed: then something may have to be decided before the next starts.
    failed: bool = False


@dataclass(frozen=True)
class Busy:
    """Keeper to launcher: another process works in this run's directory.

    Or, from the job server, with a reason: the run cannot be started at this moment.
    """

    reason: str = ""


@dataclass(frozen=True)
class Ended:
    """Keeper to launcher: the final record, and what Hydra's contract wants beside it."""

    record: RunRecord
    # The pickled return value, or the pickled exception; None where there is none.
    value: bytes | None = None
    # Something that the user must hear although it did not decide the state.
    warning: str = ""
    # Whether an earlier attempt answered and nothing ran.
    skipped: bool = False
    # Whether the record is on the disk.
    saved: bool = True


@dataclass(frozen=True)
class Outcome:
    """Job to keeper: how the task function ended, as seen from inside."""

    completed: bool
    return_value: Any = None
    value: bytes | None = None
    error: ErrorInfo | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    warning: str = ""


def final_state(outcome: Outcome | None, returncode: int) -> RunState:
    """COMPLETED needs both: the task returned, and its process then ended cleanly."""
    if outcome is not None and outcome.error is not None and outcome.error.type == PREEMPTED:
        return RunState.TIMEOUT
    finished = outcome is not None and outcome.completed and returncode == 0
    return RunState.COMPLETED if finished else RunState.FAILED


def pack(message: Any) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(body)) + body


class Inbox:
    """Puts messages together from the bytes of a descriptor, without ever blocking on one."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.closed = False
        self._buffer = bytearray()

    def receive(self) -> list[Any]:
        """The messages that one read completes; `closed` tells that the other end is gone."""
        try:
            data = os.read(self.descriptor, 1 << 20)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            data = b""
        if not data:
            self.closed = True
        self._buffer += data
        messages = []
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            messages.append(pickle.loads(memoryview(self._buffer)[_HEADER.size : end]))  # noqa: S301
            del self._buffer[:end]
        return messages


# The kernel takes 253 descriptors with one message.
MAX_DESCRIPTORS = 250


def send_with_fds(connection: socket.socket, packed: bytes, descriptors: Sequence[int]) -> None:
    """Send a packed message and, with its first byte, file descriptors."""
    socket.send_fds(connection, [packed[:1]], list(descriptors))
    connection.sendall(packed[1:])


def receive_with_fds(connection: socket.socket) -> tuple[bytes, list[int]] | None:
    """The next message, still packed, and its descriptors; None when the other end is gone."""
    first, descriptors, _, _ = socket.recv_fds(connection, 1, MAX_DESCRIPTORS)
    if not first:
        return None
    header = first + receive_exactly(connection, _HEADER.size - 1)
    (length,) = _HEADER.unpack(header)
    return header + receive_exactly(connection, length), list(descriptors)


def unpack(packed: bytes) -> Any:
    return pickle.loads(memoryview(packed)[_HEADER.size :])  # noqa: S301 - from our own launcher


def receive_exactly(connection: socket.socket, length: int) -> bytes:
    """Read ``length`` bytes.

    Raises:
        EOFError: the other end went away in the middle.
    """
    data = bytearray()
    while len(data) < length:
        more = connection.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)
