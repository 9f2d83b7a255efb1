"""Where runs are that were given to Slurm while nobody waits for them, and the end of the dead.

The rules are those of the waiting launcher (`orchestrator.slurm.watch`), for one look: a job that
Slurm knows is where Slurm says; a run whose job is over and that has left no final record gets one;
what nobody knows is never taken for done as long as it may be new.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from orchestrator.processes import hostname
from orchestrator.record import RunState
from orchestrator.slurm.ledger import LEDGER, read_ledger
from orchestrator.slurm.settle import corrected, ended_as, was_cut_short
from orchestrator.slurm.states import Seen, base_of
from orchestrator.store import RunLock, last_metrics, observed_state

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence
    from pathlib import Path

    from orchestrator.record import RunRecord
    from orchestrator.slurm.client import SlurmClient
    from orchestrator.store import RunDir

# How long after the end of its job a run may still be about to say how it ended.
_LAST_WORDS_S = 2.0
_LOOK_S = 0.2
# A job is in neither queue nor accounting for some seconds after its submission. Clocks of file
# servers may differ, and here nothing is gained by haste.
_NOWHERE_S = 60.0
# How long after it was cut short a run may still be waiting in Slurm's queue to go on.
_MAY_GO_ON_S = 7 * 86_400.0
_CANCELLED = Seen(RunState.CANCELLED, "CANCELLED")


@dataclass(frozen=True)
class Given:
    """A run that a sweep has given, or is about to give, to Slurm, and that has no final record.

    Attributes:
        run: its directory.
        record: as it was read.
        sweep_dir: of the sweep.
        job_id: the job that does it; empty while there is none.
        submitted_at: since when its job may be known to accounting.
        entered_at: when the sweep last submitted anything.
        cluster: whose job it is; empty where that is not known.
        job_logs: where Slurm's own logs of the jobs are.
    """

    run: RunDir
    record: RunRecord
    sweep_dir: Path
    job_id: str
    submitted_at: float
    entered_at: float
    cluster: str = ""
    job_logs: str = ""


@dataclass(frozen=True)
class Standing:
    """Where a run is.

    Attributes:
        record: final by now, if its job is gone.
        state: the record's, unless Slurm knows better.
        job_id: empty while there is none.
        node: where its job runs.
        reason: why it waits.
        unsaved: why a final record is not on the disk; empty where it is.
    """

    record: RunRecord
    state: RunState
    job_id: str = ""
    node: str = ""
    reason: str = ""
    unsaved: str = ""


@dataclass(frozen=True)
class Findings:
    """What was looked for below some sweeps' directories.

    Attributes:
        given: runs whose jobs are this user's.
        foreign: how many are somebody else's, who alone can ask about them.
    """

    given: list[Given]
    foreign: int = 0


def find_given(runs: Iterable[tuple[RunDir, RunRecord, Path]]) -> Findings:
    """Runs without a final record, as their sweeps' ledgers have them.

    Args:
        runs: each with its record and the directory of its sweep.
    """
    by_sweep: dict[Path, list[tuple[RunDir, RunRecord]]] = {}
    for run, record, sweep_dir in runs:
        recently = record.ended_at is None or time.time() - record.ended_at < _MAY_GO_ON_S
        if not record.state.is_final or (was_cut_short(record) and recently):
            by_sweep.setdefault(sweep_dir, []).append((run, record))
    given: list[Given] = []
    foreign = 0
    for sweep_dir, members in by_sweep.items():
        found = _of_sweep(sweep_dir, members)
        if found is None:
            foreign += len(members)
        else:
            given += found
    return Findings(given, foreign)


def _of_sweep(sweep_dir: Path, runs: Sequence[tuple[RunDir, RunRecord]]) -> list[Given] | None:
    """The runs of one sweep; None where they are another user's."""
    try:
        status = (sweep_dir / LEDGER).stat()
    except FileNotFoundError:  # of an exported script: the runs know their jobs
        return _of_script(sweep_dir, runs)
    except OSError:
        return []
    if status.st_uid != os.getuid():
        return None
    ledger = read_ledger(sweep_dir)
    if ledger is None:
        return []
    jobs: dict[int | None, str] = {run: job.id for job in ledger.jobs for run in job.runs}
    entered_at = max(status.st_mtime, ledger.submitted_at)
    return [
        Given(
            run,
            record,
            sweep_dir,
            jobs.get(record.index) or record.slurm_job_id,
            ledger.submitted_at,
            entered_at,
            ledger.cluster,
            ledger.folder,
        )
        for run, record in runs
    ]


def _of_script(sweep_dir: Path, runs: Sequence[tuple[RunDir, RunRecord]]) -> list[Given] | None:
    """Runs of a batch script that was exported, as far as they have begun."""
    if sweep_dir.stat().st_uid != os.getuid():
        return None
    return [
        Given(run, record, sweep_dir, record.slurm_job_id, began, began)
        for run, record in runs
        if record.slurm_job_id and (began := record.started_at) is not None
    ]


def of_this_cluster(given: Sequence[Given], client: SlurmClient) -> list[Given]:
    """Runs whose jobs the Slurm that answers here knows; by the same ids another means others.

    Raises:
        SlurmUnreachable: Slurm could not be asked.
    """
    if not any(run.cluster for run in given):
        return list(given)
    here = client.limits().cluster
    return [run for run in given if not here or run.cluster in ("", here)]


def standings(
    given: Sequence[Given],
    client: SlurmClient,
    *,
    cancelled: Container[str] = (),
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[Path, Standing]:
    """Ask Slurm where these runs are; those whose jobs are over get their final records.

    Args:
        given: the runs.
        client: asks Slurm: once, and accounting where that does not tell.
        cancelled: jobs that are known to have been cancelled, should Slurm have forgotten them.
        now: seconds since the epoch.
        sleep: waits; only for the last words of what has just ended.

    Returns:
        One standing for each run, by its directory.

    Raises:
        SlurmUnreachable: Slurm could not be asked; nothing was written.
    """
    found = {
        run.run.path: Standing(run.record, run.record.state, run.job_id, reason=f"on {run.cluster}")
        for run in given
    }
    given = of_this_cluster(given, client)
    seen = client.poll(run.job_id for run in given if run.job_id)
    over = []
    for run in given:
        said = seen.get(run.job_id)
        if not run.job_id:
            found[run.run.path] = Standing(run.record, run.record.state, reason="not submitted")
        elif said is not None and not said.state.is_final:
            found[run.run.path] = _in_queue(run, said)
        else:
            over.append(run)
    over = _without_ended(over, found, seen)
    ends = _ends(over, seen, client, cancelled, now())
    for run in over:
        if run.run.path not in ends:
            found[run.run.path] = Standing(run.record, run.record.state, run.job_id)
    dead = [run for run in over if run.run.path in ends]
    for run in _after_last_words(dead, ends, found, sleep):
        found[run.run.path] = _bury(run, ends[run.run.path], now())
    return found


def _in_queue(run: Given, said: Seen) -> Standing:
    # A job that was put back into the queue has left its record as it was.
    state = RunState.PENDING if said.state is RunState.PENDING else run.record.state
    return Standing(run.record, state, run.job_id, said.node, said.reason)


def _without_ended(
    runs: Iterable[Given], found: dict[Path, Standing], seen: Mapping[str, Seen]
) -> list[Given]:
    """Those that have not said by now how they ended; the others are found."""
    left = []
    for run in runs:
        record = run.run.try_read()
        if record is not None and record.state.is_final:
            record = corrected(run.run, record, run.job_id, seen.get(run.job_id))
            found[run.run.path] = Standing(record, record.state, run.job_id)
        else:
            left.append(run)
    return left


def _ends(
    over: Sequence[Given],
    seen: Mapping[str, Seen],
    client: SlurmClient,
    cancelled: Container[str],
    now: float,
) -> dict[Path, Seen | None]:
    """How jobs ended (None: nobody knows), for runs whose jobs are certainly over."""
    nowhere = [run for run in over if run.job_id not in seen]
    accounted: Mapping[str, Seen] = {}
    if nowhere:
        since = min(run.submitted_at for run in nowhere)
        accounted = client.ended({run.job_id for run in nowhere}, since)
    # Slurm knows an array as a whole: a task that it does not name among the others is gone.
    arrays = {base_of(job) for job in seen}
    ends: dict[Path, Seen | None] = {}
    for run in over:
        if said := seen.get(run.job_id) or accounted.get(run.job_id):
            ends[run.run.path] = said
        elif run.job_id in cancelled:
            ends[run.run.path] = _CANCELLED
        elif base_of(run.job_id) in arrays or now - run.entered_at >= _NOWHERE_S:
            ends[run.run.path] = None
    return ends


def _after_last_words(
    dead: list[Given],
    ends: Mapping[Path, Seen | None],
    found: dict[Path, Standing],
    sleep: Callable[[float], None],
) -> list[Given]:
    """Those that have nothing to say even after a while; the others are found."""
    speechless = [run for run in dead if _never_began(run, ends[run.run.path])]
    others = [run for run in dead if not _never_began(run, ends[run.run.path])]
    waited = 0.0
    while others and waited < _LAST_WORDS_S:
        sleep(_LOOK_S)
        waited += _LOOK_S
        others = _without_ended(others, found, {})
    return speechless + others


def _never_began(run: Given, said: Seen | None) -> bool:
    """Whether no process of ours can have worked on the run."""
    return run.record.state is RunState.PENDING and (said is None or not said.node)


def _bury(run: Given, said: Seen | None, now: float) -> Standing:
    """Write the final record of a run whose job is over, unless somebody works on it."""
    try:
        lock = RunLock.acquire(run.run)
        if lock is None:
            return _at_work(run)
        try:
            return _bury_locked(run, said, now)
        finally:
            lock.release()
    except OSError as error:
        # (A copy of the results, or somebody else's: nobody can work here.)
        final = _final(run, run.record, said, now)
        return Standing(final, final.state, run.job_id, unsaved=error.strerror or str(error))


def _bury_locked(run: Given, said: Seen | None, now: float) -> Standing:
    found = run.run.try_read_anew() or run.record
    ours = (found.sweep_id, found.index) == (run.record.sweep_id, run.record.index)
    if found.state.is_final or not ours:
        return Standing(found, found.state, run.job_id)
    if found.host == hostname() and observed_state(found) is RunState.RUNNING:
        return Standing(found, found.state, run.job_id)
    final = _final(run, found, said, now)
    run.run.write(final)
    return Standing(final, final.state, run.job_id)


def _at_work(run: Given) -> Standing:
    record = run.run.try_read() or run.record
    return Standing(record, record.state, run.job_id)


def _final(run: Given, found: RunRecord, said: Seen | None, now: float) -> RunRecord:
    record = ended_as(found, run.job_id, said, run.job_logs)
    ended_at = now if found.started_at is None else _last_sign(run.run, found.started_at, now)
    duration = None if found.started_at is None else round(ended_at - found.started_at, 3)
    return msgspec.structs.replace(
        record,
        ended_at=ended_at,
        duration_seconds=duration,
        metrics=record.metrics or last_metrics(run.run),
    )


def _last_sign(run: RunDir, began: float, now: float) -> float:
    """When a run that may have been dead for long last wrote anything."""
    signs = [began]
    for path in (run.record, run.stdout, run.stderr, run.metrics):
        try:
            signs.append(path.stat().st_mtime)
        except OSError:
            continue
    return min(max(signs), now)
