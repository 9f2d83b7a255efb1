"""What Slurm's accounting says that runs have used, in the runs' own records.

A keeper counts from the start of its run to its end. What a user pays for is the whole allocation,
from the start of the job to its end, and accounting knows that.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from orchestrator.slurm.ledger import LEDGER, Job, read_ledger
from orchestrator.slurm.states import collapse, expand
from orchestrator.store import RunDir, RunLock, find_runs, read_bytes, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from orchestrator.record import RunRecord
    from orchestrator.slurm.client import SlurmClient, Usage
    from orchestrator.slurm.ledger import Ledger

ACCOUNTED = "accounting.json"
# Accounting hears of an end some seconds later, or is not there at all.
_SOON_S = 60.0
_LATER_S = 3600.0
# What it has not heard of by then it will not hear of.
_NEVER_S = 86_400.0
_LOOK_S = 0.5


class Accounted(msgspec.Struct, frozen=True, kw_only=True):
    """``accounting.json`` in a sweep's directory: what has been asked already."""

    schema_version: int = 1
    # Jobs that need not be asked about again; tasks of an array in brackets.
    jobs: tuple[str, ...] = ()
    # When to ask about the others, in seconds since the epoch.
    ask_at: float = 0.0


@dataclass(frozen=True)
class _Open:
    """A job that has not been accounted for, and those of its runs that are still this sweep's."""

    job: Job
    runs: Mapping[int, tuple[RunDir, RunRecord]]

    @property
    def has_ended(self) -> bool:
        return all(record.state.is_final for _, record in self.runs.values())

    @property
    def began(self) -> bool:
        return any(record.started_at is not None for _, record in self.runs.values())

    @property
    def ended_at(self) -> float:
        return max(record.ended_at or 0.0 for _, record in self.runs.values())

    def shares(self) -> dict[int, float]:
        """What part of the job each run counts for: by their durations, 1 for one alone."""
        durations = {num: record.duration_seconds or 0.0 for num, (_, record) in self.runs.items()}
        total = sum(durations.values())
        if not total:
            return dict.fromkeys(durations, 1 / len(self.job.runs))
        # Runs of the job that are another sweep's by now count as much as the others on average.
        whole = total * len(self.job.runs) / len(durations)
        return {num: seconds / whole for num, seconds in durations.items()}


def is_due(sweep_dir: Path, now: float) -> bool:
    """Whether there is something to ask accounting about a sweep of this user's."""
    try:
        mine = (sweep_dir / LEDGER).stat().st_uid == os.getuid()
    except OSError:
        return False
    accounted = _read(sweep_dir)
    if not mine or now < accounted.ask_at:
        return False
    ledger = read_ledger(sweep_dir)
    done = _done(accounted)
    return ledger is not None and any(job.id not in done for job in ledger.jobs)


def account(
    sweep_dir: Path,
    client: SlurmClient,
    runs: Iterable[RunDir] | None = None,
    *,
    patience_s: float = 0.0,
    limit_s: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Write what the finished runs of a sweep have used, by accounting, into their records.

    ``gpu_seconds`` are the GPUs of the job times its time, ``core_seconds`` its CPUs times its
    time, requeues included; runs that share a job have it in proportion to their durations. Each
    job is asked about once. Without accounting nothing happens.

    Args:
        sweep_dir: ``.sweeps/<sweep_id>``.
        client: asks Slurm.
        runs: directories among which the sweep's are; by default those that ``sweep.json`` names.
        patience_s: how long accounting may take to hear of jobs that have just ended.
        limit_s: how long records may be written; the next call goes on.
        clock: in seconds.
        sleep: waits.

    Returns:
        How many records were changed.
    """
    ledger = read_ledger(sweep_dir)
    if ledger is None:
        return 0
    done = _done(_read(sweep_dir))
    found = _open_jobs(sweep_dir, ledger, done, runs)
    if not found:
        return 0
    asked = [job for job in found if job.runs and job.has_ended]
    # (What another sweep does again is that one's.)
    done |= {job.job.id for job in found if not job.runs}
    if not asked:
        _write(sweep_dir, done, 0.0)
        return 0
    patient_until = clock() + patience_s

    def wait() -> bool:
        if clock() < patient_until:
            sleep(_LOOK_S)
        return clock() < patient_until

    used, is_there = _usage(asked, client, ledger.submitted_at, wait)
    until = clock() + limit_s
    changed = _enter_all(asked, used, done, lambda: clock() < until)
    if is_there:
        done |= {job.job.id for job in asked if job.job.id not in used and _is_hopeless(job)}
    left = any(job.job.id not in done for job in asked)
    late = 0.0 if clock() >= until else _SOON_S if is_there else _LATER_S
    _write(sweep_dir, done, time.time() + late if left else 0.0)
    return changed


def _enter_all(
    asked: Iterable[_Open],
    used: Mapping[str, Usage],
    done: set[str],
    in_time: Callable[[], bool],
) -> int:
    """Write what jobs have used into their runs' records; how many records were changed."""
    changed = 0
    for job in asked:
        if job.job.id in used and in_time():
            entered = _enter(job, used[job.job.id])
            changed += sum(entered.values())
            if entered.keys() == job.runs.keys():
                done.add(job.job.id)
    return changed


def _open_jobs(
    sweep_dir: Path, ledger: Ledger, done: set[str], runs: Iterable[RunDir] | None
) -> list[_Open]:
    """Jobs that are not accounted for."""
    jobs = [job for job in ledger.jobs if job.id not in done]
    if not jobs:
        return []
    wanted = {num for job in jobs for num in job.runs}
    found: dict[int, tuple[RunDir, RunRecord]] = {}
    for run in _runs_of(sweep_dir) if runs is None else runs:
        record = run.try_read()
        if record is not None and record.sweep_id == sweep_dir.name and record.index in wanted:
            found[record.index] = (run, record)
    return [_Open(job, {num: found[num] for num in job.runs if num in found}) for job in jobs]


class _SweepRuns(msgspec.Struct):
    runs: list[str] = []


def _runs_of(sweep_dir: Path) -> list[RunDir]:
    """The runs that a sweep names; all there are where it was killed before it could."""
    root = sweep_dir.parent.parent
    names: list[str] = []
    with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
        names = msgspec.json.decode(read_bytes(sweep_dir / "sweep.json"), type=_SweepRuns).runs
    return [RunDir(root / name) for name in names] or list(find_runs(root))


def _usage(
    asked: list[_Open], client: SlurmClient, since: float, wait: Callable[[], bool]
) -> tuple[dict[str, Usage], bool]:
    """What the jobs that have ended, by accounting, have used; and whether it knows any of all."""
    ids = {job.job.id for job in asked}
    late = {job.job.id for job in asked if job.began}
    while True:
        # (In this order: what has ended uses no more.)
        ended = client.ended(ids, since)
        known = client.usage(ids, since)
        # (It is no use to wait where there is no accounting.)
        if not known or late <= ended.keys() or not wait():
            return {job: used for job, used in known.items() if job in ended}, bool(known)


def _enter(job: _Open, used: Usage) -> dict[int, bool]:
    """Write a job's use into the records of its runs.

    Returns:
        Whether each run's record has changed; not those that nobody can write to now.
    """
    entered: dict[int, bool] = {}
    shares = job.shares()
    for num, (run, _) in job.runs.items():
        seconds = used.elapsed_seconds * shares[num]
        values = {"gpu_seconds": seconds * used.gpus, "core_seconds": seconds * used.cpus}
        # (Zero GPUs: it has none, or the cluster does not account for them.)
        changes = {name: round(value, 3) for name, value in values.items() if value}
        with contextlib.suppress(OSError):
            changed = _change(run, job.runs[num][1], changes)
            if changed is not None:
                entered[num] = changed
    return entered


def _change(run: RunDir, known: RunRecord, changes: Mapping[str, float]) -> bool | None:
    """Whether a final record was changed; None where somebody works on the run."""
    if all(getattr(known, name) == value for name, value in changes.items()):
        return False
    lock = RunLock.acquire(run)
    if lock is None:
        return None
    try:
        record = run.try_read()
        ours = record is not None and (record.sweep_id, record.index, record.state) == (
            known.sweep_id,
            known.index,
            known.state,
        )
        if record is None or not ours:
            return False
        run.write(msgspec.structs.replace(record, **changes))
        return True
    finally:
        lock.release()


def _is_hopeless(job: _Open) -> bool:
    """Whether accounting, which is there, will never say anything of a job."""
    return not job.began or time.time() - job.ended_at > _NEVER_S


def _read(sweep_dir: Path) -> Accounted:
    try:
        return msgspec.json.decode(read_bytes(sweep_dir / ACCOUNTED), type=Accounted)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return Accounted()


def _done(accounted: Accounted) -> set[str]:
    return {job for words in accounted.jobs for job in expand(words)}


def _write(sweep_dir: Path, done: set[str], ask_at: float) -> None:
    content = Accounted(jobs=tuple(collapse(sorted(done))), ask_at=ask_at)
    with contextlib.suppress(OSError):
        write_atomic(sweep_dir / ACCOUNTED, msgspec.json.encode(content) + b"\n")
