"""What a job needs of the GPUs: how many, how much memory on each, and whether alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from omegaconf import DictConfig

    from orchestrator.queue.settings import QueueSettings

GB = 10**9
_MB = 10**6
AUTO = "auto"
# The share of a GPU's memory that a job may need; the driver keeps some of it for itself.
_MOST = 95
_GPUS = "gpus_per_job"
_MEMORY = "memory_per_job_gb"


@dataclass(frozen=True)
class Need:
    """What one try of a run needs.

    ``memory`` is in bytes on each GPU; None: nothing was declared. ``alone``: no other job of
    any sweep on its GPUs.
    """

    gpus: int = 1
    memory: int | None = None
    alone: bool = False


def after_oom(need: Need, total: int) -> Need:
    """What the next try of a run needs that ran out of memory.

    Half as much again, as far as its GPUs go (``total`` bytes each, less 5 %); a run that
    is there already, or for which nothing was declared, has its GPUs alone.
    """
    if need.gpus == 0:
        return need
    most = total * _MOST // 100
    if need.memory is None or need.memory >= most:
        return dataclasses.replace(need, alone=True)
    return dataclasses.replace(need, memory=min(need.memory + (need.memory + 1) // 2, most))


class Needs:
    """Decides what each run needs.

    Args:
        settings: the queue's own.
        raw_launcher: ``OmegaConf.to_container(config.hydra.launcher, resolve=False)``; it shows
            which keys are interpolations, to be looked up in each run's own config.
        node: where in that the settings are.

    Raises:
        SweepError: a value that holds for all runs is none that can be used.
    """

    def __init__(
        self,
        settings: QueueSettings,
        raw_launcher: Mapping[str, Any],
        node: str = "hydra.launcher",
    ) -> None:
        self._node = node
        self._values = {_GPUS: settings.gpus_per_job, _MEMORY: settings.memory_per_job_gb}
        self._per_run = {key for key in self._values if _is_interpolation(raw_launcher.get(key))}
        self._margin = _checked_margin(settings.memory_margin)
        # The highest peak that a run of each shape has had, in bytes.
        self._peaks: dict[str, float] = {}
        gpus = None if _GPUS in self._per_run else _gpus(self._values[_GPUS])
        memory = None if _MEMORY in self._per_run else _memory(self._values[_MEMORY])
        # No GPU, no memory on it to be learned.
        vary = bool(self._per_run) or (memory == AUTO and gpus != 0)
        self.constant: Need | None = None if vary else _need(gpus or 0, memory)

    @property
    def vary(self) -> bool:
        """Whether runs may differ in what they need, or one run from one moment to another."""
        return self.constant is None

    @property
    def learns(self) -> bool:
        """Whether the peaks of finished runs may make a difference."""
        return self.vary and (_MEMORY in self._per_run or self._values[_MEMORY] == AUTO)

    def of(
        self,
        shape: str,
        config: Callable[[], DictConfig],
        room: Callable[[int], int] = lambda _: 0,
    ) -> Need:
        """What a run needs, as far as is known now.

        Args:
            shape: what decides on its memory, see `identity.memory_shape`.
            config: composes the run's own config, Hydra's node included; it is called where a
                key has to be looked up in it.
            room: the memory that so many GPUs have each; 0 where that is not known.

        Raises:
            SweepError: a value in the run's config is none that can be used.
            Exception: OmegaConf's own, where an interpolation does not resolve.
        """
        if self.constant is not None:
            return self.constant
        composed = config() if self._per_run else None
        gpus = _gpus(self._value(_GPUS, composed))
        memory = _memory(self._value(_MEMORY, composed))
        if memory != AUTO or gpus == 0:
            return _need(gpus, memory)
        peak = self._peaks.get(shape)
        if peak is None:
            return Need(gpus, alone=True)
        # (Rounded first: 1.1 times 2 is not to be a megabyte more than 2.2.)
        memory = math.ceil(round(peak * (1 + self._margin) / _MB, 6)) * _MB
        total = room(gpus)
        # Where there is no room for the margin, it has run before, too.
        return Need(gpus, alone=True) if 0 < total * _MOST // 100 < memory else Need(gpus, memory)

    def learn(self, shape: str, peak_gb: float | None) -> bool:
        """Take in the peak that a COMPLETED run has had on one of its GPUs, if it is known.

        Returns:
            Whether runs may need something else now.
        """
        if not shape or peak_gb is None or not 0 < peak_gb < math.inf:
            return False
        before = self._peaks.get(shape, 0.0)
        self._peaks[shape] = max(before, peak_gb * GB)
        return self.learns and self._peaks[shape] > before

    def _value(self, key: str, composed: DictConfig | None) -> Any:
        if composed is None or key not in self._per_run:
            return self._values[key]
        return OmegaConf.select(composed, f"{self._node}.{key}", throw_on_missing=True)


def _is_interpolation(raw: Any) -> bool:
    return isinstance(raw, str) and "${" in raw


def _need(gpus: int, memory: int | str | None) -> Need:
    return Need(gpus, memory if gpus and isinstance(memory, int) else None)


def _gpus(value: Any) -> int:
    if _is_number(value) and value >= 0 and value == int(value):
        return int(value)
    raise _unusable(_GPUS, value, "a whole number of GPUs: 0, 1 or more")


def _memory(value: Any) -> int | str | None:
    """Bytes; None for no need; or ``auto``."""
    if value is None or (isinstance(value, str) and value == AUTO):
        return value
    if _is_number(value) and value >= 0:
        return math.ceil(round(value * GB, 3)) or None
    raise _unusable(_MEMORY, value, f"GB (10^9 bytes) as a number, {AUTO}, or null for no need")


def _checked_margin(value: Any) -> float:
    if _is_number(value) and value >= 0:
        return float(value)
    raise _unusable("memory_margin", value, "a share as a number from 0 on, such as 0.1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _unusable(key: str, value: Any, expected: str) -> SweepError:
    where = "" if key == "memory_margin" else ", or the key of the run's config that it names"
    return SweepError(f"hydra.launcher.{key} is {value!r}; expected {expected}. Correct it{where}.")
