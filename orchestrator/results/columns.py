"""From a list of any JSON values to one typed column."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import polars as pl

from orchestrator.record import from_plain, to_plain

if TYPE_CHECKING:
    from collections.abc import Sequence

_INT64 = range(-(2**63), 2**63)


def column(name: str, values: Sequence[Any]) -> pl.Series:
    """One column from values of any types; None is null.

    Booleans, integers and floats keep their type; integers next to floats become floats, and
    so do the words that a record writes for NaN and infinity. Any other mixture becomes text;
    lists and mappings become JSON text.
    """
    kinds = {_kind(value) for value in values if value is not None}
    if kinds == {"bool"}:
        return pl.Series(name, values, dtype=pl.Boolean)
    if kinds == {"int"}:
        return pl.Series(name, values, dtype=pl.Int64)
    if kinds and kinds <= {"int", "float", "word"}:
        return pl.Series(name, [_float(value) for value in values], dtype=pl.Float64)
    return pl.Series(name, [as_text(value) for value in values], dtype=pl.String)


def as_text(value: Any) -> str | None:
    """A value as a text column shows it: text as it is, all else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(to_plain(value), ensure_ascii=False)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if value in _INT64 else "text"
    if isinstance(value, float):
        return "float"
    return "word" if isinstance(value, str) and isinstance(from_plain(value), float) else "text"


def _float(value: Any) -> float | None:
    if value is None:
        return None
    return float(from_plain(value))
