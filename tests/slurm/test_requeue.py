"""Jobs that Slurm warns, and takes back into its queue: their runs go on where they were."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from slurm_sweeps import until

from orchestrator.slurm import within
from orchestrator.slurm.pack import JobTime, Pack
from orchestrator.slurm.within import PackSignals

EXAMPLE = Path(__file__).parents[2] / "examples" / "checkpoint"
# So short a limit that a warning always means it; no other job runs that long here.
LIMIT = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=20")
ONE_TIMEOUT = (*LIMIT, "hydra.launcher.max_num_timeout=1")
PACK = ("hydra.launcher.runs_per_job=6", "hydra.launcher.gpus_per_node=2")
# Slurm lets 10 s and more go by before it starts a job again.
AGAIN_S = 60.0

APP = """
import os
import signal
import subprocess
import sys
import time

import hydra

import app
import orchestrator
from beside import HOME

plain = app.behave


def is_open(cfg):
    return (HOME / "open").exists() or (HOME / f"open-{cfg.x}").exists()


def behave(what, cfg):
    if what == "save":
        end = time.monotonic() + 90
        while not (orchestrator.is_preempted() or is_open(cfg)):
            assert time.monotonic() < end
            time.sleep(0.02)
        if orchestrator.is_preempted():
            app.note("saved", cfg)
            raise orchestrator.Preempted(f"saved x={cfg.x}")
    if what == "child":
        script = "import orchestrator; files = [open('/dev/null') for _ in range(60)];"
        script += "print(orchestrator.is_preempted())"
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        app.note(f"script {said.stdout.strip()}", cfg)
        child = subprocess.Popen(["sleep", "80"])
        app.note("child", cfg)
        end = time.monotonic() + 60
        while not orchestrator.is_preempted():
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.3)
        app.note(f"child {child.poll()}", cfg)
        child.kill()
        child.wait()
    plain(what, cfg)


app.behave = behave


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    return app.main.__wrapped__(cfg)


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def together(slurm, tmp_path, sweep):
    """Runs scenarios at the same time, each with sweeps of its own: most of them wait for Slurm."""
    made = []

    def make(name):
        one = type(sweep)(slurm, tmp_path / name)
        (one.directory / "warned.py").write_text(APP)
        made.append(one)
        return one

    def run(*scenarios):
        with ThreadPoolExecutor(len(scenarios)) as pool:
            sweeps = [make(scenario.__name__) for scenario in scenarios]
            futures = [
                pool.submit(scenario, slurm, one)
                for scenario, one in zip(scenarios, sweeps, strict=True)
            ]
            errors = [future.exception() for future in futures]
        failed = [
            f"{one.directory.name}:\n{''.join(traceback.format_exception(error))}\n{one}"
            for one, error in zip(sweeps, errors, strict=True)
            if error is not None
        ]
        assert not failed, "\n".join(failed)

    yield run
    for one in made:
        one.end()


def warn(slurm, sweep, *xs):
    """Slurm's warning, as it comes before a time limit."""
    for job in dict.fromkeys(map(sweep.job, xs)):
        slurm.run("scancel", "--batch", "--signal=USR2", job)


def curve(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def example(sweep, **values):
    """A copy of the example, with other numbers in its config."""
    place = sweep.directory / "example"
    shutil.copytree(EXAMPLE, place)
    config = yaml.safe_load((place / "config.yaml").read_text())
    (place / "config.yaml").write_text(yaml.safe_dump(config | values))
    return place


def train(place, *words, warned=False):
    """The example as one run on this machine, told at its start that its time is nearly up."""
    code = "import sys, runpy, orchestrator.run as run; sys.argv[0] = 'train.py'; "
    code += "run.note_warning(); " if warned else ""
    code += "runpy.run_path('train.py', run_name='__main__')"
    words = ("hydra/callbacks=results", "seconds_per_epoch=0", *words)
    return subprocess.run([sys.executable, "-c", code, *words], cwd=place, check=False, timeout=30)


def states_of(attempts):
    return [(attempt["state"], (attempt["error"] or {}).get("type")) for attempt in attempts]


# --- jobs that are put back into the queue ---


def test_jobs_go_on_after_a_requeue(together):
    together(
        a_checkpoint_at_the_time_limit,
        a_pack_is_warned,
        a_pack_of_fresh_interpreters_is_warned,
        a_pack_is_put_back_by_slurm,
        a_pack_that_is_still_saving,
        runs_that_ignore_the_warning,
        ranks_are_warned,
        jobs_of_more_importance_come,
    )


def a_checkpoint_at_the_time_limit(slurm, sweep):
    """The example: it saves, waits in the queue, and its curve is whole in the end."""
    place = example(sweep, epochs=60, seconds_per_epoch=0.05)
    running = sweep.start("lr=0.1,0.3", *ONE_TIMEOUT, app="train.py", cwd=place)
    first = place / "outputs" / "lr_0.1"
    until(lambda: (first / "metrics.jsonl").exists() and len(curve(first)) > 5, 30, lambda: sweep)
    job = json.loads((first / "run.json").read_bytes())["slurm_job_id"]
    slurm.run("scancel", "--batch", "--signal=USR2", job)

    def waits():
        record = json.loads((first / "run.json").read_bytes())
        return record["state"] == "PENDING" and record

    until(waits, 10, lambda: sweep)
    record = waits()
    assert states_of(record["attempts"]) == [("TIMEOUT", "Preempted")]
    assert "saved after epoch" in record["attempts"][0]["error"]["message"]
    assert record["ended_at"] is None
    saved = curve(first)
    assert 5 < len(saved) < 60
    assert running.is_going_on
    done = running.wait(AGAIN_S)

    assert done.status == 0, done
    assert "2 completed" in done.text
    record = json.loads((first / "run.json").read_bytes())
    assert record["state"] == "COMPLETED"
    assert len(record["attempts"]) == 1
    assert f"goes on from epoch {len(saved)}" in (first / "train_stdout.log").read_text()
    # As if nothing had happened.
    assert train(place, "hydra.run.dir=alone").returncode == 0
    assert curve(first) == curve(place / "alone")
    assert [step for step, _ in curve(first)] == list(range(1, 61))
    assert record["return_value"] == curve(first)[-1][1]
    other = json.loads((place / "outputs" / "lr_0.3" / "run.json").read_bytes())
    assert (other["state"], other["attempts"]) == ("COMPLETED", [])


def a_pack_is_warned(slurm, sweep, *words):
    """What is done is not done again; what was saved goes on; what waited still waits."""
    sweep.plan({2: "save", 3: "save"})
    running = sweep.start("x=range(6)", *PACK, *words, app="warned.py")
    sweep.until_started(0, 1, 2, 3)
    warn(slurm, sweep, 2)
    sweep.until_states(dict.fromkeys((2, 3, 4, 5), "PENDING"))
    records = sweep.records()
    assert states_of(records[2]["attempts"]) == [("TIMEOUT", "Preempted")]
    assert records[5]["attempts"] == []
    sweep.open()
    done = running.wait(AGAIN_S)
    assert done.status == 0, done
    assert sweep.started() == [0, 1, 2, 2, 3, 3, 4, 5]
    records = sweep.records()
    assert {record["state"] for record in records.values()} == {"COMPLETED"}
    attempts = [records[x]["return_value"]["attempt"] for x in range(6)]
    assert attempts == [1, 1, 2, 2, 1, 1]
    assert "6 completed" in done.text, done
    (results,) = sweep.outputs.glob(".sweeps/*/train_sweep_results.json")
    assert len(json.loads(results.read_bytes())) == 6
    # (Far from its limit, the job was preempted.)
    assert sweep.slurm.job(sweep.jobs()[0])["Restarts"] == "1"


def a_pack_of_fresh_interpreters_is_warned(slurm, sweep):
    """Also where nothing that was done before answers: what this very sweep has done does."""
    words = ("hydra.launcher.queue.start_method=spawn", "hydra.callbacks.results.resume=false")
    a_pack_is_warned(slurm, sweep, *words)


def a_pack_is_put_back_by_slurm(slurm, sweep):
    """Nobody was warned. Meanwhile the same command waits for the same job."""
    sweep.plan({2: "gate", 3: "gate"})
    words = ("x=range(6)", *PACK)
    first = sweep.start(*words, "hydra.launcher.wait=false", app="warned.py").wait()
    assert first.status == 0, first
    sweep.until_started(0, 1, 2, 3)
    (job,) = sweep.jobs()
    slurm.scontrol("requeue", job)
    until(lambda: slurm.job(job)["JobState"] == "PENDING", 20, lambda: sweep)
    running = sweep.start(*words, app="warned.py")
    running.says("4 runs under way already")
    sweep.open()
    done = running.wait(AGAIN_S)
    assert done.status == 0, done
    assert "Submitted" not in done.text, done
    assert sweep.started() == [0, 1, 2, 2, 3, 3, 4, 5]
    records = sweep.records()
    assert {record["state"] for record in records.values()} == {"COMPLETED"}
    attempts = [records[x]["return_value"]["attempt"] for x in range(6)]
    assert attempts == [1, 1, 2, 2, 1, 1]
    assert [record["slurm_job_id"] for record in records.values()] == [job] * 6


def a_pack_that_is_still_saving(slurm, sweep):
    """What has saved goes on in the same job, whoever types the same command meanwhile."""
    sweep.plan({0: "save", 1: "gate"})
    words = ("x=0,1", "hydra.launcher.runs_per_job=2", "hydra.launcher.cpus_per_task=2")
    first = sweep.run(*words, "hydra.launcher.wait=false", app="warned.py")
    assert first.status == 0, first
    sweep.until_started(0, 1)
    warn(slurm, sweep, 0)
    until(lambda: sweep.notes("saved"), 10, lambda: sweep)
    running = sweep.start(*words, app="warned.py")
    running.says("2 runs under way already")
    sweep.open()
    done = running.wait(AGAIN_S)
    assert done.status == 0, done
    assert "Submitted" not in done.text, done
    assert sweep.states() == {0: "COMPLETED", 1: "COMPLETED"}
    assert sweep.started() == [0, 0, 1]
    assert states_of(sweep.records()[0]["attempts"]) == [("TIMEOUT", "Preempted")]


def runs_that_ignore_the_warning(slurm, sweep):
    """They are ended before the limit, and put back all the same; the second time for good."""
    sweep.plan({0: "gate", 1: "deaf, gate"})
    running = sweep.start(
        *("x=0,1", "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=2"),
        "hydra.launcher.max_num_timeout=1",
        app="warned.py",
    )
    sweep.until_started(0, 1)
    warn(slurm, sweep, 0, 1)
    took = sweep.until_states({0: "PENDING", 1: "PENDING"})
    print(f"a deaf run was put back after {took:.1f} s")
    for x in (0, 1):
        assert states_of(sweep.records()[x]["attempts"]) == [("TIMEOUT", "SLURM_TIMEOUT")]
    sweep.open(1)
    until(lambda: sweep.started() == [0, 0, 1, 1], AGAIN_S, lambda: sweep)
    warn(slurm, sweep, 0)
    # No attempt is left: nobody ends it before Slurm does.
    running.says("Completed 1 out of 2")
    assert sweep.states() == {0: "RUNNING", 1: "COMPLETED"}
    os.kill(min(slurm.job_processes(sweep.job(0))), signal.SIGTERM)
    done = running.wait()
    assert done.status == 1, done
    records = sweep.records()
    assert (records[0]["state"], len(records[0]["attempts"])) == ("TIMEOUT", 1)
    assert "TIMEOUT x_0" in done.text
    assert records[1]["return_value"]["attempt"] == 2


def ranks_are_warned(slurm, sweep):
    """All of them are told, and all of them come again."""
    sweep.plan({"all": "save"})
    tasks = ("hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=2")
    running = sweep.start("x=0", *tasks, *ONE_TIMEOUT, app="warned.py")
    until(lambda: len(sweep.started()) == 4, 30, lambda: sweep)
    warn(slurm, sweep, 0)
    sweep.until_states({0: "PENDING"})
    assert len(sweep.notes("saved")) == 4
    assert states_of(sweep.records()[0]["attempts"]) == [("TIMEOUT", "Preempted")]
    sweep.open()
    done = running.wait(AGAIN_S)
    assert done.status == 0, done
    (record,) = sweep.records().values()
    assert record["state"] == "COMPLETED"
    assert record["return_value"]["attempt"] == 2
    assert len(sweep.started()) == 8


@contextlib.contextmanager
def preempting(kind):
    """A cluster of one node, where jobs of the partition "urgent" take the place of others."""
    conf = {
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
    }
    with kind(nodes=1, conf=conf) as cluster:
        cluster.scontrol("create", "PartitionName=urgent", "Nodes=node1", "PriorityTier=10")
        cluster.scontrol("create", "PartitionName=polite", "Nodes=node1", "GraceTime=20")
        yield cluster


def jobs_of_more_importance_come(slurm, sweep):
    """What is preempted goes on later, and that counts as no time-out."""
    with preempting(type(slurm)) as cluster, contextlib.ExitStack() as stack:
        polite, rude = (type(sweep)(cluster, sweep.directory / name) for name in ("polite", "rude"))
        for one, partition in ((polite, "polite"), (rude, "main")):
            stack.callback(one.end)
            (one.directory / "warned.py").write_text(APP)
            one.plan({1: "save", 2: "gate"})
            one.start(
                *("x=range(4)", "hydra.launcher.runs_per_job=4", "hydra.launcher.cpus_per_task=4"),
                *("hydra.launcher.queue.max_processes=2", f"hydra.launcher.partition={partition}"),
                app="warned.py",
            )
        for one in (polite, rude):
            one.until_started(1, 2)
        words = ("--partition=urgent", "--cpus-per-task=8", "--output=/dev/null")
        urgent = cluster.sbatch(*words, "--wrap", "sleep 0.5")
        # One is warned, and ends when all it does is saved or done.
        until(lambda: polite.notes("saved"), 20, lambda: polite)
        assert polite.states()[2] == "RUNNING"
        polite.open(2)
        polite.until_states({1: "PENDING", 2: "COMPLETED", 3: "PENDING"})
        cluster.wait(urgent)
        for one in (polite, rude):
            one.open()
        for one in (polite, rude):
            done = one._started[0].wait(AGAIN_S)
            assert done.status == 0, done
            assert set(one.states().values()) == {"COMPLETED"}
        assert polite.started() == [0, 1, 1, 2, 3]
        # The other was warned and ended at the same moment.
        assert rude.started() == [0, 1, 1, 2, 2, 3]
        for one in (polite, rude):
            assert one.records()[1]["return_value"]["attempt"] == 2
            assert len(one.records()[1]["attempts"]) == 1


# --- jobs that are not ---


def test_jobs_that_do_not_go_on(together):
    together(
        no_timeout_is_left,
        slurm_refuses,
        cancelled_after_the_warning,
        warned_before_anything_runs,
        children_of_runs_are_not_warned,
    )


def no_timeout_is_left(slurm, sweep):
    """TIMEOUT at once; the same command goes on from the checkpoint, however often."""
    place = example(sweep, epochs=40, seconds_per_epoch=0.02)
    words = ("lr=0.1", *LIMIT)
    run = place / "outputs" / "lr_0.1"
    reached = 0
    for number in (1, 2):
        running = sweep.start(*words, app="train.py", cwd=place)

        def is_far(least=reached + 3):
            return (run / "metrics.jsonl").exists() and len(curve(run)) > least

        until(is_far, 30, lambda: sweep)
        job = json.loads((run / "run.json").read_bytes())["slurm_job_id"]
        slurm.run("scancel", "--batch", "--signal=USR2", job)
        done = running.wait(20)
        assert done.status == 1, done
        assert "TIMEOUT lr_0.1: Preempted: saved after epoch" in done.text
        record = json.loads((run / "run.json").read_bytes())
        assert (record["state"], len(record["attempts"])) == ("TIMEOUT", number - 1)
        reached = len(curve(run))
    done = sweep.run(*words, app="train.py", cwd=place)
    assert done.status == 0, done
    assert [step for step, _ in curve(run)] == list(range(1, 41))
    assert len(json.loads((run / "run.json").read_bytes())["attempts"]) == 2


def slurm_refuses(slurm, sweep):
    """The records say why it did not go on, and which attempts there have been."""
    words = ("x=0,1", "hydra.launcher.runs_per_job=2", *ONE_TIMEOUT)
    refuse = "+hydra.launcher.additional_parameters.no-requeue=true"
    sweep.plan({"all": "raise"})
    assert sweep.run(*words, refuse, app="warned.py").status == 1
    # On one core one of them waits.
    sweep.plan({0: "save"})
    running = sweep.start(*words, refuse, app="warned.py")
    until(lambda: sweep.started() == [0, 0, 1], 30, lambda: sweep)
    ledgers = sorted(sweep.outputs.glob(".sweeps/*/slurm.json"))
    (job,) = json.loads(ledgers[-1].read_bytes())["jobs"]
    slurm.run("scancel", "--batch", "--signal=USR2", job["id"])
    done = running.wait()
    assert done.status == 1, done
    records = sweep.records()
    assert [records[x]["state"] for x in (0, 1)] == ["TIMEOUT", "CANCELLED"]
    for x in (0, 1):
        assert states_of(records[x]["attempts"]) == [("FAILED", "ValueError")]
        assert "Slurm does not take its job back" in records[x]["error"]["message"]
    assert "saved x=0" in records[0]["error"]["message"]
    assert "Requested operation is presently disabled" in records[0]["error"]["message"]
    assert "Slurm does not take its job back" in done.text
    sweep.open()
    again = sweep.run(*words, app="warned.py")
    assert again.status == 0, again
    assert [record["return_value"]["attempt"] for record in sweep.records().values()] == [3, 2]


def cancelled_after_the_warning(slurm, sweep):
    """Whoever cancels a job does not want it back."""
    sweep.plan({"all": "gate"})
    running = sweep.start("x=0,1", "hydra.launcher.runs_per_job=2", app="warned.py")
    sweep.until_started(0)
    warn(slurm, sweep, 0)
    until(lambda: "1 running are told" in job_log(sweep), 10, lambda: sweep)
    slurm.run("scancel", sweep.job(0))
    done = running.wait(20)
    assert done.status == 1, done
    assert set(sweep.states().values()) == {"CANCELLED"}, done
    assert sweep.sacct() == {sweep.job(0): "CANCELLED"}


def warned_before_anything_runs(slurm, sweep):
    """The warning comes while setup lines are at work; the job lives on."""
    begun, go = sweep.directory / "begun", sweep.directory / "go"
    wait = f"touch {begun}; while [ ! -e {go} ]; do sleep 0.05; done"
    running = sweep.start(
        *("x=0", "hydra.launcher.max_num_timeout=1", f"hydra.launcher.setup=['{wait}']"),
        app="warned.py",
    )
    until(begun.exists, 20, lambda: sweep)
    warn(slurm, sweep, 0)
    go.touch()
    done = running.wait(20)
    assert done.status == 0, done
    assert sweep.states() == {0: "COMPLETED"}


def job_log(sweep):
    return "".join(path.read_text() for path in sweep.outputs.glob(".sweeps/*/slurm/*.out"))


def children_of_runs_are_not_warned(slurm, sweep):
    """Most programs die of SIGUSR2."""
    sweep.plan({"all": "child"})
    ways = {
        "plain": (),
        "teardown": ("hydra.launcher.teardown=[echo bye]",),
        "srun": ("hydra.launcher.use_srun=true",),
        "ranks": ("hydra.launcher.tasks_per_node=2",),
    }
    for number, (name, words) in enumerate(ways.items()):
        place = f"hydra.sweep.dir={sweep.directory / name}"
        sweep.start(f"x={number}", place, *words, app="warned.py")
    until(lambda: len(sweep.notes("child")) == 5, 40, lambda: sweep)
    for name in ways:
        ((job,),) = (
            json.loads(path.read_bytes())["jobs"]
            for path in (sweep.directory / name).glob(".sweeps/*/slurm.json")
        )
        slurm.run("scancel", "--batch", "--signal=USR2", job["id"])
    for name, running in zip(ways, sweep._started, strict=True):
        done = running.wait()
        assert done.status == 0, (name, done)
    notes = [(note[1], note[0]) for note in sweep.notes() if note[0].startswith("child ")]
    # (Slurm signals every process of a step: what further ranks start is not spared.)
    assert sorted(notes) == [
        *((x, "child None") for x in (0, 1, 2)),
        (3, "child -12"),
        (3, "child None"),
    ]


def test_slurm_is_slow_to_answer(slurm, sweep):
    """What Slurm is asked in a job that is being ended keeps nobody waiting."""
    (sweep.directory / "warned.py").write_text(APP)
    sweep.plan({"all": "gate"})
    real = slurm.run("which", "squeue").stdout.strip()
    slow = f'#!/bin/sh\n[ -z "$SLURM_JOB_ID" ] || sleep 3\nexec {real} "$@"\n'
    with slurm.shim("squeue", slow):
        running = sweep.start("x=0,1", app="warned.py")
        sweep.until_started(0, 1)
        # As a preemption may come: the warning and the end at the same moment.
        os.kill(min(slurm.job_processes(sweep.job(1))), signal.SIGUSR2)
        slurm.run("scancel", sweep.job(0), sweep.job(1))
        sweep.until_states({0: "CANCELLED", 1: "CANCELLED"}, timeout=10)
        done = running.wait(20)
    assert done.status == 1, done
    assert "2 cancelled" in done.text, done


# --- what needs no Slurm ---


@pytest.mark.parametrize(("epochs", "status"), [(1, 0), (3, 75)])
def test_the_example_without_slurm(tmp_path, epochs, status):
    """One that is warned in its last epoch is done."""
    shutil.copytree(EXAMPLE, tmp_path / "example")
    words = (f"epochs={epochs}", "hydra.run.dir=run")
    assert train(tmp_path / "example", *words, warned=True).returncode == status
    run = tmp_path / "example" / "run"
    if status:
        assert json.loads((run / "run.json").read_bytes())["state"] == "FAILED"
        assert train(tmp_path / "example", *words).returncode == 0
    record = json.loads((run / "run.json").read_bytes())
    assert record["state"] == "COMPLETED"
    assert record["return_value"] == curve(run)[-1][1] < 1


def job_time(**changes):
    times = {"limit_s": 3600.0, "signal_delay_s": 120.0, "kill_wait_s": 30.0, "timeouts_left": 1}
    return JobTime(**(times | changes))


@pytest.fixture
def signals(monkeypatch):
    """Signals of a job whose limit is reached in so many seconds."""
    made = []

    def make(left_s=None, **changes):
        end = None if left_s is None else round(time.time() + left_s)
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(end or ""))
        monkeypatch.setattr(within, "end_of_job", lambda: end)
        made.append(PackSignals(job_time(**changes)))
        return made[-1]

    before = {number: signal.getsignal(number) for number in PackSignals.numbers}
    yield make
    for one in made:
        os.close(one._reader)
        os.close(one._writer)
    assert before == {number: signal.getsignal(number) for number in PackSignals.numbers}


@pytest.mark.parametrize(
    ("left_s", "number", "timed_out"),
    [
        # The warning comes 120 s before the limit, give or take a minute.
        (120, signal.SIGUSR2, True),
        (175, signal.SIGUSR2, True),
        (70, signal.SIGUSR2, True),
        (3000, signal.SIGUSR2, False),
        (200, signal.SIGUSR2, False),
        # At the limit itself there is SIGTERM.
        (0, signal.SIGTERM, True),
        (-40, signal.SIGTERM, True),
        (50, signal.SIGTERM, True),
        (120, signal.SIGTERM, False),
        (3000, signal.SIGTERM, False),
        (120, signal.SIGINT, False),
        # Nobody has said how long it may run: its own clock and what was asked for.
        (None, signal.SIGUSR2, False),
        (None, signal.SIGTERM, False),
    ],
)
def test_whose_time_is_up(left_s, number, timed_out, signals):
    one = signals(left_s)
    assert not one.told
    assert not one.timed_out, "nobody has said anything"
    one._handle(number, None)
    assert one.told
    assert one.warned == (number == signal.SIGUSR2)
    assert one.timed_out == timed_out
    assert one.reason == ("SLURM_TIMEOUT" if timed_out else "SLURM_ENDED")
    assert one.may_go_on == (number == signal.SIGUSR2)


def test_a_limit_that_was_moved(signals, monkeypatch):
    """Slurm is asked at a warning; when it ends the job there is no time for that."""
    one, other = signals(3000), signals(3000)
    monkeypatch.setattr(within, "end_of_job", lambda: time.time() + 100)
    one._handle(signal.SIGUSR2, None)
    assert one.timed_out
    monkeypatch.setattr(within, "end_of_job", lambda: pytest.fail("asked"))
    other._handle(signal.SIGTERM, None)
    assert not other.timed_out


def test_a_short_limit_is_near_from_the_start(signals):
    one = signals(None, limit_s=60.0, signal_delay_s=20.0)
    one._handle(signal.SIGUSR2, None)
    assert one.timed_out


def test_who_cancels_wants_no_requeue(signals):
    one = signals(3000)
    one._handle(signal.SIGUSR2, None)
    one._handle(signal.SIGTERM, None)
    assert not one.may_go_on


def test_the_end_that_was_announced_may_be_made_to_come(signals):
    one = signals(120)
    one._handle(signal.SIGUSR2, None)
    assert not one.received
    one.stop()
    assert one.received
    assert one.may_go_on


@pytest.mark.parametrize(
    ("left_s", "timeouts_left", "early"),
    [(120, 1, True), (120, 0, False), (3000, 0, True), (3000, 2, True)],
)
def test_a_job_that_cannot_come_again_is_not_ended_early(left_s, timeouts_left, early, signals):
    one = signals(left_s, timeouts_left=timeouts_left)
    assert not one.ends_early
    one._handle(signal.SIGUSR2, None)
    assert one.ends_early == early


def test_a_pack_counts_its_timeouts():
    names = [one.name for one in dataclasses.fields(Pack)]
    pack = Pack(**dict.fromkeys(names) | {"time": job_time(timeouts_left=3)})
    assert pack.after_timeout().time == job_time(timeouts_left=2)
    assert pack.after_timeout().after_timeout().time.timeouts_left == 1
    assert pack.time.timeouts_left == 3
