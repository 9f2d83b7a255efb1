"""The record: its states, and that what is written reads back as it was."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from enum import Enum, IntEnum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.record import (
    SCHEMA_VERSION,
    Attempt,
    ErrorInfo,
    RecordError,
    RunRecord,
    RunState,
    Versions,
    decode,
    encode,
    from_plain,
    to_plain,
)


def _record(**fields):
    fields.setdefault("state", RunState.COMPLETED)
    return RunRecord(model_name="m", **fields)


def _same(left, right):
    """Equality under which NaN equals NaN."""
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return type(left) is type(right) and left == right


def test_only_pending_and_running_are_not_final():
    assert {state for state in RunState if not state.is_final} == {
        RunState.PENDING,
        RunState.RUNNING,
    }


@given(st.sampled_from(RunState), st.sampled_from(RunState))
def test_a_final_state_stays_and_nothing_goes_back(before, after):
    if before.is_final or after is RunState.PENDING or before is after:
        assert not before.can_become(after)
    if before is RunState.RUNNING and after.is_final:
        assert before.can_become(after)


def test_a_run_that_never_started_is_neither_completed_nor_timed_out():
    assert not RunState.PENDING.can_become(RunState.COMPLETED)
    assert not RunState.PENDING.can_become(RunState.TIMEOUT)


def test_advance_changes_state_and_success_together():
    running = _record(state=RunState.PENDING).advance(RunState.RUNNING, pid=5)
    assert (running.state, running.success, running.pid) == (RunState.RUNNING, False, 5)
    done = running.advance(RunState.COMPLETED, returncode=0)
    assert (done.state, done.success, done.returncode) == (RunState.COMPLETED, True, 0)
    assert running.state is RunState.RUNNING
    with pytest.raises(ValueError, match="m is COMPLETED and cannot become FAILED"):
        done.advance(RunState.FAILED)


def test_records_do_not_share_their_defaults():
    first, second = _record(), _record()
    first.metrics["a"] = 1.0
    assert second.metrics == {}


def test_an_attempt_keeps_how_it_ended():
    error = ErrorInfo("ValueError", "no", "Traceback")
    record = _record(
        state=RunState.FAILED,
        started_at=1.0,
        ended_at=2.0,
        returncode=1,
        gpu_uuids=("GPU-a",),
        error=error,
    )
    attempt = Attempt(1.0, 2.0, RunState.FAILED, 1, ("GPU-a",), error)
    assert record.with_last_attempt() == (attempt,)
    again = _record(state=RunState.RUNNING, started_at=3.0, attempts=(attempt,))
    lost = Attempt(3.0, None, RunState.LOST, None)
    assert again.with_last_attempt() == (attempt, lost)


def test_every_field_reads_back():
    record = RunRecord(
        model_name="m",
        sweep_id="s",
        index=3,
        overrides=("a=1", "b='x y'"),
        hyperparams={"a/b": 1, "ü": "<b>", "list": [1, None, {"x": True}]},
        fingerprint="f" * 32,
        seed=2**40,
        state=RunState.FAILED,
        returncode=-9,
        return_value={"acc": 0.5},
        attempts=(Attempt(1.0, None, RunState.LOST, None, ("GPU-a",), ErrorInfo("E", "m")),),
        error=ErrorInfo("ValueError", "m\n", "t"),
        gpu_id=0,
        gpu_uuids=("GPU-a", "GPU-b"),
        host="h",
        boot_id="b",
        pid=7,
        pid_started=12345.0,
        started_at=1.5,
        ended_at=2.5,
        duration_seconds=1.0,
        peak_gpu_memory_gb=0.25,
        metrics={"acc": 0.5},
        command="python x",
        versions=Versions("3.11", "0.1", "abc", True),
    )
    assert decode(encode(record)) == record


def test_a_record_is_one_line_of_strict_json():
    def refuse(word):
        pytest.fail(f"{word} is not JSON")

    data = encode(_record(metrics={"a": math.nan, "b": math.inf}, return_value=[-math.inf, "a\nb"]))
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    content = json.loads(data, parse_constant=refuse)
    assert content["metrics"] == {"a": "NaN", "b": "Infinity"}
    assert content["return_value"] == ["-Infinity", "a\nb"]


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_JSON = st.recursive(
    _SCALARS.filter(lambda value: value not in ("NaN", "Infinity", "-Infinity")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(_JSON, st.dictionaries(st.text(), st.floats()))
def test_any_return_value_and_metrics_read_back(value, metrics):
    record = decode(encode(_record(return_value=value, metrics=metrics)))
    assert _same(record.return_value, from_plain(to_plain(value)))
    assert _same(record.metrics, {to_plain(key): item for key, item in metrics.items()})


@given(st.dictionaries(st.text(), _JSON))
def test_any_hyperparameters_can_be_written(values):
    assert decode(encode(_record(hyperparams=values))).hyperparams == json.loads(
        json.dumps(to_plain(values))
    )


class Colour(Enum):
    RED = 1


class Size(IntEnum):
    BIG = 3


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Colour.RED, "RED"),
        (Size.BIG, 3),
        (Path("a/b"), "a/b"),
        ((1, 2), [1, 2]),
        ({1: "x"}, {"1": "x"}),
        ({1}, [1]),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.float64("nan"), "NaN"),
        (np.array(2.0), 2.0),
        (np.array([2]), 2),
        ("a\udcffb", "a\\udcffb"),
        (10**30, 10**30),
    ],
)
def test_values_of_libraries_become_plain(value, plain):
    got = to_plain(value)
    assert got == plain
    assert type(got) is type(plain)


@pytest.mark.parametrize("value", [b"x", 1j, object(), np.zeros(2000), {"a": [object()]}])
def test_what_json_cannot_hold_is_an_error_that_names_the_type(value):
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        to_plain(value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"{",
        b'{"a": 1}',
        b"[]",
        b"null",
        b"\xff\xfe",
        bytes(range(256)),
        b'{"model_name": "m", "state": "done"}',
        b'{"model_name": "m", "state": "COMPLETED"} trailing',
        b'{"model_name": "m", "state": "COMPLETED", "metrics": {"a": NaN}}',
    ],
)
def test_anything_else_is_not_a_record(data):
    with pytest.raises(RecordError):
        decode(data)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data):
    with pytest.raises(RecordError):
        decode(data)


@given(st.integers(0))
def test_a_truncated_record_is_not_a_record(length):
    data = encode(_record(metrics={"a": 1.0})).rstrip()
    with pytest.raises(RecordError):
        decode(data[: length % len(data)])


def test_a_newer_schema_says_to_upgrade_and_unknown_fields_are_passed_over():
    newer = {"model_name": "m", "state": "COMPLETED", "schema_version": SCHEMA_VERSION + 1}
    with pytest.raises(RecordError, match="upgrade"):
        decode(json.dumps(newer).encode())
    same = {"model_name": "m", "state": "COMPLETED", "later_field": [1]}
    assert decode(json.dumps(same).encode()).model_name == "m"


def test_a_newer_schema_with_other_fields_says_to_upgrade():
    with pytest.raises(RecordError, match="upgrade"):
        decode(b'{"schema_version": 99, "model_name": "m", "state": "PAUSED"}')


def test_deep_nesting_is_not_a_record():
    with pytest.raises(RecordError):
        decode(b'{"model_name": "m", "state": "LOST", "return_value": ' + b"[" * 100_000)


def test_a_boolean_metric_reads_back_as_a_number():
    assert decode(encode(_record(metrics={"solved": True}))).metrics == {"solved": 1.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"error": ErrorInfo("FileNotFoundError", "no file caf\udce9")},
        {"overrides": ("path=caf\udce9",)},
        {"command": "python x.py path=caf\udce9"},
    ],
)
def test_text_that_is_not_utf8_can_be_written_in_every_field(fields):
    assert decode(encode(_record(**fields))).model_name == "m"


def test_the_record_loads_nothing_heavy():
    code = (
        "import sys, orchestrator.record, orchestrator.store\n"
        "print(sorted({'numpy', 'polars', 'hydra', 'omegaconf', 'psutil'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("bad\nsecond line", "Kind: bad"),
        ("\n  first \nsecond", "Kind: first"),
        (
            "Error loading 'a.b':\n\nAttributeError('b')\nmore",
            "Kind: Error loading 'a.b': AttributeError('b')",
        ),
        ("one:\ntwo:\nthree", "Kind: one: two: three"),
        ("ends with:", "Kind: ends with:"),
        ("", "Kind"),
        (" \n ", "Kind"),
    ],
)
def test_an_error_in_one_line_has_what_its_message_says(message, line):
    assert ErrorInfo("Kind", message).line == line
    assert len(ErrorInfo("Kind", message * 1000).line) <= 300
