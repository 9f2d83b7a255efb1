"""The process tree of one job, seen from its keeper: reaping, asking to end, ending."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from orchestrator.queue.prctl import IS_LINUX

_KILL_INTERVAL_S = 0.02


class JobTree:
    """A job and all that it started.

    The keeper is a subreaper, so its children are the job and whatever orphans the job left:
    when it has no child any more, nothing is left. Where there are no subreapers (macOS),
    a process that left the job's process group and lost its parent is not found.
    """

    def __init__(self, pid: int, grace_s: float) -> None:
        self.pid = pid
        # As in `subprocess`: the exit status, or minus the signal; None while the job lives.
        self.returncode: int | None = None
        self.gone = False
        self._grace_s = grace_s
        self._kill_at: float | None = None
        self._asked_leftovers = False

    def reap(self) -> None:
        """Collect the dead. Once the job itself has ended, what is left over is asked to."""
        while not self.gone:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.gone = True
                return
            if pid == 0:
                break
            if pid == self.pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        if self.returncode is not None and not self._asked_leftovers:
            self._asked_leftovers = True
            self._set_deadline()
            self._signal_all(signal.SIGTERM)

    def ask_to_end(self) -> None:
        """SIGTERM the job; what has not ended after the grace is killed.

        Only its own process is asked: it may want its workers to shut down in order. What
        it leaves behind is asked when it has ended.
        """
        if self._kill_at is None and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        self._set_deadline()

    def warn(self) -> None:
        """Tell the job, by SIGUSR2, that its time is nearly up."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR2)

    def _set_deadline(self) -> None:
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace_s

    def end_now(self) -> None:
        self._kill_at = time.monotonic()

    def enforce(self) -> float | None:
        """Kill what has outlived its grace.

        Returns:
            Seconds until this wants to be called again; None while nothing is being ended.
        """
        if self._kill_at is None:
            return None
        left = self._kill_at - time.monotonic()
        if left > 0:
            return left
        self._signal_all(signal.SIGKILL)
        return _KILL_INTERVAL_S

    def _signal_all(self, number: signal.Signals) -> None:
        import psutil

        with contextlib.suppress(psutil.Error):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    process.send_signal(number)
        if not IS_LINUX:
            # Orphans are nobody's children here, but still of the job's process group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
