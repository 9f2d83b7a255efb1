"""The final record of a run whose keeper was killed: nobody else will write it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import msgspec

from orchestrator.processes import is_alive
from orchestrator.queue.wire import Ended
from orchestrator.record import ErrorInfo, RunRecord, RunState
from orchestrator.store import RunDir, RunLock

if TYPE_CHECKING:
    from pathlib import Path

_LAST_WAIT_S = 10.0


def bury(
    directory: Path, asked: RunRecord, pid: int | None, pid_started: float | None
) -> Ended | None:
    """See that a job is dead and its record final.

    Args:
        directory: of the run.
        asked: the record that the keeper was given.
        pid: the job's, if it was started.
        pid_started: tells it from a later process with the same pid.

    Returns:
        How it ended; None where another launcher has the run by now.
    """
    _end(pid, pid_started)
    run = RunDir(directory)
    error = ErrorInfo("KeeperDied", "the process that looked after the run was killed")
    lost = asked.advance(RunState.LOST, ended_at=time.time(), error=error)
    try:
        lock = _lock_after_death(run, asked)
        if lock is None:
            return None
        try:
            return Ended(last_word(run, asked, lost))
        finally:
            lock.release()
    except OSError as failure:
        return Ended(lost, None, f"no record could be written: {failure}", saved=False)


def _end(pid: int | None, pid_started: float | None) -> None:
    """See that the job is dead, which on Linux the kernel has seen to already."""
    give_up = time.monotonic() + _LAST_WAIT_S
    while pid is not None and is_alive(pid, pid_started):
        if time.monotonic() > give_up:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # it leads a group of its own
        time.sleep(0.01)


def _lock_after_death(run: RunDir, asked: RunRecord) -> RunLock | None:
    """The lock of a run whose keeper is dead; what the job left behind may hold it a moment more."""
    give_up = time.monotonic() + _LAST_WAIT_S
    while (lock := RunLock.acquire(run)) is None:
        record = run.try_read()
        if record is None or record.sweep_id != asked.sweep_id or time.monotonic() > give_up:
            return None
        time.sleep(0.01)
    return lock


def last_word(run: RunDir, asked: RunRecord, lost: RunRecord) -> RunRecord:
    """The final record of a run whose keeper is dead, written if the keeper had not."""
    record = run.try_read()
    ours = record is not None and (record.sweep_id, record.index) == (asked.sweep_id, asked.index)
    if record is None or not ours:
        # It died before it had begun.
        attempts = run.begin_attempt()
        final = msgspec.structs.replace(lost, attempts=attempts)
    elif record.state.is_final:
        return record
    else:
        final = record.advance(RunState.LOST, ended_at=lost.ended_at, error=lost.error)
    run.write(final)
    return final
