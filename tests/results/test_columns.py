"""Columns from values of any JSON type."""

from __future__ import annotations

import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.results.columns import column

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([True, None, False], pl.Boolean, [True, None, False]),
        ([1, None, 2], pl.Int64, [1, None, 2]),
        ([1, 2.5], pl.Float64, [1.0, 2.5]),
        ([1e-3, "Infinity", "-Infinity"], pl.Float64, [1e-3, math.inf, -math.inf]),
        (
            [1, "a", 1.5, True, None, [1, "x"]],
            pl.String,
            ["1", "a", "1.5", "true", None, '[1, "x"]'],
        ),
        ([True, 1], pl.String, ["true", "1"]),
        ([{"a": math.nan}], pl.String, ['{"a": "NaN"}']),
        (["ü", "NaN"], pl.String, ["ü", "NaN"]),
        ([2**63, 1], pl.String, ["9223372036854775808", "1"]),
        ([-(2**63)], pl.Int64, [-(2**63)]),
        ([None, None], pl.String, [None, None]),
        ([], pl.String, []),
    ],
)
def test_the_type_is_the_narrowest_that_holds_all_values(values, dtype, expected):
    series = column("x", values)
    assert series.dtype == dtype
    assert series.to_list() == expected


def test_the_word_for_nan_is_a_number():
    assert math.isnan(column("x", ["NaN"])[0])


@given(st.lists(_JSON, max_size=6))
def test_any_values_make_a_column_with_nulls_where_there_was_none(values):
    series = column("x", values)
    assert series.is_null().to_list() == [value is None for value in values]
