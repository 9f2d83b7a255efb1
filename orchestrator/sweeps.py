"""The sweep's own directory: what was asked, what ran it, and its results in one file."""

from __future__ import annotations

import contextlib
import inspect
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

import orchestrator
from orchestrator.processes import boot_id, hostname
from orchestrator.record import RunRecord, Versions, to_plain
from orchestrator.store import SWEEPS, RunDir, tail, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

RESULTS_NAME = "train_sweep_results.json"
# How much of each log a results file repeats.
_LOG_TAIL_BYTES = 2_000
# A partial results file is written anew at most this often, and less when that is slow.
_PARTIAL_INTERVAL_S = 10.0
_PARTIAL_SHARE = 0.02


def code_versions(directory: Path | str | None = None) -> Versions:
    """What runs: interpreter, this package, and the git state of a directory (default: here)."""
    commit = _git(directory, "rev-parse", "HEAD")
    dirty = _git(directory, "status", "--porcelain", "--untracked-files=no") if commit else None
    return Versions(
        python=platform.python_version(),
        orchestrator=orchestrator.__version__,
        git_commit=commit or "",
        git_dirty=None if dirty is None else bool(dirty),
    )


def code_directory(function: Callable[..., Any]) -> Path | None:
    """Where the code of a task lies; None (the current directory) where that says nothing."""
    try:
        file = Path(inspect.getfile(inspect.unwrap(function))).resolve()
    except (TypeError, OSError):
        return None
    ours = Path(orchestrator.__file__).resolve().parent
    return None if file.is_relative_to(ours) or not file.exists() else file.parent


def _git(directory: Path | str | None, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=directory, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def program_words() -> list[str]:
    """The words that started this program, up to its own arguments."""
    words = list(sys.orig_argv)
    own = len(sys.argv) - 1
    words = words[: len(words) - own] if own else words
    # `python` where that is what a shell finds, else the interpreter by its whole path.
    # (Not resolved: the python of a virtual environment is a link to another's.)
    name = Path(sys.executable).name
    interpreter = os.path.abspath(sys.executable)  # noqa: PTH100 - links are kept
    return [name if shutil.which(name) == interpreter else interpreter, *words[1:]]


def rerun_command(overrides: Sequence[str], hydra_overrides: Sequence[str]) -> str:
    """The shell line that runs one run again, alone."""
    chosen = [word for word in hydra_overrides if not word.startswith("hydra.mode=")]
    return shlex.join([*program_words(), *_config_flags(), "-m", *chosen, *overrides])


@lru_cache(maxsize=1)
def _config_flags() -> tuple[str, ...]:
    """Hydra's own flags that say which config this program was started with."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _not_hydras  # type: ignore[method-assign, assignment]
    try:
        known, _ = parser.parse_known_args(sys.argv[1:])
    except (ValueError, SystemExit):
        return ()
    flags = ("config_path", "config_name", "config_dir")
    return tuple(
        word
        for flag in flags
        if getattr(known, flag, None)
        for word in (f"--{flag.replace('_', '-')}", getattr(known, flag))
    )


def _not_hydras(message: str) -> None:
    raise ValueError(message)


class SweepGpu(Protocol):
    """A GPU, or one MIG instance of a GPU that is divided."""

    @property
    def uuid(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def mig(self) -> int | None: ...
    @property
    def name(self) -> str: ...


@dataclass
class Sweep:
    """One sweep below an outputs directory; runs are named by their directories."""

    root: Path
    overrides: tuple[str, ...] = ()
    axes: dict[str, Any] = field(default_factory=dict)
    total: int = 0
    results_file: Path | None = None
    # Where its runs may go; none where they run on cores.
    gpus: Sequence[SweepGpu] = ()
    versions: Versions = field(default_factory=code_versions)
    sweep_id: str = ""
    started_at: float = field(default_factory=time.time)
    # In the order of the sweep; paths relative to the root where they lie below it.
    runs: dict[int, str] = field(default_factory=dict)
    # What this sweep asked of them; an earlier sweep may have asked for the same run otherwise.
    asked: dict[int, dict[str, Any]] = field(default_factory=dict)
    # Runs that could not even be given a directory.
    unstarted: list[RunRecord] = field(default_factory=list)
    # How many runs came to which state, over all launches.
    states: Counter[str] = field(default_factory=Counter)
    _partial_at: float = 0.0
    _affordable_at: float = 0.0

    def __post_init__(self) -> None:
        if not self.sweep_id:
            stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
            self.sweep_id = f"{stamp}-{secrets.token_hex(3)}"

    @property
    def directory(self) -> Path:
        return self.root / SWEEPS / self.sweep_id

    def add_run(
        self, index: int, directory: Path, hyperparams: dict[str, Any] | None = None
    ) -> None:
        """A run is, or answers, a point of this sweep.

        Args:
            index: the point's number.
            directory: the run's.
            hyperparams: what this sweep asked for; by default what the run's record says.
        """
        self.runs[index] = os.path.relpath(directory, self.root)
        if hyperparams is not None:
            self.asked[index] = hyperparams

    def add_unstarted(self, record: RunRecord) -> None:
        self.unstarted.append(record)

    def reopen(self) -> None:
        """More runs are coming, from a sweeper with batches: the results are partial again."""
        for target in self._targets():
            with contextlib.suppress(FileNotFoundError):
                target.replace(_partial(target))

    def write(self, *, ended: bool = False) -> None:
        """Write ``sweep.json``: identity, axes, command line, versions, runs."""
        content = {
            "schema_version": 1,
            "sweep_id": self.sweep_id,
            "command": shlex.join([*program_words(), *sys.argv[1:]]),
            "cwd": os.getcwd(),  # noqa: PTH109
            "overrides": self.overrides,
            "axes": self.axes,
            "gpus": [
                {"uuid": gpu.uuid, "index": gpu.index, "mig": gpu.mig, "name": gpu.name}
                for gpu in self.gpus
            ],
            "total": self.total,
            "host": hostname(),
            "boot_id": boot_id(),
            "pid": os.getpid(),
            "started_at": self.started_at,
            "ended_at": time.time() if ended else None,
            "states": dict(self.states),
            "versions": msgspec.to_builtins(self.versions),
            "runs": [self.runs[index] for index in sorted(self.runs)],
        }
        data = msgspec.json.format(msgspec.json.encode(to_plain(content)), indent=1)
        write_atomic(self.directory / "sweep.json", data + b"\n")

    def end(self, *, complete: bool) -> Path:
        """Write the results and the end of the sweep; see `write_results`."""
        path = self.write_results(complete=complete)
        self.write(ended=True)
        return path

    def write_partial_now_and_then(self) -> None:
        """Keep ``train_sweep_results.json.partial`` roughly up to date while runs end."""
        # The runs' own records hold everything: a full disk need not end the sweep here.
        with contextlib.suppress(OSError):
            if time.monotonic() >= self._partial_at:
                self.write_results(complete=False)
                self._partial_at = max(self._partial_at, time.monotonic() + _PARTIAL_INTERVAL_S)

    def is_cheap_to_write(self) -> bool:
        """Whether writing the results again now keeps to its small share of the time."""
        return time.monotonic() >= self._affordable_at

    def write_results(self, *, complete: bool) -> Path:
        """Write the results in the format of ``train_sweep.py``, from the records on the disk.

        Args:
            complete: every run has ended; else the name ends in ``.partial``.

        Returns:
            The file that the user asked for, or the one in the sweep's directory.
        """
        began = time.monotonic()
        data = b"[\n" + b",\n".join(self._entries()) + b"\n]\n"
        for target in self._targets():
            write_atomic(target if complete else _partial(target), data)
            if complete:
                _partial(target).unlink(missing_ok=True)
        took = time.monotonic() - began
        self._affordable_at = self._partial_at = time.monotonic() + took / _PARTIAL_SHARE
        last = self._targets()[-1]
        return last if complete else _partial(last)

    def _targets(self) -> list[Path]:
        own = self.directory / RESULTS_NAME
        return [own] if self.results_file is None else [own, self.results_file]

    def _entries(self) -> Iterator[bytes]:
        for index in sorted(self.runs):
            run = RunDir(self.root / self.runs[index])
            record = run.try_read()
            if record is not None and record.state.is_final:
                entry = results_entry(run, record, self.asked.get(index))
                yield msgspec.json.encode(entry)
        for record in self.unstarted:
            yield msgspec.json.encode(results_entry(None, record))


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def results_entry(
    run: RunDir | None, record: RunRecord, asked: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One run as `train_sweep.py` writes it, with its state and directory beside that.

    Args:
        run: its directory, if it has one.
        record: how it ended.
        asked: the hyperparameters that the sweep asked for, where the record may differ.
    """
    entry = {
        "model_name": record.model_name,
        "hyperparams": record.hyperparams if asked is None else asked,
        "success": record.success,
        "returncode": record.returncode,
        "duration_seconds": record.duration_seconds,
        "gpu_id": record.gpu_id,
        "stdout": _text_tail(run.stdout) if run else "",
        "stderr": _text_tail(run.stderr) if run else "",
        "state": record.state.value,
        "return_value": record.return_value,
        "metrics": record.metrics,
        "error": None if record.error is None else msgspec.to_builtins(record.error),
        "directory": str(run.path) if run else None,
    }
    plain: dict[str, Any] = to_plain(entry)
    return plain


def _text_tail(path: Path) -> str:
    return tail(path, _LOG_TAIL_BYTES).decode("utf-8", "replace")


def code_change(done: Iterable[Versions], now: Versions) -> str:
    """A sentence part on how the code differs from that of finished runs; empty if it does not."""
    here = _short(now)
    before = sorted({_short(v) for v in done if v.git_commit} - {here})
    if not before or not now.git_commit:
        return ""
    return f"code changed since: {', '.join(before)} → {here}"


def _short(versions: Versions) -> str:
    return versions.git_commit[:7] + ("+edits" if versions.git_dirty else "")
