"""Memory that is slow to go, GPUs that are lost, and a driver that hangs, fails or is reloaded."""

from __future__ import annotations

import time

import psutil
import pytest

A, B, C, D = (f"GPU-{letter * 4}-{n}" for n, letter in enumerate("abcd"))
GB = 10**9
RETRY = "hydra.launcher.retries=2"


@pytest.mark.parametrize("state", ["nopids", "hostpids"])
def test_in_a_container_a_gpu_is_free_when_its_memory_is(gpus, state):
    gpus.nvml.gpus([gpus.nvml.gpu(uuid, state=state, used=GB) for uuid in (A, B)])
    gpus.run(
        "x=range(8)",
        "of=[1.5,0,0,0,0,0,0,0]",
        "linger=${mine}",
        "gb=20",
        "seconds=0.4",
        constants=gpus.CONTAINER,
    )
    spans = gpus.spans()
    slow = next(span for span in spans if span.linger)
    after = [span for span in spans if span.uuids == slow.uuids and span.start > slow.start]
    # Until its memory is gone nothing starts there; the other is refilled at once.
    assert all(span.start >= slow.end + 1.5 for span in after)
    elsewhere = [span for span in spans if span.uuids != slow.uuids]
    assert len([span for span in elsewhere if span.start < slow.end + 1.5]) >= 3
    assert gpus.most_gb() == dict.fromkeys({span.uuids[0] for span in spans}, 20)
    assert [record.peak_gpu_memory_gb for record in gpus.records().values()] == [20] * 8


def test_memory_that_never_goes_is_waited_for_only_so_long(gpus):
    gpus.nvml.gpus([gpus.nvml.gpu(A, state="nopids")])
    text = gpus.run(
        "x=1,2",
        "linger=60",
        "hydra.launcher.release_timeout_s=1",
        constants=gpus.CONTAINER,
    )
    assert "Memory of a job on gpu 0 is still in use 1 s after its end" in text
    first, second = gpus.spans()
    assert 1.0 <= second.start - first.end < 30


@pytest.mark.parametrize(("need", "seconds"), [("null", 4.5), ("${mine}", 3)])
def test_in_a_container_jobs_of_different_sizes_do_not_wait(gpus, need, seconds):
    gpus.nvml.gpus([gpus.nvml.gpu(A, state="nopids")])
    text = gpus.run(
        f"hydra.launcher.memory_per_job_gb={need}",
        "x=range(3)",
        "of=[60,3,3]",
        "gb=${mine}",
        f"for_seconds=[{seconds},0.3,0.3]",
        "seconds=${my_seconds}",
        "hydra.launcher.max_processes_per_gpu=2",
        constants=gpus.CONTAINER,
    )
    assert "still in use" not in text
    ends = {span.name: span.end for span in gpus.spans()}
    assert max(ends["1"], ends["2"]) < ends["0"]
    if need != "null":
        peaks = [record.peak_gpu_memory_gb for record in gpus.records().values()]
        assert peaks == pytest.approx([60, 3, 3], rel=0.1)


@pytest.mark.parametrize("state", ["lost", "gone"])
def test_a_run_whose_gpu_is_lost_is_done_on_another(gpus, state):
    gpus.nvml.gpus([A, B, C])
    sweep = gpus.start("x=range(6)", "gate=true", RETRY)
    gpus.wait_for_running(3, sweep)
    (victim,) = (span for span in gpus.spans() if span.uuids == (B,))
    gpus.nvml.state(B, state)
    gpus.until(lambda: "trying again (gpu_lost; 1 of 2)" in sweep.text, lambda: sweep.text)
    assert f"GPU 1 ({B}) is lost" in sweep.text
    gpus.sandbox.open_gate()
    text = gpus.end(sweep)
    assert "All runs ended (6 completed)" in text
    records = gpus.records()
    record = records[int(victim.name)]
    assert [attempt.error.type for attempt in record.attempts] == ["GPU_LOST"]
    assert record.attempts[0].gpu_uuids == (B,)
    assert record.gpu_uuids != (B,)
    assert not any(other.attempts for other in records.values() if other is not record)
    assert B not in {uuid for span in gpus.spans()[3:] for uuid in span.uuids}
    gpus.sandbox.nobody_left()


def test_without_any_gpu_the_sweep_gives_up_after_a_while(gpus):
    gpus.nvml.gpus([A, B])
    sweep = gpus.start("x=range(4)", "gate=true", constants={"gpu_places._HOPELESS_S": 2.0})
    gpus.wait_for_running(2, sweep)
    gpus.nvml.state(A, "lost")
    gpus.nvml.state(B, "lost")
    text = gpus.end(sweep, expect=1)
    assert "Nothing can run any more: no GPU answered" in text
    assert gpus.sandbox.states() == {"FAILED": 2}
    assert gpus.sandbox.partial_results()
    gpus.nvml.gpus([A, B])
    gpus.sandbox.open_gate()
    assert "4 completed" in gpus.run("x=range(4)", "gate=true")


@pytest.mark.parametrize("state", ["hang", "fail"])
def test_a_gpu_that_cannot_be_read_is_left_alone(gpus, state):
    gpus.nvml.gpus([A, B])
    words = ("gate=true", "hydra.launcher.release_timeout_s=1")
    sweep = gpus.start("x=range(8)", *words, constants=gpus.IMPATIENT)
    gpus.wait_for_running(2, sweep)
    gpus.nvml.state(B, state)
    gpus.until(lambda: "GPU 1 cannot be read" in sweep.text, lambda: sweep.text)
    count = len(gpus.spans())
    gpus.sandbox.open_gate()
    text = gpus.end(sweep)
    assert "All runs ended (8 completed)" in text
    assert {uuid for span in gpus.spans()[count:] for uuid in span.uuids} == {A}


def test_a_gpu_that_cannot_be_read_at_launch_is_told(gpus):
    gpus.nvml.gpus([A, gpus.nvml.gpu(B, state="fail")])
    text = gpus.run("x=range(3)")
    assert "GPU 1 cannot be read" in text
    assert set(gpus.most_jobs()) == {A}


def test_a_driver_that_hangs_at_launch_is_an_error(gpus):
    gpus.nvml.gpus([A])
    gpus.nvml.init("hang")
    began = time.monotonic()
    text = gpus.run("x=1,2", expect=1, constants={"resources._FIRST_READING_S": 1.0})
    assert time.monotonic() - began < 30
    assert "NVML did not answer in 1 s" in text
    assert "hydra.launcher.monitor=false" in text
    assert not gpus.events()
    gpus.sandbox.nobody_left()


def test_jobs_that_need_more_gpus_than_are_left_do_not_wait_for_ever(gpus):
    gpus.nvml.gpus([A, B])
    words = ("x=range(2)", "hydra.launcher.gpus_per_job=2", "gate=true")
    sweep = gpus.start(*words, constants={"gpu_places._HOPELESS_S": 2.0})
    gpus.wait_for_running(1, sweep)
    gpus.nvml.state(B, "lost")
    text = gpus.end(sweep, expect=1, patience=40)
    assert "no 2 GPUs, which a job needs, answered" in text


def test_a_driver_that_is_reloaded_disturbs_nobody(gpus):
    gpus.nvml.gpus([A, B])
    sweep = gpus.start("x=range(6)", "gate=true")
    gpus.wait_for_running(2, sweep)
    jobs = [psutil.Process(span.pid) for span in gpus.spans()]
    gpus.nvml.init("mismatch")
    gpus.until(lambda: "NVML does not answer" in sweep.text, lambda: sweep.text)
    time.sleep(1)
    assert all(job.is_running() for job in jobs)
    assert len(gpus.spans()) == 2
    gpus.nvml.init(None)
    gpus.until(lambda: "NVML answers again" in sweep.text, lambda: sweep.text)
    gpus.sandbox.open_gate()
    text = gpus.end(sweep)
    assert "All runs ended (6 completed)" in text
    assert not any(record.attempts for record in gpus.records().values())


def test_where_nvml_tells_no_memory_counts_decide(gpus):
    gpus.nvml.gpus([A])
    gpus.nvml.quirks("no-memory")
    words = ("hydra.launcher.memory_per_job_gb=30", "hydra.launcher.max_processes_per_gpu=3")
    gpus.run("x=range(5)", "seconds=0.5", *words)
    assert gpus.most_jobs() == {A: 3}


def test_where_nvml_tells_no_memory_of_processes_needs_still_fit(gpus):
    gpus.nvml.gpus([A])
    gpus.nvml.quirks("no-process-memory")
    words = ("hydra.launcher.memory_per_job_gb=30", "hydra.launcher.max_processes_per_gpu=3")
    gpus.run("x=range(5)", "gb=30", "seconds=0.8", *words)
    assert gpus.most_gb() == {A: 60}
