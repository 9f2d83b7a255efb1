"""The job's own process: set it up, call the task as Hydra would, say how it went."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from orchestrator import run as current_run
from orchestrator.processes import start_time
from orchestrator.queue.prctl import die_with_parent, flush_c_stdio
from orchestrator.queue.wire import JobRequest, Outcome, pack
from orchestrator.record import ErrorInfo, RunRecord, numbers_in, to_plain
from orchestrator.store import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hydra.core.utils import JobReturn

    Load = Callable[[], Callable[[], JobReturn]]

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def set_up_process(request: JobRequest, record: RunRecord) -> None:
    """Make a freshly forked child the job: session, signals, streams, variables, record."""
    keeper = os.getppid()
    die_with_parent(keeper)
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    install_sigterm_handler()
    if request.in_allocation:
        # It would end the job, and whatever it starts. (`orchestrator.is_preempted` hears of it
        # by a descriptor; a handler of the task's own gets the signal, too.)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    run = RunDir(Path(request.directory))
    redirect(run)
    set_variables(request.env, request.threads, len(record.attempts) + 1)
    pid = os.getpid()
    run.write(msgspec.structs.replace(record, pid=pid, pid_started=start_time(pid)))


def set_variables(variables: Mapping[str, str | None], threads: int, attempt: int) -> None:
    """Set this process's environment to a job's.

    Args:
        variables: what to set; None takes a variable away.
        threads: of its libraries, where nobody has said how many.
        attempt: which one of its run this is, from 1.
    """
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for name in THREAD_VARIABLES:
        os.environ.setdefault(name, str(threads))
    os.environ[current_run.ATTEMPT_VARIABLE] = str(attempt)


class EndedBySignal(SystemExit):
    """SIGTERM, from the keeper or from outside."""

    def __str__(self) -> str:
        return f"the process was asked to end by {signal.Signals(int(self.code or 0) - 128).name}"


def install_sigterm_handler() -> None:
    """Turn SIGTERM into SystemExit, so that the task's ``finally`` blocks and exit handlers run.

    Once: what cleans up is not to be interrupted by the same signal from somebody else. And in
    this process only: a worker that is forked off dies of the signal as it would in any program,
    for an exception in the wrong place of it would be swallowed.
    """
    ending = False

    def handle(number: int, _frame: object) -> None:
        nonlocal ending
        if not ending:
            ending = True
            raise EndedBySignal(128 + number)

    def back_to_default() -> None:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    signal.signal(signal.SIGTERM, handle)
    # Blocked over the fork: Python forgets signals that reach a child in its first moments.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}),
        after_in_child=back_to_default,
    )


def redirect(run: RunDir) -> None:
    """Send everything that is printed, by C code and child processes too, to the run's logs."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for target, path in ((1, run.stdout), (2, run.stderr)):
        descriptor = os.open(path, flags, 0o666)
        os.dup2(descriptor, target)
        os.close(descriptor)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    open_streams()


def open_streams() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` write to the logs, line by line, whatever the text."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = _text_stream(descriptor)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _text_stream(descriptor: int) -> io.TextIOWrapper:
    raw = open(descriptor, "wb", closefd=False)  # noqa: SIM115 - open for good
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


_blas_threads = 0


def limit_blas_threads(threads: int) -> None:
    """Bound the pools of BLAS libraries that are loaded already and read no variable any more.

    Forks inherit it, so a keeper does it once for all its jobs; asking again is free.
    """
    global _blas_threads  # noqa: PLW0603 - the pools belong to the process
    if threads == _blas_threads or not {"numpy", "scipy"} & sys.modules.keys():
        return
    import threadpoolctl

    threadpoolctl.threadpool_limits(threads)
    _blas_threads = threads


def limit_threads(threads: int) -> None:
    """Bound every pool that is loaded already."""
    limit_blas_threads(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def reseed(fingerprint: str) -> None:
    """Give the global generators a state of this run's own.

    Forked jobs would otherwise all draw the same numbers. Deterministic, so that the same
    config draws the same numbers again.
    """
    seed = int(fingerprint[:8] or "0", 16)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.backends.cuda.is_built():
        torch.manual_seed(seed)  # the devices' generators, too, once they are there
    else:
        torch.default_generator.manual_seed(seed)


def forget_parent() -> None:
    """Drop the exit handlers and child lists that were inherited: they are the launcher's."""
    atexit._clear()  # noqa: SLF001
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util._finalizer_registry.clear()  # noqa: SLF001
        process = sys.modules["multiprocessing.process"]
        process._children = set()  # type: ignore[attr-defined]  # noqa: SLF001


def work(load: Load, request: JobRequest, outcome_fd: int) -> NoReturn:
    """Call the task, send its outcome to the keeper, and end the process as Python would.

    ``load`` gets everything ready, imports included, and returns what calls the task.
    """
    status, own_pid = 1, os.getpid()
    try:
        run = current_run.ActiveRun(RunDir(Path(request.directory)), managed=True)
        current_run.activate(run)
        outcome, status = _attempt(load, request, run)
        # A fork that the task made and did not end comes back here, too; it is not the job.
        if os.getpid() == own_pid:
            _send(outcome_fd, outcome)
        _run_exit_handlers()
    except BaseException:  # noqa: BLE001 - the last frame of the process
        traceback.print_exc()
        status = status or 1
    finally:
        _flush()
        os._exit(status)


def give_up(error: BaseException, outcome_fd: int) -> NoReturn:
    """End a job that could not even be set up; the keeper hears why."""
    with contextlib.suppress(BaseException):
        _send(outcome_fd, _failed(error, {}))
        traceback.print_exception(error)
    os._exit(1)


def _attempt(load: Load, request: JobRequest, run: current_run.ActiveRun) -> tuple[Outcome, int]:
    from hydra.core.utils import JobStatus

    try:
        call = load()
        limit_threads(request.threads)
        reseed(request.record.fingerprint)
        returned = call()
    except SystemExit as error:
        status = _exit_status(error)
        if status == 0:
            return _completed(None, run.metrics), 0
        return _failed(error, run.metrics), status
    except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt, too, has ended the task
        _print(error)
        return _failed(error, run.metrics), 1
    value = returned._return_value  # noqa: SLF001 - the property raises a failed job's exception
    if returned.status is JobStatus.COMPLETED:
        return _completed(value, run.metrics), 0
    _print(value)
    return _failed(value, run.metrics), 1


def _print(error: BaseException) -> None:
    with contextlib.suppress(Exception):  # the disk that the log is on may be full
        traceback.print_exception(error)


def _exit_status(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    with contextlib.suppress(Exception):
        print(error.code, file=sys.stderr)
    return 1


def _completed(value: Any, logged: dict[str, float]) -> Outcome:
    warning, plain = "", None
    try:
        plain = to_plain(value)
    except Exception as error:  # noqa: BLE001 - a value's own methods may raise anything
        warning = f"the return value is not in the record: {error}"
    try:
        pickled = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001 - likewise
        pickled = pickle.dumps(plain)
        warning = f"the return value did not reach the sweeper, which gets {plain}: {error}"
    return Outcome(
        completed=True,
        return_value=plain,
        value=pickled,
        metrics={**logged, **numbers_in(plain)},
        warning=warning,
    )


def _failed(error: BaseException, logged: dict[str, float]) -> Outcome:
    pickled = None
    with contextlib.suppress(Exception):
        data = pickle.dumps(error, protocol=pickle.HIGHEST_PROTOCOL)
        pickle.loads(data)  # noqa: S301 - many exceptions pickle but do not unpickle
        pickled = data
    return Outcome(completed=False, value=pickled, error=ErrorInfo.of(error), metrics=logged)


def _send(descriptor: int, outcome: Outcome) -> None:
    data = pack(outcome)
    while data:
        data = data[os.write(descriptor, data) :]
    os.close(descriptor)


def _run_exit_handlers() -> None:
    """What the interpreter does at its end: join threads, run atexit, end worker processes."""
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001
    atexit._run_exitfuncs()  # noqa: SLF001
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util._exit_function()  # noqa: SLF001


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    flush_c_stdio()
