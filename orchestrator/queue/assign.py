"""Which device a job gets. Pure: no NVML, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Slot:
    """A place for one job: on a GPU, or on the CPU alone."""

    gpu: Gpu | None = None

    @property
    def env(self) -> dict[str, str | None]:
        return {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu.uuid}

    def __str__(self) -> str:
        return "cpu" if self.gpu is None else f"gpu {self.gpu.index}"


@dataclass
class Slots:
    """The places of one launcher; without GPUs, ``size`` CPU places."""

    gpus: Sequence[Gpu]
    per_gpu: int
    size: int
    _taken: int = 0
    _running: dict[str, int] = field(default_factory=dict)

    def take(self) -> Slot | None:
        """A free place, or None while there is none."""
        if self._taken >= self.size:
            return None
        if not self.gpus:
            self._taken += 1
            return Slot()
        gpu = assign(self.gpus, self._running, self.per_gpu)
        if gpu is None:
            return None
        self._taken += 1
        self._running[gpu.uuid] = self._running.get(gpu.uuid, 0) + 1
        return Slot(gpu)

    def give_back(self, slot: Slot) -> None:
        self._taken -= 1
        if slot.gpu is not None:
            self._running[slot.gpu.uuid] -= 1
