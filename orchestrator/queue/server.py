"""The job server: forked (or started) early, it does nothing but fork keepers and feed them.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.queue.keeper import keep_jobs, wake_up_on
from orchestrator.queue.prctl import become_subreaper
from orchestrator.queue.wire import Busy, pack, receive_with_fds, send_with_fds

if TYPE_CHECKING:
    from orchestrator.queue.keeper import JobBody, Preparation


def serve(launcher: socket.socket, body: JobBody, prepare: Preparation | None = None) -> None:
    """Pass on requests until the launcher is gone and the last keeper has ended.

    Args:
        launcher: where requests come from, each with a socket for its keeper.
        body: becomes the job in a forked child of a keeper.
        prepare: is called in the keeper before it forks, to load once what its jobs share.
    """
    become_subreaper()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # (In a Slurm job it is ignored from the start: there it comes to every process of the job.)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()
    _Server(launcher, body, prepare).run()


@dataclass(eq=False)
class _KeeperLink:
    """A keeper as its server sees it. It is used again for the next job once it is idle."""

    pid: int
    orders: socket.socket
    busy: bool = False


class _Server:
    def __init__(self, launcher: socket.socket, body: JobBody, prepare: Preparation | None) -> None:
        self._launcher = launcher
        self._body = body
        self._prepare = prepare
        # Keepers wait for the end of this pipe, which comes when this process is dead.
        self._alive, self._own_end = os.pipe()
        self._child_ended = wake_up_on(signal.SIGCHLD)
        self._selector = selectors.DefaultSelector()
        self._keepers: dict[int, _KeeperLink] = {}
        self._orphaned = False
        self._launcher_gone = False

    def run(self) -> None:
        self._selector.register(self._launcher, selectors.EVENT_READ)
        self._selector.register(self._child_ended, selectors.EVENT_READ)
        while not self._launcher_gone or self._keepers or self._orphaned:
            for key, _ in self._selector.select(0.05 if self._orphaned else None):
                if key.fileobj is self._launcher:
                    self._take_request()
                elif key.data is not None:
                    self._hear(key.data)
                else:
                    os.read(self._child_ended, 4096)
            self._reap()

    def _take_request(self) -> None:
        try:
            received = receive_with_fds(self._launcher)
        except (EOFError, OSError):
            received = None
        if received is None:
            self._launcher_gone = True
            self._selector.unregister(self._launcher)
            for keeper in [k for k in self._keepers.values() if not k.busy]:
                self._dismiss(keeper)
            return
        request, descriptors = received
        idle = (k for k in list(self._keepers.values()) if not k.busy)
        while True:
            try:
                keeper = next(idle, None) or self._fork_keeper(descriptors)
            except OSError as error:  # no process, or no descriptor, is to be had
                self._refuse(descriptors, error)
                return
            try:
                send_with_fds(keeper.orders, request, descriptors)
            except OSError:  # it was killed while idle
                self._dismiss(keeper)
            else:
                keeper.busy = True
                for descriptor in descriptors:
                    os.close(descriptor)
                return

    def _refuse(self, descriptors: list[int], error: OSError) -> None:
        """Answer in place of the keeper that could not be: the launcher asks again."""
        with socket.socket(fileno=descriptors[0]) as launcher, contextlib.suppress(OSError):
            launcher.sendall(pack(Busy(f"cannot be started now ({error})")))
        for descriptor in descriptors[1:]:
            os.close(descriptor)

    def _fork_keeper(self, passing: list[int]) -> _KeeperLink:
        """Fork another keeper. ``passing``: descriptors on their way to it, which it gets later."""
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            for descriptor in passing:
                os.close(descriptor)
            self._become_keeper(theirs, ours)
        theirs.close()
        keeper = self._keepers[pid] = _KeeperLink(pid, ours)
        self._selector.register(ours, selectors.EVENT_READ, keeper)
        return keeper

    def _become_keeper(self, orders: socket.socket, server_end: socket.socket) -> None:
        status = 1
        try:
            os.close(signal.set_wakeup_fd(-1))
            self._selector.close()
            # Held here, they would keep others from seeing that this server has ended.
            others = [keeper.orders for keeper in self._keepers.values()]
            for connection in (self._launcher, server_end, *others):
                connection.close()
            os.close(self._own_end)
            os.close(self._child_ended)
            keep_jobs(orders, self._alive, self._body, self._prepare)
            status = 0
        except BaseException:  # noqa: BLE001 - the last frame of the process
            traceback.print_exc()
        finally:
            os._exit(status)

    def _hear(self, keeper: _KeeperLink) -> None:
        """A keeper says that it is idle, by a byte, or that it is dead, by an end."""
        try:
            said = keeper.orders.recv(4096)
        except OSError:
            said = b""
        keeper.busy = False
        if not said or self._launcher_gone:
            self._dismiss(keeper)

    def _dismiss(self, keeper: _KeeperLink) -> None:
        if keeper.orders.fileno() >= 0:
            self._selector.unregister(keeper.orders)
            keeper.orders.close()
        keeper.busy = True  # never chosen again; it goes when it is reaped

    def _reap(self) -> None:
        """Collect keepers; end what a keeper that was killed has left to this process."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                keeper = self._keepers.pop(pid, None)
                if keeper is not None:
                    self._dismiss(keeper)
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
