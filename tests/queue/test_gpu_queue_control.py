"""Orders to a sweep that runs, counts without NVML, variables of jobs, and killed processes."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

A, B = "GPU-aaaa-0", "GPU-bbbb-1"
GB = 10**9
PER_GPU = "hydra.launcher.max_processes_per_gpu"
XLA = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def test_a_paused_gpu_is_left_alone_until_resumed(gpus):
    gpus.nvml.gpus([A, B])
    sweep = gpus.start("x=range(40)", "seconds=0.25")
    gpus.wait_for_running(2, sweep)
    assert "starts no new run on GPU 1" in gpus.order("pause", "--gpu", "1")
    gpus.until(lambda: "GPU 1 is paused" in sweep.text, lambda: sweep.text)
    count = len(gpus.spans())
    gpus.until(lambda: len(gpus.spans()) >= count + 4, lambda: sweep.text)
    # (One may have been on its way when it was said.)
    assert {uuid for span in gpus.spans()[count + 1 :] for uuid in span.uuids} == {A}
    gpus.order("resume", "--gpu", "GPU-b")
    gpus.until(lambda: "GPU 1 takes jobs again" in sweep.text, lambda: sweep.text)
    count = len(gpus.spans())
    gpus.until(
        lambda: B in {uuid for span in gpus.spans()[count:] for uuid in span.uuids},
        lambda: sweep.text,
    )
    sweep.signal(signal.SIGINT)
    assert sweep.wait() == 130


def test_a_drained_gpu_is_said_to_be_empty(gpus):
    gpus.nvml.gpus([A, B])
    sweep = gpus.start("x=range(4)", "gate=true")
    gpus.wait_for_running(2, sweep)
    gpus.order("drain", "--gpu", "0")
    gpus.until(lambda: "GPU 0 is being drained" in sweep.text, lambda: sweep.text)
    gpus.sandbox.open_gate()
    text = gpus.end(sweep)
    drained = text[text.index("GPU 0 is being drained") :].splitlines()[1:]
    assert [line for line in drained if line.startswith("GPU 0")], text
    assert {span.uuids[0] for span in gpus.spans()[2:]} == {B}


def test_a_paused_queue_waits_and_a_drained_one_ends(gpus):
    gpus.nvml.gpus([A, B])
    sweep = gpus.start("x=range(8)", "gate=true")
    gpus.wait_for_running(2, sweep)
    gpus.order("pause")
    gpus.until(lambda: "The queue is paused" in sweep.text, lambda: sweep.text)
    gpus.sandbox.open_gate()
    gpus.until(lambda: gpus.sandbox.states()["COMPLETED"] == 2, lambda: sweep.text)
    assert len(gpus.spans()) == 2
    gpus.sandbox.close_gate()
    gpus.order("resume")
    gpus.wait_for_running(2, sweep)
    gpus.order("drain")
    gpus.until(lambda: "The queue is being drained" in sweep.text, lambda: sweep.text)
    gpus.sandbox.open_gate()
    text = gpus.end(sweep, expect=1)
    assert "The queue was drained. 4 runs" in text
    assert "The same command again runs what is missing" in text
    assert gpus.sandbox.states() == {"COMPLETED": 4}
    text = gpus.run("x=range(8)", "gate=true")
    assert gpus.sandbox.states() == {"COMPLETED": 8}
    assert len(gpus.spans()) == 8


def test_a_pause_while_others_have_the_memory(gpus):
    gpus.nvml.gpus([A])
    gpus.nvml.use("other", A, 0, 60 * GB)
    words = ("x=1,2", "hydra.launcher.memory_per_job_gb=30")
    sweep = gpus.start(*words, constants={"line._EXPLAIN_S": 0.5})
    gpus.until(lambda: "Waiting for" in sweep.text, lambda: sweep.text)
    gpus.order("pause")
    gpus.until(lambda: "The queue is paused" in sweep.text, lambda: sweep.text)
    gpus.nvml.drop("other")
    gpus.order("resume")
    assert "All runs ended (2 completed)" in gpus.end(sweep)


def test_unmonitored_gpus_are_shared_by_counts(gpus):
    gpus.nvml.gpus([A, B])
    gpus.nvml.count_calls()
    words = ("hydra.launcher.monitor=false", "hydra.launcher.gpus=[0,1]", f"{PER_GPU}=2")
    sweeps = [gpus.start("x=range(6)", "seconds=0.5", *words, name=name) for name in "ab"]
    gpus.wait_for_running(2)
    assert "libnvidia-ml" not in Path(f"/proc/{sweeps[0].pid}/maps").read_text()
    for sweep in sweeps:
        text = gpus.end(sweep)
        assert "by counts alone (monitor=false)" in text
    assert len(gpus.spans()) == 12
    assert gpus.most_jobs() == {"0": 2, "1": 2}
    assert gpus.nvml.calls() == []
    assert not gpus.leases_held()
    for record in gpus.records(gpus.sandbox.directory / "outputs-a").values():
        assert record.peak_gpu_memory_gb is None
        assert record.gpu_seconds == record.duration_seconds


def test_no_gpus_wanted_means_cores(gpus):
    gpus.nvml.gpus([A])
    gpus.nvml.count_calls()
    words = ("hydra.launcher.gpus=[]", "hydra.launcher.max_processes=3")
    gpus.run("x=range(4)", "hydra.launcher.gpus_per_job=1", *words)
    for record in gpus.records().values():
        assert record.return_value["CUDA_VISIBLE_DEVICES"] is None
        assert record.gpu_uuids == ()
        assert record.gpu_id is record.gpu_seconds is record.peak_gpu_memory_gb is None
    assert gpus.nvml.calls() == []
    assert not gpus.leases.exists()
    # A machine with a driver and no GPU.
    gpus.nvml.gpus([])
    text = gpus.run("x=5,6", "hydra.launcher.max_processes=2")
    assert "CPU, for want of GPUs: NVML sees none" in text


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_jobs_that_share_a_gpu_are_told_to_take_a_part(gpus, method):
    gpus.nvml.gpus([A])
    env = ("+hydra.launcher.env.OF_JOB='{gpu}/{uuid}/{num}/{name}/{attempt}'",)
    gpus.run("x=0", f"{PER_GPU}=3", *env, method=method)
    seen = gpus.records()[0].return_value
    assert seen[XLA] == "0.300"
    assert seen["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    assert seen["OF_JOB"] == f"0/{A}/0/x_0/1"


def test_how_large_a_part_and_when_none(gpus):
    gpus.nvml.gpus([A])
    gpus.run("x=0", f"{PER_GPU}=3", "hydra.launcher.memory_per_job_gb=20")
    assert gpus.records()[0].return_value[XLA] == "0.250"
    gpus.run("x=1", f"{PER_GPU}=3", "hydra.launcher.share_memory=false")
    seen = gpus.records()[1].return_value
    assert seen[XLA] is seen["TF_FORCE_GPU_ALLOW_GROWTH"] is None
    words = ("x=2", "+hydra.launcher.env.OF_JOB='{gpus}'")
    text = gpus.run(*words, expect=1)
    assert "hydra.launcher.env.OF_JOB is '{gpus}'" in text
    assert 2 not in gpus.records()


def test_a_killed_launcher_leaves_nobody(gpus):
    gpus.nvml.gpus([A, B])
    sweep = gpus.start("x=range(4)", "gate=true")
    gpus.wait_for_running(2, sweep)
    sweep.signal(signal.SIGKILL)
    sweep.wait()
    gpus.sandbox.nobody_left()
    assert not gpus.leases_held()
    gpus.sandbox.open_gate()
    assert "4 completed" in gpus.run("x=range(4)", "gate=true")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_killed_watcher_is_replaced(gpus, method):
    gpus.nvml.gpus([A, B])
    memory = ("gb=30", "hydra.launcher.memory_per_job_gb=30", f"{PER_GPU}=4", "gate=true")
    sweep = gpus.start("x=range(8)", *memory, method=method)
    gpus.wait_for_running(4, sweep)
    job = psutil.Process(gpus.spans()[0].pid)
    server = {process.pid for process in job.parents()}
    children = psutil.Process(sweep.pid).children()
    (watcher,) = (child for child in children if child.pid not in server)
    watcher.kill()
    gpus.sandbox.open_gate()
    text = gpus.end(sweep)
    assert "All runs ended (8 completed)" in text
    assert gpus.most_gb() == {A: 60, B: 60}
    gpus.sandbox.nobody_left()
