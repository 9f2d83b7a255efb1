"""Linux's two calls that let no process escape; elsewhere they do nothing and say so."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

IS_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> bool:
    """Adopt orphaned descendants, however they detach. False where the system has no such call."""
    return IS_LINUX and _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends.

    The kernel acts on the end of the *thread* that forked this process, so the parent must
    fork from its main thread.

    Args:
        parent: its pid before the fork: it may have ended before this call.
    """
    if IS_LINUX:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def flush_c_stdio() -> None:
    """Write out what C code has printed but not flushed: ``os._exit`` would lose it."""
    _libc.fflush(None)
