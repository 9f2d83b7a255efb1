"""The runs of a sweep, asked of its own command: it is started with a launcher that only lists.

So the app's own configs and sweeper say which runs there are; see `orchestrator.slurm.export.listing`
for what happens in the app's process.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.errors import OrchestratorError
from orchestrator.record import RunState
from orchestrator.slurm.export.array_task import quoted
from orchestrator.store import SWEEPS, read_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

LIST_LAUNCHER = "hydra/launcher=list_runs"
LISTING_FILE = "listing.json"
SWEEP_FILE = "sweep.json"
# Hydra's own last line, which no sentence needs.
_HINT = "HYDRA_FULL_ERROR"
# Of what a command said, for an error.
_LINES = 6


class ListedRun(msgspec.Struct, frozen=True):
    """One run: where it is (to be), how it stands, and the command line that is it alone."""

    index: int
    name: str
    directory: str
    overrides: tuple[str, ...]
    words: tuple[str, ...]
    # As recorded; None where it never began.
    state: RunState | None = None

    @property
    def is_done(self) -> bool:
        return self.state is RunState.COMPLETED


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """A sweep's runs, and what its command says of the launcher."""

    sweep_id: str
    # Where its runs are, and where the command was typed.
    root: str
    cwd: str
    job_name: str
    # The interpreter of the command.
    python: str
    # Keys of hydra/launcher=slurm that the command (or its configs) sets.
    launcher: dict[str, Any]
    # Those of them that are not the same for all runs.
    varying: tuple[str, ...] = ()
    runs: tuple[ListedRun, ...] = ()


class PastSweep(msgspec.Struct, frozen=True):
    """What is needed of a ``sweep.json``."""

    sweep_id: str
    command: str
    cwd: str
    started_at: float
    total: int = 0


def choose_sweep(directory: Path, wanted: str | None) -> PastSweep:
    """The last sweep of an outputs directory, or the one that is named.

    Raises:
        OrchestratorError: there is none.
    """
    found = []
    for path in directory.glob(f"{SWEEPS}/*/{SWEEP_FILE}"):
        try:
            found.append(msgspec.json.decode(read_bytes(path), type=PastSweep))
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            continue
    chosen = [sweep for sweep in found if wanted in (None, sweep.sweep_id)]
    if chosen:
        return max(chosen, key=lambda sweep: sweep.started_at)
    if found:
        ids = ", ".join(sorted(sweep.sweep_id for sweep in found))
        raise OrchestratorError(
            f"there is no sweep {wanted} in {str(directory)!r}. There are: {ids}"
        )
    raise OrchestratorError(
        f"there is no sweep in {str(directory)!r} (no {SWEEPS}/*/{SWEEP_FILE}). Name the outputs "
        "directory of one, or give the command of a new one: orchestrator-export slurm -- "
        "python -m orchestrator -m 'seed=range(6)'"
    )


def list_past(sweep: PastSweep, root: Path) -> Listing:
    """The runs of a sweep that was started, as its command gives them today.

    Raises:
        OrchestratorError: its command does not work (any more), or not here.
    """
    if not Path(sweep.cwd).is_dir():
        raise OrchestratorError(
            f"sweep {sweep.sweep_id} was typed in {sweep.cwd!r}, which is not here. Go where its "
            f"code is, and give its command: orchestrator-export slurm -- {sweep.command}"
        )
    words = shlex.split(sweep.command)
    if words and not os.path.dirname(words[0]):  # noqa: PTH120
        words[0] = sys.executable  # `python` was whatever the shell found then
    listing, _ = _list(
        [*words, f"hydra.sweep.dir={quoted(str(root.absolute()))}"],
        sweep.cwd,
        f"hydra.launcher.list_sweep={sweep.sweep_id}",
    )
    return listing


def list_new(command: Sequence[str]) -> tuple[Listing, bytes]:
    """The runs of a sweep that was not started, and its ``sweep.json``.

    Raises:
        OrchestratorError: the command does not work.
    """
    return _list(command, os.getcwd())  # noqa: PTH109


def _list(command: Sequence[str], cwd: str, *more: str) -> tuple[Listing, bytes]:
    with tempfile.TemporaryDirectory(prefix="orchestrator-export-") as scratch:
        to = f"hydra.launcher.list_to={quoted(scratch)}"
        # hydra.mode: without -m, a command that sweeps nothing would simply run.
        said = _run([*command, LIST_LAUNCHER, to, *more, "hydra.mode=MULTIRUN"], cwd)
        try:
            text = Path(scratch, LISTING_FILE).read_text("ascii")
            book = Path(scratch, SWEEP_FILE)
            return msgspec.convert(json.loads(text), Listing), (
                book.read_bytes() if book.exists() else b""
            )
        except FileNotFoundError as error:
            raise OrchestratorError(
                f"{shlex.join(command)} ended without listing its runs. Give a command that "
                f"starts a Hydra app.{said}"
            ) from error


def _run(words: Sequence[str], cwd: str) -> str:
    """Run the command; what it said, at its end."""
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except OSError as error:
        raise OrchestratorError(f"{words[0]!r} cannot be started: {error.strerror}") from error
    text = done.stdout.decode("utf-8", "replace")
    lines = [line for line in map(str.strip, text.splitlines()) if line and _HINT not in line]
    said = f" It said: {' | '.join(lines[-_LINES:])}" if lines else ""
    if done.returncode:
        raise OrchestratorError(
            f"the runs of this command cannot be listed: it ended with status {done.returncode}."
            f"{said}"
        )
    return said
