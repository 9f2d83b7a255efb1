"""What once went wrong with ``hydra/launcher=slurm``, and is to stay as it is now."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from slurm_sweeps import until

from orchestrator.processes import hostname
from orchestrator.queue.wire import Ended
from orchestrator.record import RunRecord, RunState
from orchestrator.slurm import start as start_module
from orchestrator.slurm.ledger import Job, Ledger, write_ledger
from orchestrator.slurm.pack import ENDED
from orchestrator.slurm.submit import write_waiting
from orchestrator.slurm.watch import Waiting, Watcher
from orchestrator.store import RunDir, RunLock, own_directory

LEAVE = "hydra.launcher.wait=false"


def stop(slurm, *words, check=True):
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.status", "stop", *map(str, words)],
        env=slurm.env,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert not check or (done.returncode, done.stderr) == (0, ""), done
    return done


def queue(slurm):
    return {row["JOBID"] for row in slurm.squeue()}


# --- submission ---


def test_jobs_that_slurm_took_although_sbatch_failed_are_adopted(slurm, sweep):
    """ "Socket timed out" is the usual error of a busy cluster; slurmctld may have the job."""
    real = slurm.run("which", "sbatch").stdout.strip()
    fails = (
        f'#!/bin/sh\n{real} "$@" >/dev/null\n'
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv "
        "operation' >&2\nexit 1\n"
    )
    sweep.plan({"all": "gate"})
    with slurm.shim("sbatch", fails):
        running = sweep.start("x=1,2", "n=1,2", "hydra.launcher.cpus_per_task=${n}")
        running.says("Submitted 4 runs in 4 jobs")
    assert {job.partition("_")[0] for job in sweep.jobs()} == {
        job.partition("_")[0] for job in queue(slurm)
    }
    # (What jobs and launcher unpickle is nobody else's to write, whatever the umask.)
    (sweep_dir,) = sweep.outputs.glob(".sweeps/*")
    for folder in (sweep_dir / ENDED, sweep_dir / "slurm"):
        assert folder.stat().st_mode & 0o077 == 0, folder
    sweep.open()
    done = running.wait()
    assert done.status == 0, done
    assert sweep.started() == [1, 1, 2, 2]
    assert set(sweep.states().values()) == {"COMPLETED"}
    assert "Socket timed out" not in done.text


def test_a_job_that_dies_before_python_shows_the_end_of_its_own_log(slurm, sweep):
    done = sweep.run("x=1", "hydra.launcher.python=/no/such/python")
    assert done.status == 1, done
    error = sweep.records()[1]["error"]["message"]
    (log,) = sweep.outputs.glob(".sweeps/*/slurm/*_log.err")
    last = log.read_text().strip().splitlines()[-1].strip()
    assert "/no/such/python" in last
    assert error.endswith(f": {last} (see {log})"), error
    assert last in done.text
    assert "Traceback" not in done.text


# --- the same command while jobs end ---

OTHERS = "20260101-000000-aaaaaa"
OURS = "20260101-000001-bbbbbb"


def write(run, **fields):
    own_directory(run.path, "r")
    record = RunRecord(model_name="r", state=RunState.PENDING, fingerprint="same", index=0)
    run.write(msgspec.structs.replace(record, **fields))


@pytest.fixture
def waiting():
    """The record that a launch is about to write."""
    state = RunState.PENDING
    return RunRecord(model_name="r", state=state, fingerprint="same", index=0, sweep_id=OURS)


@pytest.mark.parametrize("before", ["", OTHERS, "20260101-000000-cccccc"])
def test_a_run_that_has_completed_since_it_was_planned_is_not_done_again(tmp_path, before, waiting):
    run = RunDir(tmp_path / "r")
    write(run, sweep_id=OTHERS, state=RunState.COMPLETED, success=True, return_value=7)
    there = run.read()
    assert write_waiting(run, waiting, before, resume=True) == there == run.read()
    assert not list(tmp_path.glob("r/attempts/*"))
    # Unless it is to be done again whatever there is.
    written = write_waiting(run, waiting, before, resume=False)
    assert (written.sweep_id, written.state) == (OURS, RunState.PENDING)
    assert [attempt.state for attempt in written.attempts] == [RunState.COMPLETED]
    assert run.read() == written


@pytest.mark.parametrize("state", [RunState.PENDING, RunState.RUNNING])
def test_a_run_that_another_sweep_has_taken_up_since_is_left_to_it(tmp_path, state, waiting):
    run = RunDir(tmp_path / "r")
    write(run, sweep_id=OTHERS, state=state)
    assert write_waiting(run, waiting, "", resume=True).sweep_id == OTHERS
    assert run.read().sweep_id == OTHERS
    # What it was when it was planned, is known to be left over.
    assert write_waiting(run, waiting, OTHERS, resume=True).sweep_id == OURS


@pytest.mark.parametrize(
    "fields",
    [
        {"state": RunState.COMPLETED, "success": True, "fingerprint": "of another config"},
        {"state": RunState.FAILED, "success": False},
        {"state": RunState.CANCELLED, "success": False},
    ],
)
def test_a_run_that_ended_otherwise_since_is_missing_as_ever(tmp_path, fields, waiting):
    run = RunDir(tmp_path / "r")
    write(run, sweep_id=OTHERS, **fields)
    assert write_waiting(run, waiting, "", resume=True).sweep_id == OURS
    assert run.read().state is RunState.PENDING


def test_a_run_in_which_somebody_works_gets_no_record(tmp_path, waiting):
    run = RunDir(tmp_path / "r")
    write(run, sweep_id=OTHERS, state=RunState.FAILED)
    lock = RunLock.acquire(run)
    assert write_waiting(run, waiting, OTHERS, resume=True) is None
    lock.release()
    assert run.read().sweep_id == OTHERS


def test_runs_that_complete_while_the_same_command_looks_are_not_done_again(slurm, sweep):
    """Slurm answers late: between plan and answer, they end."""
    sweep.plan({"all": "gate"})
    assert sweep.run("x=1,2", LEAVE).status == 0
    sweep.until_started(1, 2)
    real = slurm.run("which", "squeue").stdout.strip()
    asked, answer = sweep.directory / "asked", sweep.directory / "answer"
    slow = f'#!/bin/sh\ntouch {asked}\nuntil [ -e {answer} ]; do sleep 0.05; done\n{real} "$@"\n'
    with slurm.shim("squeue", slow):
        running = sweep.start("x=1,2", LEAVE)
        until(asked.exists, 30, lambda: running.text)
        sweep.open()
        sweep.until_states({1: "COMPLETED", 2: "COMPLETED"})
        until(lambda: not slurm.run(real, "--noheader").stdout, 30, lambda: str(sweep))
        answer.touch()
        done = running.wait()
    assert done.status == 0, done
    assert "Submitted" not in done.text
    assert sweep.started() == [1, 2]


# --- orchestrator-status stop ---


class Left:
    """Sweeps of an outputs directory as launchers have left them, with jobs that are held."""

    def __init__(self, slurm, outputs):
        self.slurm = slurm
        self.outputs = outputs

    def submit(self, sweep_id, *names):
        """An array of a run each; its id."""
        words = ("--hold", "--output=/dev/null", f"--array=0-{len(names) - 1}")
        array = self.slurm.sbatch(*words, "--wrap", "sleep 300")
        directory = self.outputs / ".sweeps" / sweep_id
        # A launcher that was killed did not say that it ended.
        content = {"sweep_id": sweep_id, "host": hostname(), "boot_id": "b", "pid": 1}
        directory.mkdir(parents=True)
        (directory / "sweep.json").write_text(json.dumps({**content, "started_at": time.time()}))
        for index, name in enumerate(names):
            path = own_directory(self.outputs / name, name)
            fields = {"model_name": name, "fingerprint": name, "index": index}
            fields["state"] = RunState.PENDING
            RunDir(path).write(RunRecord(sweep_id=sweep_id, **fields))
        jobs = tuple(Job(f"{array}_{index}", (index,)) for index in range(len(names)))
        write_ledger(directory, Ledger(submitted_at=time.time(), jobs=jobs))
        return array

    def states(self):
        runs = sorted(self.outputs.glob("*/run.json"))
        return {path.parent.name: RunDir(path.parent).read().state.value for path in runs}


@pytest.fixture
def left(slurm, tmp_path):
    return Left(slurm, tmp_path / "outputs")


def test_all_sweeps_are_stopped_or_one_and_what_was_stopped_goes_on_no_more(slurm, left):
    left.submit(OTHERS, "a", "b")
    ours = left.submit(OURS, "c", "d")
    refused = stop(slurm, left.outputs, check=False)
    assert refused.returncode == 1
    assert "2 sweeps go on below" in refused.stderr
    assert f"{OTHERS} (in {left.outputs}: 2 jobs)" in refused.stderr
    assert "--sweep ID" in refused.stderr
    assert "--all" in refused.stderr
    assert len(queue(slurm)) == 4
    assert set(left.states().values()) == {"PENDING"}

    named = stop(slurm, left.outputs, "--sweep", OTHERS)
    assert f"of sweep {OTHERS}; 2 runs: 2 cancelled." in named.stdout
    # The other is the only one by now, until there is a third.
    assert {job.partition("_")[0] for job in queue(slurm)} == {ours}
    left.submit("20260101-000002-dddddd", "e")
    both = stop(slurm, left.outputs, "--all")
    assert both.stdout.count("Cancelled ") == 2
    assert OTHERS not in both.stdout
    assert not queue(slurm)
    assert left.states() == dict.fromkeys("abcde", "CANCELLED")
    assert stop(slurm, left.outputs, "--all").stdout.startswith("Nothing is left to stop")


def test_jobs_are_cancelled_whatever_has_become_of_their_runs(slurm, left):
    """Run directories were removed, or another launcher has done the runs meanwhile."""
    left.submit(OTHERS, "a", "b", "c")
    other = slurm.sbatch("--hold", "--output=/dev/null", "--wrap", "sleep 300")
    shutil.rmtree(left.outputs / "a")
    done = {"sweep_id": OURS, "state": RunState.COMPLETED, "success": True}
    write(RunDir(left.outputs / "b"), **done)
    assert "Cancelled 3 Slurm jobs" in stop(slurm, left.outputs).stdout
    assert queue(slurm) == {other}
    assert left.states() == {"b": "COMPLETED", "c": "CANCELLED"}
    # Also where no run is left at all.
    left.submit(OURS, "d")
    shutil.rmtree(left.outputs / "d")
    assert "Cancelled 1 Slurm job" in stop(slurm, left.outputs).stdout
    assert queue(slurm) == {other}


def test_an_exported_array_is_cancelled_with_its_waiting_tasks(slurm, sweep):
    """Those have no records yet, and would start in place of those that are cancelled."""
    sweep.plan({"all": "gate"})
    words = ("-m", "orchestrator.cli.export", "slurm", "--option", "time=5", "--parallel", "2")
    command = ("app.py", "-m", "hydra/callbacks=results", "hydra/output=named", "x=range(6)")
    slurm.run(sys.executable, *words, "--", sys.executable, *command, cwd=sweep.directory)
    array = slurm.run("sbatch", "--parsable", "sweep.sbatch", cwd=sweep.directory).stdout.strip()
    until(lambda: len(sweep.started()) == 2, 30, lambda: str(sweep))
    done = stop(slurm, sweep.outputs)
    assert "Cancelled 6 Slurm jobs" in done.stdout, done
    assert not queue(slurm)
    assert len(sweep.started()) == 2
    tasks = slurm.scontrol("--oneliner", "show", "job", array).splitlines()
    assert sum(" NodeList=node" in task for task in tasks) == 2, "no other had its turn meanwhile"
    assert sorted(sweep.states().values()) == ["CANCELLED"] * 2
    assert stop(slurm, sweep.outputs).stdout.startswith("Nothing is left to stop")


# --- Ctrl+C ---


def test_ctrl_c_ends_no_runs_of_another_sweep_that_it_was_not_asked_for(slurm, sweep):
    sweep.plan({"all": "gate"})
    first = sweep.run("x=1,2,3", LEAVE, "hydra.launcher.runs_per_job=3")
    assert first.status == 0, first
    (job,) = sweep.jobs()
    sweep.until_started(1)
    running = sweep.start("x=1,5")
    running.says("1 run under way already", "Submitted 1 run")
    sweep.until_started(5)
    os.killpg(running.pid, signal.SIGINT)
    began = time.monotonic()
    done = running.wait(30)
    # It waits for the end of what it has cancelled, and of nothing else.
    assert time.monotonic() - began < 20
    assert done.status == 130, done
    last = done.text.splitlines()[-1]
    assert last.startswith(f"Left to Slurm: 1 run going on and 0 waiting, in {job}."), done
    assert f"{job} goes on: it does runs of another sweep, too." in done.text
    assert sweep.states()[5] == "CANCELLED"
    assert queue(slurm) == {job}
    assert sweep.states()[1] == "RUNNING"
    sweep.open()
    sweep.until_states(dict.fromkeys((1, 2, 3), "COMPLETED"))
    assert sweep.started() == [1, 2, 3, 5]


def test_ctrl_c_ends_jobs_of_another_sweep_all_of_whose_runs_were_asked_for(slurm, sweep):
    sweep.plan({"all": "gate"})
    assert sweep.run("x=1,2", LEAVE, "hydra.launcher.runs_per_job=2").status == 0
    sweep.until_started(1)
    running = sweep.start("x=1,2,3")
    running.says("2 runs under way already", "Submitted 1 run")
    os.killpg(running.pid, signal.SIGINT)
    done = running.wait(30)
    assert done.status == 130, done
    assert "goes on" not in done.text
    assert not queue(slurm)
    assert set(sweep.states().values()) == {"CANCELLED"}


# --- what others may write ---


class Evil:
    """What is unpickled may do anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


SOMEBODY = 12_345
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="files are given away by root only")


@AS_ROOT
def test_reports_of_another_owner_are_not_unpickled(tmp_path):
    ended = tmp_path / ENDED
    ended.mkdir()
    report = ended / "0"
    record = RunRecord(model_name="r", index=0, state=RunState.COMPLETED)
    now, answers = [0.0], []
    watcher = Watcher(
        SimpleNamespace(poll=dict.fromkeys),
        [
            Waiting(
                SimpleNamespace(index=0, directory=tmp_path / "r"), record, "7", tmp_path, 0.0, ""
            )
        ],
        SimpleNamespace(take=lambda _, ended: answers.append(ended)),
        SimpleNamespace(tick=lambda: None),
        SimpleNamespace(),
        clock=lambda: now[0],
    )

    def look():
        now[0] += 0.3
        watcher._poll_at = now[0] + 1.0
        watcher.step()

    report.write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    os.chown(report, SOMEBODY, -1)
    look()
    assert not (tmp_path / "pwned").exists()
    # Of our own, what is no report is none, and does no harm to the launcher.
    for content in (b"", b"no pickle", pickle.dumps("something else")):
        report.write_bytes(content)
        os.chown(report, os.getuid(), -1)
        look()
    assert not answers
    assert watcher.left
    report.write_bytes(pickle.dumps(Ended(record)))
    look()
    assert answers == [Ended(record)]
    assert not watcher.left


@AS_ROOT
def test_a_job_does_not_do_what_another_owner_has_put_there(tmp_path, monkeypatch):
    stem = tmp_path / "stem"
    path = Path(start_module.pack_file(str(stem), 0))
    path.write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    os.chown(path, SOMEBODY, -1)
    monkeypatch.setattr(sys, "argv", ["start", str(stem)])
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(SystemExit, match="another user's"):
        start_module.main()
    assert not (tmp_path / "pwned").exists()
