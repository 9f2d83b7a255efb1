"""Jobs as fresh interpreters: what is shipped to one, and how one starts.

Used where a fork is not safe. The task's module is imported again, as `multiprocessing`
does for spawned processes; only a task that cannot be found again by name is pickled.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from orchestrator.errors import OrchestratorError
from orchestrator.queue.job import (
    give_up,
    install_sigterm_handler,
    open_streams,
    set_up_process,
    work,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

    from orchestrator.queue.task import Task
    from orchestrator.queue.wire import JobRequest
    from orchestrator.record import RunRecord

# The path of modules must be set before anything of ours can be imported.
_START = (
    "import os, sys, pickle; stream = os.fdopen(int(sys.argv[1]), 'rb');"
    "sys.path[:] = pickle.load(stream);"
    "from orchestrator.queue.spawn import {function}; {function}(stream)"
)


def interpreter(function: str, descriptor: int) -> list[str]:
    """The command that calls a function of this module with an inherited descriptor."""
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    return [sys.executable, *flags, "-c", _START.format(function=function), str(descriptor)]


def anonymous_file(*parts: bytes) -> int:
    """A descriptor at the start of an unnamed file with this content, for a child to inherit."""
    with tempfile.TemporaryFile(buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[file.write(view) or 0 :]
        file.seek(0)
        descriptor = os.dup(file.fileno())
    os.set_inheritable(descriptor, True)
    return descriptor


# --- in the launcher ---


class Shipper:
    """Packs what a fresh interpreter needs; the part that all jobs share is packed once."""

    def __init__(self, task: Task) -> None:
        from multiprocessing.spawn import get_preparation_data

        import cloudpickle
        from hydra.core.utils import JobRuntime
        from hydra.version import getbase

        preparation = get_preparation_data("orchestrator-job")
        for name in ("log_to_stderr", "authkey", "start_method"):
            preparation.pop(name, None)
        function, callbacks = _by_name(task.function), task.callbacks
        common = {
            "function": function or task.function,
            "main": _main_package(),
            "callbacks": callbacks,
            "job_name": JobRuntime.instance().get("name"),
            "version_base": str(getbase()),
            "resolvers": _picklable_resolvers(),
        }
        # What `load_task` reads.
        self.common = pickle.dumps(preparation) + _framed(cloudpickle.dumps(common))

    def pack(self, config: DictConfig) -> bytes:
        """The bytes for one job: the shared part, then its composed and numbered config."""
        return self.common + self.pack_config(config)

    def pack_config(self, config: DictConfig) -> bytes:
        """What `load_config` reads."""
        import cloudpickle

        return _framed(cloudpickle.dumps(config))


def _main_package() -> str | None:
    """The name of the main module where it is a package's (``python -m package``).

    `multiprocessing` leaves those out when it makes another process like this one.
    """
    name = getattr(sys.modules["__main__"].__spec__, "name", None)
    return name if name is not None and name.endswith(".__main__") else None


def _framed(data: bytes) -> bytes:
    # As a pickle of bytes, so that it is not opened before the modules can be imported.
    return pickle.dumps(data)


def _by_name(function: Callable[..., Any]) -> str | None:
    """The qualified name of a function of ``__main__`` that can be found again, else None."""
    name = getattr(function, "__qualname__", "")
    found: Any = sys.modules["__main__"]
    if getattr(function, "__module__", None) != "__main__" or not name:
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
    # @hydra.main puts a wrapper in the module; the task itself is inside it.
    while found is not None and found is not function:
        found = getattr(found, "__wrapped__", None)
    return name if found is function else None


def _picklable_resolvers() -> dict[str, bytes]:
    import cloudpickle
    from omegaconf.basecontainer import BaseContainer

    resolvers = {}
    for name, resolver in BaseContainer._resolvers.items():  # noqa: SLF001
        if not name.startswith("oc."):
            # One that cannot be pickled is missed only by the jobs that use it.
            try:
                resolvers[name] = cloudpickle.dumps(resolver)
            except Exception:  # noqa: BLE001, S112
                continue
    return resolvers


# --- in the job server and its children ---


def server_main(stream: Any) -> None:
    """The job server as a fresh interpreter."""
    import socket

    from orchestrator.queue.server import serve

    descriptor = pickle.load(stream)  # noqa: S301 - from our own launcher
    serve(socket.socket(fileno=descriptor), spawned_body)
    os._exit(0)


def spawned_body(request: JobRequest, record: RunRecord, outcome_fd: int) -> NoReturn:
    """Replace the forked child of the keeper by a fresh interpreter that does the job."""
    try:
        set_up_process(request, record)
        slim = replace(request, payload=None)
        payload = anonymous_file(
            pickle.dumps(sys.path), pickle.dumps((slim, outcome_fd)), request.payload or b""
        )
        os.set_inheritable(outcome_fd, True)
        command = interpreter("job_main", payload)
        os.execv(command[0], command)  # noqa: S606
    except BaseException as error:  # noqa: BLE001 - the last frame of the process
        give_up(error, outcome_fd)


def job_main(stream: Any) -> None:
    """The job as a fresh interpreter."""
    request, outcome_fd = pickle.load(stream)  # noqa: S301 - from our own launcher
    os.set_inheritable(outcome_fd, False)
    install_sigterm_handler()
    open_streams()

    def load() -> Callable[[], JobReturn]:
        from orchestrator.queue.task import call_task, name_job

        task, config = load_task(stream), load_config(stream)
        name_job(config, request.record.slurm_job_id)
        return partial(call_task, task, config, request.directory)

    work(load, request, outcome_fd)


def load_task(stream: Any) -> Task:
    """The task and its callbacks: the app is imported, and Hydra set up as in the launcher."""
    from multiprocessing.spawn import prepare

    from hydra.core.utils import JobRuntime, setup_globals
    from hydra.version import setbase

    from orchestrator.queue.task import Task

    with _no_second_sweep():
        prepare(pickle.load(stream))  # noqa: S301
        common = pickle.loads(pickle.load(stream))  # noqa: S301
        main = common["main"]
        home = importlib.import_module(main) if main else sys.modules["__main__"]
    setup_globals()
    setbase(common["version_base"])
    JobRuntime.instance().set("name", common["job_name"])
    _restore_resolvers(common["resolvers"])
    function = common["function"]
    if isinstance(function, str):
        function = _find_in(home, function)
    return Task(function, common["callbacks"])


def load_config(stream: Any) -> DictConfig:
    """A composed and numbered config, after `load_task`: its types may be the app's own."""
    config: DictConfig = pickle.loads(pickle.load(stream))  # noqa: S301
    return config


@contextmanager
def _no_second_sweep() -> Iterator[None]:
    """While the app's script is imported again, it must not start the app again."""
    hydra_main: Any = importlib.import_module("hydra.main")
    original = hydra_main._run_hydra  # noqa: SLF001

    def refuse(*_: Any, **__: Any) -> None:
        msg = (
            "The script starts Hydra when it is imported, and a fresh interpreter has to import "
            "it. Write the call of main() below `if __name__ == '__main__':`, or start jobs by "
            "fork (hydra.launcher.start_method=fork) where that is safe."
        )
        raise OrchestratorError(msg)

    hydra_main._run_hydra = refuse  # noqa: SLF001
    try:
        yield
    finally:
        hydra_main._run_hydra = original  # noqa: SLF001


def _restore_resolvers(resolvers: dict[str, bytes]) -> None:
    from omegaconf import OmegaConf
    from omegaconf.basecontainer import BaseContainer

    for name, data in resolvers.items():
        if not OmegaConf.has_resolver(name):
            BaseContainer._resolvers[name] = pickle.loads(data)  # noqa: SLF001, S301


def _find_in(module: ModuleType, name: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    function: Callable[..., Any] = found
    return function
