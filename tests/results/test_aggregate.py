"""The results table and its files."""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import datetime, timezone
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import OrchestratorError
from orchestrator.record import Attempt, ErrorInfo, RunRecord, RunState, Versions, decode, encode
from orchestrator.results.aggregate import results_table
from orchestrator.results.export import csv_bytes, json_bytes, parquet_bytes, write_results
from orchestrator.results.reading import FoundRun
from orchestrator.store import RunDir


def _strict(data):
    def refuse(word):
        msg = f"{word} is not JSON"
        raise ValueError(msg)

    return json.loads(data, parse_constant=refuse)


def test_a_run_is_a_row_with_every_field(found):
    run = found(
        "sweep/a",
        state=RunState.FAILED,
        returncode=3,
        seed=4,
        index=0,
        hyperparams={"lr": 0.1, "seed": 4, "model.width": 8},
        fingerprint="f" * 32,
        gpu_id=1,
        gpu_uuids=("GPU-a", "GPU-b"),
        started_at=0.5,
        ended_at=2.0,
        duration_seconds=1.5,
        peak_gpu_memory_gb=2.5,
        attempts=(Attempt(None, None, RunState.LOST, None),),
        error=ErrorInfo("ValueError", "no,\n'good'"),
        command="python a.py",
        cwd="/here",
        versions=Versions(git_commit="abc"),
        metrics={"acc": 0.25},
        return_value=0.75,
    )
    row = results_table([run]).row(0, named=True)
    assert row == {
        "directory": "sweep/a",
        "model_name": "a",
        "state": "FAILED",
        "success": False,
        "returncode": 3,
        "seed": 4,
        "fingerprint": "f" * 32,
        "sweep_id": "",
        "index": 0,
        "host": "",
        "gpu_id": 1,
        "gpu_uuids": "GPU-a GPU-b",
        "started_at": datetime(1970, 1, 1, 0, 0, 0, 500_000, tzinfo=timezone.utc),
        "ended_at": datetime(1970, 1, 1, 0, 0, 2, tzinfo=timezone.utc),
        "duration_seconds": 1.5,
        "peak_gpu_memory_gb": 2.5,
        "gpu_seconds": None,
        "core_seconds": None,
        "gpu_utilization": None,
        "n_attempts": 2,
        "error_type": "ValueError",
        "error_message": "no,\n'good'",
        "command": "python a.py",
        "cwd": "/here",
        "git_commit": "abc",
        "lr": 0.1,
        "model.width": 8,
        "metrics.acc": 0.25,
        "return_value": 0.75,
    }


def test_a_hyperparameter_never_hides_a_field_or_a_metric(found):
    run = found(
        hyperparams={"index": "mine", "metrics.acc": 1, "seed": 7, "": 2, "return_value": 3},
        seed=8,
        metrics={"acc": 0.5},
        return_value=0.1,
    )
    row = results_table([run]).row(0, named=True)
    assert row["hyperparams.index"] == "mine"
    assert row["hyperparams.metrics.acc"] == 1
    assert row["hyperparams.seed"] == 7
    assert row["hyperparams."] == 2
    assert row["hyperparams.return_value"] == 3
    assert (row["seed"], row["metrics.acc"], row["return_value"]) == (8, 0.5, 0.1)


def test_runs_with_different_keys_make_one_table(found):
    table = results_table(
        [
            found(hyperparams={"a": 1, "path": "x/y", "html": "<b>", "long": "é" * 300}),
            found(hyperparams={"a": "one", "b": [1, None]}, return_value={"acc": 1.0}),
            found(hyperparams={"a": None}, return_value=3),
        ]
    )
    assert table["a"].to_list() == ["1", "one", None]
    assert table["b"].to_list() == [None, "[1, null]", None]
    assert table["long"].to_list() == ["é" * 300, None, None]
    assert table["return.acc"].to_list() == [None, 1.0, None]
    assert table["return_value"].to_list() == [None, None, 3]


def test_a_time_that_no_calendar_holds_is_missing(found):
    table = results_table([found(started_at=1e20, ended_at=-1e20)])
    assert table["started_at"].to_list() == [None]
    assert table["started_at"].dtype == pl.Datetime("us", "UTC")


def test_seeds_of_any_size_are_kept(found):
    assert results_table([found(seed=2**64), found(seed=1)])["seed"].to_list() == [
        "18446744073709551616",
        "1",
    ]


def test_csv_has_iso_times_and_both_keep_non_finite_numbers(found):
    runs = [
        found(started_at=0.25, metrics={"loss": math.nan}),
        found(metrics={"loss": math.inf}),
        found(metrics={"loss": -math.inf}),
        found(),
    ]
    table = results_table(runs)
    rows = list(csv.DictReader(io.StringIO(csv_bytes(table).decode())))
    assert [row["metrics.loss"] for row in rows] == ["NaN", "inf", "-inf", ""]
    assert [row["started_at"] for row in rows] == ["1970-01-01T00:00:00.250Z", "", "", ""]
    again = pl.read_parquet(io.BytesIO(parquet_bytes(table)))
    assert again.equals(table)
    assert again.schema["started_at"] == pl.Datetime("us", "UTC")


def test_json_is_strict_and_complete(found):
    record_fields = {"metrics": {"loss": math.nan}, "hyperparams": {"lr": math.inf, "x": [None]}}
    runs = [found("a/ü", **record_fields), found("b")]
    data = json_bytes(runs)
    first, second = _strict(data)
    assert first["directory"] == "a/ü"
    assert first["metrics"] == {"loss": "NaN"}
    assert first["hyperparams"] == {"lr": "Infinity", "x": [None]}
    assert set(second) == {"directory", *RunRecord.__struct_fields__}
    assert _strict(json_bytes([])) == []


def test_the_files_show_the_observed_state(make_record):
    run = FoundRun("a", RunDir(Path()), make_record(state=RunState.RUNNING), RunState.LOST)
    assert results_table([run])["state"].to_list() == ["LOST"]
    assert _strict(json_bytes([run]))[0]["state"] == "LOST"


def test_only_the_formats_asked_for_are_written(tmp_path, found):
    written = write_results([found()], tmp_path / "new", ["csv", "json"])
    assert [path.name for path in written] == ["results.csv", "results.json"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "results.csv",
        "results.json",
    ]


def test_a_target_that_cannot_be_written_is_a_sentence(tmp_path, found):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OrchestratorError, match="--output"):
        write_results([found()], tmp_path / "file", ["csv"])
    (tmp_path / "results.json").mkdir()
    with pytest.raises(OrchestratorError, match=r"results\.json"):
        write_results([found()], tmp_path, ["json"])


_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=4,
)
_RECORDS = st.builds(
    RunRecord,
    model_name=_TEXT,
    state=st.sampled_from(RunState),
    seed=st.none() | st.integers(),
    returncode=st.none() | st.integers(),
    hyperparams=st.dictionaries(
        _TEXT | st.sampled_from(["seed", "state", "lr"]), _JSON, max_size=4
    ),
    metrics=st.dictionaries(_TEXT, st.floats(), max_size=3),
    return_value=_JSON,
    command=_TEXT,
    started_at=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    duration_seconds=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    error=st.none() | st.builds(ErrorInfo, type=_TEXT, message=_TEXT),
)


def _as_read(record):
    """The record as a run.json gives it back."""
    again = decode(encode(record))
    return FoundRun("run", RunDir(Path()), again, again.state)


@settings(max_examples=150, deadline=None)
@given(st.lists(_RECORDS.map(_as_read), max_size=4))
def test_any_records_make_a_table_and_files_that_read_back(runs):
    table = results_table(runs)
    assert len(table) == len(runs)
    assert pl.read_parquet(io.BytesIO(parquet_bytes(table))).equals(table)
    assert [item["model_name"] for item in _strict(json_bytes(runs))] == [
        run.record.model_name for run in runs
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(_RECORDS.map(_as_read), min_size=1, max_size=4))
def test_csv_reads_back_as_the_same_table(runs):
    table = results_table(runs)
    header, *rows = csv.reader(io.StringIO(csv_bytes(table).decode("utf-8"), newline=""))
    assert header == table.columns
    assert len(rows) == len(table)
    for name, cells in zip(header, zip(*rows, strict=True), strict=True):
        for cell, value in zip(cells, table[name], strict=True):
            assert _same_cell(cell, value), (name, cell, value)


def _same_cell(cell, value):
    if isinstance(value, float):
        return float(cell) == value or (math.isnan(value) and math.isnan(float(cell)))
    if isinstance(value, datetime):
        return cell.endswith("Z")
    if isinstance(value, bool):
        return cell == str(value).lower()
    return cell == ("" if value is None else str(value))
