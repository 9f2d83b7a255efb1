"""What becomes of the runs of a Slurm job: reported, put back into Slurm's queue, or given up."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from orchestrator.queue.wire import Ended
from orchestrator.record import ErrorInfo, RunRecord, RunState
from orchestrator.slurm.allocation import job_id
from orchestrator.slurm.ranks import are_several, error_of_ranks
from orchestrator.store import RunDir, RunLock, write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.queue.plan import Plan
    from orchestrator.slurm.pack import Pack, PackedRun
    from orchestrator.slurm.within import PackSignals

_REQUEUE_S = 60.0
# What Slurm's signals cut short: it may be put back into the queue and go on.
_CUT_SHORT = (RunState.TIMEOUT, RunState.CANCELLED)
_ENDED_FIRST = ErrorInfo("SLURM_ENDED", "its Slurm job ended before it could begin")


class Endings:
    """Hears of each run that ends, and has the last word on those that did not.

    Args:
        pack: the runs.
        path: where the pack is; what is put back into the queue is written there.
        signals: what Slurm has said.
    """

    def __init__(self, pack: Pack, path: Path, signals: PackSignals) -> None:
        self._pack = pack
        self._path = path
        self._signals = signals
        self._runs = {run.num: run for run in pack.runs}
        self._ended: dict[int, Ended] = {}
        # Why Slurm did not take the job back.
        self._refused = ""

    def hear(self, plan: Plan, ended: Ended) -> None:
        """A run has ended, or was found done."""
        self._ended[plan.num] = ended
        cut_short = ended.record.state in _CUT_SHORT and self._signals.told
        # (Whether a run of several ranks has ended well is not known yet.)
        if not (cut_short or are_several()):
            self._report(plan.num)

    def not_started(self, record: RunRecord) -> None:
        """The queue could not start a run; ``record`` says why."""
        run = self._runs[record.index or 0]
        error = record.error or _ENDED_FIRST
        self._finalise(run, run.record.advance(RunState.FAILED, ended_at=time.time(), error=error))
        self._report(run.num)

    def await_ranks(self) -> None:
        """Where rank 0 of a run has ended well, wait for the others; one may have failed."""
        if not are_several():
            return
        for num, ended in self._ended.items():
            if ended.record.state is RunState.COMPLETED:
                run = self._runs[num]
                directory = Path(run.directory)
                error = error_of_ranks(directory, until=lambda: bool(self._signals.received))
                if error is not None:
                    failed = msgspec.structs.replace(
                        ended.record, state=RunState.FAILED, success=False, error=error
                    )
                    self._finalise(run, failed)

    def finish(self, why_not: ErrorInfo | None) -> None:
        """Say what became of every run, and end this process as they have.

        Args:
            why_not: why runs were not begun, where it was no signal of Slurm's.

        Raises:
            SystemExit: with status 1, where a run has not ended well.
        """
        missing = [run for run in self._pack.runs if self._is_missing(run)]
        if missing and self._signals.may_go_on and why_not is None:
            self._go_on_later(missing)
        for run in missing:
            self._give_up(run, why_not)
        if are_several():
            for num in self._ended:
                self._report(num)
        if any(ended.record.state is not RunState.COMPLETED for ended in self._ended.values()):
            sys.exit(1)

    def _is_missing(self, run: PackedRun) -> bool:
        """Whether a run has not begun, or was cut short by a signal of Slurm's."""
        ended = self._ended.get(run.num)
        return ended is None or (self._signals.told and ended.record.state in _CUT_SHORT)

    def _go_on_later(self, missing: Sequence[PackedRun]) -> None:
        """Put the job back into Slurm's queue, where that is possible: then this ends here."""
        pack = self._pack
        if self._signals.timed_out:
            if pack.time.timeouts_left < 1:
                return
            pack = pack.after_timeout()
        for run in missing:
            _wait_again(run)
        try:
            write_atomic(self._path, pickle.dumps(pack, protocol=pickle.HIGHEST_PROTOCOL))
            requeue()
        except (subprocess.SubprocessError, OSError) as error:
            said = getattr(error, "stderr", None) or str(error)
            self._refused = f"Slurm does not take its job back into the queue: {said.strip()}"
            print(self._refused, flush=True)
        else:
            sys.exit(1)

    def _give_up(self, run: PackedRun, why_not: ErrorInfo | None) -> None:
        """The final record of a run that this job will not go on with."""
        found = RunDir(Path(run.directory)).try_read() or run.record
        ended = self._ended.get(run.num)
        if ended is not None:
            record = ended.record
        elif why_not is None or why_not.type == "NotStarted":
            error = why_not or _ENDED_FIRST
            record = found.advance(RunState.CANCELLED, ended_at=time.time(), error=error)
        else:
            record = found.advance(RunState.FAILED, ended_at=time.time(), error=why_not)
        if self._refused and record.error is not None:
            message = f"{record.error.message}. {self._refused}"
            error = msgspec.structs.replace(record.error, message=message)
            # (The attempt that was to be followed by another is the last one now.)
            attempts = found.attempts if ended is None else found.attempts[:-1]
            record = msgspec.structs.replace(record, error=error, attempts=attempts)
        failure = error_of_ranks(Path(run.directory)) if are_several() else None
        if failure is not None:
            record = msgspec.structs.replace(record, state=RunState.FAILED, error=failure)
        self._finalise(run, record)
        if self._is_certain(record, why_not):
            self._report(run.num)

    def _is_certain(self, record: RunRecord, why_not: ErrorInfo | None) -> bool:
        """Whether Slurm may not put the job back into its queue of itself; it is asked otherwise."""
        if record.state is RunState.FAILED or why_not is not None:
            return True
        return self._signals.timed_out or not self._signals.received

    def _finalise(self, run: PackedRun, record: RunRecord) -> None:
        """Write a final record, if it is another than the one that the run's keeper has written."""
        files = RunDir(Path(run.directory))
        if record != files.try_read():
            with contextlib.suppress(OSError):
                files.write(record)
        ended = self._ended.get(run.num)
        self._ended[run.num] = Ended(record) if ended is None else replace(ended, record=record)

    def _report(self, num: int) -> None:
        """Tell whoever waits, now or later."""
        data = pickle.dumps(self._ended[num], protocol=pickle.HIGHEST_PROTOCOL)
        with contextlib.suppress(OSError):  # the run's own record has all that matters
            write_atomic(self._pack.ended_file(num), data)


def requeue() -> None:
    """Have Slurm put this job back into its queue; it ends this process.

    Raises:
        OSError: there is no scontrol here.
        subprocess.SubprocessError: Slurm does not do it; ``stderr`` says why.
    """
    words = ["scontrol", "requeue", job_id()]
    subprocess.run(
        words,
        check=True,
        timeout=_REQUEUE_S,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    print(f"Slurm has job {job_id()} back in its queue.", flush=True)


def _wait_again(run: PackedRun) -> None:
    """A run that was cut short is PENDING again, its attempt among the earlier ones."""
    files = RunDir(Path(run.directory))
    lock = RunLock.acquire(files)
    try:
        files.write(msgspec.structs.replace(run.record, attempts=files.begin_attempt()))
    finally:
        if lock is not None:
            lock.release()
