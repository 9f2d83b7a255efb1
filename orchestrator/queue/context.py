"""What a scheduler works with; all of it is replaced easily, in a test or in a Slurm job."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.queue.retry import OomKills

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from omegaconf import DictConfig

    from orchestrator.queue.control import Control
    from orchestrator.queue.link import ServerLink
    from orchestrator.queue.needs import Needs
    from orchestrator.queue.places import Places
    from orchestrator.queue.plan import Plan, Seat
    from orchestrator.queue.progress import Progress
    from orchestrator.queue.retry import FailureLimit, RetryPolicy
    from orchestrator.queue.wire import Ended, JobRequest
    from orchestrator.record import RunRecord


class Composes(Protocol):
    """Makes a point's whole config."""

    def compose(self, overrides: Sequence[str]) -> DictConfig: ...


class Plans(Protocol):
    """Turns points into plans, and these into jobs."""

    def plan(self, index: int, num: int, overrides: Sequence[str]) -> Plan: ...
    def request(self, plan: Plan, seat: Seat, sweep: Any) -> JobRequest: ...
    def remember(self, plan: Plan, record: RunRecord) -> None: ...


class KeepsBook(Protocol):
    """Hears which runs a sweep has."""

    @property
    def sweep_id(self) -> str: ...
    def add_run(
        self, index: int, directory: Path, hyperparams: dict[str, Any] | None = None
    ) -> None: ...
    def add_unstarted(self, record: RunRecord) -> None: ...
    def write_partial_now_and_then(self) -> None: ...


class Launch(Protocol):
    """What the answers of a launch are made of."""

    @property
    def composer(self) -> Composes: ...
    @property
    def planner(self) -> Plans: ...
    @property
    def sweep(self) -> KeepsBook: ...
    @property
    def progress(self) -> Progress: ...
    @property
    def ended(self) -> Callable[[Plan, Ended], None]: ...


def nobody_listens(_plan: Plan, _ended: Ended) -> None:
    """What is done at the end of a run where nothing more is to be done."""


@dataclass
class Context:
    """One launch's parts."""

    composer: Composes
    planner: Plans
    sweep: KeepsBook
    places: Places
    needs: Needs
    retry: RetryPolicy
    limit: FailureLimit
    control: Control
    threads: int
    progress: Progress
    make_server: Callable[[], ServerLink]
    server: ServerLink
    oom_kills: OomKills = field(default_factory=OomKills)
    # Runs that failed for good, over all launches.
    failures: int = 0
    clock: Callable[[], float] = time.monotonic
    # Hears of each run that has ended for good.
    ended: Callable[[Plan, Ended], None] = nobody_listens
