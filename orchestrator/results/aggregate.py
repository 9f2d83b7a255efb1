"""Records as one table: a row per run, a column per field, hyperparameter and metric."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import polars as pl

from orchestrator.results.columns import as_text, column
from orchestrator.results.scores import METRIC_PREFIX, returned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from orchestrator.results.reading import FoundRun

HYPERPARAM_PREFIX = "hyperparams."

_TIME = pl.Datetime("us", "UTC")


def _time(seconds: float | None) -> datetime | None:
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, tz=timezone.utc)
    except (OverflowError, ValueError, OSError):  # beyond the year 9999
        return None


# The record's own columns, in order. A new field is one line here.
_FIELDS: dict[str, tuple[Any, Callable[[FoundRun], Any]]] = {
    "directory": (pl.String, lambda run: run.directory),
    "model_name": (pl.String, lambda run: run.record.model_name),
    "state": (pl.String, lambda run: run.state.value),
    "success": (pl.Boolean, lambda run: run.record.success),
    "returncode": (None, lambda run: run.record.returncode),
    "seed": (None, lambda run: run.record.seed),
    "fingerprint": (pl.String, lambda run: run.record.fingerprint),
    "sweep_id": (pl.String, lambda run: run.record.sweep_id),
    "index": (None, lambda run: run.record.index),
    "host": (pl.String, lambda run: run.record.host),
    "gpu_id": (None, lambda run: run.record.gpu_id),
    "gpu_uuids": (pl.String, lambda run: " ".join(run.record.gpu_uuids)),
    "started_at": (_TIME, lambda run: _time(run.record.started_at)),
    "ended_at": (_TIME, lambda run: _time(run.record.ended_at)),
    "duration_seconds": (pl.Float64, lambda run: run.record.duration_seconds),
    "peak_gpu_memory_gb": (pl.Float64, lambda run: run.record.peak_gpu_memory_gb),
    "gpu_seconds": (pl.Float64, lambda run: run.record.gpu_seconds),
    "core_seconds": (pl.Float64, lambda run: run.record.core_seconds),
    "gpu_utilization": (pl.Float64, lambda run: run.record.gpu_utilization),
    "n_attempts": (pl.Int64, lambda run: len(run.record.attempts) + 1),
    "error_type": (pl.String, lambda run: run.record.error and run.record.error.type),
    "error_message": (pl.String, lambda run: run.record.error and run.record.error.message),
    "command": (pl.String, lambda run: run.record.command),
    "cwd": (pl.String, lambda run: run.record.cwd),
    "git_commit": (pl.String, lambda run: run.record.versions.git_commit),
}


def results_table(runs: Sequence[FoundRun]) -> pl.DataFrame:
    """One row per run.

    Columns: the record's fields; each hyperparameter under its dotted key (with
    ``hyperparams.`` before it where that name is taken); each metric as ``metrics.NAME``;
    the return value, or a returned mapping's scalars as ``return.KEY``.
    """
    fields = [_field(name, runs) for name in _FIELDS]
    metrics = {f"{METRIC_PREFIX}{name}": name for name in _keys(r.record.metrics for r in runs)}
    returns = [returned(run.record) for run in runs]
    return_names = list(_keys(returns))
    parameters = _hyperparam_columns(runs, {*_FIELDS, *metrics, *return_names})
    return pl.DataFrame(
        [
            *fields,
            *(
                column(name, [run.hyperparams.get(key) for run in runs])
                for name, key in parameters.items()
            ),
            *(
                column(name, [run.record.metrics.get(key) for run in runs])
                for name, key in metrics.items()
            ),
            *(column(name, [row.get(name) for row in returns]) for name in return_names),
        ]
    )


def _field(name: str, runs: Sequence[FoundRun]) -> pl.Series:
    dtype, value = _FIELDS[name]
    values = [value(run) for run in runs]
    if dtype is None:  # an integer that a record may hold in any size
        series = column(name, values)
        return series.cast(pl.Int64) if series.null_count() == len(series) else series
    return pl.Series(name, values, dtype=dtype)


def _keys(mappings: Iterable[dict[str, Any]]) -> dict[str, None]:
    """The union of the mappings' keys, in order of appearance."""
    return {key: None for mapping in mappings for key in mapping}


def _hyperparam_columns(runs: Sequence[FoundRun], taken: set[str]) -> dict[str, str]:
    """Column name to hyperparameter key; what a field says already (the seed) is left out."""
    columns: dict[str, str] = {}
    for key in _keys(run.hyperparams for run in runs):
        if key in _FIELDS and _repeats_field(key, runs):
            continue
        name = key
        while name in taken or not name:
            name = f"{HYPERPARAM_PREFIX}{name}"
        taken.add(name)
        columns[name] = key
    return columns


def _repeats_field(key: str, runs: Sequence[FoundRun]) -> bool:
    field = _FIELDS[key][1]
    return all(
        as_text(run.hyperparams[key]) == as_text(field(run))
        for run in runs
        if key in run.hyperparams
    )
