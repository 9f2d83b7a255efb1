"""One launch: an event loop that fills slots with jobs until every point has its answer."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.processes import is_alive
from orchestrator.queue.returns import QueueJobReturn
from orchestrator.queue.wire import Busy, Ended, Exited, Started
from orchestrator.record import ErrorInfo, RunRecord, RunState, Versions
from orchestrator.store import RunDir, RunLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from orchestrator.queue.link import JobLink, ServerLink
    from orchestrator.queue.plan import Plan, Planner
    from orchestrator.queue.progress import Progress
    from orchestrator.queue.signals import StopSignals
    from orchestrator.queue.slots import Slot, Slots
    from orchestrator.queue.wire import JobRequest
    from orchestrator.sweep.compose import Composer
    from orchestrator.sweeps import Sweep

# How long after a run was seen in another launcher's hands it is looked at again.
_BUSY_INTERVAL_S = 0.5
_MAX_SERVER_DEATHS = 3
# How many points in a row may be answered without a look at jobs and signals.
_POINTS_AT_A_TIME = 100
_LAST_WAIT_S = 10.0


@dataclass
class _Job:
    """A job between its start and its final record."""

    plan: Plan
    slot: Slot | None
    link: JobLink
    request: JobRequest
    pid: int | None = None
    pid_started: float | None = None
    answered: bool = False


@dataclass
class Context:
    """What a scheduler works with; all of it is replaced easily in a test."""

    composer: Composer
    planner: Planner
    sweep: Sweep
    slots: Slots
    threads: int
    progress: Progress
    make_server: Callable[[], ServerLink]
    server: ServerLink
    clock: Callable[[], float] = time.monotonic


class Scheduler:
    """Runs the points of one launch.

    Args:
        points: the override lists, possibly lazy; each is looked at once.
        first_num: Hydra's number of the first.
        context: what to work with.
        signals: says when to stop.
    """

    def __init__(
        self,
        points: Sequence[Sequence[str]],
        first_num: int,
        context: Context,
        signals: StopSignals,
    ) -> None:
        self._coming: Iterator[tuple[int, Sequence[str]]] = iter(enumerate(points))
        self._first_num = first_num
        self._context = context
        self._signals = signals
        self._selector = selectors.DefaultSelector()
        self._jobs: dict[int, _Job] = {}
        self._exhausted = False
        self._next: Plan | None = None
        # Runs that are in another launcher's hands, and when to look at them again.
        self._later: deque[tuple[float, Plan]] = deque()
        # By the index of the point that is doing them: points that ask for the same run.
        self._repeats: dict[int, list[Plan]] = {}
        self._first_in: dict[str, int] = {}
        self._server_deaths = 0
        self.returns: list[QueueJobReturn | None] = [None] * len(points)
        # What the code was when the runs that answer were done.
        self.answered_by: set[Versions] = set()
        # Runs whose final record is not on the disk.
        self.unsaved = 0

    @property
    def stopping(self) -> bool:
        return bool(self._signals.received)

    def run(self) -> None:
        """Go on until every point is answered, or until a signal has ended every job."""
        self._selector.register(self._signals, selectors.EVENT_READ)
        try:
            while True:
                self._fill()
                if not self._jobs and (self.stopping or self._nothing_left()):
                    break
                self._wait()
        finally:
            for job in self._jobs.values():
                job.link.stop()
            self._selector.close()

    def _nothing_left(self) -> bool:
        return self._exhausted and self._next is None and not self._later and not self._repeats

    # --- starting ---

    def _fill(self) -> None:
        while not self.stopping:
            plan = self._take_plan()
            if plan is None:
                return
            slot = self._context.slots.take()
            if slot is None:
                self._next = plan
                return
            self._start(plan, slot)

    def _take_plan(self) -> Plan | None:
        """The next plan that needs a job; those that are answered already are dealt with."""
        if self._next is not None:
            waiting, self._next = self._next, None
            return waiting
        for _ in range(_POINTS_AT_A_TIME):
            point = next(self._coming, None)
            if point is None:
                self._exhausted = True
                break
            plan = self._plan(*point)
            if plan is not None:
                return plan
        if not self._exhausted:
            return None
        if self._later and self._later[0][0] <= self._context.clock():
            return self._later.popleft()[1]
        return None

    def _plan(self, index: int, overrides: Sequence[str]) -> Plan | None:
        num = self._first_num + index
        try:
            plan = self._context.planner.plan(index, num, overrides)
        except Exception as error:  # noqa: BLE001 - the point's own failure; the others go on
            self._cannot_start(index, num, overrides, error)
            return None
        if plan.done is not None:
            self._answer(plan, plan.done)
            return None
        first = self._first_in.setdefault(str(plan.directory), index)
        if first != index:
            self._repeats.setdefault(first, []).append(plan)
            if self.returns[first] is not None:
                self._answer_repeats(first)
            return None
        self._context.sweep.add_run(num, plan.directory)
        return plan

    def _cannot_start(
        self, index: int, num: int, overrides: Sequence[str], error: Exception
    ) -> None:
        result = QueueJobReturn(self._context.composer, overrides, num, "")
        result.fail(error)
        self.returns[index] = result
        record = RunRecord(
            model_name=" ".join(overrides),
            sweep_id=self._context.sweep.sweep_id,
            index=num,
            overrides=tuple(overrides),
            state=RunState.FAILED,
            error=ErrorInfo.of(error),
        )
        self._context.sweep.add_unstarted(record)
        self._context.progress.end(index, overrides, record, "")

    def _start(self, plan: Plan, slot: Slot) -> None:
        context = self._context
        request = context.planner.request(plan, slot, context.threads, context.sweep)
        try:
            link = context.server.start(request)
        except OSError:
            self._restart_server()
            # The new server may start jobs in another way, which needs other things.
            request = context.planner.request(plan, slot, context.threads, context.sweep)
            link = context.server.start(request)
        self._jobs[plan.index] = _Job(plan, slot, link, request)
        self._selector.register(link, selectors.EVENT_READ, plan.index)
        context.progress.start(plan.index, request.record.model_name, str(slot))

    def _restart_server(self) -> None:
        self._server_deaths += 1
        if self._server_deaths > _MAX_SERVER_DEATHS:
            msg = f"the job server died {self._server_deaths} times; see the messages above"
            raise RuntimeError(msg)
        self._context.progress.say("The job server died; starting another for what is left.")
        self._context.server.close()
        self._context.server = self._context.make_server()

    # --- waiting ---

    def _wait(self) -> None:
        for key, _ in self._selector.select(self._patience()):
            if key.fileobj is self._signals:
                self._signals.drain()
                for job in self._jobs.values():
                    job.link.stop()
            else:
                self._hear(self._jobs[key.data])
        self._context.progress.tick()

    def _patience(self) -> float | None:
        if not self._exhausted and self._next is None:
            return 0.0  # many points were answered: look up for a moment, then go on
        waits = [self._context.progress.interval()]
        if self._later and self._exhausted and self._next is None:
            waits.append(max(self._later[0][0] - self._context.clock(), 0.01))
        return min((wait for wait in waits if wait is not None), default=None)

    def _hear(self, job: _Job) -> None:
        for message in job.link.inbox.receive():
            self._take(job, message)
        if job.answered or job.link.inbox.closed:
            self._release(job)
            del self._jobs[job.plan.index]
            self._selector.unregister(job.link)
            job.link.close()
            if not job.answered:
                self._bury(job)

    def _take(self, job: _Job, message: Any) -> None:
        if isinstance(message, Started):
            job.pid, job.pid_started = message.pid, message.pid_started
        elif isinstance(message, Exited):
            # The next job starts before this one's record is written.
            self._release(job)
            self._fill()
        elif isinstance(message, Busy):
            job.answered = True
            self._context.progress.running.pop(job.plan.index, None)
            if not self._later:
                name = job.request.record.model_name
                self._context.progress.say(f"{name} is being run by another launcher; waiting.")
            self._later.append((self._context.clock() + _BUSY_INTERVAL_S, job.plan))
        elif isinstance(message, Ended):
            job.answered = True
            self._end(job, message)

    def _release(self, job: _Job) -> None:
        if job.slot is not None:
            self._context.slots.give_back(job.slot)
            job.slot = None

    # --- ending ---

    def _result(self, plan: Plan) -> QueueJobReturn:
        result = QueueJobReturn(
            self._context.composer, plan.overrides, plan.num, str(plan.directory)
        )
        self.returns[plan.index] = result
        self._answer_repeats(plan.index)
        return result

    def _answer(self, plan: Plan, record: RunRecord) -> None:
        """A finished run answers; nothing is started."""
        self._context.sweep.add_run(plan.num, plan.directory)
        self._result(plan).take(record, None)
        self.answered_by.add(record.versions)
        self._context.progress.skip(plan.overrides)

    def _answer_repeats(self, first: int) -> None:
        """The same run was asked for twice in one sweep: it is run once and answers both."""
        for plan in self._repeats.pop(first, ()):
            self.returns[plan.index] = self.returns[first]
            self._context.progress.repeat(plan.overrides)

    def _end(self, job: _Job, message: Ended) -> None:
        if message.skipped:
            self._context.progress.running.pop(job.plan.index, None)
            self._answer(job.plan, message.record)
            return
        self.unsaved += not message.saved
        self._context.planner.remember(job.plan, message.record)
        self._result(job.plan).take(message.record, message.value)
        if message.warning:
            self._context.progress.say(f"{message.record.model_name}: {message.warning}")
        directory = str(job.plan.directory)
        self._context.progress.end(job.plan.index, job.plan.overrides, message.record, directory)
        self._context.sweep.write_partial_now_and_then()

    def _bury(self, job: _Job) -> None:
        """The keeper was killed: nobody else will write this run's final record."""
        asked, run = job.request.record, RunDir(job.plan.directory)
        self._end_with_keeper(job)
        error = ErrorInfo("KeeperDied", "the process that looked after the run was killed")
        lost = asked.advance(RunState.LOST, ended_at=time.time(), error=error)
        try:
            lock = _lock_after_death(run, asked)
            if lock is None:  # another launcher was faster
                self._later.append((self._context.clock() + _BUSY_INTERVAL_S, job.plan))
                return
            try:
                self._end(job, Ended(_last_word(run, asked, lost)))
            finally:
                lock.release()
        except OSError as failure:
            self._end(job, Ended(lost, None, f"no record could be written: {failure}", saved=False))

    def _end_with_keeper(self, job: _Job) -> None:
        """See that the job is dead, which on Linux the kernel has seen to already."""
        give_up = time.monotonic() + _LAST_WAIT_S
        while job.pid is not None and is_alive(job.pid, job.pid_started):
            if time.monotonic() > give_up:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(job.pid, signal.SIGKILL)  # it leads a group of its own
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


def _last_word(run: RunDir, asked: RunRecord, lost: RunRecord) -> RunRecord:
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
