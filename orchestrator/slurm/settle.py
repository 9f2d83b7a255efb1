"""The final record of a run whose Slurm job is over and has not written one."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from orchestrator.record import PREEMPTED, ErrorInfo, RunRecord, RunState
from orchestrator.store import RunLock, last_metrics, tail

if TYPE_CHECKING:
    from orchestrator.slurm.states import Seen
    from orchestrator.store import RunDir

_CUT_SHORT = ("SLURM_ENDED", "SLURM_TIMEOUT", PREEMPTED)
_LOG_TAIL_BYTES = 2_000
_TYPES = {
    RunState.COMPLETED: "SlurmLost",
    RunState.FAILED: "ProcessDied",
    RunState.TIMEOUT: "SlurmTimeout",
    RunState.CANCELLED: "SlurmCancelled",
    RunState.LOST: "SlurmLost",
}


def settle(
    run: RunDir,
    asked: RunRecord,
    job_id: str,
    seen: Seen | None,
    job_logs: str = "",
    *,
    certain: bool = False,
) -> RunRecord | None:
    """See that the record of a run is final, now that nobody works on it any more.

    Args:
        run: its directory.
        asked: its record as it was when the job was submitted.
        job_id: of the Slurm job, for the text.
        seen: what Slurm says of how the job ended; None where it knows nothing of it any more.
        job_logs: where Slurm's own logs of the jobs are; empty where that is not known.
        certain: its job has been over for so long that whoever still holds the run's lock is none
            of its processes: a file server keeps the locks of a node that was switched off.

    Returns:
        The final record; None where somebody works on the run, or another sweep has it by now.

    Raises:
        OSError: the record cannot be written.
    """
    lock = RunLock.acquire(run)
    if lock is None and not certain:
        return None
    try:
        found = run.try_read_anew() or asked
        if (found.sweep_id, found.index) != (asked.sweep_id, asked.index):
            return None
        if found.state.is_final:
            return found
        final = ended_as(found, job_id, seen, job_logs)
        if not final.metrics:
            final = msgspec.structs.replace(final, metrics=last_metrics(run))
        run.write(final)
        return final
    finally:
        if lock is not None:
            lock.release()


def was_cut_short(record: RunRecord) -> bool:
    """Whether a run was ended because of its Slurm job, which may go on with it later."""
    return record.error is not None and record.error.type in _CUT_SHORT


def corrected(run: RunDir, record: RunRecord, job_id: str, seen: Seen | None) -> RunRecord:
    """A record that says only that Slurm ended the job, with Slurm's own word for why.

    Slurm sends the same signal for ``scancel``, at a time limit and when a node goes down.

    Args:
        run: its directory; the better record is written there.
        record: the final one.
        job_id: of the Slurm job.
        seen: what Slurm says of how the job ended.
    """
    told_no_more = record.error is not None and record.error.type == "SLURM_ENDED"
    if not told_no_more or seen is None or not seen.state.is_final:
        return record
    state = seen.state if seen.state in (RunState.LOST, RunState.TIMEOUT) else RunState.CANCELLED
    error = ErrorInfo(_TYPES[state], _sentence(record, job_id, seen))
    better = msgspec.structs.replace(record, state=state, error=error)
    with contextlib.suppress(OSError):
        lock = RunLock.acquire(run)
        if lock is None:
            return record
        try:
            if run.try_read() == record:  # else it goes on by now
                run.write(better)
        finally:
            lock.release()
    return better


def ended_as(found: RunRecord, job_id: str, seen: Seen | None, job_logs: str = "") -> RunRecord:
    """The record of a run as its Slurm job left it, in the final state that Slurm's words mean."""
    if seen is not None and seen.state is RunState.CANCELLED and not seen.node:
        # Said of tasks of an array that never had a node; this one had.
        seen = seen if found.started_at is None else None
    state = _state(found, seen)
    # A job that fails before its first run has said why in its own log, if anywhere.
    failed_first = found.started_at is None and state is RunState.FAILED
    last_said = _last_said(job_logs, job_id) if failed_first else ""
    now = time.time()
    began = found.started_at
    record = found
    if found.state is RunState.PENDING and state is RunState.TIMEOUT:
        record = record.advance(RunState.RUNNING)
    return record.advance(
        state,
        slurm_job_id=job_id,
        ended_at=now,
        duration_seconds=None if began is None else round(now - began, 3),
        returncode=_returncode(seen),
        error=ErrorInfo(_TYPES[state], _sentence(found, job_id, seen) + last_said),
    )


def _last_said(folder: str, job_id: str) -> str:
    """What a job's own log ends with, and where it is."""
    for name in (f"{job_id}_0_log.err", f"{job_id}_0_log.out"):
        path = Path(folder, name)
        lines = tail(path, _LOG_TAIL_BYTES).decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        if said:
            return f": {said[-1]} (see {path})"
    return ""


def _state(found: RunRecord, seen: Seen | None) -> RunState:
    if seen is None:
        return RunState.CANCELLED if found.state is RunState.PENDING else RunState.LOST
    # A job that ended well without a word of its run has not done it.
    return RunState.LOST if seen.state is RunState.COMPLETED else seen.state


def _returncode(seen: Seen | None) -> int | None:
    """The exit code of the job, as in `subprocess`: minus the signal where one ended it."""
    words = seen.exit_code.split(":") if seen is not None else []
    if len(words) != 2 or not all(word.isdecimal() for word in words):  # noqa: PLR2004
        return None
    code, number = map(int, words)
    return -number if number else code


def _sentence(found: RunRecord, job_id: str, seen: Seen | None) -> str:
    began = "before it began" if found.started_at is None else "while it ran"
    if seen is None:
        return f"Slurm's job {job_id} is gone, and Slurm knows nothing of it; it ended {began}"
    where = f" on {seen.node}" if seen.node else ""
    code = f", exit code {seen.exit_code}" if seen.exit_code not in ("", "0:0") else ""
    reason = f" ({seen.reason})" if seen.reason not in ("", "None") else ""
    return f"Slurm's job {job_id} ended{where} as {seen.word}{reason}{code} {began}"
