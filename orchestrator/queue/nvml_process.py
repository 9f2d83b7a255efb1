"""The process that calls NVML: how it is started, what is said to it, and what it does."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import socket
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from orchestrator.queue.nvml import Nvml, NvmlFailed
from orchestrator.queue.wire import Inbox, pack

if TYPE_CHECKING:
    from orchestrator.queue.gpus import Gpu

# Killed, and not yet collected: one that hangs in the driver ends when the driver lets it.
_unreaped: set[int] = set()


@dataclass(frozen=True)
class List:
    """To the process: open NVML anew and tell what there is. Answered by `Devices`."""


@dataclass(frozen=True)
class Read:
    """To the process: read these. Answered by a `GpuSnapshot` for each, in order, and `Done`."""

    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Opened:
    """NVML is open; it is said before any other answer."""


@dataclass(frozen=True)
class Devices:
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Done:
    pass


@dataclass(frozen=True)
class Failed:
    """NVML as a whole does not answer; it is opened again at the next request."""

    error: str


# --- in the launcher ---


class NvmlProcess:
    """The launcher's end. Whatever it does, it never waits for the process."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        connection.setblocking(False)
        self._connection = connection
        self.pid = pid
        self.inbox = Inbox(connection.fileno())

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: List | Read) -> None:
        """Ask.

        Raises:
            OSError: the process is dead.
        """
        self._connection.sendall(pack(message))

    def kill(self) -> None:
        self._connection.close()
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        _unreaped.add(self.pid)


def reap() -> bool:
    """Collect killed processes that have ended; whether all have."""
    for pid in list(_unreaped):
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            ended = pid
        if ended:
            _unreaped.discard(pid)
    return not _unreaped


def forked() -> NvmlProcess:
    """Fork the process off this one."""
    from orchestrator.queue.link import socket_pair

    reap()
    parent = os.getpid()
    ours, theirs = socket_pair()
    with theirs, warnings.catch_warnings():
        # Python 3.12 warns of any thread; `start_method` has looked at them more closely.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
        if pid == 0:
            _become_forked(theirs, parent)
    return NvmlProcess(ours, pid)


def _become_forked(theirs: socket.socket, parent: int) -> NoReturn:
    try:
        # Whatever dies with this process never closes a descriptor: NVML's have its number.
        gc.disable()
        gc.freeze()
        signal.set_wakeup_fd(-1)
        os.setsid()
        connection = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 3)
        _close_all_but(connection)
        null = os.open(os.devnull, os.O_RDWR)
        for target in range(3):  # a user's pipe must not stay open while NVML hangs
            os.dup2(null, target)
        _serve(socket.socket(fileno=connection), parent)
    finally:
        os._exit(0)


def _close_all_but(keep: int) -> None:
    """Close what was inherited: locks, too, which this process would go on holding."""
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - numbers, not paths
        if int(name) not in (0, 1, 2, keep):
            with contextlib.suppress(OSError):
                os.close(int(name))


def spawned() -> NvmlProcess:
    """Start the process as a fresh interpreter."""
    import subprocess

    from orchestrator.queue.link import socket_pair

    reap()
    ours, theirs = socket_pair()
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    start = (
        "import sys; sys.path[:] = sys.argv[3:];"
        "from orchestrator.queue.nvml_process import spawned_main; spawned_main()"
    )
    with theirs:
        numbers = [str(theirs.fileno()), str(os.getpid())]
        paths = [path for path in sys.path if isinstance(path, str)]
        process = subprocess.Popen(
            [sys.executable, *flags, "-c", start, *numbers, *paths],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    process.returncode = 0  # `reap` collects it; the handle must not complain that it lives
    return NvmlProcess(ours, process.pid)


# --- in the process ---


def spawned_main() -> NoReturn:
    """The process as a fresh interpreter."""
    try:
        _serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    finally:
        os._exit(0)


def _serve(launcher: socket.socket, parent: int) -> None:
    """Answer until the launcher is gone."""
    from orchestrator.queue.prctl import die_with_parent

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)  # a call that hangs does not see a closed connection
    answerer = _Answerer(launcher)
    inbox = Inbox(launcher.fileno())
    while not inbox.closed:
        for request in inbox.receive():
            answerer.answer(request)


class _Answerer:
    def __init__(self, launcher: socket.socket) -> None:
        self._launcher = launcher
        self._nvml: Nvml | None = None

    def answer(self, request: List | Read) -> None:
        try:
            if isinstance(request, List):
                self._close()
                self._say(Devices(tuple(self._open().devices())))
            else:
                nvml = self._open()
                for gpu in request.gpus:
                    self._say(nvml.read(gpu))
                self._say(Done())
        except NvmlFailed as error:
            self._close()
            self._say(Failed(str(error)))
        except Exception as error:  # noqa: BLE001 - pynvml may be missing, or be another's
            self._close()
            self._say(Failed(f"{type(error).__name__}: {error}"))

    def _open(self) -> Nvml:
        if self._nvml is None:
            self._nvml = Nvml()
            self._say(Opened())
        return self._nvml

    def _close(self) -> None:
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            nvml.close()

    def _say(self, answer: Any) -> None:
        self._launcher.sendall(pack(answer))
