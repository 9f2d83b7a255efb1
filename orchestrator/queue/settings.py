"""The settings of ``hydra/launcher=gpu_queue``, as ``--cfg hydra`` shows them."""

# No `from __future__ import annotations`, as in `orchestrator.settings`.
from dataclasses import dataclass
from typing import Any, Optional


@dataclass(repr=False, eq=False)
class GpuQueueSettings:
    """Runs jobs on this machine, as many at once as its GPUs (or cores) allow."""

    _target_: str = "hydra_plugins.hydra_orchestrator.gpu_queue_launcher.GpuQueueLauncher"
    # auto: all GPUs that NVML sees and CUDA_VISIBLE_DEVICES allows, or CPU slots where there
    # are none. A list of NVML indices or UUIDs: just these. []: CPU slots.
    gpus: Any = "auto"
    # Jobs of this launcher on one GPU at a time.
    max_processes_per_gpu: int = 1
    # Jobs at a time in all. null: as many as fit on the GPUs; without GPUs, one per core.
    max_processes: Optional[int] = None  # noqa: UP045 - OmegaConf reads this at run time
    # fork: jobs start in milliseconds from the process that has imported the app already.
    # spawn: a fresh interpreter each. auto: fork wherever that is safe.
    start_method: str = "auto"
    # Seconds until a job is ended and recorded as TIMEOUT. null: no limit.
    timeout_s: Optional[float] = None  # noqa: UP045
    # Seconds between asking a job to end (SIGTERM) and ending it (SIGKILL).
    kill_grace_s: float = 10.0
    # Threads for numpy, torch and OpenMP in each job. null: the cores divided by the slots.
    threads: Optional[int] = None  # noqa: UP045
    # Modules (or functions in them) to import once, before any job is forked. auto: the task
    # function that the config names in task._target_, if it names one. null: none.
    preload: Any = "auto"
