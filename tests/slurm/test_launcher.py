"""Sweeps with ``hydra/launcher=slurm`` on a real Slurm: what users of it meet."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from slurm_cluster import processes, until
from slurm_sweeps import WORDS

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


def test_a_node_dies(slurm, sweep, tmp_path):
    """Slurm may put the job back into its queue, or not."""
    twin = type(sweep)(slurm, tmp_path / "twin")
    for one in (sweep, twin):
        one.plan({1: "gate"})
    try:
        where = "hydra.launcher.nodelist=node${x}"
        back = sweep.start("x=1,2", where)
        lost = twin.start("x=1,2", where, "+hydra.launcher.additional_parameters.no-requeue=true")
        sweep.until_started(1)
        twin.until_started(1)
        with slurm.stopped("node1"):
            for one in (sweep, twin):
                _die(slurm, one.job(1))
            slurm.down("node1")
            noticed = twin.until_states({1: "LOST", 2: "COMPLETED"})
            print(f"LOST {noticed:.1f} s after its node died")
            done = lost.wait()
            assert done.status == 1, done
            assert "NODE_FAIL" in twin.records()[1]["error"]["message"]
            assert "node1" in twin.records()[1]["error"]["message"]
            # The other waits for the node; it is no end.
            assert back.is_going_on
        began = time.monotonic()
        sweep.open()
        slurm.resume("node1")
        done = back.wait()
        print(f"done {time.monotonic() - began:.1f} s after its node came back")
    finally:
        twin.end()
    assert done.status == 0, done
    assert sweep.states() == {1: "COMPLETED", 2: "COMPLETED"}
    assert sweep.started() == [1, 1, 2]
    record = sweep.records()[1]
    assert record["return_value"]["attempt"] == 2
    assert [attempt["state"] for attempt in record["attempts"]] == ["LOST"]
    assert record["attempts"][0]["started_at"] < record["started_at"]


def _die(slurm, job):
    """Nobody on the job's node tells Slurm anything any more."""
    pids = slurm.job_processes(job)
    slurmstepd = processes()[min(pids)]
    assert "slurmstepd" in Path(f"/proc/{slurmstepd}/cmdline").read_text()
    for pid in (slurmstepd, *pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_node_is_taken_down(slurm, sweep):
    """Slurm then asks its jobs to end; nobody has cancelled them."""
    sweep.plan({1: "gate"})
    running = sweep.start("x=1", "+hydra.launcher.additional_parameters.no-requeue=true")
    sweep.until_started(1)
    slurm.down(slurm.job(sweep.job(1))["NodeList"])
    done = running.wait(30)
    assert done.status == 1, done
    record = sweep.records()[1]
    assert record["state"] == "LOST", record
    assert "NODE_FAIL" in record["error"]["message"]


@pytest.mark.parametrize("how", [None, "disabled", "down", "hangs"])
def test_scancel(slurm, sweep, how):
    """Jobs that somebody cancels read CANCELLED soon, with accounting and without."""
    sweep.plan({"all": "gate"})
    took = {}
    words = ("x=range(6)", "hydra.launcher.array_parallelism=2")
    held = ("x=range(6,9)", "+hydra.launcher.additional_parameters.hold=true")
    if how is None:
        _cancel(slurm, sweep, words, held, took)
    else:
        with slurm.without_sacct(how):
            _cancel(slurm, sweep, words, held, took)
    print(f"sacct {how or 'there'}:", ", ".join(f"{k} {v:.1f} s" for k, v in took.items()))
    assert max(took.values()) < NOTICED_S


def _cancel(slurm, sweep, words, held, took):
    other = sweep.start(*held)
    running = sweep.start(*words)
    sweep.until_started(0, 1)
    other.says("JobHeld", timeout=15)
    job = running.array
    # One task of an array that waits.
    slurm.run("scancel", f"{job}_2")
    took["a waiting task"] = sweep.until_states({2: "CANCELLED"})
    # A whole array that waits.
    slurm.run("scancel", other.array)
    took["a waiting array"] = sweep.until_states(dict.fromkeys((6, 7, 8), "CANCELLED"))
    began = time.monotonic()
    ended = other.wait(NOTICED_S)
    took["the end of its launcher"] = time.monotonic() - began
    assert ended.status != 0, ended
    # One that runs.
    slurm.run("scancel", f"{job}_1")
    took["a running task"] = sweep.until_states({1: "CANCELLED"})
    sweep.open()
    done = running.wait()
    assert done.status != 0, done
    states = sweep.states()
    assert {x for x in states if states[x] == "CANCELLED"} == {1, 2, 6, 7, 8}
    assert {x for x in states if states[x] == "COMPLETED"} == {0, 3, 4, 5}
    assert sweep.started() == [0, 1, 3, 4, 5]
    records = sweep.records()
    for x in (1, 2, 6, 7, 8):
        assert records[x]["error"]["message"], records[x]
    assert records[2]["started_at"] is None


@pytest.mark.parametrize("accounting", [True, False])
def test_jobs_that_slurm_forgot(slurm, sweep, accounting):
    """squeue shows jobs that ended for some minutes only."""
    sweep.plan({1: "gate", 2: "gate"})
    # As after MinJobAge, whatever the format.
    real = slurm.run("which", "squeue").stdout.strip()
    forgets = (
        f"#!/bin/sh\n{real} \"$@\" | grep -v -E 'CANCELLED|COMPLETED|FAILED|\\bCA\\b'\nexit 0\n"
    )
    with slurm.shim("squeue", forgets):
        running = sweep.start("x=range(1,5)", "hydra.launcher.array_parallelism=1")
        sweep.until_started(1)
        job = running.array
        if accounting:
            slurm.run("scancel", f"{job}_2")
            took = sweep.until_states({3: "CANCELLED"})
        else:
            with slurm.without_sacct():
                slurm.run("scancel", f"{job}_2")
                took = sweep.until_states({3: "CANCELLED"})
        sweep.open(1)
        sweep.until_started(2)
        # All its processes at once: nobody is left to say how it ended.
        slurm.kill_job_process(f"{job}_1")
        sweep.until_states({2: {"FAILED", "LOST"}})
        done = running.wait()
    print(f"sacct {accounting}: a forgotten task noticed after {took:.1f} s")
    assert took < NOTICED_S
    assert done.status != 0
    assert sweep.states()[1] == sweep.states()[4] == "COMPLETED"


def test_slurmctld_away(slurm, sweep):
    """A controller that is away for a while ends nothing; without one there is no sweep."""
    sweep.plan({1: "gate", 2: "gate", 3: "gate"})
    running = sweep.start("x=1,2,3", "hydra.launcher.array_parallelism=2")
    sweep.until_started(1, 2)
    with slurm.stopped("slurmctld"):
        running.says("What runs goes on", timeout=30)
        sweep.open(1)
        running.says("Completed 1 out of 3")
        assert sweep.states()[2] == "RUNNING"
        assert sweep.states()[3] == "PENDING"
        refused = sweep.run("x=9")
        assert refused.status == 1, refused
        assert 9 not in sweep.states(), refused
        assert "Slurm's" in refused.text
        assert "Traceback" not in refused.text, refused
    running.says("Slurm answers again", timeout=30)
    sweep.open()
    done = running.wait()
    assert done.status == 0, done
    assert sweep.started() == [1, 2, 3]


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


def _quoted(text):
    """As Hydra reads a text that may hold anything."""
    return "'" + text.replace("'", "\\'") + "'"


REFUSED = {
    "hydra.sweep.dir=out%put": "'out%put'",
    "hydra.launcher.gpus_per_node=9": "sbatch refuses",
    "hydra.launcher.partition=nowhere": "nowhere",
    "hydra.launcher.cpus_per_task=x": "hydra.launcher",
    "hydra.launcher.name='a\nb'": "one line",
    "hydra.launcher.array_parallelism=0": "array_parallelism",
    "hydra.launcher.on_interrupt=no": "on_interrupt",
    "+hydra.launcher.additional_parameters.no-such-flag=1": "no-such-flag",
}


@pytest.mark.parametrize(("word", "said"), REFUSED.items(), ids=range(len(REFUSED)))
def test_refused(sweep, word, said):
    """What cannot be is told in a sentence, and leaves nothing behind that waits for ever."""
    done = sweep.run("x=1,2", word, timeout=20)
    assert done.status == 1, done
    assert said in done.text
    assert "Traceback" not in done.text, done
    assert done.text.count(said) == 1, done
    assert "PENDING" not in sweep.states().values()
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


def test_held_and_put_back_by_hand(slurm, sweep):
    """What Slurm's own tools do to jobs: hold, release, suspend, requeue."""
    sweep.plan({1: "gate", 2: "gate"})
    running = sweep.start("x=1,2,3", "hydra.launcher.array_parallelism=2")
    sweep.until_started(1, 2)
    slurm.scontrol("hold", sweep.job(3))
    running.says("JobHeld")
    slurm.scontrol("suspend", sweep.job(2))
    slurm.scontrol("requeue", sweep.job(1))
    until(lambda: sweep.started().count(1) == 2, 60)
    sweep.open()
    slurm.scontrol("resume", sweep.job(2))
    slurm.scontrol("release", sweep.job(3))
    done = running.wait()
    assert done.status == 0, done
    assert set(sweep.states().values()) == {"COMPLETED"}
    assert sweep.started() == [1, 1, 2, 3]
    first = sweep.records()[1]
    assert first["return_value"]["attempt"] == 2
    assert len(first["attempts"]) == 1, first["attempts"]


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
