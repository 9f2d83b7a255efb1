"""The simulated cluster itself: that it is a Slurm, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Cluster, SlurmError, descendants, processes, until


@pytest.fixture
def submit(slurm, tmp_path):
    """Submits a line for bash; its output goes to `<job>.out` in `tmp_path`."""

    def run(line, *words):
        return slurm.sbatch(
            f"--chdir={tmp_path}", "--output=%j.out", *words, script=f"#!/bin/bash\n{line}\n"
        )

    return run


def rows(found):
    return {row["JobID"]: (row["State"], row["ExitCode"]) for row in found}


def test_jobs_run_and_accounting_knows_how_they_ended(slurm, submit, tmp_path):
    good = submit("echo on $SLURMD_NODENAME")
    bad = submit("exit 3")
    assert rows(slurm.wait(good, bad)) == {good: ("COMPLETED", "0:0"), bad: ("FAILED", "3:0")}
    assert (tmp_path / f"{good}.out").read_text().split()[1] in slurm.nodes
    assert slurm.job(bad)["JobState"] == "FAILED"
    assert slurm.job(1) == {}


def test_steps_run_on_several_nodes(slurm):
    done = slurm.run("srun", "--nodes=2", "printenv", "SLURMD_NODENAME")
    first, second = done.stdout.split()
    assert first != second
    assert {first, second} <= set(slurm.nodes)


def test_gpus_are_given(slurm, submit, tmp_path):
    line = "echo $CUDA_VISIBLE_DEVICES; sleep 60"
    jobs = [submit(line, "--gres=gpu:1", "--nodelist=node2") for _ in range(3)]
    first, second, third = (tmp_path / f"{job}.out" for job in jobs)
    until(lambda: all(path.exists() and path.read_text() for path in (first, second)))
    assert {first.read_text(), second.read_text()} == {"0\n", "1\n"}
    assert not third.exists()
    states = {job["JOBID"]: job["STATE"] for job in slurm.squeue()}
    assert [states[job] for job in jobs] == ["RUNNING", "RUNNING", "PENDING"]


def test_arrays(slurm, submit, tmp_path):
    job = submit("exit $SLURM_ARRAY_TASK_ID", "--array=0-2%2")
    assert rows(slurm.wait(job)) == {
        f"{job}_0": ("COMPLETED", "0:0"),
        f"{job}_1": ("FAILED", "1:0"),
        f"{job}_2": ("FAILED", "2:0"),
    }
    assert slurm.wait(f"{job}_1")[0]["ExitCode"] == "1:0"


def test_arrays_have_an_end(submit):
    submit("true", "--array=0-29%1")
    with pytest.raises(SlurmError, match="Invalid job array specification"):
        submit("true", "--array=0-30")


def test_scancel(slurm, submit):
    running, waiting = submit("sleep 60"), submit("true", "--hold")
    until(lambda: slurm.job_processes(running))
    slurm.run("scancel", running, waiting)
    found = slurm.wait(running, waiting)
    assert {row["State"] for row in found} == {"CANCELLED by 0"}


def test_tasks_that_never_start(slurm, submit):
    job = submit("sleep 60", "--array=0-29%1")
    until(lambda: slurm.job_processes(f"{job}_0"))
    slurm.run("scancel", f"{job}_[1,3,5,7,9,11,13,15,17,19,21,23,25,27]")
    slurm.run("scancel", job)
    found = slurm.wait(job)
    assert f"{job}_0" in rows(found)
    assert {row["State"] for row in found} == {"CANCELLED by 0"}
    assert not any("[" in row["JobID"] for row in found)
    assert slurm_cluster.expand("7_[1-3,5%2]") == ["7_1", "7_2", "7_3", "7_5"]


def test_the_queue_is_emptied_without_waiting_for_kill_wait(slurm, submit):
    jobs = [submit("trap '' TERM; while :; do sleep 1; done") for _ in range(2)]
    submit("true", "--array=0-20", "--exclusive")
    until(lambda: all(slurm.job_processes(job) for job in jobs))
    slurm.cancel_all()
    assert slurm.squeue() == []
    assert not any(slurm.job_processes(job) for job in jobs)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("disabled", "Slurm accounting storage is disabled"),
        ("down", "Problem talking to the database: Connection refused"),
    ],
)
def test_without_accounting(slurm, submit, how, says):
    with slurm.without_sacct(how):
        job = submit("exit 4")
        until(lambda: slurm.job(job)["JobState"] == "FAILED")
        assert slurm.job(job)["ExitCode"] == "4:0"
        with pytest.raises(SlurmError, match=says):
            slurm.sacct(job)
    # What happened meanwhile is told when it is back.
    assert rows(slurm.wait(job)) == {job: ("FAILED", "4:0")}


def test_accounting_that_hangs(slurm, submit):
    with slurm.without_sacct("hangs"):
        job = submit("true")
        until(lambda: slurm.job(job)["JobState"] == "COMPLETED")
        with pytest.raises(subprocess.TimeoutExpired):
            slurm.run("sacct", "--jobs", job, timeout=1)
    slurm.wait(job)


def test_programs_are_shimmed_for_who_runs_already(slurm):
    with slurm.shim("squeue", "#!/bin/sh\necho mine\n"):
        assert slurm.run("squeue").stdout == "mine\n"
    assert "JOBID" in slurm.run("squeue").stdout


def test_nodes_drain_and_go_down(slurm, submit):
    slurm.drain("node1")
    slurm.down("node2")
    states = slurm.node_states()
    assert (states["node1"], states["node2"], states["node3"]) == ("IDLE+DRAIN", "DOWN", "IDLE")
    job = submit("true", "--nodelist=node1")
    until(lambda: slurm.squeue()[0]["REASON"] not in {"None", "Priority"})
    slurm.resume("node1", "node2")
    assert slurm.node_states()["node2"] == "IDLE"
    assert rows(slurm.wait(job)) == {job: ("COMPLETED", "0:0")}


def test_a_node_goes_down_below_a_job(slurm, submit):
    fixed, moved = (
        submit("sleep 60", "--nodelist=node1", "--no-requeue"),
        submit("sleep 60", "--nodelist=node2"),
    )
    until(lambda: slurm.job_processes(fixed) and slurm.job_processes(moved))
    slurm.down("node1")
    slurm.down("node2")
    until(lambda: slurm.job(fixed)["JobState"] == "NODE_FAIL")
    until(lambda: slurm.job(moved)["Restarts"] == "1")
    assert slurm.job(moved)["JobState"] == "PENDING"


def test_processes_of_jobs_are_killed(slurm, submit):
    script, child = submit("exec sleep 60"), submit("sleep 60; exit 5")
    task = submit("sleep 60", "--array=4,5")
    assert len(slurm.kill_job_process(script)) == 1
    assert len(slurm.kill_job_process(child, match="sleep")) == 1
    assert len(slurm.kill_job_process(f"{task}_4", signal.SIGTERM, match="sleep")) == 1
    assert rows(slurm.wait(script, child, f"{task}_4")) == {
        script: ("FAILED", "0:9"),
        child: ("FAILED", "5:0"),
        f"{task}_4": ("FAILED", "15:0"),
    }
    # The shell's code was 143; sacct takes 128 off what is above it.
    assert slurm.job(f"{task}_4")["ExitCode"] == "143:0"
    assert slurm.job_processes(f"{task}_5")


def test_slurmctld_restarts_below_jobs(slurm, submit):
    job = submit("sleep 1")
    until(lambda: slurm.job_processes(job))
    # Every client tries for 9 seconds before it says that it cannot contact slurmctld.
    with slurm.stopped("slurmctld"), pytest.raises(subprocess.TimeoutExpired):
        slurm.run("squeue", timeout=1)
    until(lambda: slurm.job(job)["JobState"] == "COMPLETED")


def test_a_machine_without_slurm_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert slurm_cluster.why_not() == (
        "Slurm is not installed: make test-slurm installs it (root, Debian/Ubuntu)"
    )


# Nothing stays.

HOLDER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from cluster import Cluster, descendants, until

with Cluster(nodes=1) as slurm:
    job = slurm.sbatch("--chdir=/tmp", "--output=/dev/null", "--wrap", "trap '' TERM; sleep 1000")
    until(lambda: slurm.job_processes(job))
    keeper = slurm._keeper.pid
    told = {"folder": str(slurm.folder), "pids": [keeper, *descendants(keeper)]}
    told["times"] = slurm.start_s
    print(json.dumps(told), flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def installed():
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)


def listening(folder):
    """Unix sockets of a cluster."""
    return [line for line in Path("/proc/net/unix").read_text().splitlines() if folder in line]


def gone(pids, folder):
    return (
        not (processes().keys() & set(pids)) and not Path(folder).exists() and not listening(folder)
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_of_a_process_that_is_killed(installed, number):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(Path(slurm_cluster.__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as holder:
        told = json.loads(holder.stdout.readline())
        assert processes().keys() >= set(told["pids"])
        # The keeper, six daemons, slurmstepd, the job's shell and what it runs.
        assert len(told["pids"]) >= 9
        holder.send_signal(number)
        until(lambda: gone(told["pids"], told["folder"]), 10, "the end of the cluster")


def test_up_and_down_twice(installed):
    slurm = Cluster(nodes=1, gpus=0, conf={"MaxArraySize": 5})
    for _ in range(2):
        with slurm:
            folder = str(slurm.folder)
            assert Path(folder) in Path(slurm.env["SLURM_CONF"]).parents
            assert listening(folder)
            assert slurm.node_states() == {"node1": "IDLE"}
            assert "MaxArraySize            = 5" in slurm.scontrol("show", "config")
            pids = [slurm._keeper.pid, *descendants(slurm._keeper.pid)]
        assert gone(pids, folder)
        slurm.stop()


def test_a_start_that_fails_says_why_and_leaves_nothing(installed):
    slurm = Cluster(nodes=1, conf={"SelectType": "select/nonesuch"})
    with pytest.raises(SlurmError, match=r"(?s)Slurm did not start.*select/nonesuch"):
        slurm.start()
    assert not slurm.folder.exists()
    assert not listening(str(slurm.folder))


def test_the_command_line(installed):
    done = subprocess.run(
        [
            *(sys.executable, slurm_cluster.__file__, "--nodes=2", "--gpus=0"),
            *("--run", "sinfo --noheader --Node; dirname $SLURM_CONF; exit 7"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    *nodes, folder = done.stdout.splitlines()
    assert [line.split()[0] for line in nodes] == ["node1", "node2"]
    assert done.returncode == 7
    assert not os.path.exists(folder)
