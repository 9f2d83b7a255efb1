"""``hydra.launcher.wait=false`` on a real Slurm: submit, leave, and come back."""

from __future__ import annotations

import json
import subprocess
import sys

NO_WAIT = "hydra.launcher.wait=false"


def test_submit_leave_and_come_back(slurm, sweep):
    sweep.plan({"all": "gate"})
    words = ("x=1,2,3", "hydra.launcher.array_parallelism=2")
    first = sweep.run(*words, NO_WAIT)
    assert first.status == 0, first
    assert first.seconds < 10
    assert "Submitted 3 runs" in first.text
    assert "orchestrator-status" in first.text
    assert "same command" in first.text
    jobs = sweep.jobs()
    sweep.until_started(1, 2)

    # All of them are under way: the same command submits nothing.
    second = sweep.run(*words, NO_WAIT)
    assert second.status == 0, second
    assert "3 runs under way already" in second.text
    assert "Submitted" not in second.text
    shown = status(slurm, sweep)
    assert shown["counts"] == {"RUNNING": 2, "PENDING": 1}

    # Some done, some not, one new.
    sweep.open(1)
    sweep.until_states({1: "COMPLETED"})
    third = sweep.run("x=range(1,5)", "hydra.launcher.array_parallelism=2", NO_WAIT)
    assert third.status == 0, third
    assert "2 runs under way already" in third.text
    assert "Submitted 1 run" in third.text
    assert "1 of 4 done already" in third.text
    assert len(slurm.squeue()) == 3

    # Waiting for all of them; also when they end while nobody waits.
    sweep.open(2)
    running = sweep.start("x=range(1,5)", "hydra.launcher.wait=true")
    running.says("under way already")
    sweep.open()
    done = running.wait()
    assert done.status == 0, done
    assert sweep.started() == [1, 2, 3, 4]
    assert set(sweep.states().values()) == {"COMPLETED"}
    assert set(jobs) < set(sweep.jobs())
    for wait in (NO_WAIT, "hydra.launcher.wait=true"):
        again = sweep.run("x=range(1,5)", wait)
        assert again.status == 0, again
        assert "4 of 4 done" in again.text
        assert "Submitted" not in again.text
    assert sweep.started() == [1, 2, 3, 4]
    shown = status(slurm, sweep)
    assert shown["counts"] == {"COMPLETED": 4}
    results = max(sweep.outputs.glob(".sweeps/*/train_sweep_results.json"))
    entries = json.loads(results.read_bytes())
    assert [entry["hyperparams"]["x"] for entry in entries] == [1, 2, 3, 4]


def test_ends_while_nobody_waits(slurm, sweep):
    """Failed, killed, cancelled: the same command does these again, and nothing else."""
    sweep.plan({2: "raise", 3: "gate", 4: "gate"})
    first = sweep.run("x=range(1,7)", "hydra.launcher.array_parallelism=4", NO_WAIT)
    assert first.status == 0, first
    sweep.until_states({1: "COMPLETED", 2: "FAILED"})
    sweep.until_started(3, 4)
    slurm.kill_job_process(sweep.job(3))
    slurm.run("scancel", sweep.job(4))
    slurm.wait(*sweep.jobs())
    sweep.plan({})
    second = sweep.run("x=range(1,7)", NO_WAIT)
    assert second.status == 0, second
    assert "Submitted 3 runs" in second.text, second
    slurm.wait(*sweep.jobs())
    third = sweep.run("x=range(1,7)")
    assert third.status == 0, third
    assert "6 of 6 done" in third.text
    assert sweep.started() == sorted([1, *(2, 2), *(3, 3), *(4, 4), 5, 6])


def test_other_sweepers_need_the_results(slurm, sweep):
    done = sweep.run("hydra/sweeper=basic", "x=1,2", NO_WAIT)
    assert done.status == 1, done
    assert "hydra.launcher.wait=false is for hydra/sweeper=grid" in done.text
    assert "Traceback" not in done.text
    assert not sweep.states()
    assert not slurm.squeue()


def test_a_refusal(slurm, sweep):
    done = sweep.run("x=1,2", NO_WAIT, "hydra.launcher.partition=nowhere")
    assert done.status == 1, done
    assert done.text.count("nowhere") == 1, done
    assert "PENDING" not in sweep.states().values()


def status(slurm, sweep):
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.status", str(sweep.outputs), "--json"],
        env=slurm.env,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)
