"""What NVML, the driver's library, says of the GPUs. It can hang: `watcher` calls it elsewhere."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.queue.gpus import Gpu, GpuProcess, GpuSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DRIVER = Path("/proc/driver/nvidia")
# NVML's number; nvidia-ml-py 12.535 has no name for it.
_GPU_NOT_FOUND = 28
# How often a list of processes that grows while it is read is read again.
_TRIES = 3


class NvmlFailed(Exception):  # noqa: N818 - reads as what happened
    """NVML as a whole does not answer: no driver, or another one than a moment ago."""


class Nvml:
    """NVML, opened.

    A device is found anew by its UUID at each reading, so a GPU that falls off the bus never
    lends its number to another.

    Raises:
        NvmlFailed: there is no driver, or it does not answer.
    """

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        # Nothing works after these until NVML has been opened again.
        self._whole = {
            pynvml.NVML_ERROR_UNINITIALIZED,
            pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
            pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
            pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        }
        self._lost = {
            pynvml.NVML_ERROR_GPU_IS_LOST,
            pynvml.NVML_ERROR_NOT_FOUND,
            _GPU_NOT_FOUND,
        }
        # This driver, or this kind of device, does not tell.
        self._unsupported = {
            pynvml.NVML_ERROR_NOT_SUPPORTED,
            pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            pynvml.NVML_ERROR_NO_PERMISSION,
            pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        }
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlFailed(str(error)) from error

    def close(self) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def devices(self) -> list[Gpu]:
        """What jobs can be given, in NVML's order. A GPU that is lost has no name, and is left out.

        Raises:
            NvmlFailed: NVML must be opened again.
        """
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError as error:
            raise NvmlFailed(str(error)) from error
        found: list[Gpu] = []
        for index in range(count):
            try:
                found += self._devices_at(index)
            except self._nvml.NVMLError as error:
                self._raise_if_whole(error)
        return found

    def read(self, gpu: Gpu) -> GpuSnapshot:
        """The GPU at this moment. Where NVML does not tell the memory, the numbers are zero.

        Raises:
            NvmlFailed: NVML must be opened again.
        """
        now = time.monotonic()
        try:
            handle = self._nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
            total, used, free = self._memory(handle)
            processes = self._if_supported(self._processes, handle)
        except self._nvml.NVMLError as error:
            self._raise_if_whole(error)
            return GpuSnapshot(gpu, now, error=str(error), lost=error.value in self._lost)
        utilization = self._utilization(handle)
        return GpuSnapshot(gpu, now, total, used, free, utilization, processes)

    def _raise_if_whole(self, error: Any) -> None:
        if error.value in self._whole:
            raise NvmlFailed(str(error)) from error

    def _if_supported(self, call: Callable[[Any], Any], handle: Any) -> Any:
        try:
            return call(handle)
        except self._nvml.NVMLError as error:
            if error.value in self._unsupported:
                return None
            raise

    # --- listing ---

    def _devices_at(self, index: int) -> list[Gpu]:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        name = _text(self._nvml.nvmlDeviceGetName(handle))
        mode = self._if_supported(self._nvml.nvmlDeviceGetMigMode, handle)
        if mode is None or mode[0] != self._nvml.NVML_DEVICE_MIG_ENABLE:
            return [Gpu(_text(self._nvml.nvmlDeviceGetUUID(handle)), index, name)]
        return list(self._instances(handle, index, name))

    def _instances(self, parent: Any, index: int, name: str) -> Iterator[Gpu]:
        for mig in range(self._nvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
            try:
                handle = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, mig)
                uuid = _text(self._nvml.nvmlDeviceGetUUID(handle))
            except self._nvml.NVMLError as error:  # most numbers stand for nothing
                self._raise_if_whole(error)
                continue
            own_name = self._if_supported(self._nvml.nvmlDeviceGetName, handle)
            yield Gpu(uuid, index, _text(own_name) if own_name else name, mig)

    # --- reading ---

    def _memory(self, handle: Any) -> tuple[int, int, int]:
        get = self._nvml.nvmlDeviceGetMemoryInfo

        def exact(handle: Any) -> Any:
            # Only the second version leaves out what the driver keeps for itself.
            return get(handle, version=self._nvml.nvmlMemory_v2)

        memory = self._if_supported(exact, handle) or self._if_supported(get, handle)
        return (memory.total, memory.used, memory.free) if memory else (0, 0, 0)

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...] | None:
        call = self._nvml.nvmlDeviceGetComputeRunningProcesses_v3
        for _ in range(_TRIES):
            try:
                found = call(handle)
            except self._nvml.NVMLError_FunctionNotFound:  # a driver before 510
                call = getattr(self._nvml, "nvmlDeviceGetComputeRunningProcesses_v2", None)
                if call is None:
                    return None
            except self._nvml.NVMLError_InsufficientSize:
                continue
            else:
                return tuple(GpuProcess(p.pid, p.usedGpuMemory) for p in found)
        return None

    def _utilization(self, handle: Any) -> int | None:
        try:
            return int(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        except self._nvml.NVMLError as error:  # MIG instances have none, and nothing hangs on it
            self._raise_if_whole(error)
            return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def known_without_nvml(driver: Path = _DRIVER) -> list[Gpu]:
    """The GPUs as the kernel's driver lists them, in NVML's order; NVML is not even loaded.

    It tells no MIG instances, and no UUID of a GPU that nobody has opened since the machine
    started (without the persistence daemon): such a GPU is left out.
    """
    found = []
    for path in driver.glob("gpus/*/information"):
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            pairs = (line.partition(":") for line in lines)
            found.append({name.strip(): value.strip() for name, _, value in pairs})
    found.sort(key=_bus_location)
    return [
        Gpu(uuid, index, facts.get("Model", ""))
        for index, facts in enumerate(found)
        if (uuid := facts.get("GPU UUID", "")) and "?" not in uuid
    ]


def _bus_location(facts: dict[str, str]) -> list[int]:
    return [int(part, 16) for part in re.findall("[0-9a-fA-F]+", facts.get("Bus Location", ""))]
