"""Sweeps on GPUs by memory: declared, of each run's own, learned, and other people's."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess

import pytest

A, B, C, D = (f"GPU-{letter * 4}-{n}" for n, letter in enumerate("abcd"))
GB = 10**9
OWN = "hydra.launcher.memory_per_job_gb=${mine}"
FOUR = "hydra.launcher.max_processes_per_gpu=4"
MEMORY = "hydra.launcher.memory_per_job_gb"


@contextlib.contextmanager
def somebody():
    """A process that is none of ours."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("container", [False, True])
def test_memory_that_appears_late_is_not_given_twice(gpus, container):
    gpus.nvml.gpus([A, B])
    constants = gpus.CONTAINER if container else None
    if container:
        gpus.nvml.state(A, "nopids")
        gpus.nvml.state(B, "hostpids")
    gpus.run(
        "x=range(9)", "gb=30", "delay=0.5", "seconds=0.9", f"{MEMORY}=30", FOUR, constants=constants
    )
    # The middle ones of them see memory that was given and is not taken yet.
    assert gpus.most_jobs() == {A: 2, B: 2}
    assert gpus.most_gb() == {A: 60, B: 60}


def test_above_the_threshold_nothing_starts(gpus):
    gpus.nvml.gpus([A])
    words = ("hydra.launcher.memory_threshold_gb=50", "hydra.launcher.stagger_s=0.5", FOUR)
    gpus.run("x=range(4)", "gb=30", "seconds=1.2", *words)
    # 30 GB are below 50, 60 are not.
    spans = gpus.spans()
    assert gpus.most_jobs() == {A: 2}
    starts = [span.start for span in spans]
    assert all(later - earlier > 0.4 for earlier, later in itertools.pairwise(starts))


def test_memory_of_others_is_waited_for_with_a_word(gpus):
    gpus.nvml.gpus([A])
    with somebody() as other:
        gpus.nvml.use("other", A, other.pid, 60 * GB)
        sweep = gpus.start(
            "x=1,2", "gb=30", f"{MEMORY}=30", FOUR, constants={"line._EXPLAIN_S": 0.5}
        )
        gpus.until(lambda: "Waiting for" in sweep.text, lambda: sweep.text)
        assert "GPU 0: 20 GB are free, the job needs 30 GB" in sweep.text
        assert not gpus.events()
        gpus.nvml.use("other", A, other.pid, 45 * GB)
        gpus.wait_for_running(1, sweep)
        gpus.end(sweep)
    assert gpus.most_jobs() == {A: 1}


def test_exclusive_leaves_alone_where_others_compute(gpus):
    gpus.nvml.gpus([A, B])
    with somebody() as other:
        gpus.nvml.use("other", A, other.pid, 1 * GB)
        gpus.run("x=range(3)", "hydra.launcher.exclusive=true")
        assert set(gpus.most_jobs()) == {B}
        # Other jobs of sweeps are no such thing; and without the word, nobody is.
        gpus.run("x=range(4,6)", "seconds=0.5")
        assert set(gpus.most_jobs()) == {A, B}


@pytest.mark.parametrize("container", [False, True])
def test_auto_is_alone_at_first_then_by_the_peak(gpus, container):
    gpus.nvml.gpus([gpus.nvml.gpu(A, state="nopids" if container else "ok")])
    constants = gpus.CONTAINER if container else None
    words = ("gb=20", "seconds=0.6", f"{MEMORY}=auto", FOUR)
    text = gpus.run("x=0", "seed=range(4)", *words, constants=constants)
    spans = gpus.spans()
    assert all(span.start >= spans[0].end for span in spans[1:]), text
    # 22 GB each with the margin.
    assert gpus.most_jobs() == {A: 3}
    for record in gpus.sandbox.records().values():
        assert record.peak_gpu_memory_gb == pytest.approx(20, rel=0.01)
    if container:
        return
    # Another sweep knows at once; another shape does not.
    gpus.run("x=0", "seed=range(4,6)", *words, constants=constants)
    new = gpus.spans()[4:]
    assert max(span.start for span in new) < min(span.end for span in new)
    gpus.run("x=1", "seed=range(2)", *words, constants=constants)
    one, two = gpus.spans()[6:]
    assert two.start >= one.end


def test_auto_gives_a_gpu_alone_to_what_fits_only_without_a_margin(gpus):
    gpus.nvml.gpus([A])
    text = gpus.run("x=0", "seed=range(3)", "gb=77", f"{MEMORY}=auto", FOUR)
    assert "3 completed" in text
    assert gpus.most_jobs() == {A: 1}


def test_needs_of_each_run(gpus):
    gpus.nvml.gpus([A, B])
    words = ("of=[50,50,20,20,20,5]", "gb=${mine}", "seconds=0.6", FOUR)
    gpus.run("x=range(6)", *words, OWN)
    assert len(gpus.spans()) == 6
    assert all(most <= 80 for most in gpus.most_gb().values())
    # Both large ones ran at once, a small one beside each.
    large = [span for span in gpus.spans() if span.gb == 50]
    assert large[0].uuids != large[1].uuids
    assert not gpus.sandbox.states().keys() - {"COMPLETED"}


def test_a_run_that_needs_all_gpus_gets_its_turn(gpus):
    gpus.nvml.gpus([A, B, C, D])
    of = [4 if x == 3 else 1 for x in range(9)]
    # Of different lengths, so that they do not all end at once by themselves.
    gpus.run(
        "x=range(9)",
        f"of={of}",
        "seconds=0.2,0.4",
        "hydra.launcher.gpus_per_job=${mine}",
    )
    spans = gpus.spans()
    assert len(spans) == 18
    order = [len(span.uuids) for span in spans]
    assert order.count(4) == 2
    # The two are the 7th and 8th in line; some of those behind fill the gaps until then.
    assert order.index(4) <= 11
    assert gpus.most_jobs() == dict.fromkeys((A, B, C, D), 1)
    gpus.sandbox.nobody_left()


def test_what_is_impossible_fails_at_launch_or_in_its_run(gpus):
    gpus.nvml.gpus([A, B])
    text = gpus.run("x=1,2", f"{MEMORY}=90", expect=1)
    assert "it needs 90 GB on 1 GPUs, of which this sweep has 0; the largest has 80 GB" in text
    text = gpus.run("x=1,2", "hydra.launcher.gpus_per_job=3", expect=1)
    assert "it needs 3 GPUs, this sweep has 2" in text
    assert not gpus.events()
    words = ("of=[1,1,90,1]", OWN)
    text = gpus.run("x=1,2,3", *words, expect=1)
    assert "All runs ended (2 completed, 1 failed)" in text
    assert "never find a place: it needs 90 GB" in text
    words = ("of=[1,one,1]", "hydra.launcher.gpus_per_job=${mine}")
    text = gpus.run("x=1,2", *words, "seed=1", expect=1)
    assert "hydra.launcher.gpus_per_job is 'one'" in text


def test_two_jobs_on_one_gpu_have_their_own_peaks(gpus):
    mig = [("MIG-one", 40 * GB), ("MIG-two", 40 * GB)]
    gpus.nvml.gpus([gpus.nvml.gpu(A, utilisation=60), gpus.nvml.gpu(B, mig=mig)])
    gpus.run(
        "x=range(6)",
        "of=[3,7,11,13,17,19]",
        "gb=${mine}",
        "seconds=1",
        "hydra.launcher.max_processes_per_gpu=2",
    )
    records = gpus.records()
    sizes = [3, 7, 11, 13, 17, 19]
    assert [records[x].peak_gpu_memory_gb for x in range(6)] == sizes
    assert gpus.most_jobs() == {A: 2, "MIG-one": 2, "MIG-two": 2}
    for record in records.values():
        mine = record.gpu_uuids[0]
        assert record.gpu_utilization == (60 if mine == A else None)
        assert record.gpu_id == (0 if mine == A else 1)
        assert record.return_value["CUDA_VISIBLE_DEVICES"] == mine
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None
