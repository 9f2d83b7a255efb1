"""The keeper: a process that looks after one job at a time, and that nothing of it can escape.

It claims the run directory, forks the job, ends it when asked, at its time limit, or when
launcher or job server die, waits until the whole process tree is gone, and writes the final
record. Then it is ready for the next.
"""

from __future__ import annotations

import contextlib
import enum
import os
import selectors
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.processes import boot_id, hostname, start_time
from orchestrator.queue.prctl import become_subreaper
from orchestrator.queue.tree import JobTree
from orchestrator.queue.wire import (
    Busy,
    Ended,
    Exited,
    Inbox,
    JobRequest,
    Outcome,
    Started,
    Stop,
    Usage,
    Warn,
    final_state,
    pack,
    receive_with_fds,
    unpack,
)
from orchestrator.record import ErrorInfo, RunRecord, RunState
from orchestrator.run import WARNING_VARIABLE
from orchestrator.store import RANKS, RunDir, RunLock, last_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    # Becomes the job in the forked child, reports on the given descriptor, never returns.
    JobBody = Callable[[JobRequest, RunRecord, int], None]
    # Loads what the jobs of one keeper share; each of them inherits it.
    Preparation = Callable[[JobRequest], None]

_WRITE_RETRIES_S = (0.1, 0.5, 1.0)
_LAST_WORD_S = 1.0


class Reason(enum.Enum):
    """Why a job was ended by its keeper."""

    STOPPED = "the sweep was stopped by Ctrl+C or a signal"
    LAUNCHER_DIED = "the launcher died"
    LAUNCHER_FAILED = "the launcher failed, as it says itself"
    SERVER_DIED = "the job server died"
    TIMEOUT = "it reached its time limit"
    GPU_LOST = "its GPU was lost"
    SLURM_ENDED = "Slurm asked its job to end (scancel, or preemption)"
    SLURM_TIMEOUT = "its Slurm job reached its time limit"
    SLURM_JOB_DIED = "the first process of its Slurm job was killed"

    @property
    def state(self) -> RunState:
        return _STATES.get(self, RunState.CANCELLED)


_STATES = {
    Reason.TIMEOUT: RunState.TIMEOUT,
    Reason.SLURM_TIMEOUT: RunState.TIMEOUT,
    Reason.SERVER_DIED: RunState.LOST,
    Reason.SLURM_JOB_DIED: RunState.LOST,
    Reason.GPU_LOST: RunState.FAILED,
}


def keep_jobs(
    orders: socket.socket, server_alive: int, body: JobBody, prepare: Preparation | None
) -> None:
    """Keep one job after another, until the server closes the connection.

    Args:
        orders: where requests come from; a byte goes back after each job.
        server_alive: readable (at its end) once the job server is dead.
        body: becomes the job.
        prepare: is called before each fork.
    """
    become_subreaper()
    child_ended = wake_up_on(signal.SIGCHLD)
    while (received := receive_with_fds(orders)) is not None:
        request = unpack(received[0])
        connection, *leases = received[1]
        with socket.socket(fileno=connection) as launcher:
            if prepare is not None:
                # An error in common work is the job's to meet and to report.
                with contextlib.suppress(Exception):
                    prepare(request)
            own = (server_alive, child_ended, orders.fileno())
            keeper = Keeper(request, launcher, server_alive, child_ended, (*own, *leases))
            try:
                keeper.keep(body, leases)
            finally:
                _close_all(leases)
        try:
            orders.send(b"\0")
        except OSError:  # the server is dead
            return


class Keeper:
    """Looks after one job from before its start until nothing of it is left."""

    def __init__(
        self,
        request: JobRequest,
        launcher: socket.socket,
        server_alive: int,
        child_ended: int,
        own: Sequence[int],
    ) -> None:
        self._request = request
        self._run = RunDir(Path(request.directory))
        self._launcher = launcher
        self._commands = Inbox(launcher.fileno())
        self._server_alive = server_alive
        self._child_ended = child_ended
        # What a job must not inherit: others would not see them end.
        self._own = (launcher.fileno(), *own)
        # Still PENDING; it says so on the disk from the moment the directory is ours.
        self._record = request.record
        self._reason: Reason | None = None
        # What it was last told, be it too late.
        self._last_order: Reason | None = None
        self._told_to_stop = False
        self._outcome: Outcome | None = None
        self._usage = Usage(None, None)
        # Where the job hears that its time is nearly up; only in a Slurm job.
        self._warning = -1
        self._leases: list[int] = []

    def keep(self, body: JobBody, leases: list[int]) -> None:
        """Run the job to its end and record it; answer only, if it is done or being done.

        ``leases`` are closed, and emptied, when nothing of the job is left.
        """
        self._leases = leases
        try:
            # A forked job inherits the lock: it is held until the last of both has ended.
            lock = RunLock.acquire(self._run)
            if lock is None:
                self._send(Busy())
                return
            try:
                self._keep_locked(body)
            finally:
                lock.release()
        except OSError as error:  # the directory is gone, the disk is full, …
            info = ErrorInfo(type(error).__name__, f"the run could not be started: {error}")
            record = self._record.advance(RunState.FAILED, error=info)
            self._send(Ended(record, saved=not self._write(record)))

    def _keep_locked(self, body: JobBody) -> None:
        earlier = self._run.try_read()
        if earlier is not None and self._request.resume and self._is_done(earlier):
            self._send(Ended(earlier, skipped=True))
            return
        # (The other ranks of a Slurm job may be at work already.)
        attempts = self._run.begin_attempt((RANKS,) if self._request.in_allocation else ())
        self._record = msgspec.structs.replace(self._record, attempts=attempts)
        self._run.write(self._record)
        record, tree = self._work(body)
        _close_all(self._leases)
        returncode = tree.returncode or 0
        self._send(Exited(failed=self._state(returncode) is not RunState.COMPLETED))
        self._finish(record, returncode)

    def _is_done(self, earlier: RunRecord) -> bool:
        same = earlier.fingerprint == self._record.fingerprint
        return same and earlier.state is RunState.COMPLETED

    def _work(self, body: JobBody) -> tuple[RunRecord, JobTree]:
        """Fork the job and wait until it and all that it started are gone."""
        outcome_fd, job_outcome_fd = os.pipe()
        warned, self._warning = os.pipe() if self._request.in_allocation else (-1, -1)
        record = self._record.advance(
            RunState.RUNNING,
            host=hostname(),
            boot_id=boot_id(),
            started_at=time.time(),
        )
        pid = os.fork()
        if pid == 0:
            for descriptor in (outcome_fd, signal.set_wakeup_fd(-1), *self._own):
                os.close(descriptor)
            if warned >= 0:
                os.close(self._warning)
                os.set_inheritable(warned, True)
                os.environ[WARNING_VARIABLE] = f"{warned}:{os.fstat(warned).st_ino}"
            body(self._request, record, job_outcome_fd)
        os.close(job_outcome_fd)
        tree = JobTree(pid, self._request.kill_grace_s)
        record = msgspec.structs.replace(record, pid=pid, pid_started=start_time(pid))
        self._send(Started(pid, record.pid_started, os.getpid()))
        self._watch(tree, outcome_fd)
        os.close(outcome_fd)
        if warned >= 0:
            os.close(warned)
            os.close(self._warning)
        if self._request.in_allocation and self._reason is None and self._ended_by_sigterm(tree):
            self._reason = self._last_order or self._await_order()
        return record, tree

    def _ended_by_sigterm(self, tree: JobTree) -> bool:
        if self._outcome is None:  # it may have come before the job could say anything
            return tree.returncode != 0
        error = self._outcome.error
        return error is not None and error.type == "EndedBySignal"

    def _await_order(self) -> Reason | None:
        """Slurm's signal may have reached the job before the launcher, which knows why."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._launcher, selectors.EVENT_READ)
            if selector.select(_LAST_WORD_S):
                for message in self._commands.receive():
                    if isinstance(message, Stop):
                        return Reason[message.reason]
        return None

    def _watch(self, tree: JobTree, outcome_fd: int) -> None:
        os.set_blocking(outcome_fd, False)
        outcome = Inbox(outcome_fd)
        limit = self._request.timeout_s
        deadline = None if limit is None else time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            for descriptor in (
                outcome_fd,
                self._child_ended,
                self._launcher.fileno(),
                self._server_alive,
            ):
                selector.register(descriptor, selectors.EVENT_READ)
            tree.reap()
            while not tree.gone:
                patience = tree.enforce()
                if patience is None and deadline is not None:
                    patience = max(deadline - time.monotonic(), 0.0)
                ready = {key.fd for key, _ in selector.select(patience)}
                if outcome_fd in ready:
                    self._take_outcome(outcome)
                    if outcome.closed:
                        selector.unregister(outcome_fd)
                if self._child_ended in ready:
                    os.read(self._child_ended, 4096)
                # Before any order: a job that has ended is not ended by it.
                tree.reap()
                for descriptor in ready & {self._launcher.fileno(), self._server_alive}:
                    self._take_orders(descriptor, tree)
                    if descriptor == self._server_alive or self._commands.closed:
                        selector.unregister(descriptor)
                if deadline is not None and time.monotonic() >= deadline:
                    self._end(tree, Reason.TIMEOUT)
                    deadline = None
                tree.reap()
        self._take_outcome(outcome)

    def _take_outcome(self, inbox: Inbox) -> None:
        for message in inbox.receive():
            self._outcome = message

    def _take_orders(self, descriptor: int, tree: JobTree) -> None:
        if descriptor == self._server_alive:
            self._end(tree, Reason.SERVER_DIED)
            return
        for message in self._commands.receive():
            if isinstance(message, Stop):
                self._end(tree, Reason[message.reason])
                if self._told_to_stop:
                    tree.end_now()
                self._told_to_stop = True
            elif isinstance(message, Usage):
                self._usage = message
            elif isinstance(message, Warn):
                os.write(self._warning, b"!")
                tree.warn()
        if self._commands.closed:
            in_job = self._request.in_allocation
            self._end(tree, Reason.SLURM_JOB_DIED if in_job else Reason.LAUNCHER_DIED)

    def _end(self, tree: JobTree, reason: Reason) -> None:
        # A job that has ended by itself keeps its outcome, whatever happens while its
        # left-over processes are being ended.
        if tree.returncode is None and self._reason is None:
            self._reason = reason
        self._last_order = reason
        tree.ask_to_end()

    def _finish(self, running: RunRecord, returncode: int) -> None:
        outcome = self._outcome
        state = self._state(returncode)
        ended_at = time.time()
        duration = round(ended_at - (running.started_at or ended_at), 3)
        gpus = len(running.gpu_uuids)
        record = running.advance(
            state,
            returncode=returncode,
            return_value=outcome.return_value if outcome else None,
            error=None if state is RunState.COMPLETED else self._error(returncode),
            ended_at=ended_at,
            duration_seconds=duration,
            gpu_seconds=round(duration * gpus, 3) if gpus else None,
            peak_gpu_memory_gb=self._usage.peak_gpu_memory_gb,
            gpu_utilization=self._usage.gpu_utilization,
            metrics=outcome.metrics if outcome else last_metrics(self._run),
        )
        unsaved = self._write(record)
        warning = unsaved or (outcome.warning if outcome else "")
        value = outcome.value if outcome else None
        self._send(Ended(record, value, warning, saved=not unsaved))

    def _state(self, returncode: int) -> RunState:
        return self._reason.state if self._reason else final_state(self._outcome, returncode)

    def _error(self, returncode: int) -> ErrorInfo:
        if self._reason is not None:
            return ErrorInfo(self._reason.name, f"the run was ended because {self._reason.value}")
        if self._outcome is not None and self._outcome.error is not None:
            return self._outcome.error
        return ErrorInfo(
            "ProcessDied", how_it_ended(returncode, returned=self._outcome is not None)
        )

    def _write(self, record: RunRecord) -> str:
        """Write the final record; a disk that is full for a moment is given a few."""
        for pause in (*_WRITE_RETRIES_S, None):
            try:
                self._run.write(record)
            except Exception as error:  # noqa: BLE001 - the launcher must hear of the end
                if pause is None:
                    return (
                        f"{self._run.record} could not be written ({error}); the run ended as "
                        f"{record.state.value} but will read as LOST and be run again"
                    )
                time.sleep(pause)
            else:
                break
        return ""

    def _send(self, message: Any) -> None:
        # A dead launcher needs no answer: the record has it.
        with contextlib.suppress(OSError):
            self._launcher.sendall(pack(message))


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def how_it_ended(returncode: int, *, returned: bool) -> str:
    """A sentence on the end of a process that did not say goodbye."""
    when = "after its task had returned" if returned else "before its task returned"
    if returncode >= 0:
        return f"the process exited with status {returncode} {when}"
    name = signal.Signals(-returncode).name if -returncode in _SIGNALS else "an unknown signal"
    hint = " (out of memory, or killed by hand)" if -returncode == signal.SIGKILL else ""
    return f"the process was killed by {name}{hint} {when}"


_SIGNALS = {int(number) for number in signal.Signals}


def wake_up_on(number: signal.Signals) -> int:
    """A descriptor that becomes readable when the signal arrives."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader
