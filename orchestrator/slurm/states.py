"""Slurm's words for jobs, translated: their states, and the ids of tasks in brackets. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.record import RunState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_STATES = {
    RunState.PENDING: (
        # The nodes of the last two are still starting.
        "PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT RESV_DEL_HOLD EXPEDITING "
        "CONFIGURING POWER_UP_NODE"
    ),
    # Those that end (COMPLETING, SIGNALING, STAGE_OUT) are not over: some go back to the queue.
    RunState.RUNNING: (
        "RUNNING COMPLETING SIGNALING STAGE_OUT SUSPENDED STOPPED RESIZING UPDATE_DB"
    ),
    RunState.COMPLETED: "COMPLETED",
    RunState.FAILED: "FAILED OUT_OF_MEMORY",
    RunState.TIMEOUT: "TIMEOUT DEADLINE",
    RunState.CANCELLED: "CANCELLED PREEMPTED REVOKED",
    RunState.LOST: "NODE_FAIL BOOT_FAIL LAUNCH_FAILED RECONFIG_FAIL",
}
_BY_WORD = {word: state for state, words in _STATES.items() for word in words.split()}
_PART = re.compile(r"(\d+)(?:-(\d+))?(?::(\d+))?", re.ASCII)


@dataclass(frozen=True)
class Seen:
    """What Slurm says of one job, or of one task of an array.

    Attributes:
        state: where it is.
        word: the state in Slurm's own word, for people.
        node: its node, or an expression of several (``node[1-2]``); empty before it starts.
        reason: why it waits, or how it ended; empty where Slurm gives none.
        exit_code: ``code:signal``, once it is over. Accounting takes 128 off codes above 128.
        restarts: how often Slurm has put it back into the queue; accounting does not tell.
    """

    state: RunState
    word: str
    node: str = ""
    reason: str = ""
    exit_code: str = ""
    restarts: int = 0


def translate(word: str) -> RunState | None:
    """The state that a word of Slurm's stands for; None for a word that is not known here.

    ``CANCELLED by 1000`` is CANCELLED, and so is a word that was cut (``CANCELLED+``), as long
    as all that it may have been mean the same.
    """
    first = word.partition(" ")[0]
    start = first.removesuffix("+")
    if start == first or start in _BY_WORD:
        return _BY_WORD.get(start)
    states = {state for known, state in _BY_WORD.items() if start and known.startswith(start)}
    return states.pop() if len(states) == 1 else None


def base_of(job_id: str) -> str:
    """The id that sbatch gave: ``123`` of ``123``, ``123_4``, ``123_[5-6]`` and ``123+1``."""
    return re.split(r"[_+]", job_id, maxsplit=1)[0]


def expand(job_id: str) -> list[str]:
    """The tasks of an id: ``123_[3-5,8%2]`` is four of them; an id without brackets is itself.

    Where Slurm has cut the text, the tasks that can still be read.
    """
    base, bracket, text = job_id.partition("_[")
    if not bracket:
        return [job_id]
    inside, closed, _ = text.partition("]")
    parts = inside.partition("%")[0].split(",")
    # Of a number that was cut nobody knows how it went on.
    whole = parts if closed else parts[:-1]
    return [f"{base}_{task}" for part in whole for task in _tasks(part)]


def _tasks(part: str) -> range:
    match = _PART.fullmatch(part)
    if match is None:
        return range(0)
    first, last, step = match.groups()
    return range(int(first), int(last or first) + 1, max(1, int(step or 1)))


def collapse(ids: Iterable[str]) -> list[str]:
    """The same jobs in fewest words: ``["123_[0-3,7]", "200"]``; arrays as they first come."""
    found: dict[str, set[int]] = {}
    for job_id in (single for given in ids for single in expand(given)):
        base, _, task = job_id.partition("_")
        if task.isdecimal():
            found.setdefault(f"{base}_", set()).add(int(task))
        else:
            found.setdefault(job_id, set())
    return [f"{name}{_bracket(tasks)}" for name, tasks in found.items()]


def _bracket(tasks: set[int]) -> str:
    if len(tasks) <= 1:
        return "".join(map(str, tasks))
    ranges = (f"{a}-{b}" if a < b else str(a) for a, b in _ranges(sorted(tasks)))
    return f"[{','.join(ranges)}]"


def _ranges(tasks: list[int]) -> Iterator[tuple[int, int]]:
    first = last = tasks[0]
    for task in tasks[1:]:
        if task > last + 1:
            yield first, last
            first = task
        last = task
    yield first, last
