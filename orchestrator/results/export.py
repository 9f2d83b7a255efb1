"""The merged results as files: CSV, Parquet and JSON, each written atomically."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import msgspec
import polars as pl

from orchestrator.errors import OrchestratorError
from orchestrator.record import encode
from orchestrator.results.aggregate import results_table
from orchestrator.store import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from orchestrator.results.reading import FoundRun


def csv_bytes(table: pl.DataFrame) -> bytes:
    """CSV in UTF-8; times as ISO 8601 in UTC, missing values as empty fields."""
    times = pl.col(pl.Datetime).dt.strftime("%Y-%m-%dT%H:%M:%S%.3fZ")
    return table.with_columns(times).write_csv().encode("utf-8")


def parquet_bytes(table: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    return buffer.getvalue()


def json_bytes(runs: Sequence[FoundRun]) -> bytes:
    """A JSON array of the complete records, each with its directory and observed state."""
    lines = []
    for run in runs:
        record = run.record
        if record.state is not run.state:
            record = msgspec.structs.replace(record, state=run.state)
        directory = msgspec.json.encode(run.directory)
        lines.append(b'{"directory":' + directory + b"," + encode(record).rstrip()[1:])
    return b"[\n" + b",\n".join(lines) + b"\n]\n"


def write_results(runs: Sequence[FoundRun], target: Path, formats: Iterable[str]) -> list[Path]:
    """Write ``results.FORMAT`` for each format (csv, parquet, json) into ``target``.

    Returns:
        The files written.

    Raises:
        OrchestratorError: a file cannot be written; the ones before it are.
    """
    table: pl.DataFrame | None = None
    written = []
    for name in formats:
        path = target / f"results.{name}"
        if name == "json":
            data = json_bytes(runs)
        else:
            table = results_table(runs) if table is None else table
            data = _OF_TABLE[name](table)
        try:
            write_atomic(path, data)
        except OSError as error:
            msg = (
                f"{path} cannot be written: {error.strerror or error}. "
                "Choose another directory with --output"
            )
            raise OrchestratorError(msg) from error
        written.append(path)
    return written


_OF_TABLE: dict[str, Callable[[pl.DataFrame], bytes]] = {
    "csv": csv_bytes,
    "parquet": parquet_bytes,
}
