"""GPU and core time of runs, as accounting has it, in their records."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from slurm_cluster import until

from orchestrator.record import RunRecord, RunState
from orchestrator.slurm import client as client_module
from orchestrator.slurm.accounting import ACCOUNTED, account, is_due
from orchestrator.slurm.client import SlurmClient, Usage
from orchestrator.slurm.ledger import Job, Ledger, write_ledger
from orchestrator.slurm.states import Seen
from orchestrator.store import RunDir, RunLock, own_directory

ID = "20260101-000000-abcdef"
DONE = RunState.COMPLETED


class Recorder:
    """Runs tools, and keeps their names."""

    def __init__(self):
        self.programs = []

    def __call__(self, words, environ, timeout_s):
        self.programs.append(words[0])
        return client_module._run(words, environ, timeout_s)


class Ended:
    """The directory of a sweep whose runs have ended."""

    def __init__(self, outputs):
        self.outputs = outputs
        self.sweep_dir = outputs / ".sweeps" / ID
        self.records = []

    def write(self, **jobs):
        """Jobs by their ids (with a leading ``j``), each with the durations of its runs."""
        entries = []
        for job, durations in jobs.items():
            first = len(self.records)
            for seconds in durations:
                self._write(len(self.records), seconds)
            entries.append(Job(job.removeprefix("j"), tuple(range(first, len(self.records)))))
        write_ledger(self.sweep_dir, Ledger(submitted_at=time.time() - 60, jobs=tuple(entries)))
        names = [path.parent.name for path in sorted(self.outputs.glob("*/run.json"))]
        (self.sweep_dir / "sweep.json").write_text(json.dumps({"runs": names}))

    def _write(self, index, seconds, **fields):
        run = RunDir(own_directory(self.outputs / f"r{index}", f"r{index}"))
        began = None if seconds is None else time.time() - seconds
        own = {"state": DONE, "started_at": began, "duration_seconds": seconds}
        record = RunRecord(
            **{"model_name": f"r{index}", "sweep_id": ID, "index": index, **own, **fields},
            ended_at=time.time(),
        )
        run.write(record)
        self.records.append(record)

    def run(self, index):
        return RunDir(self.outputs / f"r{index}")

    def seconds(self, index):
        record = self.run(index).read()
        return record.gpu_seconds, record.core_seconds


@pytest.fixture
def ended(tmp_path):
    return Ended(tmp_path / "outputs")


class Accounting:
    """Answers of accounting."""

    def __init__(self, **usage):
        self.used = {job.removeprefix("j"): used for job, used in usage.items()}
        self.heard = set(self.used)
        self.asked = []

    def ended(self, ids, since=0.0):
        self.asked.append(set(ids))
        return {job: Seen(DONE, "COMPLETED") for job in ids if job in self.heard}

    def usage(self, ids, since=0.0):
        return {job: self.used[job] for job in ids if job in self.used}


def used(seconds, cpus, gpus):
    return Usage(seconds, cpus, gpus, "node1")


def test_each_run_has_the_allocation_of_its_own_job(slurm, ended):
    """Different GPUs for different runs; a pack divides its job among its runs."""
    line = ("--output=/dev/null", "--wrap", "sleep 2")
    one = slurm.sbatch("--gres=gpu:1", "--cpus-per-task=1", *line)
    two = slurm.sbatch("--gres=gpu:2", "--cpus-per-task=3", *line)
    pack = slurm.sbatch("--gres=gpu:1", "--cpus-per-task=4", *line)
    no_gpu = slurm.sbatch("--cpus-per-task=2", *line)
    held = slurm.sbatch("--hold", *line)
    slurm.run("scancel", held)
    elapsed = {row["JobID"]: int(row["ElapsedRaw"]) for row in slurm.wait(one, two, pack, no_gpu)}
    jobs = {one: [1.5], two: [1.5], pack: [0.5, 1.5], no_gpu: [1.5], held: [None]}
    ended.write(**{f"j{job}": durations for job, durations in jobs.items()})
    recorder = Recorder()
    client = SlurmClient(environ=slurm.env, run=recorder)
    assert is_due(ended.sweep_dir, time.time())
    assert account(ended.sweep_dir, client) == 5
    assert ended.seconds(0) == (elapsed[one], elapsed[one])
    assert ended.seconds(1) == (2 * elapsed[two], 3 * elapsed[two])
    assert ended.seconds(2) == (elapsed[pack] / 4, elapsed[pack])
    assert ended.seconds(3) == (elapsed[pack] * 3 / 4, 3 * elapsed[pack])
    assert ended.seconds(4) == (None, 2 * elapsed[no_gpu])
    assert ended.seconds(5) == (None, None)
    # Once.
    assert set(recorder.programs) == {"sacct"}
    count = len(recorder.programs)
    assert not is_due(ended.sweep_dir, time.time() + 10**6)
    assert account(ended.sweep_dir, client) == 0
    assert len(recorder.programs) == count


def test_the_end_of_a_launch_waits_a_moment_for_accounting(slurm, ended):
    job = slurm.sbatch("--gres=gpu:1", "--output=/dev/null", "--wrap", "sleep 2")
    until(lambda: slurm.sacct(job), what="accounting to know the job")
    ended.write(**{f"j{job}": [1.0]})
    client = SlurmClient(environ=slurm.env)
    assert account(ended.sweep_dir, client) == 0
    assert not is_due(ended.sweep_dir, time.time())
    assert is_due(ended.sweep_dir, time.time() + 61)
    assert account(ended.sweep_dir, client, patience_s=15) == 1
    assert ended.seconds(0)[0] >= 2


@pytest.mark.parametrize("how", ["disabled", "down"])
def test_without_accounting_nothing_happens(slurm, ended, how):
    ended.write(j1=[1.0], j2=[2.0])
    before = [ended.run(index).record.read_bytes() for index in (0, 1)]
    with slurm.without_sacct(how):
        began = time.monotonic()
        assert account(ended.sweep_dir, SlurmClient(environ=slurm.env), patience_s=10) == 0
        assert time.monotonic() - began < 5
    assert [ended.run(index).record.read_bytes() for index in (0, 1)] == before
    assert not is_due(ended.sweep_dir, time.time() + 60), "it is not asked at every look"
    assert is_due(ended.sweep_dir, time.time() + 4000)


def test_orchestrator_status_accounts_for_a_sweep_that_has_ended_once(slurm, sweep, monkeypatch):
    from click.testing import CliRunner

    from orchestrator.cli.status import main

    left = sweep.run("x=1,2", "hydra.launcher.wait=false", "hydra.launcher.gpus_per_node=1")
    assert left.status == 0, left
    sweep.until_states({1: "COMPLETED", 2: "COMPLETED"})
    by_keeper = {x: record["gpu_seconds"] for x, record in sweep.records().items()}
    slurm.wait(*sweep.jobs())
    for key in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(key, slurm.env[key])
    assert CliRunner().invoke(main, [str(sweep.outputs)]).exit_code == 0
    records = sweep.records()
    rows = {row["JobID"]: int(row["ElapsedRaw"]) for row in slurm.sacct(*sweep.jobs())}
    for x, record in records.items():
        if elapsed := rows[record["slurm_job_id"]]:
            assert record["gpu_seconds"] == record["core_seconds"] == elapsed
        else:  # shorter than accounting's second: what the keeper has measured stays
            assert record["gpu_seconds"] == by_keeper[x]
    with slurm.shim("sacct", f"#!/bin/sh\ntouch {sweep.directory}/asked\n"):
        assert CliRunner().invoke(main, [str(sweep.outputs)]).exit_code == 0
    assert not (sweep.directory / "asked").exists()


# --- the rules, without a cluster ---


def test_a_run_that_somebody_works_on_is_left_for_the_next_time(ended):
    ended.write(j1=[1.0], j2=[1.0])
    accounting = Accounting(j1=used(10, 2, 1), j2=used(10, 2, 1))
    lock = RunLock.acquire(ended.run(0))
    assert account(ended.sweep_dir, accounting) == 1
    lock.release()
    assert ended.seconds(0) == (None, None)
    assert account(ended.sweep_dir, accounting) == 1
    assert accounting.asked == [{"1", "2"}, {"1"}]
    assert ended.seconds(0) == (10.0, 20.0)


def test_a_cluster_that_does_not_count_gpus_leaves_the_keepers_figure(ended):
    ended.write(j1=[8.0])
    record = ended.run(0).read()
    ended._write(0, 8.0, gpu_seconds=8.0)
    assert record.gpu_seconds is None
    assert account(ended.sweep_dir, Accounting(j1=used(10, 2, 0))) == 1
    assert ended.seconds(0) == (8.0, 20.0)


def test_a_job_with_a_run_under_way_waits(ended):
    ended.write(j1=[1.0, 3.0], j2=[1.0])
    ended._write(1, 3.0, state=RunState.RUNNING)
    accounting = Accounting(j1=used(8, 1, 1), j2=used(8, 1, 1))
    assert account(ended.sweep_dir, accounting) == 1
    assert accounting.asked == [{"2"}]
    ended._write(1, 3.0)
    assert account(ended.sweep_dir, accounting) == 2
    assert [ended.seconds(index)[0] for index in range(3)] == [2.0, 6.0, 8.0]


def test_runs_that_another_sweep_has_done_again_are_not_touched(ended):
    ended.write(j1=[2.0, 2.0], j2=[1.0])
    ended._write(1, 50.0, sweep_id="another")
    assert account(ended.sweep_dir, Accounting(j1=used(8, 1, 1), j2=used(8, 1, 1))) == 2
    assert ended.seconds(0) == (4.0, 4.0), "half of the job, as the other had about the other half"
    assert ended.seconds(1) == (None, None)
    ended.write(j3=[1.0])
    ended._write(len(ended.records) - 1, 1.0, sweep_id="another")
    assert account(ended.sweep_dir, Accounting()) == 0
    assert not is_due(ended.sweep_dir, time.time() + 10**6)


def test_what_accounting_never_heard_of_is_given_up_after_a_day(ended):
    ended.write(j1=[1.0], j2=[1.0])
    record = ended.run(1).read()
    ended._write(1, 1.0)
    from msgspec.structs import replace

    ended.run(1).write(replace(record, ended_at=time.time() - 100_000))
    assert account(ended.sweep_dir, Accounting(j1=used(8, 1, 1))) == 1
    assert not is_due(ended.sweep_dir, time.time() + 10**6)


def test_records_that_take_long_to_write_are_for_the_next_time(ended):
    ended.write(**{f"j{number}": [1.0] for number in range(4)})
    accounting = Accounting(**{f"j{number}": used(8, 1, 1) for number in range(4)})
    ticks = iter(range(100))
    assert account(ended.sweep_dir, accounting, limit_s=3.5, clock=lambda: next(ticks)) == 3
    assert is_due(ended.sweep_dir, time.time()), "at once"
    assert account(ended.sweep_dir, accounting) == 1


def test_a_sweep_that_was_killed_before_it_named_its_runs(ended):
    ended.write(j1=[1.0])
    (ended.sweep_dir / "sweep.json").unlink()
    assert account(ended.sweep_dir, Accounting(j1=used(8, 1, 1))) == 1


def test_without_a_ledger_there_is_nothing_to_account_for(ended):
    ended.write(j1=[1.0])
    (ended.sweep_dir / ACCOUNTED).write_text("no json")
    assert is_due(ended.sweep_dir, 0.0)
    shutil.rmtree(ended.sweep_dir)
    assert not is_due(ended.sweep_dir, 0.0)
    assert account(ended.sweep_dir, Accounting(j1=used(8, 1, 1))) == 0
