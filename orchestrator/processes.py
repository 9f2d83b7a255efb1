"""Who a process is: pid, start time and boot, so that a reused pid is never mistaken."""

from __future__ import annotations

import os
import socket
import subprocess
from functools import lru_cache
from pathlib import Path

_HAS_PROC = os.path.exists("/proc/self/stat")  # noqa: PTH110 - false on macOS


@lru_cache(maxsize=1)
def hostname() -> str:
    return socket.gethostname()


@lru_cache(maxsize=1)
def boot_id() -> str:
    """An identifier that changes when the machine restarts; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        pass
    try:  # macOS; its boot *time* moves when the clock is set
        words = ["sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def start_time(pid: int) -> float | None:
    """When a process started, in a unit of the kernel's; None when it is gone or a zombie.

    Only equality means anything: with the boot identifier it tells a process from a
    later one that was given the same pid.
    """
    if _HAS_PROC:
        return _start_ticks(pid)
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time())
    except psutil.Error:
        return None


def _start_ticks(pid: int) -> float | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - called once a run
            text = file.read()
    except OSError:
        return None
    # The command name is in parentheses and may itself hold spaces and parentheses.
    fields = text[text.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else float(fields[19])


def is_alive(pid: int, started: float | None) -> bool:
    """Whether the process that had this pid and start time still runs on this machine."""
    now = start_time(pid)
    return now is not None and (started is None or now == started)


def own_identity() -> tuple[int, float | None]:
    pid = os.getpid()
    return pid, start_time(pid)
