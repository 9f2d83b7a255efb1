"""The job server: forked (or started) early, it does nothing but fork a keeper per job.

It holds all that the app had imported at that moment, so a job costs a fork and not an
interpreter. It is a subreaper: what a killed keeper leaves behind comes to it, and is ended.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import traceback
from typing import TYPE_CHECKING

from orchestrator.queue.keeper import Keeper, wake_up_on
from orchestrator.queue.prctl import become_subreaper
from orchestrator.queue.wire import JobRequest, receive_with_fd

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.queue.keeper import JobBody


def serve(
    launcher: socket.socket, body: JobBody, prepare: Callable[[JobRequest], None] | None = None
) -> None:
    """Start jobs until the launcher is gone and the last keeper has ended.

    Args:
        launcher: where requests come from, each with a socket for its keeper.
        body: becomes the job in a forked child.
        prepare: is called here before each fork, to load once what jobs have in common.
    """
    become_subreaper()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    child_ended = wake_up_on(signal.SIGCHLD)
    # Keepers wait for the end of this pipe, which comes when this process is dead.
    alive, own_end = os.pipe()
    server = _Server(launcher, body, prepare, alive, own_end)
    gc.freeze()
    with selectors.DefaultSelector() as selector:
        selector.register(launcher, selectors.EVENT_READ)
        selector.register(child_ended, selectors.EVENT_READ)
        while not server.finished():
            for key, _ in selector.select(server.patience()):
                if key.fileobj is launcher:
                    if not server.take_request():
                        selector.unregister(launcher)
                else:
                    os.read(child_ended, 4096)
            server.reap()


class _Server:
    def __init__(
        self,
        launcher: socket.socket,
        body: JobBody,
        prepare: Callable[[JobRequest], None] | None,
        alive: int,
        own_end: int,
    ) -> None:
        self._launcher = launcher
        self._body = body
        self._prepare = prepare
        self._alive = alive
        self._own_end = own_end
        self._keepers: set[int] = set()
        self._orphaned = False
        self._launcher_gone = False

    def finished(self) -> bool:
        return self._launcher_gone and not self._keepers and not self._orphaned

    def patience(self) -> float | None:
        return 0.05 if self._orphaned else None

    def take_request(self) -> bool:
        try:
            received = receive_with_fd(self._launcher)
        except (EOFError, OSError):
            received = None
        if received is None:
            self._launcher_gone = True
            return False
        request, descriptor = received
        connection = socket.socket(fileno=descriptor)
        if self._prepare is not None:
            # An error in common work is the job's to meet and to report.
            with contextlib.suppress(Exception):
                self._prepare(request)
        pid = os.fork()
        if pid == 0:
            self._become_keeper(request, connection)
        self._keepers.add(pid)
        connection.close()
        return True

    def _become_keeper(self, request: JobRequest, connection: socket.socket) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            self._launcher.close()
            os.close(self._own_end)
            Keeper(request, connection, self._alive).keep(self._body)
            status = 0
        except BaseException:  # noqa: BLE001 - the last frame of the process
            traceback.print_exc()
        finally:
            os._exit(status)

    def reap(self) -> None:
        """Collect keepers; end what a keeper that was killed has left to this process."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid in self._keepers:
                    self._keepers.remove(pid)
                    self._orphaned |= status != 0
        if self._orphaned:
            self._orphaned = self._end_orphans()

    def _end_orphans(self) -> bool:
        import psutil

        left = [p for p in psutil.Process().children() if p.pid not in self._keepers]
        for orphan in left:
            with contextlib.suppress(psutil.Error):
                for process in [*orphan.children(recursive=True), orphan]:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
        return bool(left)
