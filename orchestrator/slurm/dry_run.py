"""``hydra.launcher.dry_run``: what would be submitted, and what it would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hydra.core.utils import JobReturn

    from orchestrator.queue.plan import Planner
    from orchestrator.slurm.settings import SlurmSettings
    from orchestrator.sweep.compose import Composer


def show(
    points: Sequence[Sequence[str]],
    first_num: int,
    settings: SlurmSettings,
    raw: dict[str, Any],
    planner: Planner,
    composer: Composer,
) -> list[JobReturn]:
    """Print it."""
    raise NotImplementedError
