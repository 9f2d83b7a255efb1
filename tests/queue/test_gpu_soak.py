"""Three sweeps at once on eight GPUs, simulated: limits, turns, and how long it all takes.

`make test-slow` runs 2,000 jobs; the suite runs fewer of the same.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from simulation import G, Job, Launcher, Machine, list_schedule

from orchestrator.queue.assign import Rules
from orchestrator.queue.needs import Need

SIZES = [
    pytest.param(150, id="150"),
    pytest.param(2_000, id="2000", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
]


def durations(chance, number):
    """Seconds, as trainings take: most short, some ten times that."""
    return [min(chance.lognormvariate(2.5, 0.8), 120.0) for _ in range(number)]


def mixed_jobs(chance, number, limit):
    jobs = []
    for seconds in durations(chance, number):
        gpus = chance.choice([1] * 12 + [2, 2, 4, 8])
        memory = chance.choice([2, 5, 10, 20, 35, 60]) * G if limit > 1 else 70 * G
        jobs.append(
            Job(
                seconds,
                memory=memory,
                appears=chance.uniform(0.0, 4.0),
                lingers=chance.uniform(0.0, 1.0),
                need=Need(gpus, memory, alone=chance.random() < 0.05),
            )
        )
    return jobs


class Judge:
    """Looks at every GPU at every start, and keeps what it sees."""

    def __init__(self, machine, sweeps):
        self.machine, self.sweeps = machine, sweeps
        self.most = Counter()
        begin = machine.begin

        def watched(job, gpus):
            begin(job, gpus)
            self.look()

        machine.begin = watched

    def look(self):
        for gpu in self.machine.gpus:
            here = [
                (sweep, job)
                for sweep in self.sweeps
                for job, place in sweep.running.values()
                if gpu in place.gpus
            ]
            # (The job that is just being started is not in `running` yet.)
            starting = [job for job in self.machine.jobs if job.ended is None and gpu in job.gpus]
            assert len(starting) - len(here) in (0, 1)
            limits = [sweep.rules.per_gpu for sweep, _ in here]
            limits += [1 for _, job in here if job.need.alone]
            assert len(starting) <= min(limits, default=len(starting)), (gpu, starting)
            if any(job.need.alone for job in starting):
                assert len(starting) == 1, (gpu, starting)
            # All that they may come to use, and what the ended have left.
            left = sum(
                self.machine.holds(job, gpu) for job in self.machine.jobs if job.ended is not None
            )
            promised = sum(job.memory for job in starting) + left
            assert promised <= self.machine.total, (gpu, starting)
            self.most[gpu.index] = max(self.most[gpu.index], len(starting))


@pytest.mark.parametrize("number", SIZES)
def test_three_sweeps_together_keep_the_limits_of_each_and_nothing_starves(tmp_path, number):
    chance = random.Random(number)
    machine = Machine()
    sweeps = []
    for limit in (1, 2, 4):
        jobs = mixed_jobs(chance, number // 3, limit)
        sweeps.append(Launcher(machine, tmp_path / "leases", jobs, Rules(limit)))
    judge = Judge(machine, sweeps)
    machine.run(until=number * 1_000.0)
    for sweep in sweeps:
        assert (len(sweep.done), sweep.waiting, sweep.todo) == (sweep.total, [], [])
        assert max(Counter(job.pid for job in sweep.done).values()) == 1
        sweep.close()
    assert set(judge.most) == set(range(8))
    assert max(judge.most.values()) > 1  # GPUs were shared
    total = sum(job.seconds * job.need.gpus for sweep in sweeps for job in sweep.done)
    # The first in line waits at most for the jobs on its GPUs, and for older first ones' turns.
    longest = max(sweep.longest_wait for sweep in sweeps)
    assert longest < 600
    print(
        f"{number} jobs in {machine.now:.0f} s ({total / 8:.0f} s if GPUs were not shared); "
        f"longest wait at the front of a queue {longest:.0f} s"
    )


@pytest.mark.parametrize("number", SIZES)
def test_the_machine_is_kept_busy(tmp_path, number):
    chance = random.Random(number)
    machine = Machine()
    sweeps = []
    for _ in range(3):
        jobs = [
            Job(seconds, 10 * G, appears=1.0, lingers=0.05, need=Need())
            for seconds in durations(chance, number // 3)
        ]
        sweeps.append(Launcher(machine, tmp_path / "leases", jobs, lookahead=1))
    machine.run(until=number * 1_000.0)
    done = sorted((job for sweep in sweeps for job in sweep.done), key=lambda job: job.started)
    assert len(done) == number // 3 * 3
    makespan = max(job.ended for job in done)
    ideal = list_schedule([job.seconds for job in done])
    print(
        f"{len(done)} jobs: {makespan:.1f} s, list scheduling {ideal:.1f} s: {makespan / ideal:.4f}"
    )
    assert makespan <= 1.03 * ideal
    for sweep in sweeps:
        sweep.close()
