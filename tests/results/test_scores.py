"""What a run may be judged by, and how a metric is chosen."""

from __future__ import annotations

import math

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.record import RunState
from orchestrator.results.scores import (
    check_seed_key,
    choose_score,
    default_mode,
    returned,
    score,
    score_counts,
    scores,
)


def test_a_number_returned_is_a_score_beside_the_metrics(make_record):
    record = make_record(metrics={"acc": 0.5}, return_value=3)
    assert scores(record) == {"acc": 0.5, "return_value": 3.0}
    assert score(record, "return_value") == 3.0
    assert score(record, "loss") is None


def test_a_returned_mapping_is_not_shown_twice(make_record):
    record = make_record(
        metrics={"acc": 0.5, "bad": math.nan, "changed": 1.0},
        return_value={"acc": 0.5, "bad": math.nan, "changed": 2.0, "word": "x", "list": [1]},
    )
    assert returned(record) == {"return.changed": 2.0, "return.word": "x"}


def test_text_and_lists_are_not_scores_and_truth_is_one(make_record):
    assert scores(make_record(return_value="good")) == {}
    assert scores(make_record(return_value=[1.0])) == {}
    assert scores(make_record(return_value=True)) == {"return_value": 1.0}
    assert scores(make_record(return_value=10**400)) == {"return_value": math.inf}


def test_time_and_memory_can_be_asked_for_and_are_never_the_default(make_record, found):
    record = make_record(duration_seconds=5.0)
    assert score_counts([found(duration_seconds=5.0)]) == {}
    assert choose_score({}, "duration_seconds") == "duration_seconds"
    assert score(record, "duration_seconds") == 5.0
    assert score(record, "peak_gpu_memory_gb") is None


def test_the_default_is_what_most_completed_runs_have():
    assert choose_score({"acc": 1, "loss": 2}, None) == "loss"
    assert choose_score({"acc": 2, "loss": 2}, None) == "acc"
    assert choose_score({"acc": 2, "loss": 2, "return_value": 2}, None) == "return_value"
    assert choose_score({"acc": 3, "return_value": 2}, None) == "acc"
    assert choose_score({}, None) is None


def test_scores_are_counted_over_completed_runs(found):
    runs = [
        found(metrics={"loss": 1.0}),
        found(metrics={"loss": 2.0}, return_value=1),
        found(metrics={"loss": 1.0, "acc": 1.0}, state=RunState.FAILED),
    ]
    assert score_counts(runs) == {"acc": 0, "loss": 2, "return_value": 1}


def test_a_seed_key_that_no_run_has_gets_the_nearest_names(found):
    runs = [found(hyperparams={"seed": 1, "lr": 0.1})]
    check_seed_key(runs, "seed")
    with pytest.raises(OrchestratorError) as caught:
        check_seed_key(runs, "sed")
    assert str(caught.value) == "no run has 'sed'; did you mean seed? There are: seed, lr"
    with pytest.raises(OrchestratorError, match=r"^no run has 'zzz'\.$"):
        check_seed_key([found()], "zzz")


def test_a_metric_may_be_named_as_its_column_is():
    assert choose_score({"acc": 1}, "metrics.acc") == "acc"
    assert choose_score({"metrics.acc": 1, "acc": 1}, "metrics.acc") == "metrics.acc"


def test_an_unknown_metric_gets_the_nearest_names_and_all_of_them():
    with pytest.raises(OrchestratorError, match=r"Did you mean test_accuracy\?") as caught:
        choose_score({"test_accuracy": 1, "zeta": 1}, "test_acuracy")
    assert "zeta" in str(caught.value)
    with pytest.raises(OrchestratorError, match="none has logged"):
        choose_score({}, "acc")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("test_loss", "min"),
        ("valLoss", "min"),
        ("eval/error", "min"),
        ("duration_seconds", "min"),
        ("accuracy", "max"),
        ("return_value", "max"),
        ("glossary", "max"),
        ("", "max"),
    ],
)
def test_less_is_better_where_a_word_says_so(name, mode):
    assert default_mode(name) == mode
