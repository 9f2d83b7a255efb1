"""A sweep whose sweeper launches a few runs at a time."""

from __future__ import annotations

import json
import re
import resource
import signal

import pytest

from orchestrator.identity import fingerprint
from orchestrator.queue.progress import SettingsCount
from orchestrator.record import RunRecord, RunState, encode

APP = "ledger_app.py"
RESULTS = "train_sweep_results.json"
BASIC, GRID = ("hydra/sweeper=basic",), ("hydra/sweeper=grid",)


def size(number):
    return f"hydra.sweeper.max_batch_size={number}"


def sweep_directory(sandbox):
    (directory,) = (sandbox.outputs / ".sweeps").iterdir()
    return directory


def sweep_json(sandbox):
    return json.loads((sweep_directory(sandbox) / "sweep.json").read_bytes())


def results(sandbox, name=RESULTS):
    return json.loads((sweep_directory(sandbox) / name).read_bytes())


def files(sandbox):
    return sorted(path.name for path in sweep_directory(sandbox).iterdir())


def finish(sandbox, numbers):
    """Runs as an earlier sweep has left them, without running them."""
    for x in numbers:
        task = {"x": x, "seed": 0, "hold_from": 1000, "child": "none", "fail_from": 1000, "base": 0}
        record = RunRecord(
            model_name=f"x_{x}",
            hyperparams={"x": x},
            fingerprint=fingerprint(task, (), "ledger_app"),
            state=RunState.COMPLETED,
            success=True,
            return_value={"score": 10 * x},
            overrides=(f"x={x}",),
        )
        (sandbox.outputs / f"x_{x}").mkdir(parents=True)
        (sandbox.outputs / f"x_{x}" / "run.json").write_bytes(encode(record))


@pytest.mark.parametrize("sweeper", [BASIC, GRID], ids=["basic", "grid"])
def test_all_batches_are_one_sweep(sandbox, sweeper):
    file = sandbox.directory / "mine.json"
    words = (*sweeper, size(2), f"hydra.callbacks.results.results_file={file}")
    sandbox.run(APP, *words, "x=range(5)")
    said = sweep_json(sandbox)
    assert said["total"] == 5
    assert files(sandbox) == ["sweep.json", RESULTS]
    assert [entry["hyperparams"]["x"] for entry in results(sandbox)] == list(range(5))
    assert json.loads(file.read_bytes()) == results(sandbox)
    assert {record.sweep_id for record in sandbox.records().values()} == {said["sweep_id"]}


def test_failures_of_several_batches_are_in_the_results(sandbox):
    sandbox.run(APP, *GRID, size(2), "x=range(5)", "fail_from=2", expect=1)
    assert [entry["success"] for entry in results(sandbox)] == [True, True, False, False, False]
    assert files(sandbox) == ["sweep.json", RESULTS]


def test_settings_are_counted_in_each_batch(sandbox):
    text = sandbox.run(
        APP, *GRID, size(2), "x=range(3)", "seed=range(3)", "hydra.launcher.max_processes=1"
    )
    counts = re.findall(r"\[(\d) of (\d) settings?", text)
    # Seeds of a setting may fall into two batches.
    whole = [("1", "1")]
    assert counts == [
        *(("0", "1"), ("1", "1")),
        *(("1", "2"), ("2", "2")),
        *(("0", "1"), ("1", "1")),
        *(("0", "1"), ("1", "1")),
        *whole,
    ]


def test_a_window_of_a_grid_counts_its_own_settings():
    class Window(list):
        axes = (("x", ["x=0", "x=1"]), ("seed", ["seed=0", "seed=1", "seed=2"]))

    points = [(f"x={x}", f"seed={seed}") for x in range(2) for seed in range(3)]
    for window, total in ((points, 2), (points[:2], 1), (points[2:4], 2), (points[5:], 1)):
        count = SettingsCount(Window(window), "seed")
        assert count.total == total
        for point in window:
            count.count(point)
        assert count.complete == total


def test_a_stop_in_the_second_batch_leaves_partial_results(sandbox):
    sandbox.env["SWEEP_HOLD_FROM"] = "2"
    sweep = sandbox.start(APP, *BASIC, size(2), "x=range(9)")
    sandbox.until(lambda: len(sandbox.held()) == 2, lambda: sweep.text)
    sweep.signal(signal.SIGINT)
    assert sweep.wait() == 130
    assert files(sandbox) == ["sweep.json", f"{RESULTS}.partial"]
    entries = results(sandbox, f"{RESULTS}.partial")
    assert [entry["state"] for entry in entries] == ["COMPLETED"] * 2 + ["CANCELLED"] * 2
    said = sweep_json(sandbox)
    assert said["states"] == {"COMPLETED": 2, "CANCELLED": 2}
    assert said["runs"] == [f"x_{x}" for x in range(4)]
    assert said["ended_at"] >= said["started_at"]


def test_results_of_many_batches_are_whole_at_the_end(sandbox):
    finish(sandbox, range(30))
    text = sandbox.run(APP, *BASIC, size(1), "x=range(31)")
    assert text.count("1 of 1 done already") == 30
    assert sandbox.ledger() == {"30 0": 1}
    assert files(sandbox) == ["sweep.json", RESULTS]
    assert [entry["hyperparams"]["x"] for entry in results(sandbox)] == list(range(31))
    assert sweep_json(sandbox)["total"] == 31


def test_what_is_done_already_costs_the_same_in_every_batch(sandbox):
    finish(sandbox, range(300))

    def cpu_seconds(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        sandbox.run(APP, *GRID, size(1), f"x=range({runs})")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    nothing = cpu_seconds(1)
    half, whole = cpu_seconds(150) - nothing, cpu_seconds(300) - nothing
    assert whole < 3 * max(half, 0.1), (nothing, half, whole)
    assert sandbox.ledger() == {}


def test_what_was_postponed_is_whole_at_the_end(sandbox):
    finish(sandbox, range(30))
    sandbox.run(APP, *GRID, size(1), "x=range(31)")
    said = sweep_json(sandbox)
    assert len(said["runs"]) == 31
    assert said["states"] == {"SKIPPED": 30, "COMPLETED": 1}
    assert said["ended_at"] >= said["started_at"]


def test_a_stop_after_postponed_batches_stays_partial(sandbox):
    finish(sandbox, range(30))
    sandbox.env["SWEEP_HOLD_FROM"] = "30"
    sweep = sandbox.start(APP, *GRID, size(1), "x=range(32)")
    sandbox.until(lambda: len(sandbox.held()) == 1, lambda: sweep.text)
    sweep.signal(signal.SIGINT)
    assert sweep.wait() == 130
    assert files(sandbox) == ["sweep.json", f"{RESULTS}.partial"]
    entries = results(sandbox, f"{RESULTS}.partial")
    assert [entry["state"] for entry in entries] == ["COMPLETED"] * 30 + ["CANCELLED"]
