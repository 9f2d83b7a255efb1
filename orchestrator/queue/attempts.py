"""A run on its way through a scheduler: waiting for its next try, or at work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.queue.needs import GB
from orchestrator.queue.wire import Usage

if TYPE_CHECKING:
    from orchestrator.queue.link import JobLink
    from orchestrator.queue.needs import Need
    from orchestrator.queue.places import Place
    from orchestrator.queue.plan import Plan
    from orchestrator.queue.wire import JobRequest


@dataclass(frozen=True)
class Try:
    """A run that waits for a place; ``number`` is 1 for its first try in this launch."""

    plan: Plan
    number: int = 1


@dataclass
class Job:
    """A job between its start and its final record."""

    run: Try
    place: Place
    link: JobLink
    request: JobRequest
    pid: int | None = None
    pid_started: float | None = None
    released: bool = False
    answered: bool = False

    @property
    def plan(self) -> Plan:
        return self.run.plan


def usage_of(place: Place) -> Usage:
    peak, busy = place.peak, place.utilization
    return Usage(
        None if peak is None else round(peak / GB, 3), None if busy is None else round(busy, 1)
    )


def described(need: Need) -> str:
    if need.alone:
        return "; alone on its GPU"
    return f"; with {need.memory / GB:.3g} GB" if need.memory else ""
