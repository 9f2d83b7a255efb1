"""Records as files, for the tests of the results."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.record import RunRecord, RunState
from orchestrator.results.reading import FoundRun
from orchestrator.store import RunDir, observed_state


@pytest.fixture
def make_record():
    def make(name="run", **fields):
        state = fields.pop("state", RunState.COMPLETED)
        return RunRecord(
            model_name=name, state=state, success=state is RunState.COMPLETED, **fields
        )

    return make


@pytest.fixture
def write_run(tmp_path, make_record):
    """Write a record into a new run directory below the test's directory."""

    def write(directory, **fields):
        run = RunDir(tmp_path / directory)
        run.write(make_record(run.path.name, **fields))
        return run

    return write


@pytest.fixture
def found(make_record):
    """A run as the reading gives it, without a file."""

    def make(directory="run", **fields):
        record = make_record(directory.rsplit("/", 1)[-1], **fields)
        return FoundRun(
            directory, RunDir(Path("/nonexistent") / directory), record, observed_state(record)
        )

    return make
