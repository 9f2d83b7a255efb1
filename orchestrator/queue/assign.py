"""Which device a job gets. Pure: no NVML, no clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.queue.gpus import Gpu


def assign(gpus: Sequence[Gpu], running: Mapping[str, int], limit: int) -> Gpu | None:
    """The GPU for the next job, or None to wait.

    Args:
        gpus: those that may be used.
        running: UUID to number of own jobs on it now.
        limit: own jobs that a GPU takes at a time.

    Returns:
        Of the GPUs below the limit, the one with the fewest own jobs, then the lowest index.
    """
    fitting = [gpu for gpu in gpus if running.get(gpu.uuid, 0) < limit]
    return min(fitting, key=lambda gpu: (running.get(gpu.uuid, 0), gpu.index), default=None)
