"""Reading every record below some directories: the one place where results touch the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.record import RecordError, RunRecord, RunState, decode
from orchestrator.store import RECORD, RunDir, find_runs, observed_state, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class FoundRun:
    """A run as found: its directory relative to the root, its record, its state as observed."""

    directory: str
    files: RunDir
    record: RunRecord
    state: RunState
    # What tells it apart beside the hyperparameters that its record holds.
    added: dict[str, Any] = field(default_factory=dict)

    @property
    def hyperparams(self) -> dict[str, Any]:
        """What the run was given, and what was found out; see `orchestrator.results.telling`."""
        given = self.record.hyperparams
        return {**given, **self.added} if self.added else given


@dataclass(frozen=True)
class Unreadable:
    """A run directory whose record cannot be read, and why, in one line."""

    directory: str
    path: str
    reason: str


@dataclass
class Reading:
    """What was found below the directories, in name order."""

    runs: list[FoundRun] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)


def read_runs(directories: Sequence[Path | str]) -> Reading:
    """Every run at or below ``directories``, at any depth.

    A run's ``directory`` is relative to the directory it was found in; where several were
    given, that one's name comes first, so that each stays unique. A run that is reached
    twice (``outputs outputs/a``) is read once.

    Raises:
        OrchestratorError: a directory is missing, is a file, or may not be read.
    """
    roots = [str(directory) for directory in directories]
    for root in roots:
        check_directory(root)
    reading = Reading()
    seen: set[str] = set()
    for root in roots:
        for files, directory in _below(root, named=len(roots) > 1):
            if len(roots) > 1:
                real = os.path.realpath(files.path)
                if real in seen:
                    continue
                seen.add(real)
            _read_into(reading, files, directory)
    return reading


def check_directory(root: str) -> None:
    """Say so if a directory cannot be walked.

    Raises:
        OrchestratorError: it is missing, is a file, or may not be read.
    """
    path = Path(root)
    if not path.exists():
        problem = "is a dangling link" if path.is_symlink() else "does not exist"
        msg = (
            f"{root!r} {problem} (looked from {os.getcwd()}). Name the directory that holds the "  # noqa: PTH109
            "run directories, or start a sweep first: python -m orchestrator -m 'seed=range(3)'"
        )
        raise OrchestratorError(msg)
    if not path.is_dir():
        msg = f"{root!r} is a file, expected a directory with run directories at any depth"
        raise OrchestratorError(msg)
    if not os.access(path, os.R_OK | os.X_OK):
        msg = f"{root!r} may not be read by this user; ask its owner for read permission"
        raise OrchestratorError(msg)


def require_any(reading: Reading, directories: Sequence[Path | str]) -> None:
    """Say so if no record could be read.

    Raises:
        OrchestratorError: there is no run; the text says where it was looked and for what.
    """
    if reading.runs:
        return
    where = ", ".join(repr(str(directory)) for directory in directories)
    if reading.unreadable:
        first = reading.unreadable[0]
        msg = (
            f"none of the {len(reading.unreadable)} {RECORD} below {where} could be read; "
            f"the first: {first.path}: {first.reason}"
        )
    else:
        msg = (
            f"there is no run below {where}: expected run directories that hold a {RECORD}, at "
            "any depth. Name the directory that a sweep wrote to; a Hydra app writes records "
            "when it runs with hydra/callbacks=results"
        )
    raise OrchestratorError(msg)


def _below(root: str, *, named: bool) -> Iterator[tuple[RunDir, str]]:
    start = os.path.abspath(root)  # noqa: PTH100 - a link to the results stays a link
    skip = len(start.rstrip(os.sep)) + 1
    for files in find_runs(start):
        relative = str(files.path)[skip:] or "."
        yield files, _text(os.path.normpath(os.path.join(root, relative)) if named else relative)  # noqa: PTH118


def _read_into(reading: Reading, files: RunDir, directory: str) -> None:
    try:
        record = decode(read_bytes(files.record))
    except (OSError, RecordError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        path = _text(str(files.record))
        reading.unreadable.append(Unreadable(directory, path, " ".join(reason.split())))
    else:
        reading.runs.append(FoundRun(directory, files, record, observed_state(record, files)))


def _text(path: str) -> str:
    """A path as text that every format can hold: names that are not UTF-8 get escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
