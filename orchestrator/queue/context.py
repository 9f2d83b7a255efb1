"""What a scheduler works with; all of it is replaced easily in a test."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.queue.retry import OomKills

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.queue.control import Control
    from orchestrator.queue.link import ServerLink
    from orchestrator.queue.needs import Needs
    from orchestrator.queue.places import Places
    from orchestrator.queue.plan import Planner
    from orchestrator.queue.progress import Progress
    from orchestrator.queue.retry import FailureLimit, RetryPolicy
    from orchestrator.sweep.compose import Composer
    from orchestrator.sweeps import Sweep


@dataclass
class Context:
    """One launch's parts."""

    composer: Composer
    planner: Planner
    sweep: Sweep
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
