"""Several runs in one Slurm job (``runs_per_job``): they share its GPUs and cores."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import fields
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from slurm_sweeps import until

from orchestrator.queue.settings import QueueSettings
from orchestrator.slurm import allocation
from orchestrator.slurm.cut import arrays, lanes, packs
from orchestrator.slurm.resources import check_text, tasks_of
from orchestrator.slurm.start import pack_file
from orchestrator.sweep.errors import SweepError

# Until runs of a job that somebody cancels, or kills, read so.
NOTICED_S = 15.0

APP = """
import os
import signal
import sys
import time

import hydra

import app
import orchestrator

plain = app.behave


class LongStory(Exception):
    def __reduce__(self):
        app.note("telling", self.args[0])
        time.sleep(1.0)
        return LongStory, ("no config",)

    def __str__(self):
        return "a long story"


def behave(what, cfg):
    if what == "flaky" and orchestrator.attempt() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "tidy":
        try:
            plain("gate", cfg)
        finally:
            time.sleep(0.5)
            app.note("tidied", cfg)
    if what == "long story":
        raise LongStory(cfg)
    if what.startswith("use "):
        sys.path.insert(0, os.environ["NVML_STUB_TOOLS"])
        import use_gpu

        use_gpu.occupy(int(what.removeprefix("use ")) * 10**9)
    plain(what, cfg)


app.behave = behave


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        app.note(f"{name}={os.environ.get(name)}", cfg)
    return app.main.__wrapped__(cfg)


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def packed(slurm, tmp_path, sweep):
    """Sweeps of an app that knows a little more; `sweep` is one, and this makes others."""

    def make(name="", **env):
        if name or env:
            cluster = SimpleNamespace(env={**slurm.env, **env}, wait=slurm.wait)
            made.append(type(sweep)(cluster, tmp_path / (name or "with-env")))
        one = made[-1]
        (one.directory / "packed.py").write_text(APP)
        return one

    made = [sweep]
    yield make
    for one in made[1:]:
        one.end()


def told(sweep, name):
    """What runs have said of a variable of theirs: by `x`, the last one counts."""
    notes = [note for note in sweep.notes() if note[0].startswith(f"{name}=")]
    return {note[1]: note[0].partition("=")[2] for note in notes}


def spans(sweep):
    """For each start of a run that came to its end: x, from, to, GPUs."""
    found, going_on = [], {}
    for word, x, moment, pid, _ in sweep.notes():
        if word.startswith("CUDA_VISIBLE_DEVICES="):
            going_on[pid] = (x, moment, set(word.partition("=")[2].split(",")))
        elif word == "end":
            begun = going_on.pop(pid)
            found.append((begun[0], begun[1], moment, begun[2]))
    return found


# --- on a real Slurm ---


def test_runs_share_the_gpus_of_their_job(packed):
    """Two jobs, two GPUs each, a GPU a run; what ends badly harms no other."""
    sweep = packed()
    words = (
        *("x=range(7)", "hydra.launcher.runs_per_job=4"),
        *("hydra.launcher.gpus_per_node=2", "hydra.launcher.cpus_per_task=4"),
    )
    sweep.plan({0: "gate", 1: "gate", 2: "raise", 3: "kill", 4: "gate", 5: "gate"})
    running = sweep.start(*words, app="packed.py")
    running.says("Submitted 7 runs in 2 jobs")
    sweep.until_started(0, 1, 4, 5)
    first, second = sweep.job(0), sweep.job(4)
    assert [sweep.job(x) for x in range(7)] == [first] * 4 + [second] * 3
    # No GPU has two, so the others wait; that they are in a job that runs is no news of theirs.
    assert sweep.started() == [0, 1, 4, 5]
    states = {x: "RUNNING" if x in (0, 1, 4, 5) else "PENDING" for x in range(7)}
    assert sweep.states() == states
    gpus = told(sweep, "CUDA_VISIBLE_DEVICES")
    assert {gpus[0], gpus[1]} == {gpus[4], gpus[5]} == {"0", "1"}
    sweep.open()
    done = running.wait()

    assert done.status == 1, done
    records = sweep.records()
    bad = {2: "FAILED", 3: "FAILED"}
    assert sweep.states() == dict.fromkeys(range(7), "COMPLETED") | bad
    assert "ValueError: as asked" in done.text
    assert "SIGKILL" in records[3]["error"]["message"]
    assert "ValueError: as asked" in (sweep.directory_of(2) / "train_stderr.log").read_text()
    assert "hello from 6" in (sweep.directory_of(6) / "train_stdout.log").read_text()
    gpus = told(sweep, "CUDA_VISIBLE_DEVICES")
    threads = told(sweep, "OMP_NUM_THREADS")
    for x, record in records.items():
        assert record["slurm_job_id"] == (first if x < 4 else second)
        assert str(record["gpu_id"]) == gpus[x]
        # Its keeper's, unless accounting has been asked already: that counts the whole job.
        assert record["gpu_seconds"] > 0
        assert threads[x] == "2", "4 cores for 2 runs at a time"
        if x not in bad:
            assert record["return_value"] == {"score": x, "attempt": 1, "text": ""}
            assert record["metrics"]["loss"] == x / 2
    assert sorted(path.name for path in sweep.outputs.glob("x_*")) == [f"x_{x}" for x in range(7)]
    assert sweep.sacct() == {first: "FAILED", second: "COMPLETED"}
    # The same command does what is missing, in one job.
    sweep.plan({})
    again = sweep.run(*words, app="packed.py")
    assert again.status == 0, again
    assert "Submitted 2 runs in 1 job" in again.text
    assert sweep.started() == sorted([*range(7), 2, 3])
    assert set(sweep.states().values()) == {"COMPLETED"}
    assert sweep.records()[3]["return_value"]["attempt"] == 2


def test_runs_share_the_cores_of_their_job(packed):
    """As many at a time as the job has cores, or as is said; crashes are tried again."""
    cores, fewer = packed(), packed("fewer")
    for one in (cores, fewer):
        one.plan({"all": "gate"})
    by_cores = cores.start(
        *("x=range(5)", "hydra.launcher.runs_per_job=9", "hydra.launcher.cpus_per_task=3"),
        app="packed.py",
    )
    fewer.plan({0: "flaky, gate", 1: "gate", 2: "raise", 3: "flaky"})
    by_number = fewer.start(
        *("x=range(4)", "hydra.launcher.runs_per_job=9", "hydra.launcher.cpus_per_task=4"),
        *("hydra.launcher.queue.max_processes=2", "hydra.launcher.queue.retries=1"),
        app="packed.py",
    )
    cores.until_started(0, 1, 2)
    # (x=2 takes the place of x=0 as soon as that is free.)
    until(lambda: fewer.started() == [0, 0, 1, 2], 20, lambda: fewer)
    assert fewer.records()[0]["attempts"][0]["state"] == "FAILED"
    assert cores.started() == [0, 1, 2]
    cores.open(0)
    cores.until_started(3)
    assert cores.started() == [0, 1, 2, 3]
    cores.open()
    fewer.open()
    done = by_cores.wait()
    assert done.status == 0, done
    assert cores.states() == dict.fromkeys(range(5), "COMPLETED")
    assert set(told(cores, "OMP_NUM_THREADS").values()) == {"1"}
    assert set(told(cores, "CUDA_VISIBLE_DEVICES").values()) <= {"", "None"}
    done = by_number.wait()
    assert done.status == 1, done
    assert fewer.states() == {0: "COMPLETED", 1: "COMPLETED", 2: "FAILED", 3: "COMPLETED"}
    assert fewer.started() == [0, 0, 1, 2, 3, 3], "what raises is not tried again"
    records = fewer.records()
    assert [records[x]["return_value"]["attempt"] for x in (0, 1, 3)] == [2, 1, 2]
    assert len(records[2]["attempts"]) == 0
    assert set(told(fewer, "OMP_NUM_THREADS").values()) == {"2"}


def test_each_run_says_how_many_gpus_it_needs(packed):
    sweep = packed()
    sweep.plan({"all": "sleep 0.1"})
    done = sweep.run(
        *("x=0,1,2", "n=1,2", "hydra.launcher.runs_per_job=9", "hydra.launcher.gpus_per_node=2"),
        "hydra.launcher.queue.gpus_per_job=${n}",
        app="packed.py",
    )
    assert done.status == 0, done
    found = spans(sweep)
    assert sorted((x, len(gpus)) for x, _, _, gpus in found) == [
        (x, n) for x in (0, 1, 2) for n in (1, 2)
    ]
    for one in found:
        for other in found:
            if one is not other and one[3] & other[3]:
                assert one[2] <= other[1] or other[2] <= one[1], (one, other)


def test_memory_of_watched_gpus(packed, nvml):
    """The queue in a job sees what NVML says of the job's GPUs, and only of these."""
    nvml.gpus(["GPU-one", "GPU-two"])
    sweep = packed(**nvml.env)
    sweep.plan({"all": "use 30, gate"})
    # (A job that asks for one GPU is given the first.)
    running = sweep.start(
        *("x=0,1,2", "n=30", "hydra.launcher.runs_per_job=3", "hydra.launcher.gpus_per_node=1"),
        *("hydra.launcher.cpus_per_task=3", "hydra.launcher.queue.max_processes_per_gpu=8"),
        "hydra.launcher.queue.memory_per_job_gb=${n}",
        app="packed.py",
    )
    sweep.until_started(0, 1)
    # 30 of 80 GB each: no room for a third.
    time.sleep(0.3)
    assert sweep.started() == [0, 1]
    sweep.open(0)
    sweep.until_started(2)
    sweep.open()
    done = running.wait()
    assert done.status == 0, done
    records = sweep.records().values()
    assert {tuple(record["gpu_uuids"]) for record in records} == {("GPU-one",)}
    assert {record["gpu_id"] for record in records} == {0}
    assert set(told(sweep, "CUDA_VISIBLE_DEVICES").values()) == {"GPU-one"}
    # (Short ones may end before they were looked at.)
    assert {record["peak_gpu_memory_gb"] for record in records} - {None} == {30.0}


def test_a_pack_is_cancelled_and_another_loses_its_first_process(slurm, packed):
    """What runs and what waits in it is told apart from what never came; no other job is hurt."""
    sweep = packed()
    sweep.plan({0: "tidy", 1: "gate, long story", "all": "gate"})
    words = ("x=range(10)", "hydra.launcher.runs_per_job=4", "hydra.launcher.gpus_per_node=2")
    running = sweep.start(*words, app="packed.py")
    sweep.until_started(0, 1, 4, 5, 8, 9)
    sweep.open(1)
    until(lambda: sweep.notes("telling"), 10, lambda: sweep)
    slurm.run("scancel", sweep.job(0))
    os.kill(min(slurm.job_processes(sweep.job(4))), signal.SIGKILL)
    ends = dict.fromkeys(range(4), "CANCELLED") | {1: {"FAILED", "CANCELLED"}}
    cancelled = sweep.until_states(ends)
    killed = sweep.until_states({x: {"FAILED", "LOST"} for x in range(4, 8)})
    print(f"cancelled after {cancelled:.1f} s, a killed first process noticed {killed:.1f} s later")
    assert cancelled + killed < NOTICED_S
    assert {sweep.states()[x] for x in (8, 9)} == {"RUNNING"}
    sweep.open()
    done = running.wait()
    assert done.status == 1, done
    assert sweep.started() == [0, 1, 4, 5, 8, 9]
    records = sweep.records()
    assert {records[x]["state"] for x in (8, 9)} == {"COMPLETED"}
    assert all(record["error"]["message"] for x, record in records.items() if x < 8), records
    assert "launcher" not in records[4]["error"]["message"], records[4]["error"]
    assert [records[x]["started_at"] is None for x in (0, 2, 4, 6)] == [False, True, False, True]
    # A task that is asked to end may tidy up undisturbed; so may what describes its error.
    assert [note[1] for note in sweep.notes("tidied")] == [0]
    assert records[1]["error"]["type"] in {
        "LongStory",
        "SLURM_ENDED",
        "SlurmCancelled",
    }, records[1]["error"]
    # All of it is missing, and what never began has had no attempt.
    sweep.plan({})
    again = sweep.run(*words, app="packed.py")
    assert again.status == 0, again
    assert "Submitted 8 runs in 2 jobs" in again.text
    attempts = [record["return_value"]["attempt"] for record in sweep.records().values()]
    assert attempts == [2, 2, 1, 1, 2, 2, 1, 1, 1, 1]


def test_nothing_more_starts_after_a_failure(packed):
    """What runs in the same job goes on."""
    sweep = packed()
    sweep.plan({0: "gate", 1: "gate, raise"})
    running = sweep.start(
        *("x=range(6)", "hydra.launcher.runs_per_job=6", "hydra.launcher.cpus_per_task=2"),
        "hydra.callbacks.results.on_failure=stop",
        app="packed.py",
    )
    sweep.until_started(0, 1)
    sweep.open(1)
    running.says("nothing more is started")
    assert sweep.states()[0] == "RUNNING"
    sweep.open()
    done = running.wait()
    assert done.status == 1, done
    assert sweep.states() == {0: "COMPLETED", 1: "FAILED"} | dict.fromkeys(range(2, 6), "CANCELLED")
    assert sweep.started() == [0, 1]
    assert "nothing more is started" in sweep.records()[5]["error"]["message"]


NO_START = {
    "gpus_per_job=3": "it needs 3 GPUs, this sweep has 2",
    "gpus_per_job=${x}": "it needs 9 GPUs, this sweep has 2",
    "gpus=[5]": "hydra.launcher.queue.gpus names 5",
}


def test_runs_that_their_job_cannot_start(packed):
    """They are FAILED and say why, in their records and to whoever waits."""
    started = {}
    for number, word in enumerate(NO_START):
        started[word] = sweep = packed(f"sweep-{number}")
        sweep.plan({})
        sweep.start(
            *("x=9,8", "hydra.launcher.runs_per_job=2", "hydra.launcher.gpus_per_node=2"),
            f"hydra.launcher.queue.{word}",
            app="packed.py",
        )
    for word, sweep in started.items():
        (running,) = sweep._started
        done = running.wait()
        assert done.status == 1, done
        assert NO_START[word] in done.text, done
        assert set(sweep.states().values()) == {"FAILED"}, done
        assert NO_START[word] in sweep.records()[9]["error"]["message"]
        assert not sweep.notes()


REFUSED = {
    "hydra.launcher.queue.start_method=thread": "queue.start_method",
    "hydra.launcher.queue.retry_on=[rain]": "queue.retry_on",
    "hydra.launcher.queue.gpus_per_job=-1": "queue.gpus_per_job",
    "hydra.launcher.queue.memory_per_job_gb=much": "queue.memory_per_job_gb",
    "hydra.launcher.queue.max_processes=0": "queue.max_processes",
    "hydra.launcher.runs_per_job=0": "runs_per_job",
    "hydra.launcher.max_num_timeout=-1": "max_num_timeout",
}


def test_settings_that_no_job_could_meet(packed):
    """A sentence, before anything is submitted."""
    sweep = packed()
    for word in REFUSED:
        sweep.start("x=1,2", "hydra.launcher.runs_per_job=2", word, app="packed.py")
    for (word, said), running in zip(REFUSED.items(), sweep._started, strict=True):
        done = running.wait()
        assert done.status == 1, (word, done)
        assert f"hydra.launcher.{said}" in done.text, (word, done)
        assert "Traceback" not in done.text, done
    assert not sweep.states()


# --- what needs no Slurm ---


def found_in(environ, *, shared=True, kill_wait_s=30.0, **settings):
    """The queue's settings in a job that Slurm has given this environment."""
    return allocation.queue_settings(
        QueueSettings(**settings), shared=shared, kill_wait_s=kill_wait_s, environ=environ
    )


def differences(settings):
    default = QueueSettings()
    names = [one.name for one in fields(default)]
    return {
        name: getattr(settings, name)
        for name in names
        if getattr(settings, name) != getattr(default, name)
    }


GPUS = {"CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize("environ", [{}, {"CUDA_VISIBLE_DEVICES": ""}, {"SLURM_JOB_ID": "7"}])
def test_a_job_without_gpus_uses_its_cores(environ, monkeypatch):
    """NVML may show GPUs that Slurm has not given."""
    monkeypatch.setattr(allocation, "has_driver", lambda: True)
    found = found_in({**environ, "SLURM_CPUS_PER_TASK": "6"})
    assert differences(found) == {"leases": False, "gpus": [], "max_processes": 6}


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "GPU_DEVICE_ORDINAL"])
@pytest.mark.parametrize("driver", [True, False])
def test_a_job_with_gpus_uses_these(name, driver, monkeypatch):
    """Without NVML by counts alone. Slurm is the one that gives leases."""
    monkeypatch.setattr(allocation, "has_driver", lambda: driver)
    found = found_in({name: "0,1"})
    assert differences(found) == {"leases": False} | ({} if driver else {"monitor": False})


def test_a_run_alone_in_its_job_has_all_of_it(monkeypatch):
    monkeypatch.setattr(allocation, "has_driver", lambda: True)
    for environ in (GPUS, {}):
        assert found_in(environ, shared=False, max_processes=5).max_processes == 1


def test_what_is_said_counts(monkeypatch):
    monkeypatch.setattr(allocation, "has_driver", lambda: True)
    wanted = QueueSettings(max_processes=3, gpus=[1])
    found = allocation.queue_settings(wanted, shared=True, kill_wait_s=5.0, environ=GPUS)
    assert (found.max_processes, found.gpus, found.leases) == (3, [1], False)
    assert found.kill_grace_s <= 5.0 < wanted.kill_grace_s, "records come after the grace"
    assert found_in(GPUS, kill_grace_s=1.0).kill_grace_s == 1.0
    assert wanted.leases, "the settings of the pack are nobody's to change"


@pytest.mark.parametrize("gpus", [[2], "2", 2, [0, 2], ["0", "2"]])
def test_gpus_that_were_not_given_are_refused(gpus, monkeypatch):
    monkeypatch.setattr(allocation, "has_driver", lambda: False)
    with pytest.raises(SweepError, match=r"queue\.gpus names 2; Slurm has given the job 0,1"):
        found_in(GPUS, gpus=gpus)
    # Somebody on a cluster without such variables knows best.
    assert found_in({}, gpus=gpus).gpus == gpus


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "8"}, 6),
        ({"SLURM_CPUS_ON_NODE": "8"}, 8),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2"}, 4),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 2),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "4,1"}, 2),
        ({"SLURM_CPUS_ON_NODE": "1", "SLURM_NTASKS_PER_NODE": "4"}, 1),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "x"}, 8),
        ({"SLURM_CPUS_ON_NODE": "72(x2)"}, 5),
        ({"SLURM_CPUS_PER_TASK": ""}, 5),
        ({}, 5),
    ],
)
def test_cores_of_a_task(environ, cores, monkeypatch):
    monkeypatch.setattr(allocation, "cores", lambda: 5)
    assert allocation.allocated_cores(environ) == cores


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}, "7_0"),
    ],
)
def test_a_job_as_squeue_names_it(environ, name):
    assert allocation.job_id(environ) == name


@given(st.integers(1, 5_000), st.integers(1, 1_000))
@example(65, 30)
@example(1, 1)
def test_arrays_are_few_and_nearly_equal(count, most):
    sizes = arrays(count, most)
    assert sum(sizes) == count
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-count // most)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 300))
@example([1] * 6, 3)
@example([1, 999], 10)
def test_lanes_are_all_used(sizes, at_a_time):
    """The arrays together never run more than that, and as many wherever they have them."""
    found = lanes(sizes, at_a_time)
    assert len(found) == len(sizes)
    first = [share for share, after in found if after is None]
    assert sum(first) == min(at_a_time, sum(sizes) if len(first) == len(sizes) else at_a_time)
    for number, (share, after) in enumerate(found):
        assert 1 <= share <= sizes[number]
        assert after is None or (after < number and found[after][0] >= share)
    followers = [after for _, after in found if after is not None]
    assert len(followers) == len(set(followers)), "one array follows one"


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=60), st.integers(1, 8))
def test_packs_hold_runs_that_ask_for_the_same(partitions, size):
    asked = [
        SimpleNamespace(number=number, resources={"partition": name, "gpus_per_node": 1})
        for number, name in enumerate(partitions)
    ]
    found = list(packs(asked, size))
    assert sorted(run.number for pack in found for run in pack) == list(range(len(asked)))
    for pack in found:
        assert 1 <= len(pack) <= size
        assert len({run.resources["partition"] for run in pack}) == 1
        assert [run.number for run in pack] == sorted(run.number for run in pack)
    for name in set(partitions):
        sizes = [len(pack) for pack in found if pack[0].resources["partition"] == name]
        assert set(sizes[:-1]) <= {size}, "full ones first"


@pytest.mark.parametrize(
    ("nodes", "per_node", "tasks"), [(1, 1, 1), (2, 4, 8), (None, None, 1), ("2", 2.0, 4)]
)
def test_tasks_of_a_job(nodes, per_node, tasks):
    assert tasks_of({"nodes": nodes, "tasks_per_node": per_node}) == tasks


@given(st.text())
@example("a\nb")
@example("\x85")
def test_text_stays_in_its_line(text):
    """A line end in a value would be a line of the batch script."""
    for resources in ({"partition": text}, {"additional_parameters": {"mail-user": text}}):
        if len(text.splitlines()) > 1 or not text.isprintable():
            with pytest.raises(SweepError, match="one line"):
                check_text(resources)
        else:
            check_text(resources)


def test_where_packs_are():
    assert pack_file("/a b/c", "3") == "/a b/c_3.pkl"
    assert pack_file("/a b/c", 0) == "/a b/c_0.pkl"
