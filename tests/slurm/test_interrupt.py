"""Ctrl+C and other ends of the launcher of a sweep on a real Slurm."""

from __future__ import annotations

import os
import signal
import time

import pytest
from slurm_cluster import until

AT_A_TIME = "hydra.launcher.array_parallelism=2"
LEAVE = "hydra.launcher.on_interrupt=leave"


def interrupted(sweep, running, number=signal.SIGINT):
    """The end of a launcher that got a signal, and how long it took to end."""
    began = time.monotonic()
    if number == signal.SIGINT:  # a terminal sends it to all that were started there
        os.killpg(running.pid, number)
    else:
        running.signal(number)
    done = running.wait(40)
    done.seconds = time.monotonic() - began
    return done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_cancels(slurm, sweep, number):
    """All jobs are gone, those that run as well, and the records say so."""
    sweep.plan({0: "", 1: "raise", 2: "gate", 3: "gate"})
    running = sweep.start("x=range(6)", AT_A_TIME)
    job = running.array
    sweep.until_states({0: "COMPLETED", 1: "FAILED"})
    sweep.until_started(2, 3)
    done = interrupted(sweep, running, number)
    print(f"{number.name}: cancelled after {done.seconds:.1f} s")
    assert done.status == 128 + number, done
    assert "Traceback" not in done.text, done
    assert job in done.text.partition("Cancelling")[2].splitlines()[0], done
    assert done.seconds < 15
    assert sweep.states() == {
        0: "COMPLETED",
        1: "FAILED",
        **dict.fromkeys((2, 3, 4, 5), "CANCELLED"),
    }
    assert not slurm.squeue()
    records = sweep.records()
    assert all(records[x]["error"]["message"] and records[x]["ended_at"] for x in range(1, 6))
    (partial,) = sweep.outputs.glob(".sweeps/*/train_sweep_results.json.partial")
    assert str(partial) in done.text
    if number != signal.SIGINT:
        return

    sweep.plan({})
    again = sweep.run("x=range(6)")
    assert again.status == 0, again
    assert set(sweep.states().values()) == {"COMPLETED"}
    assert sweep.started() == sorted([0, *(1, 1), *(2, 2), *(3, 3), 4, 5])
    # What never began was no attempt.
    attempts = {x: record["return_value"]["attempt"] for x, record in sweep.records().items()}
    assert attempts == {0: 1, 1: 2, 2: 2, 3: 2, 4: 1, 5: 1}


def test_leaves(slurm, sweep):
    """The jobs go on without their launcher; the same command takes them up again."""
    sweep.plan({0: "raise", 1: "gate", 2: "gate"})
    running = sweep.start("x=range(5)", AT_A_TIME, LEAVE)
    job = running.array
    sweep.until_states({0: "FAILED"})
    sweep.until_started(1, 2)
    done = interrupted(sweep, running)
    assert done.status == 130, done
    assert done.seconds < 5
    assert job in done.text.partition("Left to Slurm")[2], done
    assert str(sweep.outputs) in done.text.partition("Left to Slurm")[2]
    assert len(slurm.squeue()) == 4

    # Once more, by a lost connection: it leaves, whatever it was told to do.
    running = sweep.start("x=range(5)", AT_A_TIME)
    running.says("under way already", job, "Submitted 1 run")
    done = interrupted(sweep, running, signal.SIGHUP)
    assert done.status == 128 + signal.SIGHUP, done
    assert "Left to Slurm" in done.text
    assert sweep.states()[1] == sweep.states()[2] == "RUNNING"

    sweep.plan({1: "gate", 2: "gate"})
    running = sweep.start("x=range(6)", AT_A_TIME)
    running.says("under way already", "Submitted 1 run")
    sweep.open()
    done = running.wait()
    assert done.status == 0, done
    assert sweep.started() == [0, 0, 1, 2, 3, 4, 5]
    assert set(sweep.states().values()) == {"COMPLETED"}


def test_a_second_one_leaves_at_once(slurm, sweep):
    """Cancelling may take long."""
    sweep.plan({0: "deaf, gate", 1: "deaf, gate"})
    running = sweep.start("x=range(4)", AT_A_TIME)
    job = running.array
    sweep.until_started(0, 1)
    running.signal(signal.SIGINT)
    running.says("Cancelling")
    sweep.until_states({3: "CANCELLED"})
    if running.is_going_on:
        done = interrupted(sweep, running)
        assert done.seconds < 2
        assert job in done.text.partition("Cancelled, and not gone yet")[2]
    else:
        pytest.fail(f"it did not wait for jobs that do not end: {running.text}")
    assert done.status == 130
    assert "Traceback" not in done.text

    # Nobody was there to write down how they ended; the same command does.
    until(lambda: not slurm.squeue(), 30)
    sweep.plan({})
    again = sweep.run("x=range(4)", AT_A_TIME)
    assert again.status == 0, again
    assert set(sweep.states().values()) == {"COMPLETED"}


def test_a_second_one_while_slurm_is_deaf(slurm, sweep):
    """It does not wait for an answer of Slurm's either."""
    sweep.plan({"all": "gate"})
    running = sweep.start("x=1,2")
    job = running.array
    sweep.until_started(1, 2)
    asked = sweep.directory / "asked"
    deaf = f"#!/bin/sh\ntouch {asked}\nsleep 10\n"
    with slurm.shim("squeue", deaf), slurm.shim("scancel", deaf):
        until(asked.exists)
        running.signal(signal.SIGINT)
        time.sleep(0.3)
        done = interrupted(sweep, running)
    print(f"left after {done.seconds:.1f} s")
    assert done.status == 130, done
    assert done.seconds < 3
    assert job in done.text.splitlines()[-1]
    assert len(slurm.squeue()) == 2


@pytest.mark.parametrize("said", ["outputs in", "Submitted"])
def test_at_any_moment(slurm, sweep, said):
    """Just before and just after the jobs are submitted."""
    sweep.plan({"all": "gate"})
    running = sweep.start("x=range(40)", "hydra.launcher.array_parallelism=4")
    running.says(said)
    done = interrupted(sweep, running)
    assert done.status == 130, done
    assert "Traceback" not in done.text, done
    assert not slurm.squeue()
    assert set(sweep.states().values()) <= {"CANCELLED"}, done


def test_while_sbatch_is_at_work(slurm, sweep):
    """Slurm has the jobs, but has not said so yet."""
    sweep.plan({"all": "gate"})
    real = slurm.run("which", "sbatch").stdout.strip()
    there = sweep.directory / "there"
    with slurm.shim("sbatch", f'#!/bin/sh\n{real} "$@"\ntouch {there}\nsleep 1\n'):
        running = sweep.start("x=1,2")
        until(there.exists)
        done = interrupted(sweep, running)
    assert done.status == 130, done
    assert "Traceback" not in done.text, done
    assert not slurm.squeue()
    assert sweep.states() == {1: "CANCELLED", 2: "CANCELLED"}


def test_a_launcher_that_is_killed(slurm, sweep):
    """Its jobs go on. The same command waits for those that are there, and does what is not."""
    sweep.plan({0: "", 1: "raise", 2: "gate", 3: "gate", 4: "gate"})
    running = sweep.start("x=range(8)", "hydra.launcher.array_parallelism=3")
    job = running.array
    sweep.until_states({0: "COMPLETED", 1: "FAILED"})
    sweep.until_started(2, 3, 4)
    interrupted(sweep, running, signal.SIGKILL)
    # Meanwhile one ends, one dies, and one that waits is cancelled.
    sweep.open(2)
    slurm.kill_job_process(f"{job}_3")
    slurm.run("scancel", f"{job}_7")
    sweep.until_states({2: "COMPLETED"})
    until(lambda: not {f"{job}_3", f"{job}_7"} & {row["JOBID"] for row in slurm.squeue()})

    sweep.plan({4: "gate"})
    running = sweep.start("x=range(8)", "hydra.launcher.array_parallelism=3")
    running.says("under way already", "Submitted 3 runs")
    # At the same time by somebody else.
    twin = sweep.start("x=range(8)", "hydra.launcher.array_parallelism=3")
    twin.says("under way already")
    assert "Submitted" not in twin.text
    sweep.open()
    done, same = running.wait(), twin.wait()
    assert done.status == 0, done
    assert same.status == 0, same
    assert sweep.started() == sorted([0, *(1, 1), 2, *(3, 3), 4, 5, 6, 7])
    assert set(sweep.states().values()) == {"COMPLETED"}
    records = sweep.records()
    assert [attempt["state"] for attempt in records[3]["attempts"]] == ["LOST"]
    assert not records[7]["attempts"]
    third = sweep.run("x=range(8)")
    assert third.status == 0, third
    assert "8 of 8 done" in third.text
