"""Places on GPUs, by readings that are made up: who is gone, whose memory it is, who is asked."""

from __future__ import annotations

import os
import subprocess

import pytest

from orchestrator.queue.assign import Rules
from orchestrator.queue.environment import job_environment
from orchestrator.queue.gpu_places import GpuPlaces
from orchestrator.queue.gpus import Gpu, GpuProcess, GpuSnapshot
from orchestrator.queue.needs import Need, Needs, after_oom
from orchestrator.queue.places import Want
from orchestrator.queue.settings import GpuQueueSettings
from orchestrator.queue.watcher import Reading

G = 10**9
TOTAL = 80 * G
GPU = Gpu("GPU-a", 0)


class Watcher:
    """One that never answers, and counts how often it is asked."""

    outstanding = False

    def __init__(self):
        self.asks = 0

    def ask(self):
        self.asks += 1
        self.outstanding = True

    def receive(self):
        return None

    def check(self, now):
        return None

    def deadline(self):
        return None

    def fileno(self):
        return 0


class Bench:
    """Places on one GPU, with a clock and NVML's answers by hand."""

    def __init__(self, per_gpu=1, **rules):
        self.now = 100.0
        self.watcher = Watcher()
        self.places = GpuPlaces(
            [GPU],
            Rules(per_gpu, **rules),
            per_gpu,
            self.watcher,
            None,
            cores=4,
            clock=lambda: self.now,
            pids_tell=True,
        )
        self.said = []
        self.places.say = self.said.append

    def read(self, *processes, after=0.01):
        """A reading that shows these (pid, bytes)."""
        self.now += after
        used = sum(memory for _, memory in processes)
        shown = tuple(GpuProcess(*process) for process in processes)
        snapshot = GpuSnapshot(GPU, self.now, TOTAL, used, TOTAL - used, 0, shown)
        self.watcher.outstanding = False
        self.places.take_in(Reading(self.now, (GPU,), (snapshot,)))

    def fill(self, *needs):
        wants = [Want(need, n) for n, need in enumerate(needs)]
        return [place for _, place in self.places.fill(wants)]


@pytest.fixture
def dead():
    """The pid of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_dead_process_that_nvml_still_lists_holds_its_gpu_back(dead):
    bench = Bench()
    bench.read()
    (place,) = bench.fill(Need())
    bench.places.started(place, 1234567)
    bench.read(after=60)
    # All its memory came and it died between two readings: nobody saw whose it was.
    bench.places.give_back(place)
    bench.read((dead, 79 * G))
    assert bench.places.releasing
    assert not bench.fill(Need())
    bench.read(after=1)
    assert not bench.places.releasing
    assert bench.fill(Need())


def test_processes_that_were_there_before_hold_no_gpu_back(dead):
    bench = Bench()
    bench.read((dead, 5 * G))
    (place,) = bench.fill(Need())
    bench.places.started(place, 1234567)
    bench.read((dead, 5 * G), after=60)
    bench.places.give_back(place)
    bench.read((dead, 5 * G))
    assert not bench.places.releasing
    assert bench.fill(Need())


def test_a_need_that_is_learned_or_raised_is_never_one_that_is_refused():
    bench = Bench()
    total, used = 16 * G, 1_400_000_000  # the driver's own, on a card that idles
    snapshot = GpuSnapshot(GPU, bench.now, total, used, total - used, 0, ())
    bench.places.take_in(Reading(bench.now, (GPU,), (snapshot,)))
    needs = Needs(GpuQueueSettings(memory_per_job_gb="auto"), {})
    needs.learn("a", 13.6)
    learned = needs.of("a", dict, bench.places.room)
    assert bench.places.impossible(learned) == ""
    assert learned == Need(alone=True)
    raised = after_oom(Need(memory=13 * G), bench.places.room(1))
    assert bench.places.impossible(raised) == ""
    assert raised.memory > 13 * G


def test_what_lingers_of_a_keeper_s_old_job_is_not_its_next_one_s():
    bench = Bench(2)
    keeper = os.getpid()
    child = subprocess.Popen(["sleep", "60"])
    try:
        bench.read()
        (old,) = bench.fill(Need(memory=30 * G))
        bench.places.started(old, keeper)
        bench.read((child.pid, 30 * G), after=1)
        assert old.peak == 30 * G
    finally:
        child.kill()
        child.wait()
    bench.places.give_back(old)
    bench.read((child.pid, 30 * G))
    (new,) = bench.fill(Need(memory=30 * G))
    bench.places.started(new, keeper)
    bench.read((child.pid, 30 * G))
    assert new.peak is None
    # So its 30 GB are still to come, beside those that linger: 20 are left.
    bench.read((child.pid, 30 * G))
    assert not bench.fill(Need(memory=21 * G))


def test_the_last_in_line_is_not_forgotten_when_seats_were_all_taken():
    bench = Bench(2, exclusive=True)
    foreign = (1, 10 * G)
    bench.read(foreign)
    first, second = bench.fill(Need(0), Need(0))
    bench.places.give_back(first)
    waiting = Want(Need(), "waiting")
    assert not bench.places.fill([waiting])
    again = Want(Need(0), "again")
    # A run that is tried again takes the seat; then both seats are free for who waits.
    taken = [place for _, place in bench.places.fill([again, waiting])]
    for place in (*taken, second):
        bench.places.give_back(place)
    asks = bench.watcher.asks
    for _ in range(20):
        bench.now += 0.5
        bench.places.fill([waiting])
        bench.places.check()
        if bench.watcher.asks > asks:
            break
    else:
        pytest.fail("no reading was asked for")
    bench.read()
    assert bench.places.fill([waiting])


@pytest.mark.parametrize(
    ("settings", "environ", "told"),
    [
        ({"max_processes_per_gpu": 4}, {}, {"PREALLOCATE": "false", "GROWTH": "true"}),
        (
            {"max_processes_per_gpu": 4},
            {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"},
            {"GROWTH": "true"},
        ),
        ({"max_processes_per_gpu": 1}, {}, {}),
        ({"max_processes_per_gpu": 4, "share_memory": False}, {}, {}),
    ],
)
def test_who_is_measured_takes_what_it_needs_not_all_there_is(settings, environ, told):
    found = job_environment(
        GpuQueueSettings(memory_per_job_gb="auto", **settings),
        [GPU],
        Need(alone=True),
        [TOTAL],
        environ,
        num=0,
        name="run",
        directory="run",
        attempt=1,
    )
    names = {
        "PREALLOCATE": "XLA_PYTHON_CLIENT_PREALLOCATE",
        "GROWTH": "TF_FORCE_GPU_ALLOW_GROWTH",
    }
    assert found == {"CUDA_VISIBLE_DEVICES": GPU.uuid, **{names[k]: v for k, v in told.items()}}
