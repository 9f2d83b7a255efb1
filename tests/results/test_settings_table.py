"""Runs pooled over seeds and ranked."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.record import RunRecord, RunState
from orchestrator.results.reading import FoundRun
from orchestrator.results.settings_table import (
    compare,
    constant_values,
    pool,
    shown,
    varying_keys,
)
from orchestrator.store import RunDir


def _grid(found):
    return [
        found(
            f"lr{lr}s{seed}",
            hyperparams={"lr": lr, "model": "mlp", "seed": seed},
            metrics={"acc": lr + seed / 100},
        )
        for lr in (0.1, 0.2)
        for seed in range(3)
    ]


def test_seeds_are_pooled(found):
    table = compare(_grid(found), "acc", "max", "seed")
    assert table.keys == ["lr"]
    assert table.same == {"model": "mlp"}
    first, second = table.rows
    assert first.setting.hyperparams["lr"] == 0.2
    assert first.mean == pytest.approx(0.21)
    # Deviations -0.01, 0, 0.01: sqrt(2e-4 / 2) / sqrt(3).
    assert first.standard_error == pytest.approx(0.01 / math.sqrt(3))
    assert (first.n, second.n) == (3, 3)
    assert table.best is first
    assert first.best_run("max").directory == "lr0.2s2"
    assert compare(_grid(found), "acc", "min", "seed").best.setting.hyperparams["lr"] == 0.1


def test_another_key_may_be_the_seed(found):
    assert len(pool(_grid(found), "lr")) == 3


def test_only_completed_runs_count_and_the_others_are_counted(found):
    runs = [
        found(state=state, metrics={"acc": 0.5})
        for state in (*RunState, RunState.COMPLETED, RunState.PENDING)
    ]
    (row,) = compare(runs, "acc", None, "seed").rows
    assert (row.n, row.setting.failed, row.setting.unfinished) == (2, 3, 4)
    assert row.standard_error == 0


def test_a_setting_without_a_score_or_with_nan_is_never_the_best(found):
    runs = [
        found("none", hyperparams={"a": 1}, state=RunState.FAILED),
        found("nan", hyperparams={"a": 2}, metrics={"loss": math.nan}),
        found("bad", hyperparams={"a": 3}, metrics={"loss": 5.0}),
        found("good", hyperparams={"a": 4}, metrics={"loss": 1.0}),
    ]
    table = compare(runs, "loss", None, "seed")
    assert table.mode == "min"
    assert [row.setting.hyperparams["a"] for row in table.rows][:2] == [4, 3]
    assert compare(runs[:2], "loss", None, "seed").best is None
    assert compare(runs, None, None, "seed").best is None


def test_a_key_that_a_run_was_not_given_shows_as_a_dash(found):
    settings_ = pool([found(hyperparams={}), found(hyperparams={"a": None})], "seed")
    assert varying_keys(settings_) == ["a"]
    assert [shown(setting, "a") for setting in settings_] == ["-", "null"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (1.0, "1.0"),
        ("1", '"1"'),
        ("-", '"-"'),
        ("", '""'),
        ("true", '"true"'),
        ("NaN", "NaN"),
        (True, "true"),
        ("a/b", "a/b"),
        ([1, "x"], '[1, "x"]'),
    ],
)
def test_values_of_different_types_never_look_alike(found, value, text):
    (setting,) = pool([found(hyperparams={"a": value})], "seed")
    assert shown(setting, "a") == text


def test_equal_looking_values_of_different_types_are_different_settings(found):
    values = [1, 1.0, True, "1", None]
    settings_ = pool([found(hyperparams={"a": value}) for value in values], "seed")
    assert len(settings_) == len(values)


def test_one_run_has_nothing_that_varies(found):
    settings_ = pool([found(hyperparams={"a": 1, "seed": 0})], "seed")
    assert varying_keys(settings_) == []
    assert constant_values(settings_) == {"a": "1"}


_VALUES = st.none() | st.booleans() | st.integers(0, 3) | st.floats() | st.text(max_size=3)
_RECORDS = st.builds(
    RunRecord,
    model_name=st.text(max_size=3),
    state=st.sampled_from(RunState),
    hyperparams=st.dictionaries(st.sampled_from(["a", "b", "seed"]), _VALUES),
    metrics=st.dictionaries(st.sampled_from(["x", "y"]), st.floats()),
)


@settings(deadline=None)
@given(st.lists(_RECORDS, max_size=12), st.sampled_from(["max", "min", None]))
def test_every_run_is_in_exactly_one_setting(records, mode):
    runs = [FoundRun(str(i), RunDir(Path()), r, r.state) for i, r in enumerate(records)]
    table = compare(runs, "x", mode, "seed")
    pooled = sorted(int(run.directory) for row in table.rows for run in row.setting.runs)
    assert pooled == list(range(len(runs)))
    for row in table.rows:
        assert row.setting.failed >= 0
        assert row.n <= row.setting.completed
