"""Several sweeps at once on the same GPUs."""

from __future__ import annotations

import signal

import psutil
import pytest

A, B, C, D = (f"GPU-{letter * 4}-{n}" for n, letter in enumerate("abcd"))
FOUR = "hydra.launcher.max_processes_per_gpu=4"
NEED = "hydra.launcher.memory_per_job_gb=${gb}"


@pytest.mark.parametrize("monitor", [True, False])
def test_limits_and_needs_hold_over_both_sweeps(gpus, monitor):
    gpus.nvml.gpus([A, B])
    soon = {"line._CLAIM_S": 0.3}
    words = (f"hydra.launcher.monitor={monitor}", "hydra.launcher.gpus=[0,1]")
    words = (*words, "gate=true")
    one = gpus.start("x=range(10)", "seconds=0.2", "gb=1", *words, name="one", constants=soon)
    gpus.wait_for_running(2, one)
    words = ("gb=25", "delay=0.2", "seconds=0.4", *words, FOUR, *([NEED] if monitor else []))
    four = gpus.start("x=range(9)", *words, name="four", constants=soon)
    gpus.until(lambda: four.pid in gpus.claimants(), "a claim of the other")
    gpus.sandbox.open_gate()
    gpus.end(one)
    gpus.end(four)
    ones, fours = gpus.spans("one"), gpus.spans("four")
    assert (len(ones), len(fours)) == (10, 9)
    # Both had jobs before the other had ended: they took turns.
    assert ones[0].start < fours[-1].end
    assert fours[0].start < ones[-1].end
    for alone in ones:
        others = [span for span in (*ones, *fours) if span is not alone]
        assert not [other for other in others if gpus.overlaps(alone, other)]
    if monitor:
        assert max(gpus.most_gb().values()) <= 80
    else:
        assert max(gpus.most_jobs(fours).values()) <= 4
    assert not gpus.leases_held()


def test_needs_of_two_sweeps_together_fit(gpus):
    gpus.nvml.gpus([A, B])
    words = (FOUR, NEED, "delay=0.5", "seconds=0.7", "gate=true")
    large = gpus.start("x=range(3)", "gb=45", *words, name="large")
    gpus.wait_for_running(2, large)
    small = gpus.start("x=range(6)", "gb=17", *words, name="small")
    gpus.wait_for_running(4, small)
    gpus.sandbox.open_gate()
    gpus.end(large)
    gpus.end(small)
    assert len(gpus.spans()) == 9
    assert all(most <= 80 for most in gpus.most_gb().values()), gpus.most_gb()
    pairs = [(x, y) for x in gpus.spans("large") for y in gpus.spans("small")]
    assert any(gpus.overlaps(x, y) for x, y in pairs)


def test_without_leases_others_do_not_count(gpus):
    gpus.nvml.gpus([A])
    one = gpus.start("x=0", "gate=true", name="one")
    gpus.wait_for_running(1, one)
    gpus.run("x=1", "hydra.launcher.leases=false", name="two")
    (before,) = gpus.spans("one")
    (after,) = gpus.spans("two")
    assert before.end == float("inf")
    assert after.uuids == before.uuids == (A,)
    gpus.sandbox.open_gate()
    gpus.end(one)


def test_a_killed_sweep_leaves_its_gpus_when_its_jobs_are_gone(gpus):
    gpus.nvml.gpus([A, B])
    killed = gpus.start("x=range(4)", "gate=true", name="killed")
    gpus.wait_for_running(2, killed)
    other = gpus.start("x=range(4)", name="other")
    gpus.until(lambda: "4 runs, outputs in" in other.text, lambda: other.text)
    assert len(gpus.leases_held()) == 2
    jobs = [psutil.Process(span.pid) for span in gpus.spans("killed")]
    # The jobs outlive it for a moment: they have a second to end in order.
    killed.signal(signal.SIGKILL)
    gpus.end(other)
    assert not [job for job in jobs if job.is_running()]
    assert gpus.most_jobs(gpus.spans("other")) == {A: 1, B: 1}
    assert len(gpus.spans("other")) == 4
    assert not gpus.leases_held()
    killed.wait()
    gpus.sandbox.nobody_left()


def test_an_interrupted_sweep_leaves_no_lease(gpus):
    gpus.nvml.gpus([A])
    words = ("gb=60", "hydra.launcher.memory_per_job_gb=60")
    sweep = gpus.start("x=range(4)", "gate=true", *words)
    gpus.wait_for_running(1, sweep)
    sweep.signal(signal.SIGINT)
    assert sweep.wait() == 130
    assert not gpus.leases_held()
    gpus.sandbox.open_gate()
    text = gpus.run("x=range(4)", "gate=true", *words)
    assert "4 completed" in text
    assert [len(r.attempts) for r in gpus.records().values()].count(1) == 1


def test_sweeps_of_many_runs_take_turns(gpus):
    # Runs of the first are looked at together; that must not put all of them before others.
    gpus.nvml.gpus([A])
    constants = {"line._CLAIM_S": 0.2}
    words = ("seconds=0.1", "hydra.launcher.gpus_per_job=${mine}", "gate=true")
    long = gpus.start("x=range(12)", *words, name="long", constants=constants)
    gpus.wait_for_running(1, long)
    short = gpus.start("x=range(2)", "seconds=0.1", name="short", constants=constants)
    gpus.until(lambda: short.pid in gpus.claimants(), "a claim of the other")
    gpus.sandbox.open_gate()
    gpus.end(short)
    gpus.end(long)
    last = gpus.spans("short")[-1]
    assert len([span for span in gpus.spans("long") if span.start > last.start]) >= 3


def test_large_jobs_of_one_sweep_get_their_turn_among_small_ones_of_another(gpus):
    gpus.nvml.gpus([A, B])
    soon = {"line._CLAIM_S": 0.3}
    small = gpus.start("x=range(40)", "seconds=0.2", name="small", constants=soon)
    gpus.wait_for_running(2, small)
    words = ("x=range(2)", "seconds=0.1", "hydra.launcher.gpus_per_job=2")
    large = gpus.start(*words, name="large", constants=soon)
    gpus.end(large)
    assert small.process.poll() is None
    small.signal(signal.SIGINT)
    assert small.wait() == 130
    assert len(gpus.spans("large")) == 2
    assert gpus.most_jobs() == {A: 1, B: 1}


def test_a_paused_sweep_stands_in_nobody_s_way(gpus):
    gpus.nvml.gpus([A])
    soon = {"line._CLAIM_S": 0.3}
    busy = gpus.start("x=range(3)", "gate=true", name="busy", constants=soon)
    gpus.wait_for_running(1, busy)
    paused = gpus.start("x=range(2)", name="paused", constants=soon)
    gpus.until(lambda: paused.pid in gpus.claimants(), lambda: paused.text)
    gpus.order("pause", outputs="outputs-paused")
    gpus.until(lambda: "The queue is paused" in paused.text, lambda: paused.text)
    gpus.sandbox.open_gate()
    gpus.end(busy)
    assert not gpus.spans("paused")
    gpus.order("resume", outputs="outputs-paused")
    gpus.end(paused)


def test_a_lease_directory_that_is_a_link_is_refused(gpus):
    gpus.nvml.gpus([A])
    (gpus.leases.parent / "elsewhere").mkdir()
    gpus.leases.symlink_to("elsewhere")
    text = gpus.run("x=1,2", expect=1)
    assert f"The lease directory {gpus.leases} is a symbolic link; expected a directory" in text
    assert "hydra.launcher.leases=false" in text
    assert not gpus.events()
