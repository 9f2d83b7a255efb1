"""Faults around sweeps on GPUs: full disks, forks that fail, stopped keepers, a silent NVML."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

A, B = "GPU-aaaa-0", "GPU-bbbb-1"
GB = 10**9
PER_GPU = "hydra.launcher.max_processes_per_gpu"
MEMORY = "hydra.launcher.memory_per_job_gb"
FIRST_IS_HELD = ("gate=${mine}", "of=[1,0,0,0,0,0,0,0]")
# While a file is there, leases cannot be written; a second one lets one fork fail.
FAULTS = """
import errno, os, sys
full, no_fork = os.environ["FAULT_FULL"], os.environ["FAULT_NO_FORK"]
pwrite, fork = os.pwrite, os.fork

def faulty_pwrite(*words):
    if os.path.exists(full):
        raise OSError(errno.ENOSPC, "No space left on device")
    return pwrite(*words)

def faulty_fork():
    if sys._getframe(1).f_code.co_name == "_fork_keeper" and os.path.exists(no_fork):
        os.unlink(no_fork)
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
    return fork()

os.pwrite, os.fork = faulty_pwrite, faulty_fork
"""


class Faults:
    """Files that make a sweep's system calls fail while they are there."""

    def __init__(self, directory):
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(FAULTS)
        self.full, self.no_fork = directory / "full", directory / "no-fork"
        paths = [str(directory), os.environ.get("PYTHONPATH", "")]
        self.env = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "FAULT_FULL": str(self.full),
            "FAULT_NO_FORK": str(self.no_fork),
        }


@pytest.fixture
def faults(tmp_path):
    return Faults(tmp_path / "faults")


def names(spans):
    return [span.name for span in spans]


# --- disks, forks, keepers ---


def test_a_full_disk_under_the_leases_harms_no_job_that_runs(gpus, faults):
    gpus.nvml.gpus([A, B])
    sweep = gpus.start("x=range(5)", *FIRST_IS_HELD, "seconds=0.5", env=faults.env)
    gpus.wait_for_running(2, sweep)
    faults.full.touch()
    gpus.until(lambda: "No space left on device" in sweep.text, lambda: sweep.text)
    (running,) = gpus.running()
    gpus.until(lambda: gpus.sandbox.states()["COMPLETED"] == 1, lambda: sweep.text)
    assert psutil.Process(running.pid).is_running()
    assert sweep.process.poll() is None
    assert len(gpus.spans()) == 2
    faults.full.unlink()
    gpus.until(lambda: gpus.sandbox.states()["COMPLETED"] == 4, lambda: sweep.text)
    gpus.sandbox.open_gate()
    assert "All runs ended (5 completed)" in gpus.end(sweep)
    assert sorted(names(gpus.spans())) == list("01234")
    assert not any(record.attempts for record in gpus.records().values())
    assert not gpus.leases_held()


def test_a_fork_that_fails_once_costs_no_run(gpus, faults):
    gpus.nvml.gpus([A, B])
    gpus.nvml.use("other", B, 0, 60 * GB)
    words = (*FIRST_IS_HELD, f"{MEMORY}=30")
    sweep = gpus.start("x=range(4)", *words, env=faults.env)
    gpus.wait_for_running(1, sweep)
    (running,) = gpus.running()
    # The only keeper is busy: the next run needs another one.
    faults.no_fork.touch()
    gpus.nvml.drop("other")
    gpus.until(lambda: gpus.sandbox.states()["COMPLETED"] == 3, lambda: sweep.text)
    assert not faults.no_fork.exists()
    assert psutil.Process(running.pid).is_running()
    gpus.sandbox.open_gate()
    assert "All runs ended (4 completed)" in gpus.end(sweep)
    assert sorted(names(gpus.spans())) == list("0123")
    assert "server died" not in sweep.text
    gpus.sandbox.nobody_left()


def test_a_stopped_keeper_does_not_freeze_the_sweep(gpus):
    gpus.nvml.gpus([gpus.nvml.gpu(uuid, utilisation=50) for uuid in (A, B)])
    often = ("gpu_places._YOUNG_S", "gpu_places._RUNNING_S", "gpu_places._WAITING_S")
    # Its keeper is told of each reading, and does not listen.
    constants = {"gpu_view._TELL_S": 0.0, **dict.fromkeys(often, 0.001)}
    gate = "gate=${mine}", f"of={[1] + [0] * 29}"
    sweep = gpus.start("x=range(16)", *gate, "seconds=0.3", constants=constants)
    gpus.wait_for_running(2, sweep)
    (held,) = (span for span in gpus.spans() if span.name == "0")
    keeper = psutil.Process(held.pid).parent()
    keeper.suspend()
    try:
        gpus.until(lambda: gpus.sandbox.states()["COMPLETED"] == 15, lambda: sweep.text, 40.0)
    finally:
        keeper.resume()
    gpus.sandbox.open_gate()
    assert "All runs ended (16 completed)" in gpus.end(sweep)


# --- NVML ---


@pytest.mark.parametrize("wanted", ["auto", "[0]"])
def test_a_driver_of_another_version_at_launch_is_an_error(gpus, wanted):
    gpus.nvml.gpus([A, B])
    gpus.nvml.init("mismatch")
    text = gpus.run("x=1,2", f"hydra.launcher.gpus={wanted}", expect=1)
    assert "mismatch" in text.lower()
    assert "is not on this machine" not in text
    assert "hydra.launcher.monitor=false" in text
    assert "hydra.launcher.gpus=[]" in text
    assert not gpus.events()


def test_auto_learns_by_growth_where_nvml_tells_no_memory_of_processes(gpus):
    gpus.nvml.gpus([A])
    gpus.nvml.quirks("no-process-memory")
    words = ("gb=10", "seconds=0.8", f"{MEMORY}=auto", f"{PER_GPU}=4")
    gpus.run("x=0", "seed=range(4)", *words)
    spans = gpus.spans()
    assert all(span.start >= spans[0].end for span in spans[1:])
    # 11 GB each with the margin.
    assert gpus.most_jobs() == {A: 3}
    peaks = [record.peak_gpu_memory_gb for record in gpus.sandbox.records().values()]
    assert peaks == pytest.approx([10] * 4, rel=0.1)


def test_needs_are_counted_once_where_nvml_tells_no_memory_of_processes(gpus):
    gpus.nvml.gpus([A])
    gpus.nvml.quirks("no-process-memory")
    words = (f"{MEMORY}=20", f"{PER_GPU}=4", "hydra.launcher.stagger_s=0.3")
    gpus.run("x=range(4)", "gb=20", "seconds=2", *words)
    assert gpus.most_jobs() == {A: 4}
    assert gpus.most_gb() == {A: 80}


# --- memory ---


def test_peaks_of_another_base_config_are_not_believed(
    gpus, gpu_sweeps_module, monkeypatch, tmp_path
):
    gpus.nvml.gpus([A])
    words = ("x=0", "seed=range(3)", "seconds=0.4", f"{MEMORY}=auto", f"{PER_GPU}=4")
    gpus.run(*words)
    # The same command again, of an app whose model has become larger.
    source = (Path(__file__).parent / "apps" / "gpu_app.py").read_text()
    assert '"gb": 1.0,' in source
    larger = tmp_path / "gpu_app.py"
    larger.write_text(source.replace('"gb": 1.0,', '"gb": 50.0,'))
    monkeypatch.setattr(gpu_sweeps_module, "APP", str(larger))
    gpus.run(*words)
    large = [span for span in gpus.spans() if span.gb == 50]
    assert len(large) == 3
    assert gpus.most_gb() == {A: 50}


def test_in_a_container_a_threshold_waits_until_memory_shows(gpus):
    gpus.nvml.gpus([gpus.nvml.gpu(A, state="nopids")])
    words = (f"{PER_GPU}=4", "hydra.launcher.memory_threshold_gb=50")
    sizes = ("gb=30", "delay=0.6", "seconds=1.8")
    gpus.run("x=range(4)", *sizes, *words, constants=gpus.CONTAINER)
    assert gpus.most_jobs() == {A: 2}
    assert gpus.most_gb() == {A: 60}


def test_what_fits_only_without_the_driver_s_own_memory_is_refused_at_launch(gpus):
    gpus.nvml.gpus([gpus.nvml.gpu(A, used=GB // 2)])
    text = gpus.run("x=1,2", "gb=1", f"{MEMORY}=80", expect=1, patience=30.0)
    assert "it needs 80 GB" in text
    assert "the largest has 79.5 GB" in text
    assert not gpus.events()
    assert "2 completed" in gpus.run("x=1,2", "gb=1", f"{MEMORY}=79")


# --- who goes first ---


def test_runs_that_need_no_gpu_have_the_cores(gpus):
    gpus.nvml.gpus([A])
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        pytest.skip("a single core")
    sweep = gpus.start("x=range(6)", "hydra.launcher.gpus_per_job=0", "gate=true")
    gpus.wait_for_running(min(cores, 6), sweep)
    gpus.sandbox.open_gate()
    assert "6 completed" in gpus.end(sweep)


@pytest.mark.parametrize("first", [0, 2])
def test_runs_that_need_no_gpu_do_not_go_before_one_that_does(gpus, first):
    gpus.nvml.gpus([A])
    of = [1 if x == first else 0 for x in range(10)]
    words = (f"of={of}", "hydra.launcher.gpus_per_job=${mine}", "hydra.launcher.max_processes=1")
    assert "10 completed" in gpus.run("x=range(10)", *words, "seconds=0.05")
    assert names(gpus.spans())[first] == str(first)


def test_others_fill_the_gaps_while_a_retry_waits(gpus):
    gpus.nvml.gpus([A, B])
    # 0 runs out of memory and waits for a GPU of its own; 1 and 2 are on one each.
    gate = "gate=${my_seconds}", f"for_seconds={[0, 1, 1] + [0] * 6}"
    fails = ("fail=oom", "fail_times=${mine}", "of=[1,0,0,0,0,0,0,0,0]", "hydra.launcher.retries=1")
    sweep = gpus.start("x=range(8)", *gate, *fails, "seconds=0.3", f"{PER_GPU}=2")
    gpus.until(lambda: gpus.sandbox.states()["COMPLETED"] == 5, lambda: sweep.text)
    assert "trying again (oom; 1 of 1; alone on its GPU)" in sweep.text
    assert names(gpus.spans()).count("0") == 1
    gpus.sandbox.open_gate()
    assert "All runs ended (8 completed)" in gpus.end(sweep)
    again = gpus.spans()[-1]
    assert again.name == "0"
