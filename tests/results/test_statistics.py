"""Statistics against numbers worked out by hand and the standard library."""

from __future__ import annotations

import math
import statistics as reference

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.results.statistics import best_index, mean, ranking, standard_error

_FLOATS = st.floats(min_value=-1e100, max_value=1e100, allow_nan=False)


def test_known_values():
    # Deviations -1.5, -0.5, 0.5, 1.5: squares sum to 5, 5/3 is the variance, over n = 4.
    assert mean([1, 2, 3, 4]) == 2.5
    assert standard_error([1, 2, 3, 4]) == pytest.approx(math.sqrt(5 / 3 / 4), rel=1e-15)


def test_one_value_has_a_mean_and_no_error_and_none_has_neither():
    assert mean([7.0]) == 7.0
    assert np.isnan(standard_error([7.0]))
    assert np.isnan(mean([]))
    assert np.isnan(standard_error([]))


def test_the_last_axis_is_reduced():
    values = np.array([[[1.0, 3.0], [2.0, 2.0]]])
    assert mean(values).shape == (1, 2)
    assert mean(values).tolist() == [[2.0, 2.0]]
    assert standard_error(values).tolist() == [[1.0, 0.0]]
    assert mean(np.zeros((3, 0))).shape == (3,)
    assert standard_error(np.zeros((3, 1))).shape == (3,)


def test_nan_and_infinity_are_results():
    assert np.isnan(mean([1.0, math.nan]))
    assert np.isnan(standard_error([1.0, math.nan]))
    assert mean([math.inf, 1.0]) == math.inf
    assert mean([1.0, math.inf]) == math.inf
    assert np.isnan(standard_error([math.inf, 1.0]))
    assert np.isnan(mean([math.inf, -math.inf]))


def test_very_large_and_very_small_values_keep_their_spread():
    assert mean([1.7e308, 1.7e308]) == 1.7e308
    assert standard_error([0.0, 1e200]) == pytest.approx(5e199)
    assert standard_error([0.0, 1e-200]) == pytest.approx(5e-201)


# (Half of the smallest number that there is is rounded one way or the other.)
@given(st.lists(_FLOATS.filter(lambda x: x == 0 or abs(x) > 1e-290), min_size=2, max_size=30))
def test_agrees_with_the_standard_library(values):
    scale = max(abs(value) for value in values)
    assert float(mean(values)) == pytest.approx(
        float(reference.mean(values)), rel=1e-9, abs=scale * 1e-12
    )
    expected = reference.stdev(values) / math.sqrt(len(values))
    assert float(standard_error(values)) == pytest.approx(expected, rel=1e-6, abs=scale * 1e-12)


@given(st.lists(st.floats(), max_size=20))
def test_no_numbers_break_them(values):
    assert mean(values).shape == ()
    assert standard_error(values).shape == ()


@given(_FLOATS, st.integers(2, 20))
def test_equal_values_have_no_error(value, count):
    assert mean([value] * count) == value
    assert standard_error([value] * count) == 0


@given(st.lists(st.floats(), max_size=20), st.sampled_from(["max", "min"]))
def test_ranking_is_a_permutation_from_best_to_worst_with_nan_last(values, mode):
    order = ranking(values, mode).tolist()
    assert sorted(order) == list(range(len(values)))
    ranked = [values[index] for index in order]
    numbers = [value for value in ranked if not math.isnan(value)]
    assert numbers == sorted(numbers, reverse=mode == "max")
    assert all(math.isnan(value) for value in ranked[len(numbers) :])
    best = best_index(values, mode)
    assert best == (order[0] if numbers else None)


def test_the_first_of_equals_is_best():
    assert best_index([1.0, 3.0, 3.0], "max") == 1
    assert best_index([2.0, 1.0, 1.0], "min") == 1
    assert best_index([], "max") is None
    assert best_index([math.nan], "min") is None
