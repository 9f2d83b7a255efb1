"""The settings of ``hydra/launcher=gpu_queue``, as ``--cfg hydra`` shows them."""

# No `from __future__ import annotations`, as in `orchestrator.settings`.
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035 - OmegaConf reads these at run time


@dataclass(repr=False, eq=False)
class QueueSettings:
    """How jobs share the GPUs and cores of a machine, or of what Slurm gives of one."""

    # auto: all GPUs that NVML sees and CUDA_VISIBLE_DEVICES allows, or CPU slots where there
    # are none. A list of NVML indices or UUIDs: just these. []: CPU slots.
    gpus: Any = "auto"
    # Jobs on one GPU at a time, those of other sweeps included.
    max_processes_per_gpu: int = 1
    # GPUs for each job: 0, 1 or more; ${model.gpus} is looked up in each run's own config.
    gpus_per_job: Any = 1
    # GB (10^9 bytes) of memory that a job needs on each of its GPUs; a number, an
    # interpolation of the run's own config, or auto: learned from finished runs. null: no need.
    memory_per_job_gb: Any = None
    # auto: what is added to the highest peak that was seen, as a share of it.
    memory_margin: float = 0.1
    # auto: the keys that decide on memory. null: all that is swept but the seed.
    memory_keys: Optional[List[str]] = None  # noqa: UP006, UP045 - OmegaConf reads these
    # A GPU with more memory in use than this takes no further job. null: no limit.
    memory_threshold_gb: Optional[float] = None  # noqa: UP045
    # Leave a GPU alone while a process that no sweep started computes on it.
    exclusive: bool = False
    # Seconds between two starts on the same GPU.
    stagger_s: float = 0.0
    # Seconds to wait, after a job, for its memory to be free again.
    release_timeout_s: float = 30.0
    # Share GPUs with the other sweeps of this machine, through locked tables in this directory
    # (null: /tmp/orchestrator-leases). leases=false: as if alone.
    leases: bool = True
    lease_dir: Optional[str] = None  # noqa: UP045
    # Watch memory and processes by NVML. false: go by counts alone.
    monitor: bool = True
    # Several jobs on a GPU: tell JAX and TensorFlow to take their share of the memory only.
    share_memory: bool = True
    # Further environment variables of each job; {gpu}, {uuid}, {num}, {name}, {dir}, {attempt}
    # in a value are filled in.
    env: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    # Jobs at a time in all. null: as many as fit on the GPUs; without GPUs, one per core.
    max_processes: Optional[int] = None  # noqa: UP045
    # fork: jobs start in milliseconds from the process that has imported the app already.
    # spawn: a fresh interpreter each. auto: fork wherever that is safe.
    start_method: str = "auto"
    # How often a run that failed is tried again, and after which failures: oom (out of memory),
    # crash (the process died), error (the task raised), timeout, gpu_lost.
    retries: int = 0
    retry_on: List[str] = field(  # noqa: UP006
        default_factory=lambda: ["oom", "crash", "timeout", "gpu_lost"]
    )
    # Seconds until a job is ended and recorded as TIMEOUT. null: no limit.
    timeout_s: Optional[float] = None  # noqa: UP045
    # Seconds between asking a job to end (SIGTERM) and ending it (SIGKILL).
    kill_grace_s: float = 10.0
    # Threads for numpy, torch and OpenMP in each job. null: the cores divided by the slots.
    threads: Optional[int] = None  # noqa: UP045
    # Modules (or functions in them) to import once, before any job is forked. auto: the task
    # function that the config names in task._target_, if it names one. null: none.
    preload: Any = "auto"


@dataclass(repr=False, eq=False)
class GpuQueueSettings(QueueSettings):
    """Runs jobs on this machine, as many at once as its GPUs (or cores) allow."""

    _target_: str = "hydra_plugins.hydra_orchestrator.gpu_queue_launcher.GpuQueueLauncher"
