"""Which GPUs the waiting jobs get. Pure: no NVML, no clock, no files. Memory in bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.queue.gpus import Gpu
    from orchestrator.queue.needs import Need


@dataclass(frozen=True)
class Rules:
    """What this sweep accepts on a GPU."""

    # Jobs at a time, those of other sweeps included.
    per_gpu: int = 1
    # With more memory in use than this, no further job starts; None: no such limit.
    threshold: int | None = None
    # Never beside a process that no sweep started.
    exclusive: bool = False


@dataclass(frozen=True)
class Load:
    """What is known of one GPU when a decision is made."""

    gpu: Gpu
    total: int = 0
    used: int = 0
    free: int = 0
    # Whether the three above are known; if not, counts alone decide.
    measured: bool = True
    # Promised to jobs whose memory does not show yet.
    reserved: int = 0
    # The same with a guess for jobs that declared no need: decides on the order, never on fit.
    expected: int = 0
    # Jobs of all sweeps, and the fewest that any of these accepts beside and with itself.
    processes: int = 0
    limit: int | None = None
    # Of what is used: by jobs of sweeps, which end some day.
    by_sweeps: int = 0
    # Whether a process computes on it that no sweep started.
    foreign: bool = False
    # Whether it answers and is neither paused nor drained; which of these it is.
    usable: bool = True
    closed: str = ""
    # Whether it may take a job at this moment: the stagger is over, its last job has shown.
    ready: bool = True
    # Whether another sweep has waited for it for longer.
    awaited: bool = False

    def taken_by(self, need: Need, rules: Rules) -> Load:
        """The load once a job has been given this GPU."""
        memory = need.memory or 0
        guess = need.memory if need.memory is not None else self.total // rules.per_gpu
        mine = 1 if need.alone else rules.per_gpu
        return replace(
            self,
            reserved=self.reserved + memory,
            expected=self.expected + guess,
            processes=self.processes + 1,
            limit=mine if self.limit is None else min(self.limit, mine),
        )


def why_not(load: Load, need: Need, rules: Rules) -> str:
    """Why a GPU cannot take a job now, for a person; empty where it can."""
    limit = min(rules.per_gpu, load.limit or rules.per_gpu, 1 if need.alone else rules.per_gpu)
    if not load.usable:
        return load.closed or "it does not answer"
    if not load.ready:
        return "a job has just been started there, its memory is still to come"
    if load.awaited:
        return "another sweep has waited for it for longer"
    if load.processes >= limit:
        return f"{plural(load.processes, 'job')} there, and at most {limit} at a time"
    if rules.exclusive and load.foreign:
        return "another program computes there (exclusive)"
    if not load.measured:
        return ""
    if rules.threshold is not None and load.used + load.reserved > rules.threshold:
        return f"{gb(load.used + load.reserved)} are in use or reserved, the threshold is " + gb(
            rules.threshold
        )
    if need.memory is not None and load.free - load.reserved < need.memory:
        return f"{gb(max(load.free - load.reserved, 0))} are free, the job needs {gb(need.memory)}"
    return ""


def decide(
    loads: Sequence[Load], need: Need, rules: Rules, held: frozenset[str] = frozenset()
) -> tuple[Load, ...] | None:
    """The GPUs for one job, or None to wait.

    Args:
        loads: every GPU of this sweep.
        need: what the job asks for.
        rules: what this sweep accepts.
        held: UUIDs that are kept free for a job that has waited for longer.

    Returns:
        Of the GPUs that fit: least memory in use or expected, then fewest jobs, then index.
    """
    possible = [x for x in loads if x.gpu.uuid not in held and _suits(x.gpu, need)]
    fitting = [x for x in possible if not why_not(x, need, rules)]
    if len(fitting) < need.gpus:
        return None
    return tuple(sorted(fitting, key=_order)[: need.gpus])


def _suits(gpu: Gpu, need: Need) -> bool:
    # CUDA uses only one MIG instance a process.
    return need.gpus == 1 or gpu.mig is None


def _order(load: Load) -> tuple[int, int, int, int]:
    instance = -1 if load.gpu.mig is None else load.gpu.mig
    return (load.used + load.expected, load.processes, load.gpu.index, instance)


def hold(
    loads: Sequence[Load], need: Need, rules: Rules, before: frozenset[str] = frozenset()
) -> frozenset[str]:
    """The GPUs to keep free for the job that waits first, so that it gets its turn.

    Those that would fit once the jobs of sweeps there have ended, of these the emptiest; but
    the same as ``before`` unless others are emptier by now, so jobs there only become fewer.
    Empty where too few ever would fit: the others need not wait for that.
    """
    possible = [x for x in loads if _suits(x.gpu, need)]
    hopeful = {x.gpu.uuid: x for x in possible if not why_not(_emptied(x), need, rules)}
    if len(hopeful) < need.gpus:
        return frozenset()
    ordered = sorted(hopeful.values(), key=lambda x: (x.processes, *_order(x)))
    best = ordered[: need.gpus]
    if len(before) == need.gpus and before <= hopeful.keys():
        left = sum(hopeful[uuid].processes for uuid in before)
        if left <= sum(x.processes for x in best):
            return before
    return frozenset(x.gpu.uuid for x in best)


def _emptied(load: Load) -> Load:
    return replace(
        load,
        used=load.used - load.by_sweeps,
        free=load.free + load.by_sweeps,
        reserved=0,
        expected=0,
        processes=0,
        limit=None,
        ready=True,
        awaited=False,
    )


def schedule(
    loads: Sequence[Load], needs: Sequence[Need], rules: Rules, before: frozenset[str] = frozenset()
) -> tuple[list[tuple[int, tuple[Gpu, ...]]], frozenset[str]]:
    """Give out GPUs to waiting jobs, first come first served; later ones fill the gaps.

    Args:
        loads: every GPU of this sweep.
        needs: of the waiting jobs, in their order; each of at least one GPU.
        rules: what this sweep accepts.
        before: what was held the last time for the job that waits first.

    Returns:
        Which of the jobs start, each with its GPUs; and what is held for the first that does
        not. No later job gets any of these, so they empty, and its turn comes.
    """
    now = {load.gpu.uuid: load for load in loads}
    given: list[tuple[int, tuple[Gpu, ...]]] = []
    held: frozenset[str] = frozenset()
    in_vain: set[Need] = set()
    for number, need in enumerate(needs):
        # (GPUs only fill up from here on: what did not fit does not fit later.)
        chosen = None if need in in_vain else decide(tuple(now.values()), need, rules, held)
        if chosen is not None:
            given.append((number, tuple(load.gpu for load in chosen)))
            now.update((x.gpu.uuid, x.taken_by(need, rules)) for x in chosen)
            continue
        if not in_vain:
            held = hold(tuple(now.values()), need, rules, before)
        in_vain.add(need)
    return given, held


def impossible(gpus: Sequence[tuple[Gpu, int]], need: Need) -> str:
    """Why no moment will ever come for a job; empty if one may.

    Args:
        gpus: those of this sweep, each with the memory that is free when it idles (0: not known).
        need: what the job asks for.
    """
    if need.gpus > len(gpus):
        return f"it needs {need.gpus} GPUs, this sweep has {len(gpus)}"
    suitable = [total for gpu, total in gpus if _suits(gpu, need)]
    if need.gpus > len(suitable):
        return (
            f"it needs {need.gpus} GPUs, but CUDA uses only one MIG instance a process and this "
            f"sweep has {len(suitable)} undivided GPUs"
        )
    memory = need.memory
    if memory is None or need.gpus == 0:
        return ""
    large = sum(total == 0 or total >= memory for total in suitable)
    if large < need.gpus:
        largest = max(suitable)
        return (
            f"it needs {gb(memory)} on {need.gpus} GPUs, of which this sweep has {large}; "
            f"the largest has {gb(largest)} when it idles"
        )
    return ""


def gb(memory: int) -> str:
    """Bytes as a person reads them; a gigabyte is 10^9 bytes."""
    return f"{memory / 1e9:.3g} GB"
