"""Fork or spawn: a fork is fast, and safe only from a process that has done nothing but import."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from orchestrator.sweep.errors import SweepError

METHODS = ("auto", "fork", "spawn")


def choose(wanted: str) -> tuple[str, str]:
    """The start method and, in a few words, why.

    Raises:
        SweepError: the setting is none of ``auto``, ``fork``, ``spawn``.
    """
    if wanted not in METHODS:
        msg = f"hydra.launcher.start_method is {wanted!r}; expected one of {', '.join(METHODS)}."
        raise SweepError(msg)
    if wanted != "auto":
        return wanted, "as asked"
    danger = why_not_fork()
    return ("spawn", danger) if danger else ("fork", "the app has only been imported")


def why_not_fork() -> str:
    """What makes a fork of this process unsafe; empty when nothing does."""
    if sys.platform != "linux":
        return f"a fork is not safe on {sys.platform}"
    if _cuda_is_initialised():
        return "CUDA is initialised in this process, and would not work in a fork of it"
    if threading.active_count() > 1:
        names = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
        return f"threads run in this process: {', '.join(names[:4])}"
    extra = len(os.listdir("/proc/self/task")) - 1  # noqa: PTH208
    if extra and extra > _idle_blas_threads():
        return f"{extra} threads run in this process (OpenMP, once used, hangs in a fork)"
    return ""


def _cuda_is_initialised() -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return True
    # NVML opens the other nodes, too; only a CUDA context opens this one.
    for link in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(link) == "/dev/nvidia-uvm":  # noqa: PTH115
                return True
        except OSError:
            continue
    return False


def _idle_blas_threads() -> int:
    """Threads that OpenBLAS made when it was imported; it makes them anew after a fork."""
    import threadpoolctl

    pools = threadpoolctl.threadpool_info()
    return sum(
        pool["num_threads"] - 1
        for pool in pools
        if pool["internal_api"] == "openblas" and pool.get("threading_layer") == "pthreads"
    )
