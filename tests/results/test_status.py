"""Where every run stands, as data."""

from __future__ import annotations

import json

import pytest

from orchestrator.record import ErrorInfo, RunState
from orchestrator.results.reading import Reading, Unreadable, read_runs
from orchestrator.results.status import ORDER, as_json, counts, run_statuses, select


def test_the_order_names_every_state():
    assert sorted(ORDER) == sorted([*(state.value for state in RunState), "UNREADABLE"])


def test_running_comes_first_and_completed_last(tmp_path, write_run):
    for state in RunState:
        write_run(f"run_{state.value}", state=state)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    statuses = run_statuses(read_runs([tmp_path]), now=0.0)
    assert [status.state for status in statuses] == list(ORDER)
    assert counts(statuses) == dict.fromkeys(ORDER, 1)
    broken = statuses[ORDER.index("UNREADABLE")]
    assert (broken.directory, broken.name) == ("broken", "broken")
    assert broken.error


def test_elapsed_is_since_the_start_while_running_and_the_duration_after(tmp_path, write_run):
    write_run("a", state=RunState.RUNNING, host="elsewhere", started_at=100.0)
    write_run("b", duration_seconds=7.0, started_at=100.0)
    write_run("c", state=RunState.PENDING)
    statuses = run_statuses(read_runs([tmp_path]), now=160.0)
    assert {s.directory: s.elapsed_seconds for s in statuses} == {"a": 60.0, "b": 7.0, "c": None}


@pytest.mark.parametrize(
    ("fields", "device"),
    [
        ({}, "cpu"),
        ({"state": RunState.PENDING}, "-"),
        ({"gpu_id": 0}, "0"),
        (
            {"gpu_id": 2, "gpu_uuids": ("GPU-5c1e2f3a-1111-2222-3333-444455556666",)},
            "2 GPU-5c1e2f3a",
        ),
        ({"gpu_uuids": ("GPU-aaaaaaaa-1", "MIG-bbbbbbbb-2")}, "GPU-aaaaaaaa,MIG-bbbbbbbb"),
    ],
)
def test_the_device_in_short(found, fields, device):
    reading = Reading(runs=[found(**fields)])
    assert run_statuses(reading, 0.0)[0].device == device


def test_the_error_is_one_line(tmp_path, write_run):
    write_run("a", state=RunState.FAILED, error=ErrorInfo("ValueError", "\n first \nsecond"))
    write_run("b", state=RunState.FAILED, returncode=-9)
    write_run("c")
    errors = {s.directory: s.error for s in run_statuses(read_runs([tmp_path]), 0.0)}
    assert errors == {"a": "ValueError: first", "b": "exit code -9", "c": None}


def test_json_is_strict_even_where_a_curve_or_a_time_is_odd(tmp_path, write_run):
    run = write_run("a", state=RunState.RUNNING, host="elsewhere", started_at=-1e308)
    run.metrics.write_bytes(b'{"step": 1, "loss": "NaN", "n": 123456789012345678901234567890}\n')
    content = json.loads(as_json(run_statuses(read_runs([tmp_path]), now=1e308)))
    assert content["counts"] == {"RUNNING": 1}
    assert content["runs"][0]["metrics"]["loss"] == "NaN"
    assert content["runs"][0]["elapsed_seconds"] == "Infinity"


def test_runs_are_selected_by_state_and_by_name_or_directory(found):
    reading = Reading(unreadable=[Unreadable("x/broken", "p", "r")])
    for directory, state in (("x/a1", RunState.FAILED), ("y/a2", RunState.COMPLETED)):
        reading.runs.append(found(directory, state=state))
    statuses = run_statuses(reading, 0.0)

    def names(*args):
        return [status.name for status in select(statuses, *args)]

    assert names() == ["a1", "broken", "a2"]
    assert names(["FAILED"]) == ["a1"]
    assert names(["FAILED", "UNREADABLE"]) == ["a1", "broken"]
    assert names([], "a*") == ["a1", "a2"]
    assert names([], "x/*") == ["a1", "broken"]
    assert names(["COMPLETED"], "x/*") == []
