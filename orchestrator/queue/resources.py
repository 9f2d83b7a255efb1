"""What this machine offers a sweep: its GPUs, if there are any to be had, else its cores."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from orchestrator.queue.assign import Rules, gb
from orchestrator.queue.environment import check_environment
from orchestrator.queue.gpus import Gpu, choose_gpus, mask_note
from orchestrator.queue.needs import GB
from orchestrator.queue.places import Places
from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from orchestrator.queue.leases import LeaseTables
    from orchestrator.queue.needs import Needs
    from orchestrator.queue.settings import QueueSettings
    from orchestrator.queue.watcher import GpuWatcher, Reading

_VISIBLE, _ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
# What NVML says where there is nothing to be had: no reason to stop a sweep that can use cores.
_NO_DRIVER = ("driver not loaded", "not found", "no permission")
_NVML = "libnvidia-ml.so.1"
# (Opening NVML may take 30 s where no daemon keeps the GPUs awake.)
_FIRST_READING_S = 40.0


def start_watcher(settings: QueueSettings, method: str) -> GpuWatcher | None:
    """Begin to watch the GPUs, where that is wanted and there is a driver.

    Args:
        settings: the queue's own.
        method: ``fork`` or ``spawn``.
    """
    if not settings.monitor or _wants_none(settings.gpus) or not has_driver():
        return None
    from orchestrator.queue.watcher import make_watcher

    watcher = make_watcher(method)
    watcher.ask()
    return watcher


def _wants_none(gpus: Any) -> bool:
    return not isinstance(gpus, (str, int)) and not list(gpus or [])


def has_driver() -> bool:
    """Whether NVML can be asked here."""
    import ctypes

    try:
        ctypes.CDLL(_NVML)
    except OSError:
        return False
    return True


def make_places(settings: QueueSettings, watcher: GpuWatcher | None) -> tuple[Places, str]:
    """The places that the settings and this machine give, and where they are, for the user.

    Raises:
        SweepError: a setting is out of bounds, a GPU is not to be had, NVML does not answer.
        LeaseError: the tables that are shared with other sweeps cannot be used.
    """
    check_settings(settings)
    reading = None if watcher is None else watcher.first(_FIRST_READING_S)
    gpus, why_none = _find_gpus(settings, reading)
    if not gpus:
        size = settings.max_processes or cores()
        return Places(
            size, on_purpose=_wants_none(settings.gpus)
        ), f"CPU, for want of GPUs: {why_none}"
    # (Not for the sake of a machine without GPUs.)
    from orchestrator.queue.gpu_places import GpuPlaces

    places = GpuPlaces(
        gpus,
        _rules(settings),
        settings.max_processes,
        watcher,
        _tables(settings, gpus),
        stagger_s=settings.stagger_s,
        release_timeout_s=settings.release_timeout_s,
        cores=cores(),
    )
    if reading is not None:
        places.take_in(reading)
    return places, _where(gpus, reading)


def jobs_at_a_time(places: Places, needs: Needs) -> int:
    """How many jobs there is room for; of those whose needs differ, as if each had one GPU."""
    gpus = 1 if needs.constant is None else needs.constant.gpus
    return max(1, places.size // max(gpus, 1)) if places.gpus else places.size


def _find_gpus(settings: QueueSettings, reading: Reading | None) -> tuple[list[Gpu], str]:
    """The GPUs to use, or none and why."""
    mask, order = os.environ.get(_VISIBLE), os.environ.get(_ORDER)
    found: list[Gpu] = []
    if _wants_none(settings.gpus):
        return [], "hydra.launcher.gpus is empty"
    if not settings.monitor:
        return _unwatched(settings.gpus, mask)
    if reading is None:
        why_none = "NVML Shared Library Not Found"
    elif reading.error:
        why_none = f"NVML: {reading.error}"
        if not any(word in reading.error.lower() for word in _NO_DRIVER):
            msg = (
                f"There is a driver for GPUs, but NVML fails: {reading.error} (nvidia-smi should "
                "say the same). hydra.launcher.monitor=false goes by counts alone, "
                "hydra.launcher.gpus=[] uses the cores."
            )
            raise SweepError(msg)
    else:
        found, why_none = list(reading.devices), "NVML sees none"
    chosen = choose_gpus(settings.gpus, found, mask, order)
    if found and not chosen:
        why_none = f"CUDA_VISIBLE_DEVICES={mask} allows none of the {len(found)}"
    return chosen, why_none


def _unwatched(wanted: Any, mask: str | None) -> tuple[list[Gpu], str]:
    """GPUs without NVML: as the kernel's files name them, else by the numbers that were typed."""
    from orchestrator.queue.nvml import known_without_nvml

    known = known_without_nvml()
    if known:
        return choose_gpus(
            wanted, known, mask, os.environ.get(_ORDER)
        ), f"CUDA_VISIBLE_DEVICES={mask} allows none"
    words = wanted if wanted != "auto" else (mask or "").split(",")
    words = [words] if isinstance(words, (str, int)) else list(words)
    named = [str(word).strip() for word in words]
    named = [word for word in named if word and word != "-1"]
    if not named and mask is None:
        return [], "hydra.launcher.monitor is false; hydra.launcher.gpus=[0,1] names GPUs to use"
    if not named:
        return [], f"CUDA_VISIBLE_DEVICES={mask} allows none"
    return [Gpu(word, int(word) if word.isdecimal() else n) for n, word in enumerate(named)], ""


def _rules(settings: QueueSettings) -> Rules:
    threshold = settings.memory_threshold_gb
    return Rules(
        settings.max_processes_per_gpu,
        None if threshold is None else int(threshold * GB),
        settings.exclusive,
    )


def _tables(settings: QueueSettings, gpus: list[Gpu]) -> LeaseTables | None:
    if not settings.leases or sys.platform != "linux":
        return None
    from pathlib import Path

    from orchestrator.queue.leases import LeaseTables

    directory = None if settings.lease_dir is None else Path(settings.lease_dir)
    return LeaseTables([gpu.uuid for gpu in gpus], directory)


def _where(gpus: list[Gpu], reading: Reading | None) -> str:
    totals = {s.gpu.uuid: s.total for s in reading.snapshots} if reading is not None else {}
    names = ", ".join(
        f"{gpu.label} ({' '.join(filter(None, (gpu.name, gpu.uuid)))}"
        f"{', ' + gb(totals[gpu.uuid]) if totals.get(gpu.uuid) else ''})"
        for gpu in gpus
    )
    found = gpus if reading is None else reading.devices
    note = mask_note(found, os.environ.get(_VISIBLE), os.environ.get(_ORDER))
    counts = "" if reading is not None else ", by counts alone (monitor=false)"
    return f"{'GPUs' if len(gpus) > 1 else 'GPU'} {names}{counts}" + (f". {note}" if note else "")


_AT_LEAST_ONE = ("max_processes", "max_processes_per_gpu", "threads")
_AT_LEAST_ZERO = ("kill_grace_s", "stagger_s", "release_timeout_s", "memory_threshold_gb")


def check_settings(settings: QueueSettings) -> None:
    """Refuse settings that no machine could meet.

    Raises:
        SweepError: what one of them is, and what it should be.
    """
    for name in _AT_LEAST_ONE:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise SweepError(f"hydra.launcher.{name} is {value}; expected at least 1.")
    for name in _AT_LEAST_ZERO:
        value = getattr(settings, name)
        if value is not None and not value >= 0:
            raise SweepError(f"hydra.launcher.{name} is {value}; expected 0 or more.")
    if settings.timeout_s is not None and not settings.timeout_s > 0:
        msg = f"hydra.launcher.timeout_s is {settings.timeout_s}; expected seconds, or null."
        raise SweepError(msg)
    check_environment(settings)


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
