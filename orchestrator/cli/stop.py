"""``orchestrator-status stop``: end a sweep, on this machine or on a cluster."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from orchestrator.cli.output import plural, printable, reported_errors
from orchestrator.cli.slurm_runs import LEDGER, members
from orchestrator.errors import OrchestratorError
from orchestrator.live_sweeps import SweepFile, unfinished_sweeps
from orchestrator.processes import hostname, is_alive, start_time
from orchestrator.results.reading import Reading, read_runs
from orchestrator.store import read_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.slurm.reconcile import Given
    from orchestrator.slurm.stop import Stopped

# A launcher ends its jobs, which may take their grace, and writes its results.
_LAUNCHER_S = 60.0
_LOOK_S = 0.1


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", default="outputs", type=click.Path())
@click.option("--sweep", "sweep_id", metavar="ID", help="Which, where several go on.")
def stop(directory: str, sweep_id: str | None) -> None:
    """End a sweep: what runs is ended and what waits does not start; all are CANCELLED.

    Means the sweep with outputs in DIRECTORY (default: outputs) that goes on: on this machine,
    or as jobs on a Slurm cluster, of which those of this sweep are cancelled and no others. It
    returns when they are gone. The same command as before later runs what is missing.

    \b
    Examples:
      orchestrator-status stop
      orchestrator-status stop outputs/mlp --sweep 20260101-120000-1a2b3c
    """  # noqa: D301 - click reads the backspace
    with reported_errors():
        click.echo(printable(_stop(directory, sweep_id), limit=None))


@dataclass
class _Target:
    """A sweep that goes on: by a launcher here, by jobs on a cluster, or both."""

    directory: Path
    launcher: SweepFile | None = None
    given: list[Given] = field(default_factory=list)

    @property
    def sweep_id(self) -> str:
        return self.directory.name

    @property
    def root(self) -> Path:
        return self.directory.parent.parent


def _stop(directory: str, wanted: str | None) -> str:
    target = _choose(directory, wanted)
    if target is None:
        return f"Nothing is left to stop below {directory!r}."
    said = []
    if target.launcher is not None:
        said.append(_end_launcher(target, target.launcher))
    if (target.directory / LEDGER).exists():
        said.append(_cancel(target))
    return " ".join(filter(None, said))


# Which sweep.


def _choose(directory: str, wanted: str | None) -> _Target | None:
    """The one sweep that goes on below a directory, or the one that is named; None: none does.

    Raises:
        OrchestratorError: it has to be said which, or it cannot be stopped from here.
    """
    reading = read_runs([directory])
    targets = _on_slurm(reading, directory)
    unfinished = unfinished_sweeps(Path(directory))
    for path, sweep in unfinished:
        if sweep.runs_here:
            key = Path(os.path.realpath(path))
            targets.setdefault(key, _Target(key)).launcher = sweep
    chosen = [target for target in targets.values() if wanted in (None, target.sweep_id)]
    if len(chosen) == 1:
        return chosen[0]
    if chosen or (targets and wanted):
        raise OrchestratorError(_which(directory, wanted, targets))
    away = [s for _, s in unfinished if s.host != hostname() and wanted in (None, s.sweep_id)]
    if away:
        raise OrchestratorError(_is_away(away))
    return None


def _on_slurm(reading: Reading, directory: str) -> dict[Path, _Target]:
    """Sweeps below a directory that have runs on Slurm without a final record."""
    given = _given(reading)
    top = Path(os.path.realpath(directory))
    targets: dict[Path, _Target] = {}
    for run in given:
        if run.sweep_dir.is_relative_to(top) and run.job_id:
            targets.setdefault(run.sweep_dir, _Target(run.sweep_dir)).given.append(run)
    return targets


def _given(reading: Reading) -> list[Given]:
    known = members(reading.runs)
    if not known:
        return []
    from orchestrator.slurm.reconcile import find_given

    findings = find_given((m.found.files, m.found.record, m.sweep_dir) for m in known)
    if findings.foreign and not findings.given:
        count = plural(findings.foreign, "run")
        raise OrchestratorError(f"{count} of another user, who alone can cancel jobs of theirs.")
    return findings.given


def _which(directory: str, wanted: str | None, targets: Mapping[Path, _Target]) -> str:
    ids = ", ".join(f"{target.sweep_id} (in {target.root})" for target in targets.values())
    if wanted:
        return f"Sweep {wanted} does not go on below {directory!r}. These do: {ids}."
    count = len(targets)
    return f"{count} sweeps go on below {directory!r}: {ids}. Name one with --sweep ID."


def _is_away(sweeps: list[SweepFile]) -> str:
    what = "; ".join(f"sweep {s.sweep_id} on {s.host} as process {s.pid}" for s in sweeps)
    return (
        "No sweep goes on that can be stopped from this machine. These have not said that they "
        f"ended: {what}. Type it there."
    )


# A launcher on this machine.


def _end_launcher(target: _Target, sweep: SweepFile) -> str:
    """Ask a launcher to end, as Ctrl+C does, and wait until it has.

    Raises:
        OrchestratorError: it is another user's, or is still at it after a minute.
    """
    started = start_time(sweep.pid)
    # (Looked at again: the pid is still that of a process no younger than the sweep.)
    if started is None or not sweep.runs_here:
        return ""
    try:
        os.kill(sweep.pid, signal.SIGTERM)
    except ProcessLookupError:
        return ""
    except PermissionError:
        raise OrchestratorError(
            f"Sweep {sweep.sweep_id} is another user's (process {sweep.pid}), who can stop it."
        ) from None
    until = time.monotonic() + _LAUNCHER_S
    while is_alive(sweep.pid, started):
        if time.monotonic() > until:
            raise OrchestratorError(
                f"Sweep {sweep.sweep_id} was asked to end and has not within {_LAUNCHER_S:g} s. "
                f"`kill -TERM {sweep.pid}` ends its jobs at once."
            )
        time.sleep(_LOOK_S)
    counts = _counts(_states(target.directory))
    return f"Sweep {sweep.sweep_id} has ended{counts and f': {counts}'}."


class _States(msgspec.Struct):
    states: dict[str, int] = {}


def _states(sweep_dir: Path) -> dict[str, int]:
    with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(read_bytes(sweep_dir / "sweep.json"), type=_States).states
    return {}


def _counts(states: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))


# Jobs on a cluster.


def _cancel(target: _Target) -> str:
    """Cancel a sweep's jobs, and say what came of it.

    Raises:
        OrchestratorError: Slurm cannot be asked, or some are not gone in time.
    """
    from orchestrator.slurm.client import SlurmClient
    from orchestrator.slurm.states import collapse
    from orchestrator.slurm.stop import stop_jobs

    def find() -> list[Given]:
        given = _given(read_runs([str(target.root)]))
        return [run for run in given if run.sweep_dir == target.directory]

    stopped = stop_jobs(find, SlurmClient())
    if not stopped.runs:
        return ""
    count = plural(len(stopped.jobs), "Slurm job")
    ids = f" ({' '.join(collapse(stopped.jobs))})" if stopped.jobs else ""
    text = f"Cancelled {count}{ids} of sweep {target.sweep_id}; {_outcome(stopped)}."
    if stopped.left:
        raise OrchestratorError(
            f"{text} Still ending: {' '.join(collapse(stopped.left))}. orchestrator-status shows "
            "when they are gone."
        )
    return text


def _outcome(stopped: Stopped) -> str:
    """``8 runs: 6 cancelled, 2 completed``."""
    states = {state.value: count for state, count in stopped.states.items()}
    return f"{plural(len(stopped.runs), 'run')}: {_counts(states)}"
