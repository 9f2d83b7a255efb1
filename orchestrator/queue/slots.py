"""The places that jobs run in: on GPUs where there are any, else on cores."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.queue.assign import assign
from orchestrator.queue.gpus import Gpu, choose_gpus, list_gpus
from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.queue.settings import GpuQueueSettings


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


def make_slots(settings: GpuQueueSettings) -> tuple[Slots, str]:
    """The places that the settings and this machine give, and where they are, for the user.

    Raises:
        SweepError: a limit is below one, or a GPU is not to be had.
    """
    _check(settings)
    gpus, why_none = _usable_gpus(settings)
    if not gpus:
        size = settings.max_processes or cores()
        return Slots([], 1, size), f"CPU, for want of GPUs: {why_none}"
    room = len(gpus) * settings.max_processes_per_gpu
    names = ", ".join(f"{gpu.index} ({gpu.name} {gpu.uuid})" for gpu in gpus)
    size = min(room, settings.max_processes or room)
    return Slots(gpus, settings.max_processes_per_gpu, size), f"GPUs {names}"


def _check(settings: GpuQueueSettings) -> None:
    for name in ("max_processes", "max_processes_per_gpu", "threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            msg = f"hydra.launcher.{name} is {value}; expected at least 1."
            raise SweepError(msg)
    if settings.timeout_s is not None and settings.timeout_s <= 0:
        msg = f"hydra.launcher.timeout_s is {settings.timeout_s}; expected seconds, or null."
        raise SweepError(msg)
    if settings.kill_grace_s < 0:
        msg = f"hydra.launcher.kill_grace_s is {settings.kill_grace_s}; expected 0 or more."
        raise SweepError(msg)


def _usable_gpus(settings: GpuQueueSettings) -> tuple[list[Gpu], str]:
    wanted = settings.gpus
    if not isinstance(wanted, (str, int)) and not list(wanted or []):
        return [], "hydra.launcher.gpus is empty"
    found, why_none = list_gpus()
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = choose_gpus(wanted, found, mask)
    if found and not chosen:
        why_none = f"CUDA_VISIBLE_DEVICES={mask} allows none of the {len(found)}"
    return chosen, why_none


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
