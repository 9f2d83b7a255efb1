"""Sweeps with ``hydra/launcher=slurm`` on a real Slurm: what users of it meet."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import processes
from slurm_sweeps import WORDS, Sweeps

# Until a cancelled job reads CANCELLED, however Slurm tells.
NOTICED_S = 15.0


def test_ends_of_all_kinds(slurm, sweep):
    """What ends badly is FAILED at once, with its cause; the others end as ever, and return."""
    sweep.plan(
        {
            2: "raise",
            3: "exit",
            4: "kill",
            5: "gate",
            6: "gate",
            7: "gate",
            8: "sys.exit",
        }
    )
    running = sweep.start("x=range(1,9)", "hydra.launcher.gpus_per_node=1")
    bad = sweep.until_states(dict.fromkeys((2, 3, 4, 8), "FAILED"))
    print(f"four bad ends after {bad:.1f} s")
    # A run that does not end hides nothing.
    assert sweep.records()[7]["state"] == "RUNNING"
    running.says("ValueError: as asked", "exited with status 3", "SIGKILL", "good bye")
    sweep.until_started(5, 6, 7)
    # The first process of one job, and all of another.
    job = sweep.job(5)
    os.kill(min(slurm.job_processes(job)), signal.SIGKILL)
    slurm.kill_job_process(sweep.job(6))
    ends = {"FAILED", "LOST"}
    first = sweep.until_states({5: ends})
    print(f"killed jobs noticed after {first:.1f} s and {sweep.until_states({6: ends}):.1f} s more")
    sweep.open(7)
    done = running.wait()

    assert done.status == 1, done
    records = sweep.records()
    assert {x: records[x]["state"] for x in (1, 7)} == {1: "COMPLETED", 7: "COMPLETED"}
    assert [records[x]["return_value"]["score"] for x in (1, 7)] == [1, 7]
    assert [records[x]["returncode"] for x in (1, 2, 3, 4)] == [0, 1, 3, -9]
    assert all(record["ended_at"] for record in records.values())
    assert all(records[x]["error"]["message"] for x in (2, 3, 4, 5, 6, 8))
    assert records[7]["metrics"]["loss"] == 3.5
    assert records[5]["metrics"]["loss"] == 2.5, "what was logged before the end is kept"
    for name in ("train_stderr.log", "run.json"):
        text = (sweep.directory_of(2) / name).read_text()
        assert "Traceback" in text
        assert "ValueError: as asked" in text
    assert "hello from 7" in (sweep.directory_of(7) / "train_stdout.log").read_text()
    # Slurm's own word, per run.
    words = sweep.sacct()
    by_run = {x: words[records[x]["slurm_job_id"]] for x in records}
    assert by_run == dict.fromkeys((1, 7), "COMPLETED") | dict.fromkeys(
        (2, 3, 4, 5, 6, 8), "FAILED"
    )
    # The results are complete; the sweep ends in a sentence.
    (results,) = sweep.outputs.glob(".sweeps/*/train_sweep_results.json")
    assert len(json.loads(results.read_bytes())) == 8
    assert "6 of 8 runs failed" in done.text
    assert "Traceback" not in done.text, done

    # The same command again does what is missing, and nothing else.
    sweep.plan({})
    again = sweep.run("x=range(1,9)", "hydra.launcher.gpus_per_node=1")
    assert again.status == 0, again
    assert sweep.started() == sorted([1, 7] + [2, 3, 4, 5, 6, 8] * 2)
    assert set(sweep.states().values()) == {"COMPLETED"}
    assert [record["state"] for record in sweep.records()[2]["attempts"]] == ["FAILED"]
    assert [record["return_value"]["attempt"] for record in sweep.records().values()] == [
        *(1, 2, 2, 2, 2, 2, 1, 2),
    ]
    # And once more, nothing.
    third = sweep.run("x=range(1,9)", "hydra.launcher.gpus_per_node=1")
    assert third.status == 0, third
    assert "8 of 8 done" in third.text
    assert "Submitted" not in third.text


def test_nodes_fail_and_jobs_are_put_back(slurm, sweep, tmp_path):
    """A job that starts anew is another attempt; one that Slurm gives up is LOST."""
    twin = Sweeps(slurm, tmp_path / "twin")
    for one in (sweep, twin):
        one.plan(dict.fromkeys((1, 2, 3), "gate"))
    try:
        where = "hydra.launcher.nodelist=node${x}"
        back = sweep.start("x=1,3,4", where)
        lost = twin.start("x=1,2,4", where, "+hydra.launcher.additional_parameters.no-requeue=true")
        sweep.until_started(1, 3)
        twin.until_started(1, 2)
        slurm.scontrol("requeue", sweep.job(3))
        # One node is taken out of service: Slurm asks its jobs to end. One dies.
        slurm.down("node2")
        with slurm.stopped("node1"):
            for one in (sweep, twin):
                _die(slurm, one.job(1))
            slurm.down("node1")
            noticed = twin.until_states({1: "LOST", 2: "LOST", 4: "COMPLETED"})
            print(f"LOST {noticed:.1f} s after nodes failed")
            done = lost.wait()
            # The other waits for the node; it is no end.
            assert back.is_going_on
        assert done.status == 1, done
        for x in (1, 2):
            message = twin.records()[x]["error"]["message"]
            assert "NODE_FAIL" in message
            assert f"node{x}" in message
        sweep.open()
        began = time.monotonic()
        slurm.resume("node1")
        done = back.wait()
        print(f"done {time.monotonic() - began:.1f} s after the node came back")
    finally:
        twin.end()
    assert done.status == 0, done
    assert sweep.started() == [1, 1, 3, 3, 4]
    assert set(sweep.states().values()) == {"COMPLETED"}
    for x, states in {1: ["LOST"], 3: ["CANCELLED"], 4: []}.items():
        record = sweep.records()[x]
        assert [attempt["state"] for attempt in record["attempts"]] == states
        assert record["return_value"]["attempt"] == len(states) + 1
        assert all(attempt["started_at"] < record["started_at"] for attempt in record["attempts"])


def _die(slurm, job):
    """Nobody on the job's node tells Slurm anything any more."""
    pids = slurm.job_processes(job)
    slurmstepd = processes()[min(pids)]
    assert "slurmstepd" in Path(f"/proc/{slurmstepd}/cmdline").read_text()
    for pid in (slurmstepd, *pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("how", [None, "disabled", "down", "hangs"])
def test_scancel(slurm, sweep, how):
    """Jobs that somebody cancels read CANCELLED soon, with accounting and without."""
    sweep.plan({"all": "gate"})
    took = {}
    with slurm.without_sacct(how) if how else contextlib.nullcontext():
        _cancel(slurm, sweep, took)
    print(f"sacct {how or 'there'}:", ", ".join(f"{k} {v:.1f} s" for k, v in took.items()))
    assert max(took.values()) < NOTICED_S


def _cancel(slurm, sweep, took):
    held = sweep.start("x=range(4,6)", "+hydra.launcher.additional_parameters.hold=true")
    running = sweep.start("x=range(4)", "hydra.launcher.array_parallelism=2")
    sweep.until_started(0, 1)
    # (Said for "JobHeldUser", and for "JobHeldAdmin", which it is for root.)
    held.says("JobHeld")
    job = running.array
    began = time.monotonic()
    slurm.run("scancel", f"{job}_1", f"{job}_2", held.array)
    for what, x in {"a running task": 1, "a waiting array": 5, "a waiting task": 2}.items():
        sweep.until_states({x: "CANCELLED"})
        took[what] = time.monotonic() - began
    ended = held.wait(NOTICED_S)
    assert ended.status != 0, ended
    sweep.open()
    done = running.wait()
    assert done.status != 0, done
    assert sweep.states() == {
        **dict.fromkeys((1, 2, 4, 5), "CANCELLED"),
        **dict.fromkeys((0, 3), "COMPLETED"),
    }
    assert sweep.started() == [0, 1, 3]
    records = sweep.records()
    assert all(records[x]["error"]["message"] for x in (1, 2, 4, 5))
    assert [records[x]["started_at"] is None for x in (1, 2, 4, 5)] == [False, True, True, True]


@pytest.mark.parametrize("accounting", [True, False])
def test_jobs_that_slurm_forgot(slurm, sweep, accounting):
    """squeue shows jobs that ended for some minutes only."""
    sweep.plan({"all": "gate"})
    # As after MinJobAge, whatever the format.
    real = slurm.run("which", "squeue").stdout.strip()
    ends = "CANCELLED|COMPLETED|FAILED|\\bCA\\b"
    forgets = f"#!/bin/sh\n{real} \"$@\" | grep -v -E '{ends}'\nexit 0\n"
    without = contextlib.nullcontext() if accounting else slurm.without_sacct()
    with slurm.shim("squeue", forgets), without:
        running = sweep.start("x=range(4)", "hydra.launcher.array_parallelism=3")
        sweep.until_started(0, 1, 2)
        began = time.monotonic()
        slurm.run("scancel", sweep.job(3))
        # All its processes at once: nobody is left to say how it ended.
        slurm.kill_job_process(sweep.job(1))
        sweep.until_states({1: {"FAILED", "LOST"}, 3: "CANCELLED"})
        took = time.monotonic() - began
        sweep.open()
        done = running.wait()
    print(f"forgotten jobs, sacct {accounting}: {took:.1f} s")
    assert took < NOTICED_S
    assert done.status != 0
    assert sweep.states()[0] == sweep.states()[2] == "COMPLETED"


def test_slurmctld_away(slurm, sweep, tmp_path):
    """A controller that is away for a while ends nothing; without one there is no sweep."""
    twin = Sweeps(slurm, tmp_path / "twin")
    for one in (sweep, twin):
        one.plan({1: "gate", 2: "gate", 3: "gate"})
    try:
        running = sweep.start("x=1,2,3", "hydra.launcher.array_parallelism=2")
        stopped = twin.start("x=1,2")
        sweep.until_started(1, 2)
        twin.until_started(1, 2)
        with slurm.stopped("slurmctld"):
            new = sweep.start("x=9")
            stopped.signal(signal.SIGINT)
            sweep.open(1)
            running.says("Completed 1 out of 3")
            # Nothing can be cancelled then; it says so, and what to do.
            ended = stopped.wait(30)
            assert ended.status == 130, ended
            assert "scancel" in ended.text
            assert "Left to Slurm" in ended.text
            refused = new.wait(30)
            assert refused.status == 1, refused
            assert "Slurm's" in refused.text
            for done in (ended, refused):
                assert "Traceback" not in done.text, done
            running.says("What runs goes on", timeout=30)
            assert sweep.states() == {1: "COMPLETED", 2: "RUNNING", 3: "PENDING"}
        running.says("Slurm answers again", timeout=30)
        for one in (sweep, twin):
            one.open()
        again = twin.run("x=1,2")
        done = running.wait()
    finally:
        twin.end()
    assert done.status == 0, done
    assert sweep.started() == [1, 2, 3]
    assert again.status == 0, again
    assert twin.started() == [1, 2]


def test_composed_once(slurm, sweep):
    """What is edited while jobs wait changes none of them."""
    model = sweep.directory / "conf" / "model"
    model.mkdir(parents=True)
    (model / "wide.yaml").write_text("width: 7\n")
    sweep.plan({1: "gate"})
    running = sweep.start(
        *("+model=wide", "x=1,2", "hydra.launcher.array_parallelism=1"),
        base=("--config-dir=conf", *WORDS),
    )
    sweep.until_started(1)
    (model / "wide.yaml").write_text("width: 1000\n")
    sweep.open()
    done = running.wait()
    assert done.status == 0, done
    assert [record["return_value"]["width"] for record in sweep.records().values()] == [7, 7]


def test_resources_of_each_run(slurm, sweep):
    """Runs that ask for the same share an array; the arrays share the number at a time."""
    sweep.plan({"all": "sleep 0.2"})
    done = sweep.run(
        *("x=1,2", "n=1,2", "hydra.launcher.cpus_per_task=${n}"),
        "hydra.launcher.array_parallelism=1",
    )
    assert done.status == 0, done
    told = [note[4] for note in sweep.notes("start")]
    assert sorted(one["SLURM_CPUS_PER_TASK"] for one in told) == ["1", "1", "2", "2"]
    arrays = {one["SLURM_ARRAY_JOB_ID"]: one["SLURM_CPUS_PER_TASK"] for one in told}
    assert sorted(arrays.values()) == ["1", "2"]
    assert sweep.at_a_time() == 1
    rows = slurm.wait(*arrays)
    assert {(row["JobID"].split("_")[0], row["AllocCPUS"]) for row in rows} == set(arrays.items())


def test_more_runs_than_an_array_may_have(sweep):
    """65 runs, 30 in an array, 10 at a time over all."""
    sweep.plan({"all": "sleep 0.2"})
    done = sweep.run("x=range(65)", "hydra.launcher.array_parallelism=10")
    print(f"65 runs in {done.seconds:.1f} s, at most {sweep.at_a_time()} at a time")
    assert done.status == 0, done
    assert sweep.started() == list(range(65))
    assert set(sweep.states().values()) == {"COMPLETED"}
    assert len({job.split("_")[0] for job in sweep.jobs()}) == 3
    assert sweep.at_a_time() <= 10


HOSTILE = [
    "it's",
    'a "quote"',
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned;b",
    "two\nlines",
    "\u00e4\u00f6\u00fc \u4f60\u597d \U0001f600",
    "x" * 300,
    "../../pwned",
    "-n --help %j %a \\ {} #",
]


def test_hostile_texts(slurm, sweep):
    """Values, directories, names of jobs: none of them reaches a shell."""
    place = sweep.directory / 'it\'s a "$(touch pwned)" `touch pwned`; place'
    words = [
        "text=" + ",".join(map(_quoted, HOSTILE)),
        "hydra.sweep.dir=" + _quoted(str(place)),
        "hydra.launcher.name=" + _quoted("a $(touch pwned) 'b' \"c"),
        "hydra.launcher.comment=" + _quoted("`touch pwned` ; # \u00e4"),
    ]
    done = sweep.run(*words)
    assert done.status == 0, done
    records = [json.loads(path.read_bytes()) for path in place.glob("*/run.json")]
    assert sorted(record["return_value"]["text"] for record in records) == sorted(HOSTILE)
    assert not list(sweep.directory.rglob("pwned"))
    assert not (sweep.directory.parent / "pwned").exists()
    again = sweep.run(*words)
    assert again.status == 0, again
    assert "Submitted" not in again.text, again


def test_a_percent_sign_in_the_current_directory(slurm, tmp_path):
    """Slurm would put its logs elsewhere."""
    sweep = Sweeps(slurm, tmp_path / "100%x")
    try:
        done = sweep.run("x=1")
    finally:
        sweep.end()
    assert done.status == 1, done
    assert "100%x" in done.text
    assert "Traceback" not in done.text
    assert [path.name for path in tmp_path.iterdir()] == ["100%x"]


def _quoted(text):
    """As Hydra reads a text that may hold anything."""
    return "'" + text.replace("'", "\\'") + "'"


REFUSED = {
    "hydra.sweep.dir=out%put": "out%put'",
    "hydra.launcher.gpus_per_node=9": "sbatch refuses",
    "hydra.launcher.partition=nowhere": "nowhere",
    "hydra.launcher.cpus_per_task=x": "hydra.launcher",
    "hydra.launcher.name='a\nb'": "one line",
    "hydra.launcher.array_parallelism=0": "array_parallelism",
    "hydra.launcher.on_interrupt=no": "on_interrupt",
    "+hydra.launcher.additional_parameters.no-such-flag=1": "no-such-flag",
}


def test_refused(sweep):
    """What cannot be is told in a sentence, and leaves nothing behind that waits for ever."""
    for word, said in REFUSED.items():
        done = sweep.run("x=1,2", word, timeout=20)
        assert done.status == 1, done
        assert done.text.count(said) == 1, done
        assert "Traceback" not in done.text, done
        assert "PENDING" not in sweep.states().values(), done
    assert not sweep.notes()
    again = sweep.run("x=1,2", timeout=40)
    assert again.status == 0, again
    assert sweep.states() == {1: "COMPLETED", 2: "COMPLETED"}
    assert [record["return_value"]["attempt"] for record in sweep.records().values()] == [1, 1]


def test_some_jobs_are_refused(sweep):
    """One of two arrays cannot be: the other is done, and the records say which."""
    done = sweep.run("x=1,2", "n=1,9", "hydra.launcher.gpus_per_node=${n}", timeout=60)
    assert done.status != 0, done
    records = [json.loads(path.read_bytes()) for path in sweep.outputs.glob("*/run.json")]
    found = {(record["hyperparams"]["n"], record["state"]) for record in records}
    assert found == {(1, "COMPLETED"), (9, "CANCELLED")}
    assert "sbatch refuses" in done.text


def test_stop_after_a_failure(sweep):
    """Nothing more is started; what runs goes on."""
    sweep.plan({1: "gate, raise", 2: "gate", 3: "gate", 4: "gate"})
    running = sweep.start(
        "x=range(1,9)",
        "hydra.launcher.array_parallelism=3",
        "hydra.callbacks.results.on_failure=stop",
    )
    sweep.until_started(1, 2, 3)
    # x=4 starts in place of x=2: the launcher may not know yet that it runs.
    sweep.open(2)
    sweep.until_started(4)
    sweep.open(1)
    running.says("nothing more is started")
    sweep.until_states({8: "CANCELLED"})
    assert {sweep.states()[x] for x in (3, 4)} == {"RUNNING"}, sweep
    sweep.open()
    done = running.wait()
    assert done.status == 1, done
    states = sweep.states()
    assert [states[x] for x in (1, 2, 3, 4)] == ["FAILED", *["COMPLETED"] * 3]
    # (x=5 may have started in place of x=1.)
    assert [states[x] for x in (6, 7, 8)] == ["CANCELLED"] * 3


def test_stop_when_the_first_fails_at_once(sweep):
    """What runs goes on, also where the launcher has not asked Slurm yet."""
    sweep.plan({1: "raise", 2: "sleep 1.5", 3: "sleep 1.5"})
    done = sweep.run("x=1,2,3", "hydra.callbacks.results.on_failure=stop")
    assert done.status == 1, done
    states = sweep.states()
    started = set(sweep.started())
    assert states[1] == "FAILED"
    assert {x: states[x] for x in (2, 3) if x in started} == dict.fromkeys(
        started - {1}, "COMPLETED"
    ), done


def test_what_keeps_jobs_from_starting(slurm, sweep):
    """Jobs that cannot start, or end before they have: it says why."""
    slurm.drain("node1")
    waiting = sweep.start("x=1", "hydra.launcher.nodelist=node1")
    broken = sweep.run("x=2", "hydra.launcher.setup=['echo why not >&2; exit 7']")
    assert broken.status == 1, broken
    assert sweep.states()[2] == "FAILED"
    message = sweep.records()[2]["error"]["message"]
    assert "exit code 7" in message
    assert "why not" in message
    (log,) = sweep.outputs.glob(".sweeps/*/slurm/*.err")
    assert str(log) in broken.text
    waiting.says("ReqNodeNotAvail")
    slurm.resume("node1")
    done = waiting.wait()
    assert done.status == 0, done
    assert done.text.count("ReqNodeNotAvail") == 1, done


def test_two_at_once(slurm, sweep):
    """The same command twice, before the first one's jobs are there: no run is done twice."""
    sweep.plan({"all": "gate"})
    real = slurm.run("which", "sbatch").stdout.strip()
    with slurm.shim("sbatch", f'#!/bin/sh\nsleep 1\nexec {real} "$@"\n'):
        twins = [sweep.start("x=range(3)") for _ in range(2)]
        sweep.until_started(0, 1, 2)
    sweep.open()
    for twin in twins:
        done = twin.wait()
        # One may find that the other has just taken a run.
        assert done.status == (1 if "by another launcher" in done.text else 0), done
    again = sweep.run("x=range(3)")
    assert again.status == 0, again
    assert sweep.started() == [0, 1, 2]
    assert set(sweep.states().values()) == {"COMPLETED"}


def test_inside_a_job(slurm, sweep):
    """Where the launcher itself is a task of an array: its variables are not those of its jobs."""
    command = shlex.join([sys.executable, "app.py", *WORDS, "x=1"])
    script = f"#!/bin/sh\ncd {sweep.directory}\n{command} > inside.log 2>&1\n"
    outer = ("--array=7", "--cpus-per-task=2", "--mem-per-cpu=50", "--output=/dev/null")
    job = slurm.sbatch(*outer, script=script)
    (row,) = slurm.wait(job)
    assert row["State"] == "COMPLETED", (sweep.directory / "inside.log").read_text()
    record = sweep.records()[1]
    assert record["state"] == "COMPLETED"
    assert [record["slurm_job_id"]] == sweep.jobs()
    (note,) = sweep.notes("start")
    assert note[4]["SLURM_CPUS_PER_TASK"] is None


def test_in_other_peoples_apps(slurm, sweep):
    """With Hydra's own sweeper, without our callback, names and directories."""
    done = sweep.run(
        *("x=1,2", "hydra.launcher.timeout_min=5"),
        base=("-m", "hydra/launcher=slurm"),
        cwd=sweep.directory,
    )
    assert done.status == 0, done
    assert sweep.started() == [1, 2]
    upstream = sweep.run(base=("hydra/launcher=submitit_slurm", "--cfg", "hydra"))
    assert "hydra_plugins.hydra_submitit_launcher" in upstream.text
    assert "hydra_orchestrator.slurm_launcher" not in upstream.text


def test_our_own_app(slurm, sweep):
    """There the name of Hydra's Slurm launcher is ours."""
    done = sweep.run(
        *("training.epochs=1,2", "hydra.launcher.timeout_min=5"),
        app=("-m", "orchestrator"),
        base=("-m", "hydra/launcher=submitit_slurm"),
    )
    assert done.status == 0, done
    assert "Submitted 2 runs" in done.text
    paths = sorted(sweep.outputs.glob("*/run.json"))
    records = [json.loads(path.read_bytes()) for path in paths]
    assert [record["state"] for record in records] == ["COMPLETED"] * 2
    assert all(record["slurm_job_id"] for record in records)
