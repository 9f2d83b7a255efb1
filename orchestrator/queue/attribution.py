"""Whose memory is on a GPU: a job's, another sweep's, or somebody else's. Memory in bytes.

NVML names processes by their pids in the machine's first pid namespace. There a process
belongs to the job from whose keeper it descends. In a container NVML shows pids of outside,
or none: what the use of the GPU has grown by is then shared out among the jobs on it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from orchestrator.queue.gpus import GpuSnapshot

# Linux gives its first pid namespace this number.
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
_MAX_DEPTH = 64


@dataclass(frozen=True)
class Shares:
    """The memory of one GPU by whom it belongs to."""

    # By root process.
    seen: Mapping[int, int] = field(default_factory=dict)
    pids: Mapping[int, frozenset[int]] = field(default_factory=dict)
    # Of all sweeps together.
    by_sweeps: int = 0
    # Whether nobody knows which of several jobs has how much.
    guessed: bool = False
    # Whether NVML names processes of a sweep, but not their memory.
    silent: bool = False
    # Whether some process belongs to no sweep; None where that cannot be told.
    foreign: bool | None = None


def in_first_pid_namespace() -> bool:
    """Whether NVML's pids are certainly those that this process sees."""
    try:
        return os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE  # noqa: PTH115
    except OSError:
        return False


def parent_of(pid: int) -> int | None:
    """The parent of a process; None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - often called
            text = file.read()
    except OSError:
        return None
    return int(text[text.rindex(b")") + 2 :].split()[1])


def root_of(
    pid: int, roots: Collection[int], parent: Callable[[int], int | None] = parent_of
) -> int | None:
    """The one of ``roots`` that a process descends from (or is); None if it does from none."""
    current: int | None = pid
    for _ in range(_MAX_DEPTH):
        if current is None or current <= 1:
            return None
        if current in roots:
            return current
        current = parent(current)
    return None


def by_pids(
    snapshot: GpuSnapshot,
    roots: Collection[int],
    known: Mapping[int, int],
    gone: Collection[int] = (),
    parent: Callable[[int], int | None] = parent_of,
) -> Shares:
    """Share out by processes.

    Args:
        snapshot: the GPU.
        roots: the keepers of the jobs of all sweeps.
        known: the roots of processes that were looked at before, and may be dead by now.
        gone: processes of jobs that have ended; their keeper may have another job by now.
        parent: gives a process's parent.
    """
    seen: dict[int, int] = {}
    pids: dict[int, frozenset[int]] = {}
    left, foreign, silent = 0, False, False
    for process in snapshot.processes or ():
        if process.pid in gone:
            left += process.memory or 0
            continue
        root = root_of(process.pid, roots, parent) or known.get(process.pid)
        silent |= root is not None and process.memory is None
        if root is None:
            foreign = True
            continue
        seen[root] = seen.get(root, 0) + (process.memory or 0)
        pids[root] = pids.get(root, frozenset()) | {process.pid}
    return Shares(seen, pids, sum(seen.values()) + left, foreign=foreign, silent=silent)


def by_growth(
    snapshot: GpuSnapshot, own: Sequence[tuple[int, int | None]], baseline: int, others: int
) -> Shares:
    """Share out what the use has grown by since no job was on the GPU.

    By what the jobs need, where all have declared it; else evenly.

    Args:
        snapshot: the GPU.
        own: this sweep's jobs on it: the keeper of each (0: not known), and its need.
        baseline: what was in use while no sweep had a job there.
        others: how many jobs other sweeps have there.
    """
    jobs = len(own) + others
    if not jobs:
        return Shares()
    growth = max(snapshot.used - baseline, 0)
    needs = [need or 0 for _, need in own]
    declared = not others and all(needs)
    parts = [growth * need // sum(needs) for need in needs] if declared else []
    parts = parts or [growth // jobs] * len(own)
    seen = {root: part for (root, _), part in zip(own, parts, strict=True) if root}
    return Shares(seen, {}, growth, guessed=not declared and jobs > 1)
