"""Sweeps that are interrupted, hung up, terminated and killed, in every part of them."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import psutil
import pytest

from orchestrator.record import RunState
from orchestrator.store import RunDir, observed_state

METHODS = ("fork", "spawn")
APP = "ledger_app.py"
RUNS = 6
POINTS = f"x=range({RUNS})"
# Runs below HOLD end at once; the next ones wait, two at a time.
HOLD = 2
HELD = ("x_2", "x_3")
# Where something must happen at once, and certainly before a grace of this many seconds.
LONG_GRACE_S = 25
AT_ONCE_S = 15


def begin(sandbox, *words, method="fork", child="detached", held=2, **how):
    """Start a sweep; come back when two runs have finished and two are running."""
    sandbox.env.update(SWEEP_HOLD_FROM=str(HOLD), SWEEP_CHILD=child)
    sweep = sandbox.start(APP, POINTS, f"hydra.launcher.start_method={method}", *words, **how)
    wait_for_held(sandbox, sweep, held)
    return sweep


def wait_for_held(sandbox, sweep, held):
    deadline = time.monotonic() + 60
    while len(sandbox.held()) < held or len(sandbox.states()) < 2:
        assert sweep.process.poll() is None, sweep.text
        assert time.monotonic() < deadline, sweep.text
        time.sleep(0.02)


def processes_of(sandbox, name):
    """Job, keeper and server of a run."""
    job = psutil.Process(sandbox.record(name).pid)
    keeper = job.parent()
    return job, keeper, keeper.parent()


def check_finished(sandbox, names=("x_0", "x_1")):
    """Everything that a finished run said is there and right."""
    for name in names:
        x = int(name[2:])
        run = RunDir(sandbox.outputs / name)
        record = run.read()
        assert record.state is RunState.COMPLETED
        assert record.success
        assert record.returncode == 0
        assert record.return_value == {"score": 10 * x, "loss": x / 2}
        assert record.metrics == {"score": 10 * x, "loss": x / 2}
        assert record.hyperparams == {"x": x}
        assert record.error is None
        assert record.ended_at >= record.started_at
        with np.load(run.arrays) as arrays:
            assert arrays["curve"].tolist() == [x, x + 1, x + 2]
        assert run.metrics.read_text().count("\n") == 1


def check_ended(sandbox, states, error_type=None):
    """The runs that were going on are in these states, and nothing else was begun."""
    records = sandbox.records()
    assert {name: records[name].state.value for name in states} == states
    assert sorted(records) == sorted({"x_0", "x_1", *states})
    for name in states:
        record = records[name]
        assert not record.success
        assert record.ended_at >= record.started_at
        assert record.metrics == {"loss": int(name[2:]) / 2}
        if error_type is not None:
            assert record.error.type == error_type
            assert record.error.message


def complete(sandbox, method="fork", *, done, earlier):
    """The same command again does what is missing, and only that."""
    sandbox.open_gate()
    words = (POINTS, f"hydra.launcher.start_method={method}")
    text = sandbox.run(APP, *words)
    assert f"{done} of {RUNS} done already" in text
    assert sandbox.states() == {"COMPLETED": RUNS}
    check_finished(sandbox, [f"x_{x}" for x in range(RUNS)])
    assert sandbox.ledger() == {f"{x} 0": 1 for x in range(RUNS)}
    for name, record in sandbox.records().items():
        assert [a.state.value for a in record.attempts] == earlier.get(name, []), name
    assert not sandbox.processes()
    text = sandbox.run(APP, *words)
    assert f"{RUNS} of {RUNS} done already" in text
    assert sandbox.ledger() == {f"{x} 0": 1 for x in range(RUNS)}


def tried(state):
    return {name: [state] for name in HELD}


STOPS = [
    ("fork", signal.SIGINT, True),
    ("spawn", signal.SIGINT, True),
    ("fork", signal.SIGINT, False),
    ("fork", signal.SIGTERM, False),
    ("spawn", signal.SIGTERM, False),
    ("fork", signal.SIGHUP, False),
]


@pytest.mark.parametrize(("method", "number", "group"), STOPS)
def test_a_stop_signal_ends_the_sweep_in_order(sandbox, method, number, group):
    sweep = begin(sandbox, method=method)
    (sweep.signal_group if group else sweep.signal)(number)
    assert sweep.wait() == 128 + number
    assert not sandbox.processes()
    check_finished(sandbox)
    check_ended(sandbox, dict.fromkeys(HELD, "CANCELLED"), "STOPPED")
    assert len(sandbox.partial_results()) == 1
    assert "2 running jobs ended, 2 not started" in sweep.text
    assert "Traceback" not in sweep.text
    complete(sandbox, method, done=2, earlier=tried("CANCELLED"))


def test_a_second_interrupt_does_not_wait_for_the_grace(sandbox):
    sweep = begin(sandbox, f"hydra.launcher.kill_grace_s={LONG_GRACE_S}", child="deaf")
    began = time.monotonic()
    sweep.signal(signal.SIGINT)
    time.sleep(0.5)
    assert sweep.process.poll() is None  # deaf jobs are given their grace
    sweep.signal(signal.SIGINT)
    assert sweep.wait() == 130
    assert time.monotonic() - began < AT_ONCE_S
    assert not sandbox.processes()
    check_finished(sandbox)
    check_ended(sandbox, dict.fromkeys(HELD, "CANCELLED"), "STOPPED")


def test_a_second_interrupt_does_not_wait_for_what_a_finished_job_left_over(sandbox):
    words = ("case=leaves_deaf", f"hydra.launcher.kill_grace_s={LONG_GRACE_S}")
    sweep = sandbox.start("hostile_app.py", *words)
    deadline = time.monotonic() + 60
    while not sandbox.ledger():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    for _ in range(2):
        time.sleep(0.3)
        sweep.signal(signal.SIGINT)
    assert sweep.wait() == 130
    assert time.monotonic() - began < AT_ONCE_S
    assert not sandbox.processes()
    assert sandbox.record("case_leaves_deaf").state is RunState.COMPLETED


def test_a_stop_does_not_wait_for_children_that_obey(sandbox):
    sweep = begin(sandbox, f"hydra.launcher.kill_grace_s={LONG_GRACE_S}", child="obedient")
    began = time.monotonic()
    sweep.signal(signal.SIGINT)
    assert sweep.wait() == 130
    assert time.monotonic() - began < AT_ONCE_S
    assert not sandbox.processes()
    check_ended(sandbox, dict.fromkeys(HELD, "CANCELLED"), "STOPPED")


@pytest.mark.parametrize("method", METHODS)
def test_a_job_deaf_to_sigterm_is_killed_after_the_grace(sandbox, method):
    sweep = begin(sandbox, method=method, child="deaf")
    sweep.signal(signal.SIGINT)
    assert sweep.wait() == 130
    assert not sandbox.processes()
    check_ended(sandbox, dict.fromkeys(HELD, "CANCELLED"), "STOPPED")
    assert sandbox.record("x_2").returncode == -signal.SIGKILL


def test_a_stopped_job_is_ended_too(sandbox):
    sweep = begin(sandbox, child="none")
    processes_of(sandbox, "x_2")[0].send_signal(signal.SIGSTOP)
    sweep.signal(signal.SIGTERM)
    assert sweep.wait() == 143
    assert not sandbox.processes()
    check_ended(sandbox, dict.fromkeys(HELD, "CANCELLED"), "STOPPED")


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_launcher_takes_everything_with_it(sandbox, method):
    sweep = begin(sandbox, method=method)
    sweep.signal(signal.SIGKILL)
    assert sweep.wait() == 137
    sandbox.nobody_left()
    check_finished(sandbox)
    check_ended(sandbox, dict.fromkeys(HELD, "CANCELLED"), "LAUNCHER_DIED")
    complete(sandbox, method, done=2, earlier=tried("CANCELLED"))


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_job_server_is_replaced(sandbox, method):
    sweep = begin(sandbox, method=method)
    processes_of(sandbox, "x_2")[2].kill()
    wait_for_held(sandbox, sweep, 4)  # the last two, under the new server
    check_finished(sandbox)
    records = sandbox.records()
    for name in HELD:
        assert records[name].state is RunState.LOST
        assert records[name].error.type == "SERVER_DIED"
    sandbox.open_gate()
    assert sweep.wait() == 1
    assert "The job server died; starting another" in sweep.text
    assert not sandbox.processes()
    check_finished(sandbox, ["x_0", "x_1", "x_4", "x_5"])
    complete(sandbox, method, done=4, earlier=tried("LOST"))


def test_launcher_and_job_server_killed_together(sandbox):
    sweep = begin(sandbox)
    server = processes_of(sandbox, "x_2")[2]
    sweep.signal(signal.SIGSTOP)
    server.kill()
    sweep.signal(signal.SIGKILL)
    assert sweep.wait() == 137
    sandbox.nobody_left()
    check_finished(sandbox)
    records = sandbox.records()
    assert {records[name].state.value for name in HELD} <= {"CANCELLED", "LOST"}
    earlier = {name: [records[name].state.value] for name in HELD}
    complete(sandbox, done=2, earlier=earlier)


def test_where_nobody_was_left_to_write_the_run_reads_lost(sandbox):
    sweep = begin(sandbox, child="none")
    keepers = [processes_of(sandbox, name)[1] for name in HELD]
    server = keepers[0].parent()
    for process in keepers:
        process.suspend()
    for process in (psutil.Process(sweep.pid), server, *keepers):
        process.kill()
    sweep.wait()
    sandbox.nobody_left()
    check_finished(sandbox)
    for name in HELD:
        record = sandbox.record(name)
        assert record.state is RunState.RUNNING
        # The kernel may still be taking the process down.
        sandbox.until(lambda r=record: observed_state(r) is RunState.LOST, f"the end of {name}")
    complete(sandbox, done=2, earlier=tried("LOST"))


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_keeper_costs_its_own_run_only(sandbox, method):
    sweep = begin(sandbox, method=method)
    processes_of(sandbox, "x_2")[1].kill()
    wait_for_held(sandbox, sweep, 3)  # its slot is used again
    record = sandbox.record("x_2")
    assert record.state is RunState.LOST
    assert record.error.type == "KeeperDied"
    sandbox.open_gate()
    assert sweep.wait() == 1
    assert not sandbox.processes()
    check_finished(sandbox, ["x_0", "x_1", "x_3", "x_4", "x_5"])
    complete(sandbox, method, done=5, earlier={"x_2": ["LOST"]})


@pytest.mark.parametrize("method", METHODS)
def test_a_keeper_killed_between_two_jobs_costs_no_run(sandbox, method):
    """It dies just when the server has a job for it."""
    sweep = begin(sandbox, method=method, child="none")
    job, keeper, server = processes_of(sandbox, "x_2")
    server.suspend()
    job.kill()
    deadline = time.monotonic() + 60
    while "FAILED x_2" not in sweep.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    keeper.kill()
    time.sleep(0.1)
    server.resume()
    wait_for_held(sandbox, sweep, 3)
    sandbox.open_gate()
    assert sweep.wait() == 1
    assert not sandbox.processes()
    assert sandbox.states() == {"COMPLETED": 5, "FAILED": 1}
    complete(sandbox, method, done=5, earlier={"x_2": ["FAILED"]})


@pytest.mark.parametrize("method", METHODS)
def test_what_has_no_job_may_be_killed(sandbox, method):
    sandbox.env["SWEEP_HOLD_FROM"] = "1"
    sweep = sandbox.start(APP, "x=0,1", f"hydra.launcher.start_method={method}")
    deadline = time.monotonic() + 60
    while not sandbox.held() or "Completed 1 out of 2" not in sweep.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    _, keeper, server = processes_of(sandbox, "x_1")
    for other in server.children():
        if other != keeper:
            other.kill()
    time.sleep(0.1)
    sandbox.open_gate()
    assert sweep.wait() == 0
    assert not sandbox.processes()
    check_finished(sandbox)


def test_a_keeper_killed_after_its_record_was_written_loses_nothing(sandbox):
    sweep = sandbox.start("hostile_app.py", "case=returns_50_mb")
    deadline = time.monotonic() + 60
    while not sandbox.ledger():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # The launcher listens no more, and the answer is too long for the socket's buffer.
    sweep.signal(signal.SIGSTOP)
    name = "case_returns_50_mb"
    while sandbox.record(name).state is RunState.RUNNING:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (server,) = psutil.Process(sweep.pid).children()
    for keeper in server.children():
        keeper.kill()
    sweep.signal(signal.SIGCONT)
    assert sweep.wait() == 0
    assert sandbox.record(name).state is RunState.COMPLETED
    assert len(sandbox.record(name).return_value) == 50_000_000


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_job_costs_its_own_run_only(sandbox, method):
    sweep = begin(sandbox, method=method)
    processes_of(sandbox, "x_2")[0].kill()
    wait_for_held(sandbox, sweep, 3)
    record = sandbox.record("x_2")
    assert record.state is RunState.FAILED
    assert record.returncode == -signal.SIGKILL
    assert record.error.type == "ProcessDied"
    assert "killed by SIGKILL" in record.error.message
    sandbox.open_gate()
    assert sweep.wait() == 1
    assert "FAILED x_2: ProcessDied: the process was killed by SIGKILL" in sweep.text
    assert not sandbox.processes()
    check_finished(sandbox, ["x_0", "x_1", "x_3", "x_4", "x_5"])
    complete(sandbox, method, done=5, earlier={"x_2": ["FAILED"]})


@pytest.mark.parametrize("child", ["detached", "deaf"])
def test_a_time_limit_ends_a_run_and_the_others_go_on(sandbox, child):
    sandbox.env.update(SWEEP_HOLD_FROM="5", SWEEP_CHILD=child)
    text = sandbox.run(APP, POINTS, "hydra.launcher.timeout_s=1", expect=1)
    assert not sandbox.processes()
    assert "TIMEOUT x_5: TIMEOUT: the run was ended because it reached its time limit" in text
    record = sandbox.record("x_5")
    assert record.state is RunState.TIMEOUT
    assert record.error.type == "TIMEOUT"
    assert record.duration_seconds >= 1
    check_finished(sandbox, [f"x_{x}" for x in range(5)])
    complete(sandbox, done=5, earlier={"x_5": ["TIMEOUT"]})


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_after_a_normal_end(sandbox, method):
    cases = "leaves_a_sleeper,leaves_deaf,process_not_joined,pool_left_open,fine"
    sandbox.run("hostile_app.py", f"case={cases}", f"hydra.launcher.start_method={method}")
    assert not sandbox.processes()
    assert sandbox.states() == {"COMPLETED": 5}
    assert (sandbox.outputs / "case_process_not_joined" / "child").exists()


def test_an_ignored_hangup_stays_ignored(sandbox):
    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    sweep = begin(sandbox, child="none", preexec_fn=nohup)
    sweep.signal_group(signal.SIGHUP)
    sandbox.open_gate()
    assert sweep.wait() == 0
    check_finished(sandbox, [f"x_{x}" for x in range(RUNS)])


def test_an_interrupt_that_ends_the_reader_of_the_output_first(sandbox):
    """As in ``... | tee log`` and Ctrl+C."""
    reader, writer = os.pipe()
    sweep = begin(sandbox, stdout=writer)
    os.close(writer)
    os.close(reader)
    sweep.signal_group(signal.SIGINT)
    assert sweep.wait() == 130
    assert not sandbox.processes()
    check_finished(sandbox)
    check_ended(sandbox, dict.fromkeys(HELD, "CANCELLED"), "STOPPED")
    assert b'"CANCELLED"' in sandbox.partial_results()[0].read_bytes()


def test_a_terminal_that_goes_away(sandbox):
    master, slave = os.openpty()
    os.set_blocking(master, False)

    def own_terminal():
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    sandbox.env.update(SWEEP_HOLD_FROM=str(HOLD), SWEEP_CHILD="detached")
    sweep = sandbox.start(APP, POINTS, stdout=slave, stderr=slave, preexec_fn=own_terminal)
    os.close(slave)
    seen = b""
    deadline = time.monotonic() + 60
    while len(sandbox.held()) < 2:
        assert time.monotonic() < deadline, seen.decode()
        try:
            seen += os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.02)
    os.close(master)
    assert sweep.wait() == 129
    assert not sandbox.processes()
    check_finished(sandbox)
    check_ended(sandbox, dict.fromkeys(HELD, "CANCELLED"), "STOPPED")
    assert b'"CANCELLED"' in sandbox.partial_results()[0].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_kills_at_any_moment(sandbox, number):
    """Whatever moment is met: no process is left, and what is done stays done."""
    points = ("x=range(40)",)
    settled = {}
    for delay in (0.15, 0.35, 0.45, 0.6, 0.7):
        sweep = sandbox.start(APP, *points)
        time.sleep(delay)
        (sweep.signal if number == signal.SIGKILL else sweep.signal_group)(number)
        sweep.wait()
        sandbox.nobody_left()
        if not sandbox.outputs.exists():
            continue
        records = sandbox.records()
        assert all(record.state.is_final for record in records.values())
        for name, times in settled.items():
            assert sandbox.ledger()[name] == times, f"{name} was finished and run again"
        done = [n for n, record in records.items() if record.state is RunState.COMPLETED]
        settled = {f"{name[2:]} 0": sandbox.ledger()[f"{name[2:]} 0"] for name in done}
        assert all(times >= 1 for times in settled.values())
    sandbox.run(APP, *points)
    assert sandbox.states() == {"COMPLETED": 40}
    for name, times in settled.items():
        assert sandbox.ledger()[name] == times


def test_every_run_is_listed_after_a_stop(sandbox):
    sweep = begin(sandbox, child="none")
    sweep.signal(signal.SIGINT)
    sweep.wait()
    words = [sys.executable, "-m", "orchestrator.cli.status", str(sandbox.outputs)]
    listed = subprocess.run(words, capture_output=True, text=True, check=True, env=sandbox.env)
    assert "4 runs: 2 CANCELLED, 2 COMPLETED" in listed.stdout
