"""One launch: an event loop that gives places to jobs until every point has its answer."""

from __future__ import annotations

import selectors
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.queue.answers import Answers
from orchestrator.queue.attempts import Job, Try, described, usage_of
from orchestrator.queue.burial import bury
from orchestrator.queue.control import SENTENCES
from orchestrator.queue.needs import after_oom
from orchestrator.queue.places import Place, Want
from orchestrator.queue.plan import Seat
from orchestrator.queue.retry import Cause, cause_of
from orchestrator.queue.wire import Busy, Ended, Exited, Started
from orchestrator.record import RunRecord, RunState
from orchestrator.store import RunDir, tail
from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from orchestrator.queue.context import Context
    from orchestrator.queue.needs import Need
    from orchestrator.queue.plan import Plan
    from orchestrator.queue.signals import StopSignals
    from orchestrator.queue.wire import JobRequest

# How long after a run was seen in another launcher's hands it is looked at again.
_BUSY_INTERVAL_S = 0.5
_MAX_SERVER_DEATHS = 3
# How many points in a row may be answered without a look at jobs and signals.
_POINTS_AT_A_TIME = 100
# How many runs are looked at for one that fits, where runs differ in what they need.
_LOOKAHEAD = 64
_CONTROL_INTERVAL_S = 0.5
_LOG_TAIL_BYTES = 4_096


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
        self._jobs: dict[int, Job] = {}
        self._exhausted = False
        self._waiting: list[Want] = []
        self._lookahead = _LOOKAHEAD if context.needs.vary else 1
        self._limit_reached = ""
        self._drained = False
        self._control_at = context.clock()
        # Runs that are in another launcher's hands, and when to look at them again.
        self._later: deque[tuple[float, Plan]] = deque()
        self._server_deaths = 0
        self.answers = Answers(context, len(points), first_num)

    @property
    def stopping(self) -> bool:
        return bool(self._signals.received)

    @property
    def closed(self) -> str:
        """Why nothing more is started, although no signal has come; empty while there is no why."""
        return self._limit_reached or ("The queue was drained." if self._drained else "")

    def run(self) -> None:
        """Go on until every point is answered, or until a signal has ended every job."""
        self._selector.register(self._signals, selectors.EVENT_READ)
        descriptor = self._context.places.fileno()
        if descriptor is not None:
            self._selector.register(descriptor, selectors.EVENT_READ, self._context.places)
        try:
            self._obey()
            while True:
                self._fill()
                if not self._jobs and (self.stopping or self.closed or self._nothing_left()):
                    break
                self._wait()
            while self._context.places.releasing and not self.stopping:
                self._wait()
        finally:
            for job in self._jobs.values():
                job.link.stop("LAUNCHER_FAILED")
            self._selector.close()

    def _nothing_left(self) -> bool:
        waits = self._waiting or self._later or self.answers.any_repeats
        return self._exhausted and not waits

    # --- starting ---

    def _fill(self) -> None:
        if self._is_closed():
            self._context.places.fill(())  # nobody waits: other sweeps need not stand back
        while not self._is_closed():
            # One more at a time: the first job is not to wait for the plans of many.
            longer = self._line_up()
            if not self._waiting:
                return
            given = self._context.places.fill(self._waiting)
            for want, place in given:
                self._waiting.remove(want)
                self._start(want.key, place)
            if not (given or longer):
                self._give_up_if_hopeless()
                return

    def _line_up(self) -> bool:
        """Have one more run waiting; whether there is room for yet another."""
        # (A run that is tried again may need more than those behind it, which fill the gaps.)
        again = any(want.key.number > 1 for want in self._waiting)
        most = _LOOKAHEAD if again else self._lookahead
        if len(self._waiting) >= most:
            return False
        while not self._is_closed() and (plan := self._take_plan()) is not None:
            try:
                self._waiting.append(Want(self._need(plan), Try(plan)))
            except Exception as error:  # noqa: BLE001 - the run's own failure; the others go on
                self.answers.cannot_start(plan.index, plan.num, plan.overrides, error)
                self._count_failure()
            else:
                return len(self._waiting) < most
        return False

    def _need(self, plan: Plan) -> Need:
        context = self._context
        need = context.needs.of(
            plan.shape,
            lambda: context.composer.compose(plan.overrides),
            context.places.room,
        )
        reason = context.places.impossible(need)
        if reason:
            msg = f"This run will never find a place: {reason}. Ask for less."
            raise SweepError(msg)
        return need

    def _give_up_if_hopeless(self) -> None:
        reason = "" if self._jobs else self._context.places.hopeless()
        if reason:
            msg = f"Nothing can run any more: {reason}. The same command again goes on."
            raise SweepError(msg)

    def _take_plan(self) -> Plan | None:
        """The next plan that needs a job; those that are answered already are dealt with."""
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
        num, answers = self._first_num + index, self.answers
        try:
            plan = self._context.planner.plan(index, num, overrides)
        except Exception as error:  # noqa: BLE001 - the point's own failure; the others go on
            answers.cannot_start(index, num, overrides, error)
            self._count_failure()
            return None
        if plan.done is not None:
            answers.take_recorded(plan, plan.done)
            return None
        if answers.is_repeat(plan):
            return None
        self._context.sweep.add_run(num, plan.directory, plan.who.hyperparams)
        return plan

    def _start(self, run: Try, place: Place) -> None:
        context, plan = self._context, run.plan
        request = self._request(run, place)
        try:
            link = context.server.start(request, place.lease_descriptors)
        except OSError:
            self._restart_server()
            # The new server may start jobs in another way, which needs other things.
            request = self._request(run, place)
            link = context.server.start(request, place.lease_descriptors)
        self._jobs[plan.index] = Job(run, place, link, request)
        self._selector.register(link, selectors.EVENT_READ, plan.index)
        context.progress.start(plan.index, request.record.model_name, str(place))

    def _request(self, run: Try, place: Place) -> JobRequest:
        context = self._context
        seat = Seat(
            place,
            context.places.totals(place),
            context.threads,
            attempt=run.number,
            cpu_only=not context.places.gpus,
        )
        return context.planner.request(run.plan, seat, context.sweep)

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
        places = self._context.places
        for key, _ in self._selector.select(self._patience()):
            if key.fileobj is self._signals:
                self._heed()
            elif key.data is places:
                places.receive()
            elif key.data in self._jobs:
                self._hear(self._jobs[key.data])
        places.check()
        self._pass_on()
        self._obey()
        self._context.progress.tick()

    def _heed(self) -> None:
        """A signal has come."""
        self._signals.drain()
        self._stop_all()

    def _stop_all(self) -> None:
        for job in self._jobs.values():
            job.link.stop(self._signals.reason)
        self._context.progress.stopping(len(self._jobs))

    def _pass_on(self) -> None:
        """Tell keepers what was seen of their jobs' GPUs."""
        changed = self._context.places.take_changed()
        lost = self._context.places.take_lost()
        if not (changed or lost):
            return
        by_place = {id(job.place): job for job in self._jobs.values()}
        for place in changed:
            if (job := by_place.get(id(place))) is not None:
                job.link.tell_usage(usage_of(place))
        for place in lost:
            if (job := by_place.get(id(place))) is not None:
                job.link.stop(Cause.GPU_LOST.name)

    def _obey(self) -> None:
        """Look for what the user has ordered by ``orchestrator-status``."""
        now, control, progress = (
            self._context.clock(),
            self._context.control,
            self._context.progress,
        )
        if now < self._control_at:
            return
        self._control_at = now + _CONTROL_INTERVAL_S
        before = control.queue
        if not control.poll():
            return
        if control.problem:
            progress.say(control.problem)
        self._context.places.close_gpus(control.gpus)
        if control.queue == before:
            return
        self._drained = control.queue == "drain"
        progress.say(SENTENCES[control.queue])

    def _patience(self) -> float | None:
        if not self._exhausted and not self._waiting and not self._is_closed():
            return 0.0  # many points were answered: look up for a moment, then go on
        waits = [
            self._context.progress.interval(),
            self._context.places.patience(),
            _CONTROL_INTERVAL_S,
        ]
        if self._later and self._exhausted and not self._waiting:
            waits.append(max(self._later[0][0] - self._context.clock(), 0.01))
        return min((wait for wait in waits if wait is not None), default=None)

    def _is_closed(self) -> bool:
        return bool(self.stopping or self.closed or self._context.control.queue != "run")

    def _hear(self, job: Job) -> None:
        for message in job.link.inbox.receive():
            self._take(job, message)
        if job.answered or job.link.inbox.closed:
            self._release(job)
            del self._jobs[job.plan.index]
            self._selector.unregister(job.link)
            job.link.close()
            if not job.answered:
                self._bury(job)

    def _take(self, job: Job, message: Any) -> None:
        if isinstance(message, Started):
            job.pid, job.pid_started = message.pid, message.pid_started
            self._context.places.started(job.place, message.keeper)
        elif isinstance(message, Exited):
            # The next job starts before this one's record is written; unless the record may
            # say that none is to start any more, or what the next one needs.
            last = message.failed and self._context.limit.limit is not None
            if not last and not (job.place.need.alone and self._context.needs.learns):
                self._release(job)
                self._fill()
        elif isinstance(message, Busy):
            job.answered = True
            self._context.progress.running.pop(job.plan.index, None)
            if not self._later:
                name = job.request.record.model_name
                why = message.reason or "is being run by another launcher"
                self._context.progress.say(f"{name} {why}; waiting.")
            self._later.append((self._context.clock() + _BUSY_INTERVAL_S, job.plan))
        elif isinstance(message, Ended):
            job.answered = True
            self._end(job, message)

    def _release(self, job: Job) -> None:
        if not job.released:
            job.released = True
            self._context.places.give_back(job.place)

    # --- ending ---

    def _end(self, job: Job, message: Ended) -> None:
        record, answers = message.record, self.answers
        if message.skipped:
            self._context.progress.running.pop(job.plan.index, None)
            answers.take_recorded(job.plan, record)
            return
        if record.state is RunState.COMPLETED:
            if self._context.needs.learn(record.memory_shape, record.peak_gpu_memory_gb):
                self._think_again()
        elif self._try_again(job, record):
            return
        answers.take(job.plan, message)
        if record.state not in (RunState.COMPLETED, RunState.CANCELLED):
            self._count_failure()

    def _think_again(self) -> None:
        """What waits may need something else, now that more is known of runs of its shape."""
        self._waiting = [
            want if want.key.number > 1 else replace(want, need=self._need(want.key.plan))
            for want in self._waiting
        ]

    def _count_failure(self) -> None:
        context = self._context
        context.failures += 1
        if not (self.stopping or self.closed) and context.limit.reached(context.failures):
            self._limit_reached = context.limit.sentence(context.failures)
            context.progress.say(self._limit_reached)

    def _try_again(self, job: Job, record: RunRecord) -> bool:
        """Whether a run that failed goes back into the queue."""
        context, number = self._context, job.run.number
        if self.stopping or self.closed:  # (a pause is no reason: it goes back into the queue)
            return False
        run = RunDir(job.plan.directory)
        log = tail(run.stdout, _LOG_TAIL_BYTES) + tail(run.stderr, _LOG_TAIL_BYTES)
        cause = cause_of(record, log[-_LOG_TAIL_BYTES:], oom_killed=bool(context.oom_kills.rose()))
        if cause is None or not context.retry.again(record, cause, number):
            return False
        need = job.place.need
        if cause is Cause.OOM and job.place.gpus:
            need = after_oom(need, context.places.room(need.gpus))
        # It has had its turn before: it goes first.
        self._waiting.insert(0, Want(need, Try(job.plan, number + 1)))
        directory = str(job.plan.directory)
        how = f"trying again ({cause.value}; {number} of {context.retry.retries}{described(need)})"
        context.progress.retry(job.plan.index, record, directory, how)
        return True

    def _bury(self, job: Job) -> None:
        """The keeper was killed: nobody else will write this run's final record."""
        ended = bury(job.plan.directory, job.request.record, job.pid, job.pid_started)
        if ended is None:  # another launcher was faster
            self._later.append((self._context.clock() + _BUSY_INTERVAL_S, job.plan))
        else:
            self._end(job, ended)
