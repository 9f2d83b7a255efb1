"""CPU and wall time of a command with every process that it leads to.

The measuring process makes itself a child subreaper (Linux): a descendant whose parent ends
without waiting for it is adopted here and waited for, however it detached. What is reported
is the growth of ``getrusage(RUSAGE_CHILDREN)``, which holds user and system time of all
that was waited for, here or by a parent that was itself waited for.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_STRAGGLERS_S = 60.0
METHOD = (
    "CPU is user + system time of the whole process tree: the growth of "
    "getrusage(RUSAGE_CHILDREN) of a measuring process that is a child subreaper and waits "
    "until no descendant is left. Wall is until the command itself has ended."
)


@dataclass(frozen=True)
class Usage:
    """What one command took, in seconds."""

    cpu: float
    wall: float
    # Processes that outlived their parents and were waited for here.
    adopted: int


class CommandFailedError(Exception):
    """A measured command did not exit with 0."""


def become_subreaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this benchmark needs Linux: no child subreaper")


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def reap_all() -> int:
    """Wait for every child that is left; their number."""
    deadline = time.monotonic() + _STRAGGLERS_S
    number = 0
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return number
        if pid:
            number += 1
        elif time.monotonic() > deadline:
            raise CommandFailedError(f"processes are left {_STRAGGLERS_S:.0f} s after the command")
        else:
            time.sleep(0.002)


def measure(
    words: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    stdin: str = "",
) -> Usage:
    """Run a command to its end and to the end of all its descendants.

    Raises:
        CommandFailedError: it failed; the text has the end of its output.
    """
    before = _children_cpu()
    with log.open("wb") as output:
        start = time.perf_counter()
        subprocess_ = subprocess.Popen(
            words, cwd=cwd, env=env, stdin=subprocess.PIPE, stdout=output, stderr=output
        )
        assert subprocess_.stdin is not None
        subprocess_.stdin.write(stdin.encode())
        subprocess_.stdin.close()
        code = subprocess_.wait()
        wall = time.perf_counter() - start
    adopted = reap_all()
    if code:
        tail = log.read_text(errors="replace")[-3000:]
        raise CommandFailedError(f"{' '.join(words)} exited with {code}:\n{tail}")
    return Usage(_children_cpu() - before, wall, adopted)
