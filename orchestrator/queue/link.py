"""The launcher's ends of its connections: to the job server, and to each job's keeper."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import warnings
import weakref
from typing import TYPE_CHECKING

from orchestrator.queue.wire import Inbox, JobRequest, Stop, Usage, Warn, pack, send_with_fds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from orchestrator.queue.keeper import JobBody, Preparation

# A later server must not hold an earlier one's connections: their ends would never be seen.
_open_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


class JobLink:
    """The connection to one job's keeper."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.inbox = Inbox(connection.fileno())

    def fileno(self) -> int:
        return self._connection.fileno()

    def stop(self, reason: str = "STOPPED") -> None:
        """Have the job ended; ``reason`` is the name of a `keeper.Reason`."""
        if not self._tell(Stop(reason)):
            # A keeper that has not listened for long finds the end of what was said.
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)

    def warn(self) -> None:
        """Have the job told that its time is nearly up."""
        self._tell(Warn())

    def tell_usage(self, usage: Usage) -> None:
        self._tell(usage)

    def _tell(self, message: Stop | Usage | Warn) -> bool:
        """Whether there was room for a message; the launcher never waits for a keeper."""
        data = pack(message)
        with contextlib.suppress(OSError):
            sent = self._connection.send(data, socket.MSG_DONTWAIT)
            if sent < len(data):  # (the kernel takes messages as small as ours whole)
                self._connection.sendall(data[sent:])
            return True
        return False

    def close(self) -> None:
        self._connection.close()


class ServerLink:
    """The connection to a job server; closing it (or losing this process) ends the server."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self._close = weakref.finalize(self, _close, connection, pid)

    def start(self, request: JobRequest, leases: Sequence[int] = ()) -> JobLink:
        """Have a job started.

        Args:
            request: what to start.
            leases: descriptors that its keeper holds until nothing of the job is left.

        Raises:
            OSError: the server is dead.
        """
        ours, theirs = socket_pair()
        try:
            with theirs:
                send_with_fds(self._connection, pack(request), [theirs.fileno(), *leases])
        except OSError:
            ours.close()
            raise
        return JobLink(ours)

    def close(self) -> None:
        self._close()


def _close(connection: socket.socket, pid: int) -> None:
    connection.close()
    with contextlib.suppress(ChildProcessError, OSError):
        os.waitpid(pid, 0)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that no later child of this process will hold."""
    pair = socket.socketpair()
    _open_sockets.update(pair)
    return pair


def close_inherited(keep: socket.socket) -> None:
    """In a forked child: close the launcher's connections, but the child's own."""
    for other in list(_open_sockets):
        if other is not keep:
            other.close()


def forked_server(
    make: Callable[[], tuple[JobBody, Preparation]],
) -> ServerLink:
    """Fork the job server off this process.

    ``make`` is called in the server: what becomes a job, and what a keeper does before that.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or every child would print it again
    ours, theirs = socket_pair()
    with warnings.catch_warnings():
        # Python 3.12 warns of any thread; `start_method` has looked at them more closely.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _become_server(theirs, make)
    theirs.close()
    return ServerLink(ours, pid)


def _become_server(
    launcher: socket.socket, make: Callable[[], tuple[JobBody, Preparation]]
) -> None:
    try:
        close_inherited(launcher)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for target in (0, 1):
            os.dup2(null, target)
        from orchestrator.queue.server import serve

        serve(launcher, *make())
    finally:
        os._exit(0)


def spawned_server(before: Callable[[], None] | None = None) -> ServerLink:
    """Start the job server as a fresh interpreter; ``before`` is called in it before it is one."""
    from orchestrator.queue.spawn import anonymous_file, interpreter

    ours, theirs = socket_pair()
    descriptor = theirs.fileno()
    stream = anonymous_file(pickle.dumps(sys.path), pickle.dumps(descriptor))
    process = subprocess.Popen(
        interpreter("server_main", stream),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(stream, descriptor),
        start_new_session=True,
        preexec_fn=before,  # noqa: PLW1509 - it may only set signals
    )
    os.close(stream)
    theirs.close()
    process.returncode = 0  # the link reaps it; the handle must not complain that it lives
    return ServerLink(ours, process.pid)
