"""Runs that fail: tried again or not, and when a sweep has had enough."""

from __future__ import annotations

import json
import signal

import pytest

A, B = "GPU-aaaa-0", "GPU-bbbb-1"
GB = 10**9
FOUR = "hydra.launcher.max_processes_per_gpu=4"
FAILS = "for_seconds=[0,2,0,0,0,0]"  # by x, how often a run fails


def attempts(gpus, x):
    """Directory of a run, and its earlier tries by their logs."""
    for path in gpus.sandbox.outputs.glob("*/run.json"):
        if json.loads(path.read_text())["hyperparams"]["x"] == x:
            kept = sorted(path.parent.glob("attempts/*"))
            return path.parent, [(log / "train_stdout.log").read_text() for log in kept]
    raise AssertionError(x)


def test_out_of_memory_is_tried_again_with_more_and_at_last_alone(gpus):
    gpus.nvml.gpus([A])
    words = ("fail=oom", FAILS, "fail_times=${my_seconds}", "seconds=0.4", FOUR)
    text = gpus.run(
        "x=range(4)",
        *words,
        "hydra.launcher.retries=2",
        "hydra.launcher.memory_per_job_gb=20",
        "+hydra.launcher.env.TRY_OF_JOB='{attempt}'",
    )
    assert "trying again (oom; 1 of 2; with 30 GB)" in text
    assert "trying again (oom; 2 of 2; with 45 GB)" in text
    assert "All runs ended (4 completed)" in text
    record = gpus.records()[1]
    assert [attempt.state.value for attempt in record.attempts] == ["FAILED"] * 2
    assert [attempt.error.type for attempt in record.attempts] == ["RuntimeError"] * 2
    assert record.return_value["TRY_OF_JOB"] == "3"
    assert gpus.records()[0].return_value["TRY_OF_JOB"] == "1"
    directory, logs = attempts(gpus, 1)
    assert logs == ["try 1 of 1\n", "try 2 of 1\n"]
    assert (directory / "train_stdout.log").read_text() == "try 3 of 1\n"


def test_out_of_memory_without_a_need_is_tried_again_alone(gpus):
    gpus.nvml.gpus([A])
    words = ("fail=oom", "for_seconds=[1,0,0,0,0,0]", "fail_times=${my_seconds}", "seconds=0.4")
    text = gpus.run("x=range(6)", *words, FOUR, "hydra.launcher.retries=1")
    assert "trying again (oom; 1 of 1; alone on its GPU)" in text
    _, again = (span for span in gpus.spans() if span.name == "0")
    others = [span for span in gpus.spans() if span.name != "0"]
    assert not [span for span in others if gpus.overlaps(span, again)]
    # A job that died does not say when it ended.
    assert all(span.end < float("inf") for span in others)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_crashes_are_tried_again(gpus, method):
    gpus.nvml.gpus([A, B])
    words = ("fail=crash", "fail_times=1", "hydra.launcher.retries=1")
    text = gpus.run("x=1,2", *words, method=method)
    assert text.count("trying again (crash; 1 of 1)") == 2
    for record in gpus.records().values():
        assert record.state.value == "COMPLETED"
        assert [attempt.error.type for attempt in record.attempts] == ["ProcessDied"]
        assert record.attempts[0].returncode == 7


def test_a_time_limit_is_tried_again(gpus):
    gpus.nvml.gpus([A])
    words = ("fail=hang", "fail_times=1", "hydra.launcher.timeout_s=3")
    text = gpus.run("x=1,2", *words, FOUR, "hydra.launcher.retries=1")
    assert text.count("trying again (timeout; 1 of 1)") == 2
    for record in gpus.records().values():
        assert [attempt.state.value for attempt in record.attempts] == ["TIMEOUT"]
        assert record.state.value == "COMPLETED"


def test_errors_of_the_task_are_tried_again_only_if_wanted(gpus):
    gpus.nvml.gpus([A, B])
    words = ("fail=error", "fail_times=3", "hydra.launcher.retries=1")
    sweep = gpus.start("x=1,2", *words)
    assert sweep.wait() == 1
    assert "trying again" not in sweep.text
    assert "All runs ended (2 failed)" in sweep.text
    assert len(gpus.spans()) == 2
    # Again: tries 2 and 3 fail, too, so the retries are used up.
    words = (*words, "hydra.launcher.retry_on=[error]")
    sweep = gpus.start("x=1,2", *words)
    assert sweep.wait() == 1
    assert sweep.text.count("trying again (error; 1 of 1)") == 2
    assert "All runs ended (2 failed)" in sweep.text
    for x, record in gpus.records().items():
        assert record.state.value == "FAILED"
        assert record.error.message == "wrong"
        assert len(record.attempts) == 2
        assert attempts(gpus, x)[1] == [f"try {n} of {x}\n" for n in (1, 2)]
    assert "All runs ended (2 completed)" in gpus.run("x=1,2", *words)


def test_an_interrupt_while_a_retry_waits(gpus):
    gpus.nvml.gpus([A])
    words = ("fail=crash", "for_seconds=[1,0,0,0]", "fail_times=${my_seconds}", "gate=true")
    memory = ("hydra.launcher.memory_per_job_gb=40", FOUR)
    sweep = gpus.start("x=range(4)", *words, *memory, "hydra.launcher.retries=1", "gb=40")
    # Its place is taken by memory of somebody else before the retry could have it.
    gpus.wait_for_running(2, sweep)
    gpus.until(lambda: "trying again (crash" in sweep.text, lambda: sweep.text)
    sweep.signal(signal.SIGINT)
    assert sweep.wait() == 130
    assert "Traceback" not in sweep.text
    assert gpus.sandbox.states().keys() <= {"CANCELLED", "FAILED"}
    gpus.sandbox.nobody_left()
    gpus.sandbox.open_gate()
    text = gpus.run("x=range(4)", *words, *memory, "hydra.launcher.retries=1", "gb=40")
    assert "All runs ended (4 completed)" in text


@pytest.mark.parametrize(("limit", "failures"), [("stop", 1), (2, 2)])
def test_after_so_many_failures_nothing_more_starts(gpus, limit, failures):
    gpus.nvml.gpus([A, B])
    words = ("fail=error", "seconds=0.3", f"hydra.callbacks.results.on_failure={limit}")
    plan = ("for_seconds=[0,1,0,1,0,0,0,0]", "fail_times=${my_seconds}", "x=range(8)")
    sweep = gpus.start(*plan, *words)
    assert sweep.wait() == 1
    assert "so nothing more is started" in sweep.text
    assert "The same command again runs what is missing" in sweep.text
    states = gpus.sandbox.states()
    # What ran beside the last failure went on.
    assert states["FAILED"] == failures
    assert set(states) == {"FAILED", "COMPLETED"}
    assert len(gpus.spans()) == sum(states.values()) <= 2 + 2 * failures
    assert gpus.sandbox.partial_results()
    gpus.sandbox.nobody_left()
    if limit != "stop":  # (each fails once, so a limit of one would be met once more)
        assert "All runs ended" in gpus.run(*plan, *words)
        assert gpus.sandbox.states() == {"COMPLETED": 8}


def test_after_a_failure_its_own_gpu_is_not_refilled(gpus):
    gpus.nvml.gpus([A])
    words = ("fail=error", "fail_times=1", "hydra.callbacks.results.on_failure=stop")
    gpus.run("x=range(3)", *words, expect=1)
    assert len(gpus.spans()) == 1


def test_later_batches_do_not_start_after_a_stop(gpus):
    gpus.nvml.gpus([A, B])
    words = ("fail=error", "fail_times=${my_seconds}", "hydra.sweeper.max_batch_size=2")
    sweep = gpus.start(
        "x=range(6)",
        "for_seconds=[0,1,0,1,0,1]",
        *words,
        "hydra.callbacks.results.on_failure=stop",
    )
    assert sweep.wait() == 1
    assert len(gpus.spans()) == 2
    assert "1 run has failed, so nothing more is started" in sweep.text


def test_a_pause_does_not_cost_a_retry(gpus):
    gpus.nvml.gpus([A])
    words = ("fail=crash", "fail_times=1", "seconds=2", "hydra.launcher.retries=1")
    sweep = gpus.start("x=1", *words)
    gpus.wait_for_running(1, sweep)
    gpus.order("pause")
    gpus.until(lambda: "The queue is paused" in sweep.text, lambda: sweep.text)
    gpus.until(lambda: "trying again (crash" in sweep.text, lambda: sweep.text)
    assert len(gpus.spans()) == 1
    gpus.order("resume")
    assert "All runs ended (1 completed)" in gpus.end(sweep)
