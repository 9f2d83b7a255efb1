"""Sweeps that run on this machine, and their GPUs, as a command line names them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from orchestrator.errors import OrchestratorError
from orchestrator.processes import boot_id, hostname, is_alive
from orchestrator.queue.gpus import Gpu, is_index, meant_by
from orchestrator.store import CLAIM, RECORD, SWEEPS, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# The clock may have been set since a process started; a pid comes back much later.
_CLOCK_SLACK_S = 60.0
_NONE_HINT = "Name the outputs directory of one that does."


class SweepFile(msgspec.Struct, frozen=True):
    """What is needed of a ``sweep.json``."""

    sweep_id: str
    started_at: float
    pid: int
    host: str
    boot_id: str
    ended_at: float | None = None
    # None: it does not say.
    gpus: tuple[Gpu, ...] | None = None

    @property
    def runs_here(self) -> bool:
        """Whether its launcher is alive on this machine: a process no younger than the sweep."""
        if self.host != hostname() or self.boot_id != boot_id() or not is_alive(self.pid, None):
            return False
        import psutil

        with suppress(psutil.Error):
            started: float = psutil.Process(self.pid).create_time()
            return started <= self.started_at + _CLOCK_SLACK_S
        return False


def unfinished_sweeps(directory: Path) -> list[tuple[Path, SweepFile]]:
    """Sweeps below a directory, at any depth, that never said that they ended."""
    found = []
    for path in _sweep_files(directory):
        with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            sweep = msgspec.json.decode(read_bytes(path), type=SweepFile)
            if sweep.ended_at is None:
                found.append((path.parent, sweep))
    return sorted(found, key=lambda item: item[1].started_at)


def sweep_directories(directory: Path) -> Iterator[Path]:
    """The own directories of all sweeps below a directory, at any depth."""
    return (path.parent for path in _sweep_files(directory))


def _sweep_files(directory: Path | str) -> Iterator[Path]:
    entries = _entries(directory)
    is_run = any(entry.name in (RECORD, CLAIM) for entry in entries)
    for entry in entries:
        if entry.name == SWEEPS:
            yield from (Path(sweep.path) / "sweep.json" for sweep in _entries(entry.path))
        elif not is_run and not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
            yield from _sweep_files(entry.path)


def _entries(directory: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []


def choose_sweep(directory: str, wanted: str | None) -> tuple[Path, SweepFile]:
    """The sweep that runs below a directory, or the one of several that is named.

    Raises:
        OrchestratorError: there is none, or it has to be said which; the text names them.
    """
    if not Path(directory).is_dir():
        raise OrchestratorError(
            f"{directory!r} does not exist. Name the sweep's outputs directory."
        )
    unfinished = unfinished_sweeps(Path(directory))
    running = [(path, sweep) for path, sweep in unfinished if sweep.runs_here]
    chosen = [item for item in running if wanted in (None, item[1].sweep_id)]
    if len(chosen) == 1:
        return chosen[0]
    ids = ", ".join(f"{sweep.sweep_id} (in {path.parent.parent})" for path, sweep in running)
    if chosen:
        msg = f"{len(chosen)} sweeps run below {directory!r}: {ids}. Name one with --sweep ID."
    elif running:
        msg = f"sweep {wanted} does not run below {directory!r}. These do: {ids}."
    else:
        away = sorted({sweep.host for _, sweep in unfinished} - {hostname()})
        hint = f"One may run on {', '.join(away)}: type it there." if away else _NONE_HINT
        msg = f"no sweep of this machine runs below {directory!r}. {hint}"
    raise OrchestratorError(msg)


def choose_gpus(words: Sequence[str], sweep: SweepFile) -> list[Gpu]:
    """The GPUs of a sweep that are meant by numbers, ``0:1`` or beginnings of UUIDs.

    A number alone means all MIG instances of a GPU that is divided.

    Raises:
        OrchestratorError: the sweep has no such GPU; the text names those that it has.
    """
    chosen: dict[str, Gpu] = {}
    for word in words:
        matches = meant_by(word, sweep.gpus or ())
        if matches and (is_index(word) or len(matches) == 1):
            chosen |= {gpu.uuid: gpu for gpu in matches}
            continue
        if not sweep.gpus:
            has = "uses no GPUs" if sweep.gpus == () else "does not say which GPUs it uses"
            msg = f"sweep {sweep.sweep_id} {has}. Leave out --gpu to mean all of it."
        else:
            what = "may mean several" if matches else "is none"
            known = ", ".join(map(str, sweep.gpus))
            msg = f"GPU {word!r} {what} of the GPUs of sweep {sweep.sweep_id}: {known}. Name one."
        raise OrchestratorError(msg)
    return list(chosen.values())
