"""Where every run stands: its observed state, device, time, last metrics and error."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.record import RunState, to_plain
from orchestrator.results.curves import last_step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from orchestrator.results.reading import FoundRun, Reading, Unreadable

UNREADABLE = "UNREADABLE"

# What needs a look comes first, what is done last.
ORDER = (
    RunState.RUNNING.value,
    RunState.LOST.value,
    RunState.FAILED.value,
    RunState.TIMEOUT.value,
    UNREADABLE,
    RunState.CANCELLED.value,
    RunState.PENDING.value,
    RunState.COMPLETED.value,
)


@dataclass(frozen=True)
class Placed:
    """Where a cluster has a run: its job, the node of the job, or what the job waits for."""

    job_id: str = ""
    node: str = ""
    reason: str = ""


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One run as ``orchestrator-status`` shows it. Seconds; times since the epoch."""

    directory: str
    name: str
    state: str
    host: str = ""
    pid: int | None = None
    gpu_id: int | None = None
    gpu_uuids: tuple[str, ...] = ()
    started_at: float | None = None
    elapsed_seconds: float | None = None
    # The last line of the curve; NaN and infinity as the words that JSON can hold.
    metrics: dict[str, Any] | None = None
    # On a cluster: its job, where that is, and why it waits.
    slurm_job_id: str = ""
    node: str = ""
    reason: str = ""
    # A failed run's error, or why a record cannot be read.
    error: str | None = None

    @property
    def device(self) -> str:
        """The node and the GPUs in short, ``cpu``, or ``-`` while none is assigned.

        In brackets what a run on a cluster waits for, or the node of a job that has begun.
        """
        if self.state == RunState.PENDING.value and (self.reason or self.node):
            return f"({self.reason or f'on {self.node}'})"
        return f"{self.node} {self._gpus}".strip()

    @property
    def _gpus(self) -> str:
        uuids = ",".join(uuid[:12] for uuid in self.gpu_uuids)
        if self.gpu_id is not None or uuids:
            number = "" if self.gpu_id is None else str(self.gpu_id)
            # (Where there is no NVML a number is all that a GPU is known by.)
            return " ".join(part for part in dict.fromkeys((number, uuids)) if part)
        never_began = self.state == RunState.CANCELLED.value and self.started_at is None
        waits = self.state in (RunState.PENDING.value, UNREADABLE)
        return "-" if waits or never_began else "cpu"


def run_statuses(
    reading: Reading, now: float, placed: Mapping[Path, Placed] | None = None
) -> list[RunStatus]:
    """Every run's status: running first, then what went wrong, completed last.

    Args:
        reading: what was found.
        now: seconds since the epoch; a running run's time is counted until then.
        placed: where a cluster has runs, by their directories.
    """
    on_cluster = placed or {}
    found = [_status(run, now, on_cluster.get(run.files.path, _NOWHERE)) for run in reading.runs]
    found += [_unreadable(run) for run in reading.unreadable]
    return sorted(found, key=lambda status: (ORDER.index(status.state), status.directory))


_NOWHERE = Placed()


def _status(run: FoundRun, now: float, placed: Placed) -> RunStatus:
    record = run.record
    return RunStatus(
        directory=run.directory,
        name=record.model_name,
        state=run.state.value,
        host=record.host,
        pid=record.pid,
        gpu_id=record.gpu_id,
        gpu_uuids=record.gpu_uuids,
        started_at=record.started_at,
        elapsed_seconds=_elapsed(run, now),
        metrics=last_step(run.files.metrics),
        slurm_job_id=placed.job_id or record.slurm_job_id,
        node=placed.node,
        reason=placed.reason,
        error=error_line(run),
    )


def _elapsed(run: FoundRun, now: float) -> float | None:
    started = run.record.started_at
    if run.state is RunState.RUNNING and started is not None:
        return max(0.0, now - started)
    return run.record.duration_seconds


def error_line(run: FoundRun) -> str | None:
    error = run.record.error
    if error is not None:
        return error.line
    if run.state is RunState.LOST and run.record.state is RunState.RUNNING:
        return f"process {run.record.pid} is gone and left no outcome"
    if run.state is RunState.FAILED and run.record.returncode:
        return f"exit code {run.record.returncode}"
    return None


def _unreadable(run: Unreadable) -> RunStatus:
    name = run.directory.rsplit("/", 1)[-1]
    return RunStatus(directory=run.directory, name=name, state=UNREADABLE, error=run.reason)


def select(
    statuses: Iterable[RunStatus], states: Sequence[str] = (), name: str | None = None
) -> list[RunStatus]:
    """Those in one of ``states`` (all, if none is given) whose name or directory matches.

    Args:
        statuses: as from `run_statuses`.
        states: words of `ORDER`.
        name: a shell pattern for the run's name or its directory.
    """
    return [
        status
        for status in statuses
        if (not states or status.state in states)
        and (name is None or fnmatchcase(status.name, name) or fnmatchcase(status.directory, name))
    ]


def counts(statuses: Iterable[RunStatus]) -> dict[str, int]:
    """How many runs are in each state that occurs, in the order of the list."""
    found = Counter(status.state for status in statuses)
    return {state: found[state] for state in ORDER if found[state]}


def as_json(statuses: Sequence[RunStatus]) -> bytes:
    """Strict JSON: ``{"runs": [...], "counts": {...}}``."""
    runs = [to_plain(msgspec.structs.asdict(status)) for status in statuses]
    return msgspec.json.format(msgspec.json.encode({"runs": runs, "counts": counts(statuses)}))
