"""Waiting for runs on a cluster: what their jobs report, and what Slurm says of those that do not."""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from orchestrator.queue.wire import Ended
from orchestrator.record import RunState
from orchestrator.slurm.client import SlurmUnreachable
from orchestrator.slurm.ledger import read_ledger
from orchestrator.slurm.settle import corrected, settle
from orchestrator.slurm.waiting import Query, Waiting
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from orchestrator.queue.answers import Answers
    from orchestrator.queue.progress import Progress
    from orchestrator.queue.retry import FailureLimit
    from orchestrator.queue.signals import StopSignals
    from orchestrator.slurm.client import SlurmClient
    from orchestrator.slurm.states import Seen

# How often the directory is looked at in which jobs report.
_LOOK_S = 0.25
_TICK_NS = 2_000_000_000
# Slurm is asked this often at first, and less as the sweep grows old: a share of its age.
_FIRST_POLL_S = 1.0
_POLL_SHARE = 0.05
_LONGEST_POLL_S = 10.0
# A query that takes long is made less often.
_QUERY_SHARE = 0.05
# How long after the end of its job a run may still be about to say how it ended.
_LAST_WORDS_S = 2.0
# Accounting and queue are two services: a new job, or one just ended, may be in neither.
_NOWHERE_S = 5.0
# How long after the end of its job nothing of a run can be left, whoever holds its lock.
_CERTAIN_S = 150.0


class Watcher:
    """Waits until each run has its answer.

    Args:
        client: asks Slurm.
        waiting: the runs.
        answers: takes what they came to.
        progress: tells the user.
        limit: after how many failures nothing more is to start.
        failures: how many there are already.
        longest_poll_s: the longest time between two looks at Slurm's queue, within 1 and 10.
        clock: in seconds.
    """

    def __init__(
        self,
        client: SlurmClient,
        waiting: Iterable[Waiting],
        answers: Answers,
        progress: Progress,
        limit: FailureLimit,
        *,
        failures: int = 0,
        longest_poll_s: float = _LONGEST_POLL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._all = list(waiting)
        self._left = {run.plan.index: run for run in self._all}
        # Where their reports come, by the file's name.
        self._reports: dict[Path, dict[str, Waiting]] = defaultdict(dict)
        for run in self._left.values():
            self._reports[run.ended_file.parent][run.ended_file.name] = run
        self._answers = answers
        self._progress = progress
        self._limit = limit
        self._clock = clock
        self._began = clock()
        self._longest_poll_s = min(max(longest_poll_s, _FIRST_POLL_S), _LONGEST_POLL_S)
        self._poll_at = clock() + _FIRST_POLL_S
        self._look_at = clock()
        self._query: Query | None = None
        self._silent = False
        self._reasons_said: set[str] = set()
        # When the directories of reports had changed, the last time they were listed.
        self._looked: dict[Path, int] = {}
        self.failures = failures
        self._closed = False

    @property
    def left(self) -> list[Waiting]:
        return list(self._left.values())

    @property
    def jobs(self) -> list[str]:
        """Ids of the jobs that are not over, each once, in order."""
        return list(dict.fromkeys(run.job_id for run in self._left.values()))

    def own_jobs(self, own: Path) -> list[str]:
        """Those of `jobs` that do nothing but runs that are waited for here.

        Args:
            own: the directory of the sweep whose jobs all are.
        """
        runs = Counter((run.sweep_dir, run.job_id) for run in self._all)
        left = dict.fromkeys((run.sweep_dir, run.job_id) for run in self._left.values())
        return [
            job
            for sweep_dir, job in left
            if sweep_dir == own or runs[sweep_dir, job] == _size(sweep_dir, job)
        ]

    def run(
        self,
        signals: StopSignals,
        until: float | None = None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Go on until every run is answered, or a signal comes, or a moment.

        Args:
            signals: says when to stop.
            until: on the clock.
            given_up: asked now and then; true: nothing is waited for any more.
        """
        so_far = len(signals.received)
        with selectors.DefaultSelector() as selector:
            selector.register(signals, selectors.EVENT_READ)
            while self._left and len(signals.received) == so_far:
                if given_up() or (until is not None and self._clock() >= until):
                    return
                self.step()
                if self._left and selector.select(self._patience()):
                    signals.drain()

    def step(self) -> None:
        """Look once at what is due."""
        now = self._clock()
        if now >= self._look_at:
            self._take_reports()
            self._look_at = self._clock() + _LOOK_S
        if self._query is None and now >= self._poll_at and self._left:
            self._query = Query(self._client, self.jobs)
        if self._query is not None and self._query.done.is_set():
            query, self._query = self._query, None
            self._hear(query)
        self._progress.tick()

    def hurry(self) -> None:
        """Ask Slurm often again: jobs are being cancelled."""
        self._began = self._clock()
        self._poll_at = min(self._poll_at, self._clock() + _FIRST_POLL_S)

    def _patience(self) -> float:
        due = [self._look_at] if self._query is not None else [self._look_at, self._poll_at]
        return max(min(due) - self._clock(), 0.0)

    # --- what jobs report ---

    def _take_reports(self) -> None:
        for directory, runs in self._reports.items():
            changed = _changed_at(directory)
            if changed == self._looked.get(directory):
                continue
            # (A change in the same tick of its clock is seen the next time.)
            self._looked[directory] = changed if time.time_ns() - changed > _TICK_NS else -1
            for name in _names(directory):
                if name in runs:
                    self._take_report(runs[name])

    def _take_report(self, run: Waiting) -> bool:
        try:
            with run.ended_file.open("rb") as file:
                # (Nobody else's: what is unpickled may do anything.)
                if os.fstat(file.fileno()).st_uid != os.getuid():
                    return False
                ended = pickle.load(file)  # noqa: S301 - from our own job
        except Exception:  # noqa: BLE001 - what cannot be read is not there: the record is
            return False
        if not isinstance(ended, Ended):
            return False
        self._end(run, ended)
        return True

    def _end(self, run: Waiting, ended: Ended) -> None:
        self._left.pop(run.plan.index, None)
        self._reports[run.ended_file.parent].pop(run.ended_file.name, None)
        if ended.skipped:
            self._progress.running.pop(run.plan.index, None)
            self._answers.take_recorded(run.plan, ended.record)
            return
        self._answers.take(run.plan, ended)
        if ended.record.state not in (RunState.COMPLETED, RunState.CANCELLED):
            self._count_failure()

    def _count_failure(self) -> None:
        self.failures += 1
        if self._closed or not self._limit.reached(self.failures):
            return
        self._closed = True
        self._progress.say(self._limit.sentence(self.failures))
        with contextlib.suppress(SlurmUnreachable):
            self._client.cancel(self.jobs, only_waiting=True)

    # --- what Slurm says ---

    def _hear(self, query: Query) -> None:
        took = 0.0
        if query.error is not None:
            if not self._silent:
                self._progress.say(f"{query.error} What runs goes on; it is asked again.")
            self._silent = True
        else:
            took = query.took_s
            if self._silent:
                self._progress.say("Slurm answers again.")
            self._silent = False
            self._heed(query.seen)
        age = self._clock() - self._began
        pause = max(_FIRST_POLL_S, age * _POLL_SHARE, took / _QUERY_SHARE)
        if any(run.over_since is not None for run in self._left.values()):
            pause = min(pause, _LAST_WORDS_S)  # somebody's last word is awaited
        self._poll_at = self._clock() + min(pause, self._longest_poll_s)

    def _heed(self, seen: dict[str, Seen]) -> None:
        now = self._clock()
        over = []
        for run in list(self._left.values()):
            found = seen.get(run.job_id)
            run.seen = found or run.seen
            if found is not None and not found.state.is_final:
                run.over_since = None
                self._show(run, found)
                continue
            if run.over_since is None:
                run.over_since = now
            over.append(run)
        self._say_why_pending(seen)
        self._see_to(over)

    def _show(self, run: Waiting, found: Seen) -> None:
        if found.state is RunState.RUNNING:
            self._progress.start(run.plan.index, run.record.model_name, found.node or "running")
        elif self._progress.running.pop(run.plan.index, None) is not None:
            self._progress.say(
                f"{run.record.model_name} is back in Slurm's queue; it goes on as another attempt."
            )

    def _say_why_pending(self, seen: dict[str, Seen]) -> None:
        """Say once of each reason that is no usual waiting for one's turn."""
        pending = [found.reason for found in seen.values() if found.state is RunState.PENDING]
        for reason in sorted(set(pending) - _USUAL - self._reasons_said):
            self._reasons_said.add(reason)
            count = plural(pending.count(reason), "job")
            self._progress.say(
                f"Slurm lets {count} wait for {reason!r} (scontrol show job ID says more). If that "
                "will never change, Ctrl+C, and ask for something else."
            )

    def _see_to(self, over: list[Waiting]) -> None:
        """Answer runs whose jobs are over: by their own records, or by what Slurm says."""
        now = self._clock()
        silent = []
        for run in over:
            if self._take_report(run) or self._take_record(run):
                continue
            assert run.over_since is not None
            if now - run.over_since >= _LAST_WORDS_S or run.never_began:
                silent.append(run)
        if not silent:
            return
        for run in silent:
            if run.never_began and (found_record := run.run.try_read()) is not None:
                # It had begun after all: why it ended, Slurm has not said.
                run.seen = run.seen if found_record.started_at is None else None
        unknown = [run.job_id for run in silent if run.seen is None or not run.seen.state.is_final]
        since = min(run.submitted_at for run in silent)
        accounted = self._client.ended(unknown, since) if unknown else {}
        for run in silent:
            found = accounted.get(run.job_id) or run.seen
            if found is not None and not found.state.is_final:
                found = None
            assert run.over_since is not None
            if found is not None or now - run.over_since >= _NOWHERE_S:
                self._settle(run, found)

    def _take_record(self, run: Waiting) -> bool:
        record = run.run.try_read()
        if record is None or not record.state.is_final:
            return False
        ours = (record.sweep_id, record.index) == (run.record.sweep_id, run.record.index)
        done = record.state is RunState.COMPLETED
        if ours:
            record = corrected(run.run, record, run.job_id, run.seen)
        self._end(run, Ended(record, skipped=done and not ours))
        return True

    def _settle(self, run: Waiting, found: Seen | None) -> None:
        assert run.over_since is not None
        certain = found is not None and self._clock() - run.over_since >= _CERTAIN_S
        try:
            record = settle(run.run, run.record, run.job_id, found, run.job_logs, certain=certain)
        except OSError as error:
            record = run.record.advance(RunState.LOST)
            self._end(
                run, Ended(record, warning=f"no record could be written: {error}", saved=False)
            )
            return
        if record is not None:
            self._end(run, Ended(record))
        elif certain:  # another sweep has the run by now, and says how it ends
            lost = run.record.advance(RunState.LOST)
            why = f"{run.run.path} is another sweep's now"
            self._end(run, Ended(lost, warning=why))

    def summary(self) -> str:
        """How many runs wait and run, and the jobs that do them."""
        running = sum(1 for run in self._left.values() if run.plan.index in self._progress.running)
        waiting = len(self._left) - running
        return f"{plural(running, 'run')} going on and {waiting} waiting"


# Why jobs wait that will have their turn.
_USUAL = frozenset(
    {
        "",
        "ArrayTaskLimit",
        "BeginTime",
        "Cleaning",
        "Dependency",
        "JobArrayTaskLimit",
        "None",
        "Priority",
        "Prolog",
        "Resources",
    }
)


def _size(sweep_dir: Path, job_id: str) -> int:
    """How many runs a job of another sweep has."""
    ledger = read_ledger(sweep_dir)
    return next((len(job.runs) for job in ledger.jobs if job.id == job_id), 0) if ledger else 0


def _changed_at(directory: Path) -> int:
    try:
        return directory.stat().st_mtime_ns
    except OSError:
        return 0


def _names(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries]
    except OSError:
        return []
