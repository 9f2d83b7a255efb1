"""What a run is told before it starts, and what is on the disk if it never does."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import threading

import pytest

from orchestrator.queue import burial
from orchestrator.queue.job import THREAD_VARIABLES
from orchestrator.queue.keeper import Keeper
from orchestrator.queue.launcher import _threads, cores
from orchestrator.queue.resources import make_places
from orchestrator.queue.settings import GpuQueueSettings
from orchestrator.queue.wire import Busy, Ended, Inbox, JobRequest
from orchestrator.record import ErrorInfo, RunRecord, RunState
from orchestrator.store import RunDir, RunLock, own_directory
from orchestrator.sweep.errors import SweepError

APP = "ledger_app.py"
QUEUE = ("hydra/launcher=gpu_queue", "hydra.launcher.gpus=[]", "hydra.launcher.max_processes=1")
A = "a" * 32


# --- settings ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("timeout_s", -1), ("timeout_s", 0), ("kill_grace_s", -1), ("threads", 0)),
        *(("max_processes", 0), ("max_processes_per_gpu", 0)),
    ],
)
def test_a_setting_out_of_its_range_is_named(name, value):
    with pytest.raises(SweepError, match=rf"hydra\.launcher\.{name} is {value}; expected "):
        make_places(GpuQueueSettings(gpus=[], **{name: value}), None)


def test_settings_at_the_end_of_their_range():
    settings = GpuQueueSettings(gpus=[], kill_grace_s=0, threads=1, timeout_s=0.1)
    places, _ = make_places(settings, None)
    assert places.size == cores()


def test_nothing_runs_with_a_setting_out_of_its_range(sandbox):
    text = sandbox.run(APP, "x=1", "hydra.launcher.timeout_s=-1", expect=1)
    assert "hydra.launcher.timeout_s is -1.0; expected seconds, or null." in text
    assert "Traceback" not in text
    assert not sandbox.records()


def test_a_results_file_that_cannot_be_written_is_found_before_anything_runs(sandbox):
    (sandbox.directory / "file").touch()
    target = sandbox.directory / "file" / "results.json"
    text = sandbox.run(APP, "x=1", f"hydra.callbacks.results.results_file={target}", expect=1)
    assert f"{target.parent} cannot be written" in text
    assert "results_file=PATH" in text
    assert "Traceback" not in text
    assert not sandbox.ledger()


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OPENBLAS_NUM_THREADS": "7"}, 7),
        ({"MKL_NUM_THREADS": "7"}, 7),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "many", "MKL_NUM_THREADS": " 3 "}, 3),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({}, None),
    ],
)
def test_a_users_own_number_of_threads_counts(monkeypatch, environment, threads):
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _threads(1) == (threads or cores())
    assert _threads(cores() + 1) == (threads or 1)


def test_pools_that_are_loaded_already_keep_a_users_number(sandbox):
    for name in THREAD_VARIABLES:
        sandbox.env.pop(name, None)
    words = ("x=1", "hydra.launcher.max_processes=1", "hydra.launcher.start_method=fork")
    sandbox.run("random_app.py", *words, env={"OPENBLAS_NUM_THREADS": "1"})
    assert sandbox.record("x_1").return_value["threads"]["pools"] == {"blas": 1}


# --- start methods ---

FRAME = """
import os, signal, threading
from pathlib import Path
import hydra, psutil
from hydra.core.config_store import ConfigStore

ConfigStore.instance().store(name="config", node={"x": 0})
STATE = Path(os.environ["SWEEP_STATE"])

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    if cfg.x == 1 and not (STATE / "once").exists():
        (STATE / "once").touch()
        psutil.Process().parent().parent().kill()
        signal.pause()
    return cfg.x
"""

THREADED = """
if __name__ == "__main__":
    from orchestrator.queue.launcher import GpuQueue
    launch = GpuQueue.launch

    def launch_with_a_thread(*words):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return launch(*words)

    GpuQueue.launch = launch_with_a_thread
    main()
"""


def app(sandbox, text):
    path = sandbox.directory / "app.py"
    path.write_text(text)
    return path


def test_a_job_server_that_must_be_replaced_by_another_kind(sandbox):
    script = app(sandbox, FRAME + THREADED)
    common = (*QUEUE, "hydra/callbacks=results", "hydra/output=named")
    text = sandbox.run(script, "x=range(4)", common=common, expect=1)
    assert "Jobs start by fork" in text
    assert "The job server died; starting another" in text
    assert sandbox.states() == {"COMPLETED": 3, "LOST": 1}
    assert sandbox.record("x_1").state is RunState.LOST
    assert [sandbox.record(f"x_{x}").return_value for x in (0, 2, 3)] == [0, 2, 3]
    assert "BrokenPipeError" not in text
    assert "3 of 4 done already" in sandbox.run(script, "x=range(4)", common=common)
    assert not sandbox.processes()


def test_a_script_that_starts_hydra_when_it_is_imported_is_told_what_to_do(sandbox):
    script = app(sandbox, FRAME + "\nmain()\n")
    words = ("x=5", "hydra.launcher.start_method=spawn")
    sandbox.run(script, *words, expect=1)
    (record,) = sandbox.records().values()
    assert record.state is RunState.FAILED
    assert "`if __name__ == '__main__':`" in record.error.message
    assert "hydra.launcher.start_method=fork" in record.error.message
    assert "1 completed" in sandbox.run(script, "x=5", "hydra.launcher.start_method=fork")


# --- what to type ---


def test_named_without_the_callback_the_advice_and_the_command_work_when_typed(sandbox):
    common = (*QUEUE, "hydra/output=named")
    sandbox.run(APP, "x=1", common=common)
    text = sandbox.run(APP, "x=1", common=common)
    _, _, advice = text.partition("1 of 1 done already; run again with ")
    again = advice.splitlines()[0].split()
    assert "done already" not in sandbox.run(APP, "x=1", *again, common=common)
    assert sandbox.ledger() == {"1 0": 2}
    command = sandbox.record("x_1").command
    subprocess.run(command, shell=True, check=True, env=sandbox.env, cwd=sandbox.directory)
    assert sandbox.ledger() == {"1 0": 3}
    assert len(sandbox.record("x_1").attempts) == 2
    assert len(sandbox.records()) == 1


def test_a_command_finds_the_config_that_its_run_had(sandbox):
    without_name = FRAME.replace('config_name="config"', "config_name=None")
    script = app(sandbox, f"{without_name}\nif __name__ == '__main__':\n    main()\n")
    (sandbox.directory / "my conf").mkdir()
    (sandbox.directory / "my conf" / "other.yaml").write_text("x: 0\nname: other\n")
    flags = ("--config-dir", "my conf", "-cn", "other")
    named = (*QUEUE, "hydra/callbacks=results", "hydra/output=named")
    sandbox.run(script, "+text='it is $HOME'", common=(*flags, *named))
    ((name, before),) = sandbox.records().items()
    subprocess.run(before.command, shell=True, check=True, env=sandbox.env, cwd=sandbox.directory)
    assert list(sandbox.records()) == [name]
    after = sandbox.record(name)
    assert after.fingerprint == before.fingerprint
    assert len(after.attempts) == 1
    assert "name: other" in (sandbox.outputs / name / ".hydra" / "config.yaml").read_text()


def test_a_run_that_could_not_be_given_a_directory_is_in_the_results(sandbox):
    sandbox.outputs.mkdir()
    (sandbox.outputs / "x_1").touch()
    text = sandbox.run(APP, "x=1,2", expect=1)
    assert "FAILED x=1: " in text
    (sweep,) = (sandbox.outputs / ".sweeps").iterdir()
    entries = json.loads((sweep / "train_sweep_results.json").read_bytes())
    assert {entry["model_name"]: entry["state"] for entry in entries} == {
        "x=1": "FAILED",
        "x_2": "COMPLETED",
    }
    assert json.loads((sweep / "sweep.json").read_bytes())["states"] == {
        "COMPLETED": 1,
        "FAILED": 1,
    }


# --- a keeper, up to the fork ---


def _record(state, sweep_id="before", **fields):
    done = state is RunState.COMPLETED
    name = {"model_name": "x_1", "fingerprint": A, "index": 0}
    if state is not RunState.PENDING:
        fields.setdefault("started_at", 1.0)
    return RunRecord(**name, sweep_id=sweep_id, state=state, success=done, **fields)


@pytest.fixture
def run(tmp_path):
    return RunDir(own_directory(tmp_path / "x_1", A))


@pytest.fixture
def keep(run, monkeypatch):
    """Has a keeper in this process keep a job that cannot be forked."""

    def fork():
        keep.at_fork = run.read()
        raise OSError(errno.EAGAIN, "no process is to be had")

    def keep(*, resume=True):
        asked = JobRequest(
            num=0,
            overrides=("x=1",),
            directory=str(run.path),
            record=_record(RunState.PENDING, "now"),
            resume=resume,
        )
        ours, theirs = socket.socketpair()
        never, writer = os.pipe()
        with ours, theirs:
            Keeper(asked, theirs, never, never, (never,)).keep(lambda *_: None, [])
            theirs.shutdown(socket.SHUT_WR)
            inbox, messages = Inbox(ours.fileno()), []
            while not inbox.closed:
                messages += inbox.receive()
        os.close(never)
        os.close(writer)
        return messages

    keep.at_fork = None
    monkeypatch.setattr(os, "fork", fork)
    return keep


def test_a_run_is_pending_on_the_disk_before_its_job_runs(keep, run):
    keep()
    assert keep.at_fork.state is RunState.PENDING
    assert keep.at_fork.sweep_id == "now"


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.COMPLETED, RunState.RUNNING])
def test_a_run_that_cannot_be_forked_leaves_a_record_and_its_earlier_attempts(keep, run, state):
    run.write(_record(state, return_value=7))
    run.stdout.write_text("printed")
    (message,) = keep(resume=False)
    assert isinstance(message, Ended)
    assert message.saved
    record = run.read()
    assert message.record == record
    assert record.state is RunState.FAILED
    assert "no process is to be had" in record.error.message
    earlier = RunState.LOST if state is RunState.RUNNING else state
    assert [attempt.state for attempt in record.attempts] == [earlier]
    assert keep.at_fork.attempts == record.attempts
    aside = RunDir(run.attempts / "1")
    assert aside.read().return_value == 7
    assert aside.stdout.read_text() == "printed"
    lock = RunLock.acquire(run)
    assert lock is not None
    lock.release()


def test_a_record_that_cannot_be_written_is_not_said_to_be(keep, run, monkeypatch):
    monkeypatch.setattr("orchestrator.queue.keeper._WRITE_RETRIES_S", ())

    def full(*_):
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(RunDir, "write", full)
    (message,) = keep()
    assert not message.saved
    assert message.record.state is RunState.FAILED


def test_a_keeper_leaves_a_run_alone_that_is_done_or_in_other_hands(keep, run):
    run.write(_record(RunState.COMPLETED, return_value=7))
    before = run.record.read_bytes()
    (message,) = keep()
    assert message.skipped
    assert message.record.return_value == 7
    lock = RunLock.acquire(run)
    assert keep(resume=False) == [Busy()]
    lock.release()
    assert run.record.read_bytes() == before
    assert not run.attempts.exists()
    assert keep.at_fork is None


# --- after the death of a keeper ---


def last_word(run):
    asked = _record(RunState.PENDING, "now")
    lost = asked.advance(RunState.LOST, ended_at=9.0, error=ErrorInfo("KeeperDied", "killed"))
    final = burial.last_word(run, asked, lost)
    assert run.read() == final
    return final


@pytest.mark.parametrize("state", [RunState.COMPLETED, RunState.FAILED])
def test_a_keeper_that_died_before_it_had_begun_costs_no_earlier_result(run, state):
    before = _record(state, "before", return_value=7)
    run.write(before)
    (run.path / "checkpoint").touch()
    final = last_word(run)
    assert final.state is RunState.LOST
    assert final.sweep_id == "now"
    assert [attempt.state for attempt in final.attempts] == [state]
    assert RunDir(run.attempts / "1").read() == before
    assert (run.path / "checkpoint").exists() == (state is RunState.FAILED)


def test_a_keeper_that_died_at_once_leaves_a_lost_run(run):
    final = last_word(run)
    assert final.state is RunState.LOST
    assert final.error.type == "KeeperDied"
    assert final.attempts == ()
    assert not run.attempts.exists()


@pytest.mark.parametrize("state", [RunState.PENDING, RunState.RUNNING])
def test_what_a_dead_keeper_had_written_is_completed(run, state):
    run.write(_record(RunState.FAILED))
    attempts = run.begin_attempt()
    run.write(_record(state, "now", attempts=attempts, pid=7, started_at=1.0))
    final = last_word(run)
    assert final.state is RunState.LOST
    assert (final.pid, final.started_at, final.ended_at) == (7, 1.0, 9.0)
    assert final.attempts == attempts


@pytest.mark.parametrize("state", [RunState.COMPLETED, RunState.FAILED, RunState.TIMEOUT])
def test_a_final_record_of_a_dead_keeper_stands(run, state):
    record = _record(state, "now", return_value=7)
    run.write(record)
    assert last_word(run) == record


def test_a_run_of_a_dead_keeper_may_be_in_another_launchers_hands(run):
    asked = _record(RunState.PENDING, "now")
    run.write(_record(RunState.RUNNING, "others"))
    lock = RunLock.acquire(run)
    assert burial._lock_after_death(run, asked) is None
    # While it is our own, it is what the job has left behind that holds it.
    run.write(_record(RunState.RUNNING, "now"))
    timer = threading.Timer(0.2, lock.release)
    timer.start()
    mine = burial._lock_after_death(run, asked)
    timer.join()
    assert mine is not None
    mine.release()
