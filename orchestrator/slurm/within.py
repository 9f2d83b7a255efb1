"""The local queue inside a Slurm job: Slurm may announce the job's end, or ask for it."""

from __future__ import annotations

import os
import signal
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

from orchestrator.queue.scheduler import Scheduler
from orchestrator.queue.signals import StopSignals
from orchestrator.queue.wire import Started
from orchestrator.slurm.allocation import end_of_job

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from orchestrator.queue.attempts import Job
    from orchestrator.queue.context import Context
    from orchestrator.slurm.pack import JobTime

# Slurm looks at time limits once a minute, and may be that much early or late.
_SLACK_S = 60.0
# Of the time between Slurm's announcement and its limit, what runs may use to save their state.
_SAVING_SHARE = 0.75


class PackSignals(StopSignals):
    """Slurm's signals: SIGUSR2 announces the end of the job, SIGTERM asks for it."""

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
    # (The batch script ignores it until there is somebody to take it.)
    always = (signal.SIGUSR2,)

    def __init__(self, job: JobTime) -> None:
        super().__init__()
        self.warned = False
        self._job = job
        # By what was asked for; sbatch may have been told otherwise, or the limit changed since.
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._planned_end = float(end) if end.isdecimal() else time.time() + job.limit_s

    @property
    def told(self) -> bool:
        """Whether Slurm has said anything at all."""
        return self.warned or bool(self.received)

    @property
    def may_go_on(self) -> bool:
        """Whether the end was announced, and nobody has cancelled the job in the meantime."""
        return self.warned and not set(self.received) - {signal.SIGUSR2}

    @property
    def timed_out(self) -> bool:
        """Whether it is the job's own time that is up; else it was preempted, or cancelled."""
        if not self.told:
            return False
        ahead = self._job.signal_delay_s if self.warned else 0.0
        return time.time() + ahead + _SLACK_S >= self._end

    @property
    def _end(self) -> float:
        """When the job's time is up.

        At a warning Slurm is asked; when it wants the job to end there is no time for that.
        """
        return self._said_end if self.warned else self._planned_end

    @cached_property
    def _said_end(self) -> float:
        return end_of_job() or self._planned_end

    @property
    def ends_early(self) -> bool:
        """Whether the job is to end before Slurm ends it, since it will go on later."""
        return self.warned and (not self.timed_out or self._job.timeouts_left > 0)

    @property
    def reason(self) -> str:  # type: ignore[override]
        return "SLURM_TIMEOUT" if self.timed_out else "SLURM_ENDED"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self.warned = True
            self.wake()
        else:
            super()._handle(number, frame)

    def stop(self) -> None:
        """What was announced has come."""
        self.received.append(signal.SIGUSR2)


class PackScheduler(Scheduler):
    """Tells runs when the job's end is announced, and gives them some time to save their state."""

    def __init__(
        self,
        points: Sequence[Sequence[str]],
        first_num: int,
        context: Context,
        signals: PackSignals,
        job: JobTime,
    ) -> None:
        super().__init__(points, first_num, context, signals)
        self._slurm = signals
        self._saving_s = job.signal_delay_s * _SAVING_SHARE
        self._deadline: float | None = None

    @property
    def closed(self) -> str:
        return super().closed or ("Slurm has announced the end." if self._slurm.ends_early else "")

    def _heed(self) -> None:
        self._slurm.drain()
        if self._slurm.received:
            self._stop_all()
        elif self._slurm.warned and self._deadline is None:
            self._deadline = float("inf")
            for job in self._jobs.values():
                job.link.warn()
            told = len(self._jobs)
            self._context.progress.say(f"Slurm announces the end; {told} running are told.")
            if self._slurm.ends_early:
                self._deadline = self._context.clock() + self._saving_s

    def _stop_all(self) -> None:
        for job in self._jobs.values():
            job.link.stop(self._slurm.reason)
        self._context.progress.stopping(0)
        self._context.progress.say(f"Slurm ends the job; {len(self._jobs)} running are ended.")

    def _take(self, job: Job, message: Any) -> None:
        super()._take(job, message)
        if isinstance(message, Started) and self._deadline is not None:
            job.link.warn()

    def _wait(self) -> None:
        super()._wait()
        if self._deadline is not None and self._context.clock() >= self._deadline:
            self._deadline = float("inf")
            self._slurm.stop()
            self._stop_all()

    def _patience(self) -> float | None:
        patience = super()._patience()
        if self._deadline is None or self._deadline == float("inf"):
            return patience
        left = max(self._deadline - self._context.clock(), 0.0)
        return left if patience is None else min(left, patience)
