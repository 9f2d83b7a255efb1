"""What a task may ask and tell while it runs: its directory, its curves, its arrays."""

from __future__ import annotations

import contextlib
import os
import select
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.errors import OrchestratorError
from orchestrator.record import to_plain
from orchestrator.store import RunDir

if TYPE_CHECKING:
    from collections.abc import Iterator


# Which try of its run a job is; for scripts that it starts, too.
ATTEMPT_VARIABLE = "ORCHESTRATOR_ATTEMPT"


@dataclass
class ActiveRun:
    """The run that this process is working on."""

    directory: RunDir
    # The last value of every metric: the final scalars of the record.
    metrics: dict[str, float] = field(default_factory=dict)
    # Whether a launcher of ours writes the record, so that the callback need not.
    managed: bool = False
    # Where `run_dir` says the run is, if not where its curves go.
    home: RunDir | None = None
    attempt: int = field(default_factory=lambda: int(os.environ.get(ATTEMPT_VARIABLE, "1")))
    _curve: int | None = None

    def append(self, line: bytes) -> None:
        """Add one line to the curve; it survives the death of this process at once."""
        if self._curve is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._curve = os.open(self.directory.metrics, flags, 0o666)
        written = os.write(self._curve, line)
        if written != len(line):
            msg = f"{self.directory.metrics}: the disk took {written} of {len(line)} bytes"
            raise OSError(msg)

    def close(self) -> None:
        if self._curve is not None:
            os.close(self._curve)
            self._curve = None


_active: ActiveRun | None = None


def active() -> ActiveRun | None:
    return _active


def activate(run: ActiveRun | None) -> None:
    """Make ``run`` the one that `log_metrics` and its siblings mean; None ends it."""
    global _active  # noqa: PLW0603 - a process works on one run at a time
    if _active is not None:
        _active.close()
    _active = run


@contextmanager
def run_in(directory: Path | str) -> Iterator[ActiveRun]:
    """Work in a directory as if it were a run's: for notebooks and tests of a task."""
    global _active  # noqa: PLW0603
    run, outer = ActiveRun(RunDir(Path(directory))), _active
    run.directory.path.mkdir(parents=True, exist_ok=True)
    _active = run
    try:
        yield run
    finally:
        run.close()
        _active = outer


def run_dir() -> Path:
    """The absolute directory of the current run.

    Raises:
        OrchestratorError: no run is going on in this process.
    """
    run = _current("run_dir")
    return (run.home or run.directory).path.absolute()


def attempt() -> int:
    """Which try of its run this is: 1 the first time, then 2, 3 and so on.

    Raises:
        OrchestratorError: no run is going on in this process.
    """
    return _current("attempt").attempt


class Preempted(SystemExit):
    """Raise it when the state is saved, after `is_preempted` said so: the run is not done.

    Slurm puts the job back into its queue (as often as ``max_num_timeout`` allows where its time
    was up), and the task is called again in the same directory.
    """

    def __init__(self, message: str = "the run has saved its state; its time was up") -> None:
        super().__init__(75)  # EX_TEMPFAIL
        self._message = message

    def __str__(self) -> str:
        return self._message


_warned = False
# A descriptor (and its inode) that is readable once a job's time is nearly up: its keeper's pipe.
WARNING_VARIABLE = "ORCHESTRATOR_WARNING_FD"


def is_preempted() -> bool:
    """Whether this job's time is nearly up: save what is needed to go on, and raise `Preempted`.

    It becomes true ``hydra.launcher.signal_delay_s`` before Slurm's time limit, or when Slurm
    takes the node back; a task that asks after each epoch or so can save in time.
    """
    number, _, inode = os.environ.get(WARNING_VARIABLE, "").partition(":")
    if not _warned and number:
        # (A script that a run starts has the variable, but not the descriptor.)
        with contextlib.suppress(OSError, ValueError):
            ours = os.fstat(int(number)).st_ino == int(inode)
            if ours and select.select([int(number)], [], [], 0)[0]:
                note_warning()
    return _warned


def note_warning(*_: object) -> None:
    """Remember that the time is nearly up; the handler of a signal that tells it."""
    global _warned  # noqa: PLW0603 - a process works on one run at a time
    _warned = True


def log_metrics(step: int, **values: Any) -> None:
    """Append one step to the run's curves (``metrics.jsonl``).

    A line is written whole before this returns, so a killed run keeps every step it logged.

    Args:
        step: what the values belong to: an epoch, an update, a number of samples.
        values: numbers, NaN and infinities included; also scalars of numpy, torch and JAX.

    Raises:
        OrchestratorError: no run is going on, or a value is not a number.
        OSError: the disk is full.
    """
    run = _current("log_metrics")
    if "timestamp" in values:
        msg = (
            "log_metrics(timestamp=...): the time of each step is written anyway; use another name"
        )
        raise OrchestratorError(msg)
    plain = {name: _number(name, value) for name, value in {"step": step, **values}.items()}
    line = {"step": plain.pop("step"), "timestamp": round(time.time(), 3), **plain}
    run.append(msgspec.json.encode(line) + b"\n")
    run.metrics.update({name: float(value) for name, value in plain.items()})


def _number(name: str, value: Any) -> float | int | str:
    try:
        plain: Any = None if isinstance(value, str) else to_plain(value)
        float(plain)
        if name == "step":  # which NaN and the infinities are not
            int(plain)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        got = f"{type(value).__name__} {str(value)[:60]!r}"
        msg = (
            f"log_metrics({name}=...) got {got}, expected a number; "
            "for arrays use save_arrays(), for text print() it"
        )
        raise OrchestratorError(msg) from error
    number: float | int | str = plain
    return number


def save_arrays(**arrays: Any) -> None:
    """Add or replace arrays by name in the run's ``arrays.npz``.

    Args:
        arrays: anything that `numpy.asarray` takes, of any shape, but no Python objects.

    Raises:
        OrchestratorError: no run is going on, or an array would need pickling.
        OSError: the disk is full; the arrays saved before are intact.
    """
    import io

    import numpy as np

    from orchestrator.store import write_atomic

    run = _current("save_arrays")
    new = {name: _array(name, value) for name, value in arrays.items()}
    path = run.directory.arrays
    if path.exists():
        with np.load(path, allow_pickle=False) as old:
            new = {**{name: old[name] for name in old.files}, **new}
    buffer = io.BytesIO()
    np.savez(buffer, **new)
    write_atomic(path, buffer.getvalue())


def _array(name: str, value: Any) -> Any:
    import numpy as np

    if name in ("file", "allow_pickle", "args", "kwds"):
        msg = f"save_arrays({name}=...): numpy keeps this name to itself; use another"
        raise OrchestratorError(msg)
    try:
        array = np.asarray(value)
    except ValueError as error:
        msg = f"save_arrays({name}=...) got what makes no array: {error}"
        raise OrchestratorError(msg) from error
    if array.dtype.hasobject:
        msg = (
            f"save_arrays({name}=...) got an array of Python objects, expected numbers or "
            "text: they could only be pickled, and results are never unpickled"
        )
        raise OrchestratorError(msg)
    return array


def _current(caller: str) -> ActiveRun:
    if _active is None:
        msg = (
            f"orchestrator.{caller}() was called outside a run. Start the task through Hydra with "
            "hydra/callbacks=results (or hydra/launcher=gpu_queue), or wrap the call in "
            "`with orchestrator.run_in('some/directory'):`"
        )
        raise OrchestratorError(msg)
    return _active
