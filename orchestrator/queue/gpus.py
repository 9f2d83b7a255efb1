"""The GPUs of this machine, as values. Always named by UUID: CUDA counts otherwise than NVML."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Gpu:
    """A device that jobs can be given: a GPU, or one MIG instance of a GPU that is divided.

    ``index`` is NVML's number of the GPU, ``mig`` that of the instance on it.
    """

    uuid: str
    index: int
    name: str = ""
    mig: int | None = None

    @property
    def label(self) -> str:
        """What a person types and reads: ``0``, or ``0:1`` for an instance."""
        return str(self.index) if self.mig is None else f"{self.index}:{self.mig}"


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU; ``memory`` in bytes, None where NVML does not say."""

    pid: int
    memory: int | None = None


@dataclass(frozen=True)
class GpuSnapshot:
    """One GPU at one moment. Memory in bytes.

    ``time`` is `time.monotonic` before NVML was asked: nothing in here is older.
    ``processes`` is None where NVML cannot tell. ``error`` says why a GPU could not be read,
    ``lost`` that it is gone; the numbers are then zero.
    """

    gpu: Gpu
    time: float
    total: int = 0
    used: int = 0
    free: int = 0
    utilization: int | None = None
    processes: tuple[GpuProcess, ...] | None = None
    error: str = ""
    lost: bool = False


def list_gpus() -> tuple[list[Gpu], str]:
    """The GPUs, in NVML's order, and why there are none where there are none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"NVML: {error}"
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [
            Gpu(_text(pynvml.nvmlDeviceGetUUID(h)), i, _text(pynvml.nvmlDeviceGetName(h)))
            for i, h in enumerate(handles)
        ], "NVML sees none"
    except pynvml.NVMLError as error:
        return [], f"NVML: {error}"
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def choose_gpus(wanted: Any, found: Sequence[Gpu], mask: str | None = None) -> list[Gpu]:
    """The GPUs to use.

    Args:
        wanted: ``auto``, or NVML indices and UUIDs (or unambiguous beginnings of UUIDs).
        found: what the machine has.
        mask: an inherited ``CUDA_VISIBLE_DEVICES``: the set that is allowed; None allows all.

    Raises:
        SweepError: a GPU that was asked for is unknown or not allowed; the text names those
            that there are.
    """
    allowed = list(found) if mask is None else _allowed(found, mask)
    if wanted == "auto":
        return allowed
    if isinstance(wanted, (str, int)):
        wanted = [wanted]
    return list(dict.fromkeys(_find(item, found, allowed) for item in wanted))


def _allowed(found: Sequence[Gpu], mask: str) -> list[Gpu]:
    # As CUDA reads it: the first word that names no device ends the list.
    chosen: list[Gpu] = []
    for word in filter(None, (part.strip() for part in mask.split(","))):
        matches = _matching(word, found)
        if len(matches) != 1:
            break
        chosen += matches
    return chosen


def _matching(item: str | int, gpus: Sequence[Gpu]) -> list[Gpu]:
    text = str(item)
    if text.isdecimal():
        return [gpu for gpu in gpus if gpu.index == int(text)]
    return [gpu for gpu in gpus if gpu.uuid.startswith(text)]


def _find(item: str | int, found: Sequence[Gpu], allowed: Sequence[Gpu]) -> Gpu:
    matches = _matching(item, found)
    known = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in found) or "none"
    if len(matches) != 1:
        what = "is ambiguous" if matches else "is not on this machine"
        msg = f"hydra.launcher.gpus: GPU {item} {what}. NVML sees: {known}."
        raise SweepError(msg)
    if matches[0] not in allowed:
        msg = (
            f"hydra.launcher.gpus: GPU {item} is on this machine, but CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES')} does not allow it. NVML sees: {known}."
        )
        raise SweepError(msg)
    return matches[0]
