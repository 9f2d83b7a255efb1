"""Sweeps on GPUs as a simulation of events: the real places and lease tables, a clock of its own.

What is simulated: time, NVML's readings, and jobs, whose memory shows late and goes late.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

from orchestrator.queue.assign import Rules
from orchestrator.queue.gpu_places import GpuPlaces
from orchestrator.queue.gpus import Gpu, GpuProcess, GpuSnapshot
from orchestrator.queue.leases import LeaseTables
from orchestrator.queue.places import Want
from orchestrator.queue.watcher import Reading

G = 10**9
NVML_S = 0.005  # how long a reading takes
FIRST_PID = 1 << 30  # no process of this machine


@dataclass
class Job:
    seconds: float
    memory: int = 0
    # Its memory shows this long after its start, and stays this long after its end.
    appears: float = 0.0
    lingers: float = 0.0
    need: object = None
    number: int = 0
    started: float | None = None
    ended: float | None = None
    pid: int = 0
    gpus: tuple = ()


@dataclass
class Machine:
    """Eight GPUs, a clock, and events in the order of their times."""

    gpus: tuple = tuple(Gpu(f"GPU-{n}", n) for n in range(8))
    total: int = 80 * G
    now: float = 0.0
    jobs: list = field(default_factory=list)
    _events: list = field(default_factory=list)
    _order: itertools.count = field(default_factory=itertools.count)
    _pids: itertools.count = field(default_factory=lambda: itertools.count(FIRST_PID))

    def at(self, when, action):
        heapq.heappush(self._events, (when, next(self._order), action))

    def run(self, until=float("inf")):
        while self._events and self._events[0][0] <= until:
            when, _, action = heapq.heappop(self._events)
            self.now = max(self.now, when)
            action()

    def begin(self, job, gpus):
        job.started, job.gpus, job.pid = self.now, gpus, next(self._pids)
        self.jobs.append(job)

    def holds(self, job, gpu, when=None):
        """Bytes of a GPU that a job has at a moment."""
        when = self.now if when is None else when
        begin = job.started + job.appears
        end = float("inf")
        if job.ended is not None:  # (what had not come by then comes no more)
            end = job.ended + job.lingers if begin < job.ended else begin
        shown = begin <= when < end
        return job.memory if shown and gpu in job.gpus else 0

    def used(self, gpu):
        return sum(self.holds(job, gpu) for job in self.jobs)

    def snapshot(self, gpu, begun):
        used = self.used(gpu)
        processes = tuple(
            GpuProcess(job.pid, job.memory) for job in self.jobs if self.holds(job, gpu)
        )
        return GpuSnapshot(gpu, begun, self.total, used, self.total - used, 50, processes)

    def forget_the_gone(self):
        self.jobs = [
            job for job in self.jobs if job.ended is None or self.now < job.ended + job.lingers
        ]


class Watcher:
    """Answers as the real one does, a moment later."""

    def __init__(self, machine, wake):
        self._machine, self._wake = machine, wake
        self.outstanding = False
        self._ready = None

    def ask(self):
        if not self.outstanding:
            self.outstanding = True
            begun = self._machine.now
            self._machine.at(begun + NVML_S, lambda: self._answer(begun))

    def _answer(self, begun):
        gpus = self._machine.gpus
        snapshots = tuple(self._machine.snapshot(gpu, begun) for gpu in gpus)
        self._ready = Reading(begun, gpus, snapshots, "")
        self._wake()

    def receive(self):
        reading, self._ready = self._ready, None
        if reading is not None:
            self.outstanding = False
        return reading

    def check(self, _now):
        return self.receive()

    def deadline(self):
        return None

    def fileno(self):
        return None


class Launcher:
    """A sweep: what `Scheduler` does with places, without processes."""

    def __init__(self, machine, directory, jobs, rules=None, *, size=64, lookahead=64, **settings):
        self.machine = machine
        self.rules = rules or Rules()
        self.waiting, self.todo = [], list(jobs)[::-1]
        self.total, self.done = len(jobs), []
        self.running = {}
        # How long a job has been the first in line, at most.
        self.longest_wait = 0.0
        self._first = (None, 0.0)
        self._lookahead = lookahead
        uuids = [gpu.uuid for gpu in machine.gpus]
        self.places = GpuPlaces(
            machine.gpus,
            self.rules,
            size,
            Watcher(machine, self.wake),
            None if directory is None else LeaseTables(uuids, directory),
            clock=lambda: machine.now,
            pids_tell=True,
            **settings,
        )
        self.places.say = lambda _text: None
        self._alarm = float("inf")
        machine.at(0.0, self.wake)

    def wake(self):
        """One turn of the event loop."""
        self.places.receive()
        self.places.check()
        while True:
            while self.todo and len(self.waiting) < self._lookahead:
                job = self.todo.pop()
                self.waiting.append(Want(job.need, job))
            if not self.waiting:
                break
            if self.waiting[0] is not self._first[0]:
                self._first = (self.waiting[0], self.machine.now)
            given = self.places.fill(self.waiting)
            if not given:
                break
            for want, place in given:
                self.waiting.remove(want)
                self._start(want, place)
        patience = self.places.patience()
        if patience is not None:
            due = self.machine.now + max(patience, 1e-6)
            if due < self._alarm or self._alarm <= self.machine.now:
                self._alarm = due
                self.machine.at(due, self.wake)

    def _start(self, want, place):
        job, machine = want.key, self.machine
        if want is self._first[0]:
            self.longest_wait = max(self.longest_wait, machine.now - self._first[1])
        machine.begin(job, place.gpus)
        self.running[job.pid] = (job, place)
        self.places.started(place, job.pid)
        machine.at(machine.now + job.seconds, lambda: self._end(job, place))

    def _end(self, job, place):
        job.ended = self.machine.now
        del self.running[job.pid]
        self.done.append(job)
        self.places.give_back(place)
        self.machine.forget_the_gone()
        self.wake()

    def close(self):
        self.places.close()


def list_schedule(durations, machines=8):
    """The makespan when each job, in this order, goes to the machine that is free first."""
    free = [0.0] * machines
    for seconds in durations:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)
