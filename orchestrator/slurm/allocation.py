"""What Slurm has given a job on this node, as settings of the local queue."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.queue.resources import cores, has_driver
from orchestrator.slurm.amounts import seconds_of
from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.queue.settings import QueueSettings

_GIVEN = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "GPU_DEVICE_ORDINAL")
# Of the time between SIGTERM and SIGKILL, what is left to write records in.
_GRACE_SHARE = 0.6
_ASK_S = 10.0


def job_id(environ: Mapping[str, str] = os.environ) -> str:
    """The job as squeue names it: ``123`` or ``123_4``."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID", "")


def end_of_job(environ: Mapping[str, str] = os.environ) -> float | None:
    """When this job's time is up by Slurm's limit, in seconds since the epoch.

    None where Slurm does not say, or sets no limit.
    """
    # (Not its end time: of a job that is being cancelled that is now.)
    words = ["squeue", "--noheader", f"--jobs={job_id(environ)}", "--format=%S|%l"]
    clean = {name: value for name, value in environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(
            words,
            env={**clean, "SLURM_TIME_FORMAT": "%s"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    start, _, limit = done.stdout.strip().partition("|")
    seconds = seconds_of(limit)
    return float(start) + seconds if start.isdecimal() and seconds else None


def allocated_cores(environ: Mapping[str, str] = os.environ) -> int:
    """Cores of this task of the job; at most those that the process may use."""
    per_task = environ.get("SLURM_CPUS_PER_TASK", "")
    on_node = environ.get("SLURM_CPUS_ON_NODE", "")
    tasks = environ.get("SLURM_NTASKS_PER_NODE") or environ.get("SLURM_STEP_TASKS_PER_NODE") or "1"
    found = cores()
    if per_task.isdecimal():
        given = int(per_task)
    elif on_node.isdecimal():
        first = re.match(r"\d+", tasks)
        given = int(on_node) // max(int(first[0]) if first else 1, 1)
    else:
        given = found
    # (A job may be bound to its cores, or not; where it is not, Slurm's number counts.)
    return max(1, given)


def _check_given(settings: QueueSettings, given: str | None) -> None:
    """Without NVML nobody else sees that GPUs are named which Slurm has not given."""
    if settings.gpus == "auto" or not given:
        return
    named = [settings.gpus] if isinstance(settings.gpus, (str, int)) else list(settings.gpus)
    others = [str(gpu) for gpu in named if str(gpu) not in given.split(",")]
    if others:
        msg = (
            f"hydra.launcher.queue.gpus names {', '.join(others)}; Slurm has given the job {given}"
        )
        raise SweepError(f"{msg}. Leave it out, or name some of these.")


def queue_settings(
    wanted: QueueSettings,
    *,
    shared: bool,
    kill_wait_s: float,
    environ: Mapping[str, str] = os.environ,
) -> QueueSettings:
    """The settings of the local queue, for what the job was given.

    GPUs that Slurm has not given are left alone, although NVML may show them. No leases: Slurm
    has seen to it that nobody else is there.

    Args:
        wanted: the user's.
        shared: whether several runs were to share the job: else one has all of it.
        kill_wait_s: how long a process of the job has between SIGTERM and SIGKILL.
        environ: what Slurm says.

    Raises:
        SweepError: the settings name GPUs that the job was not given.
    """
    grace_s = min(wanted.kill_grace_s, kill_wait_s * _GRACE_SHARE)
    settings = replace(wanted, leases=False, kill_grace_s=grace_s)
    if settings.gpus == "auto" and not any(environ.get(name) for name in _GIVEN):
        settings.gpus = []
    elif not has_driver():
        settings.monitor = False
        _check_given(settings, environ.get("CUDA_VISIBLE_DEVICES"))
    if not shared:
        settings.max_processes = 1
    elif settings.max_processes is None and not settings.gpus:
        settings.max_processes = allocated_cores(environ)
    return settings
