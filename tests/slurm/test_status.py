"""What orchestrator-status shows, settles and stops of sweeps that nobody waits for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from slurm_cluster import until

from orchestrator.cli import slurm_runs
from orchestrator.record import RunRecord, RunState
from orchestrator.slurm import ledger as ledger_module
from orchestrator.slurm.ledger import Job, Ledger, write_ledger
from orchestrator.slurm.reconcile import find_given, standings
from orchestrator.slurm.states import Seen
from orchestrator.store import RunDir, RunLock, own_directory

LEAVE = "hydra.launcher.wait=false"
ID = "20260101-000000-abcdef"
OLD_S = 3600.0


def status(cluster_env, *words, check=True):
    """The command's output; it says nothing else unless it is looked at."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.status", *map(str, words)],
        env=cluster_env,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert not check or (done.returncode, done.stderr) == (0, ""), done
    return done


def listed(cluster_env, outputs, check=True):
    """Rows by the name of the run, and what was said beside them."""
    done = status(cluster_env, outputs, "--json", check=check)
    assert done.returncode == 0, done
    return {run["name"]: run for run in json.loads(done.stdout)["runs"]}, done.stderr


def states(rows):
    return {name: row["state"] for name, row in rows.items()}


# --- sweeps made by hand: real jobs, without an app ---


class Made:
    """A sweep's directory, as a launcher that is gone has left it."""

    def __init__(self, outputs):
        self.outputs = outputs
        self.sweep_dir = outputs / ".sweeps" / ID
        self._jobs = []
        self._records = 0

    def give(self, job, *names, state=RunState.PENDING, **fields):
        """Runs of one job; '' is none yet."""
        runs = [self._write(name, state, fields) for name in names]
        if job:
            self._jobs.append(Job(job, tuple(runs)))
        self.enter()

    def _write(self, name, state, fields):
        index = self._records
        self._records += 1
        directory = own_directory(self.outputs / name, name)
        record = RunRecord(
            model_name=name, sweep_id=ID, index=index, fingerprint=name, state=state, **fields
        )
        RunDir(directory).write(record)
        return index

    def enter(self, age=0.0):
        then = time.time() - age
        write_ledger(self.sweep_dir, Ledger(submitted_at=then, jobs=tuple(self._jobs)))
        os.utime(self.sweep_dir / ledger_module.LEDGER, (then, then))

    def run(self, name):
        return RunDir(self.outputs / name)

    def record(self, name):
        return self.run(name).read()

    def given(self):
        runs = (RunDir(path.parent) for path in sorted(self.outputs.glob("*/run.json")))
        return find_given((run, run.read(), self.sweep_dir) for run in runs)


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path / "outputs")


class Slurm:
    """Slurm as it would have to be for a state that takes long to come about."""

    def __init__(self, queue=(), accounting=()):
        self.queue = dict(queue)
        self.accounting = dict(accounting)
        self.asked = []

    def poll(self, ids):
        return {job: self.queue[job] for job in ids if job in self.queue}

    def ended(self, ids, since=0.0):
        self.asked.append(set(ids))
        return {job: self.accounting[job] for job in ids if job in self.accounting}


def look(made, client, **options):
    found = standings(made.given().given, client, sleep=lambda _: None, **options)
    return {path.name: standing for path, standing in found.items()}


def test_a_sweep_that_was_left_is_shown_settled_and_stopped(slurm, sweep):
    """Jobs, nodes and reasons are shown; the dead get their state, and stop ends the rest."""
    sweep.plan({"all": "gate", 1: "", 2: "raise"})
    left = sweep.run(LEAVE, "x=range(1,9)", "hydra.launcher.gpus_per_node=2")
    assert left.status == 0, left
    now = dict.fromkeys((3, 4, 5, 6), "RUNNING") | {1: "COMPLETED", 2: "FAILED"}
    sweep.until_states(now)
    now |= dict.fromkeys((7, 8), "PENDING")
    others = slurm.sbatch("--wrap", "sleep 300", "--output=/dev/null", "--cpus-per-task=1")
    names = {x: sweep.directory_of(x).name for x in range(1, 9)}
    jobs = {x: sweep.job(x) for x in names}

    rows, _ = listed(slurm.env, sweep.outputs)
    assert states(rows) == {names[x]: state for x, state in now.items()}
    assert {rows[names[x]]["slurm_job_id"] for x in names} == set(jobs.values())
    assert {rows[names[x]]["node"] for x in (3, 4, 5, 6)} == set(slurm.nodes)
    assert {rows[names[x]]["reason"] for x in (7, 8)} <= {"Resources", "Priority"}
    table = status(slurm.env, sweep.outputs).stdout
    line = next(text for text in table.splitlines() if names[8] in text).split()
    assert line[:4] == [names[8], "PENDING", jobs[8], f"({rows[names[8]]['reason']})"]

    # One is taken out of the queue, one dies.
    slurm.run("scancel", jobs[8])
    for number in (signal.SIGSTOP, signal.SIGKILL):  # all at once: none may speak for another
        slurm.kill_job_process(jobs[3], number)
    until(lambda: jobs[3] not in {row["JOBID"] for row in slurm.squeue()}, what="its end")
    rows, _ = listed(slurm.env, sweep.outputs)
    assert rows[names[8]]["state"] == "CANCELLED"
    assert rows[names[3]]["state"] in ("FAILED", "LOST")
    assert jobs[3] in rows[names[3]]["error"]
    records = sweep.records()
    assert (records[8]["state"], records[8]["slurm_job_id"]) == ("CANCELLED", jobs[8])
    assert records[8]["started_at"] is records[8]["duration_seconds"] is None
    assert records[3]["state"] == rows[names[3]]["state"]
    assert records[3]["metrics"] == {"loss": 1.5}
    assert 0 <= records[3]["duration_seconds"] < 30

    done = status(slurm.env, "stop", sweep.outputs)
    assert "Cancelled 4 Slurm jobs (" in done.stdout
    assert done.stdout.endswith("; 4 runs: 4 cancelled.\n")
    assert set(sweep.states().values()) == {"COMPLETED", "CANCELLED", "FAILED", records[3]["state"]}
    assert [row["JOBID"] for row in slurm.squeue()] == [others]
    assert status(slurm.env, "stop", sweep.outputs).stdout.startswith("Nothing is left to stop")


def test_the_sweep_of_a_launcher_that_was_killed_is_stopped_packs_and_all(slurm, sweep):
    """A Slurm job of several runs ends as a whole; what was waiting in it is CANCELLED, too."""
    sweep.plan({"all": "gate"})
    words = ("x=range(1,7)", "hydra.launcher.runs_per_job=3", "hydra.launcher.cpus_per_task=2")
    running = sweep.start(*words)
    until(lambda: list(sweep.states().values()).count("RUNNING") == 4, what=str(sweep))
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    rows, _ = listed(slurm.env, sweep.outputs)
    waiting = [row for row in rows.values() if row["state"] == "PENDING"]
    assert len(waiting) == 2
    assert {row["node"] for row in waiting} <= set(slurm.nodes), "they wait in jobs that run"
    done = status(slurm.env, "stop", sweep.outputs)
    assert "Cancelled 2 Slurm jobs" in done.stdout
    assert "6 runs: 6 cancelled" in done.stdout
    assert set(sweep.states().values()) == {"CANCELLED"}
    assert not slurm.squeue()


def test_stopping_ends_a_launcher_that_waits(slurm, sweep):
    sweep.plan({"all": "gate"})
    running = sweep.start("x=1,2")
    sweep.until_started(1, 2)
    done = status(slurm.env, "stop", sweep.outputs)
    assert "has ended: 2 cancelled" in done.stdout
    assert running.wait(timeout=20).status == 143
    assert set(sweep.states().values()) == {"CANCELLED"}


@pytest.mark.parametrize("how", ["disabled", "down"])
def test_without_accounting_the_queue_alone_tells(slurm, made, how):
    words = ("--array=0-3", "--output=/dev/null", "--wrap", "sleep 300")
    array = slurm.sbatch("--hold", *words)
    made.give("", "unsubmitted")
    for task in range(4):
        made.give(f"{array}_{task}", f"r{task}")
    slurm.run("scancel", f"{array}_2")
    with slurm.without_sacct(how):
        rows, _ = listed(slurm.env, made.outputs)
        assert {name: (row["state"], row["reason"]) for name, row in rows.items()} == {
            "unsubmitted": ("PENDING", "not submitted"),
            "r2": ("CANCELLED", ""),
            **dict.fromkeys(("r0", "r1", "r3"), ("PENDING", "JobHeldUser")),
        }
        slurm.run("scancel", array)
        rows, _ = listed(slurm.env, made.outputs)
    assert {row["state"] for name, row in rows.items() if name != "unsubmitted"} == {"CANCELLED"}
    assert made.record("r0").state is RunState.CANCELLED
    assert made.record("unsubmitted").state is RunState.PENDING


def test_a_job_that_went_back_to_the_queue_is_pending_again(slurm, made):
    job = slurm.sbatch("--output=/dev/null", "--requeue", "--wrap", "sleep 300")
    until(lambda: slurm.job(job)["JobState"] == "RUNNING", what="its start")
    made.give(job, "r", state=RunState.RUNNING, started_at=time.time(), host="elsewhere", pid=1)
    slurm.scontrol("requeuehold", job)
    until(lambda: slurm.job(job)["JobState"] != "RUNNING", what="its end")
    waits = {"r": "PENDING"}
    until(lambda: states(listed(slurm.env, made.outputs)[0]) == waits, what="its return")
    assert made.record("r").state is RunState.RUNNING, "nothing is written of the living"


def test_where_slurm_cannot_be_asked_the_records_are_shown(slurm, made):
    made.give("7_0", "r")
    made.enter(OLD_S)
    bare = {**slurm.env, "PATH": os.path.dirname(sys.executable)}
    rows, said = listed(bare, made.outputs, check=False)
    assert (rows["r"]["state"], rows["r"]["slurm_job_id"]) == ("PENDING", "7_0")
    assert said == (
        "Slurm could not be asked about 1 run, shown as recorded: it is not installed on this "
        "machine.\n"
    )
    with slurm.shim("squeue", "#!/bin/sh\necho no controller >&2\nexit 1\n"):
        rows, said = listed(slurm.env, made.outputs, check=False)
        assert "no controller" in said
        stopped = status(slurm.env, "stop", made.outputs, check=False)
    assert said.count("\n") == 1
    assert rows["r"]["state"] == made.record("r").state == "PENDING"
    assert (stopped.returncode, stopped.stdout) == (1, "")
    assert "no controller" in stopped.stderr


def test_of_several_sweeps_one_is_named(slurm, tmp_path):
    jobs = []
    for name in ("a", "b"):
        made = Made(tmp_path / name)
        jobs.append(slurm.sbatch("--hold", "--output=/dev/null", "--wrap", "sleep 300"))
        made.give(jobs[-1], f"run-{name}")
    refused = status(slurm.env, "stop", tmp_path, check=False)
    assert refused.returncode == 1
    assert "2 sweeps go on below" in refused.stderr
    other = status(slurm.env, "stop", tmp_path, "--sweep", "no", check=False)
    assert "Sweep no does not go on" in other.stderr
    assert len(slurm.squeue()) == 2
    # (The ids are the same here: the directory tells them apart.)
    status(slurm.env, "stop", tmp_path / "a")
    assert [row["JOBID"] for row in slurm.squeue()] == [jobs[1]]
    states = [RunDir(tmp_path / n / f"run-{n}").read().state.value for n in ("a", "b")]
    assert states == ["CANCELLED", "PENDING"]


# --- the rules, without a cluster ---


def test_what_nobody_knows_is_not_taken_for_done_while_it_may_be_new(made):
    made.give("7_0", "waits")
    made.give("7_1", "runs", state=RunState.RUNNING, host="elsewhere", started_at=time.time() - 5)
    client = Slurm()
    found = look(made, client)
    assert {name: standing.state for name, standing in found.items()} == {
        "waits": RunState.PENDING,
        "runs": RunState.RUNNING,
    }
    assert client.asked == [{"7_0", "7_1"}]
    made.enter(OLD_S)
    found = look(made, client)
    assert found["waits"].state is made.record("waits").state is RunState.CANCELLED
    assert found["runs"].state is made.record("runs").state is RunState.LOST
    # What was just cancelled need not be old.
    made.give("8_0", "cancelled")
    assert look(made, client, cancelled={"8_0"})["cancelled"].state is RunState.CANCELLED


def test_slurms_words_decide_how_it_ended(made):
    ends = {
        "1": Seen(RunState.TIMEOUT, "TIMEOUT", "node1", exit_code="0:0"),
        "2": Seen(RunState.FAILED, "OUT_OF_MEMORY", "node2"),
        "3": Seen(RunState.LOST, "NODE_FAIL", "node3"),
        "4": Seen(RunState.COMPLETED, "COMPLETED", "node4", exit_code="0:0"),
        "5": Seen(RunState.FAILED, "FAILED", "node4", exit_code="3:0"),
    }
    for job in ends:
        made.give(
            job, f"r{job}", state=RunState.RUNNING, host="elsewhere", started_at=time.time() - 60
        )
        (made.run(f"r{job}").path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    # Some are in the queue still, some in accounting only.
    found = look(made, Slurm(dict(list(ends.items())[:2]), dict(list(ends.items())[2:])))
    assert {name: standing.state for name, standing in found.items()} == {
        "r1": RunState.TIMEOUT,
        "r2": RunState.FAILED,
        "r3": RunState.LOST,
        "r4": RunState.LOST,
        "r5": RunState.FAILED,
    }
    record = made.record("r2")
    assert "OUT_OF_MEMORY" in record.error.message
    assert record.metrics == {"loss": 2.0}
    assert made.record("r5").returncode == 3


def test_a_run_that_died_long_ago_ended_when_it_last_wrote_something(made):
    began = time.time() - OLD_S
    made.give("1", "r", state=RunState.RUNNING, host="elsewhere", started_at=began)
    run = made.run("r")
    run.stdout.write_text("hello")
    for path in (run.record, run.stdout):
        os.utime(path, (began + 100, began + 100))
    look(made, Slurm({"1": Seen(RunState.LOST, "NODE_FAIL", "node1")}))
    record = made.record("r")
    assert record.ended_at == pytest.approx(began + 100, abs=1)
    assert record.duration_seconds == pytest.approx(100, abs=1)


def test_a_run_whose_lock_is_held_is_alive(made):
    made.give("1", "r", state=RunState.RUNNING, host="elsewhere", started_at=1.0)
    made.enter(OLD_S)
    client = Slurm({"1": Seen(RunState.FAILED, "FAILED", "node1", exit_code="1:0")})
    lock = RunLock.acquire(made.run("r"))
    before = made.run("r").record.read_bytes()
    try:
        assert look(made, client)["r"].state is RunState.RUNNING
    finally:
        lock.release()
    assert made.run("r").record.read_bytes() == before
    assert look(made, client)["r"].state is RunState.FAILED


def test_last_words_are_waited_for(made):
    made.give("1", "r", state=RunState.RUNNING, host="elsewhere", started_at=1.0)
    given = made.given().given
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if sum(waited) > 1:
            made.run("r").write(made.record("r").advance(RunState.COMPLETED))

    client = Slurm({"1": Seen(RunState.COMPLETED, "COMPLETED", "node1", exit_code="0:0")})
    (standing,) = standings(given, client, sleep=sleep).values()
    assert standing.state is RunState.COMPLETED
    assert sum(waited) < 2


def test_a_run_that_another_sweep_has_by_now_is_left_alone(made):
    made.give("1", "r")
    given = made.given().given
    record = RunRecord(model_name="r", sweep_id="another", index=0, state=RunState.PENDING)
    made.run("r").write(record)
    client = Slurm({"1": Seen(RunState.CANCELLED, "CANCELLED")})
    (standing,) = standings(given, client, sleep=lambda _: None).values()
    assert standing.record == record == made.record("r")


def test_another_users_runs_are_not_judged(made, monkeypatch):
    made.give("1", "r")
    made.enter(OLD_S)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    findings = made.given()
    assert (findings.given, findings.foreign) == ([], 1)


def test_the_name_of_the_ledger_is_the_same_everywhere():
    assert slurm_runs.LEDGER == ledger_module.LEDGER


def test_directories_without_slurm_load_nothing_of_it(tmp_path):
    for name, state in (("a", RunState.RUNNING), ("b", RunState.COMPLETED)):
        RunDir(tmp_path / name).write(RunRecord(model_name=name, sweep_id="s", state=state))
    (tmp_path / ".sweeps" / "s").mkdir(parents=True)
    code = (
        "import sys\n"
        "from orchestrator.cli.status import main\n"
        f"main([{str(tmp_path)!r}], standalone_mode=False)\n"
        "print(sorted(m for m in sys.modules if m.startswith('orchestrator.slurm')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
