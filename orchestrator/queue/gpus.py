"""The GPUs of this machine, as values. Always named by UUID: CUDA counts otherwise than NVML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

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

    def __str__(self) -> str:
        return f"{self.label} ({' '.join(filter(None, (self.name, self.uuid)))})"


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


def choose_gpus(
    wanted: Any, found: Sequence[Gpu], mask: str | None = None, order: str | None = None
) -> list[Gpu]:
    """The GPUs to use.

    Args:
        wanted: ``auto``, or NVML indices (of a divided GPU: all its instances), labels such as
            ``0:1``, and UUIDs (or unambiguous beginnings of them).
        found: what the machine has.
        mask: an inherited ``CUDA_VISIBLE_DEVICES``: the set that is allowed; None allows all.
        order: an inherited ``CUDA_DEVICE_ORDER``; it decides only on what is said, see
            `mask_note`.

    Raises:
        SweepError: a GPU that was asked for is unknown or not allowed; the text names those
            that there are.
    """
    allowed = list(found) if mask is None else _allowed(found, mask)
    if wanted == "auto":
        return allowed
    if isinstance(wanted, (str, int)):
        wanted = [wanted]
    chosen: dict[Gpu, None] = {}
    for item in wanted:
        matches = _wanted(item, found)
        usable = [gpu for gpu in matches if gpu in allowed]
        if not usable:
            _refuse(
                f"GPU {item} is on this machine, but CUDA_VISIBLE_DEVICES={mask} does not allow "
                f"it. {mask_note(found, mask, order)}".rstrip(),
                found,
            )
        chosen.update(dict.fromkeys(usable))
    return list(chosen)


def mask_note(found: Sequence[Gpu], mask: str | None, order: str | None = None) -> str:
    """A sentence where indices in the mask may be other GPUs for CUDA than for us; else empty.

    CUDA puts the fastest GPU first unless it is told not to, and NVML does not know the speeds.
    """
    models = {gpu.name.partition(" MIG ")[0] for gpu in found}
    words = [] if mask is None else [word.strip() for word in mask.split(",")]
    if order == "PCI_BUS_ID" or len(models) <= 1 or not any(map(is_index, words)):
        return ""
    return (
        f"CUDA_VISIBLE_DEVICES={mask} was read in NVML's order, but CUDA may count GPUs of "
        "different models otherwise; name them by UUID, or set CUDA_DEVICE_ORDER=PCI_BUS_ID, to "
        "be sure."
    )


def _allowed(found: Sequence[Gpu], mask: str) -> list[Gpu]:
    # As CUDA reads it: the first word that names no device (-1, void, nothing at all), or more
    # than one, ends the list.
    chosen: dict[Gpu, None] = {}
    for word in (part.strip() for part in mask.split(",")):
        if is_index(word):
            matches = [gpu for gpu in found if gpu.index == int(word)]
        else:
            matches = _by_uuid(word, found) if word.startswith(("GPU-", "MIG-")) else []
            matches = matches if len(matches) == 1 else []
        if not matches:
            break
        chosen.update(dict.fromkeys(matches))
    return list(chosen)


def _wanted(item: str | int, found: Sequence[Gpu]) -> list[Gpu]:
    """What is meant: one device, or all instances of a divided GPU."""
    text = str(item).strip()
    matches = meant_by(text, found)
    if len(matches) > 1 and not is_index(text):
        _refuse(f"GPU {item} is ambiguous.", found)
    if not matches:
        _refuse(f"GPU {item} is not on this machine.", found)
    return matches


def meant_by(word: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs that a number, a label or the beginning of a UUID may mean.

    A number means all instances of a GPU that is divided; of the others, more than one GPU is
    an ambiguity.
    """
    if is_index(word):
        return [gpu for gpu in gpus if gpu.index == int(word)]
    return [gpu for gpu in gpus if gpu.label == word] or _by_uuid(word, gpus)


def _by_uuid(text: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    whole = [gpu for gpu in gpus if gpu.uuid == text]
    return whole or [gpu for gpu in gpus if text and gpu.uuid.startswith(text)]


def is_index(text: str) -> bool:
    """Whether a word is NVML's number of a GPU."""
    return text.isascii() and text.isdecimal()


def _refuse(why: str, found: Sequence[Gpu]) -> NoReturn:
    from orchestrator.sweep.errors import SweepError

    known = ", ".join(f"{gpu.label} ({gpu.uuid})" for gpu in found) or "none"
    raise SweepError(f"hydra.launcher.gpus: {why} NVML sees: {known}.")
