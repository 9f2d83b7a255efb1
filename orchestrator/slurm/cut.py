"""From runs to job arrays: which share a job, how large arrays are, how many of each run at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from orchestrator.queue.plan import Plan
    from orchestrator.record import RunRecord


@dataclass(frozen=True)
class Asked:
    """A run to submit: its plan, its record, its config, and what its job asks Slurm for."""

    plan: Plan
    record: RunRecord
    config: bytes
    resources: dict[str, Any]


@dataclass(frozen=True)
class Array:
    """Jobs that ask for the same, to be submitted at once.

    Attributes:
        packs: the runs of each job.
        at_a_time: how many of the jobs may run at a time.
        after: the array, by its place, that has to have ended before; None where none has.
    """

    packs: Sequence[Sequence[Asked]]
    at_a_time: int
    after: int | None = None


def cut(asked: Sequence[Asked], runs_per_job: int, most: int, at_a_time: int) -> list[Array]:
    """The arrays for some runs.

    Args:
        asked: the runs.
        runs_per_job: at most.
        most: jobs in one array, at most.
        at_a_time: jobs that run at a time, of all arrays together.
    """
    groups: dict[str, list[list[Asked]]] = {}
    for pack in packs(asked, runs_per_job):
        groups.setdefault(_key(pack[0]), []).append(pack)
    pieces: list[list[list[Asked]]] = []
    for group in groups.values():
        start = 0
        for size in arrays(len(group), most):
            pieces.append(group[start : start + size])
            start += size
    shares = lanes([len(piece) for piece in pieces], at_a_time)
    return [Array(piece, *share) for piece, share in zip(pieces, shares, strict=True)]


def _key(run: Asked) -> str:
    return json.dumps(run.resources, sort_keys=True, default=str)


def packs(asked: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Runs that share a job: those that ask for the same, in their order, at most ``size``."""
    groups: dict[str, list[Asked]] = {}
    for run in asked:
        groups.setdefault(_key(run), []).append(run)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def arrays(jobs: int, most: int) -> list[int]:
    """Cut so many jobs into arrays of nearly equal sizes, none larger than ``most``."""
    count = -(-jobs // max(most, 1))  # (a cluster may have arrays switched off)
    return [jobs // count + (number < jobs % count) for number in range(count)]


def lanes(sizes: Sequence[int], at_a_time: int) -> list[tuple[int, int | None]]:
    """For each array how many of its jobs may run at a time, and after which array it starts.

    In all never more than ``at_a_time``. Where there are places enough each array has a share by
    its size, so that they end at about the same time; else they share lanes of one job at a time,
    one after the other in each.
    """
    if len(sizes) > at_a_time:
        return [
            (1, None if number < at_a_time else number - at_a_time) for number in range(len(sizes))
        ]
    shares = [1] * len(sizes)
    for _ in range(min(at_a_time, sum(sizes)) - len(sizes)):
        # The next place goes where most jobs wait for each place that there is.
        best = max(range(len(sizes)), key=lambda number: sizes[number] / shares[number])
        if shares[best] >= sizes[best]:
            break
        shares[best] += 1
    return [(share, None) for share in shares]
