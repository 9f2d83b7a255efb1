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
from orchestrator.live_sweeps import SweepFile, sweep_directories, unfinished_sweeps
from orchestrator.processes import hostname, is_alive, start_time
from orchestrator.results.reading import Reading, check_directory, read_runs
from orchestrator.store import read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from orchestrator.slurm.client import SlurmClient
    from orchestrator.slurm.reconcile import Given
    from orchestrator.slurm.stop import Stopped

# A launcher ends its jobs, which may take their grace, and writes its results.
_LAUNCHER_S = 60.0
_LOOK_S = 0.1
# As in `orchestrator.slurm.ledger`, which is not loaded where there is none of these.
ARRAYS = "arrays"
# No job waits for so long; its id may be another's by then.
_FORGOTTEN_S = 90 * 86_400.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", default="outputs", type=click.Path())
@click.option("--sweep", "sweep_id", metavar="ID", help="Which, where several go on.")
@click.option("--all", "every", is_flag=True, help="All that go on.")
def stop(directory: str, sweep_id: str | None, every: bool) -> None:
    """End a sweep: what runs is ended and what waits does not start; all are CANCELLED.

    Means the sweep with outputs in DIRECTORY (default: outputs) that goes on: on this machine,
    or as jobs on a Slurm cluster, of which those of this sweep are cancelled and no others. It
    returns when they are gone. The same command as before later runs what is missing.

    \b
    Examples:
      orchestrator-status stop
      orchestrator-status stop outputs/mlp --sweep 20260101-120000-1a2b3c
      orchestrator-status stop outputs/mlp --all
    """  # noqa: D301 - click reads the backspace
    with reported_errors():
        for text in _stop(directory, sweep_id, every=every):
            click.echo(printable(text, limit=None))


@dataclass
class _Target:
    """A sweep that goes on: by a launcher here, by jobs on a cluster, or both."""

    directory: Path
    launcher: SweepFile | None = None
    # Its jobs that Slurm has in its queue.
    jobs: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        what = [plural(len(self.jobs), "job")] if self.jobs else []
        what += ["its launcher"] if self.launcher else []
        return f"{self.sweep_id} (in {self.root}: {' and '.join(what)})"

    @property
    def sweep_id(self) -> str:
        return self.directory.name

    @property
    def root(self) -> Path:
        return self.directory.parent.parent


def _stop(directory: str, wanted: str | None, *, every: bool) -> Iterator[str]:
    targets = _choose(directory, wanted, every=every)
    if not targets:
        yield f"Nothing is left to stop below {directory!r}."
    for target in targets:
        said = []
        if target.launcher is not None:
            said.append(_end_launcher(target, target.launcher))
        if target.jobs or (target.directory / LEDGER).exists():
            said.append(_cancel(target))
        yield " ".join(filter(None, said))


# Which sweep.


def _choose(directory: str, wanted: str | None, *, every: bool) -> list[_Target]:
    """The sweep that goes on below a directory, or the one that is named, or all of them.

    A launcher that waits here for what earlier ones have submitted has all of it: it is the one.

    Raises:
        OrchestratorError: it has to be said which, or it cannot be stopped from here.
    """
    check_directory(directory)
    problem: OrchestratorError | None = None
    targets: dict[Path, _Target] = {}
    try:
        targets = _on_slurm(Path(directory))
    except OrchestratorError as error:  # sweeps of this machine can be stopped nevertheless
        problem = error
    unfinished = unfinished_sweeps(Path(directory))
    for path, sweep in unfinished:
        if sweep.runs_here:
            key = Path(os.path.realpath(path))
            targets.setdefault(key, _Target(key)).launcher = sweep
    chosen = [target for target in targets.values() if wanted in (None, target.sweep_id)]
    if len(chosen) == 1 or (every and chosen):
        # (A launcher first: it may be about to submit more.)
        return sorted(chosen, key=lambda target: target.launcher is None)
    launchers = [target for target in chosen if target.launcher]
    if len(launchers) == 1 and len({target.root for target in chosen}) == 1:
        return launchers
    if chosen or (targets and wanted):
        raise OrchestratorError(_which(directory, wanted, targets))
    if problem is not None:
        raise problem
    away = [s for _, s in unfinished if s.host != hostname() and wanted in (None, s.sweep_id)]
    if away:
        raise OrchestratorError(_is_away(away))
    return []


def _on_slurm(directory: Path) -> dict[Path, _Target]:
    """Sweeps below a directory whose jobs are in Slurm's queue, whatever has become of their runs.

    Raises:
        OrchestratorError: Slurm cannot be asked.
    """
    sweeps = list(sweep_directories(directory))
    found = [path for path in sweeps if (path / LEDGER).is_file()]
    exported = {array.name: array.parent.parent for s in sweeps for array in _listed(s / ARRAYS)}
    if not found and not exported:
        return {}
    from orchestrator.slurm.client import SlurmClient
    from orchestrator.slurm.ledger import read_ledger

    client = SlurmClient()
    here = client.limits().cluster
    since = time.time() - _FORGOTTEN_S
    jobs: dict[str, Path] = {}
    for path in found:
        ledger = read_ledger(path)
        ours = path.stat().st_uid == os.getuid()
        if ledger and ours and ledger.cluster in ("", here) and ledger.submitted_at > since:
            jobs |= dict.fromkeys((job.id for job in ledger.jobs), Path(os.path.realpath(path)))
    targets: dict[Path, _Target] = {}
    for job, seen in client.poll(jobs).items():
        if not seen.state.is_final:
            sweep_dir = jobs[job]
            targets.setdefault(sweep_dir, _Target(sweep_dir)).jobs.add(job)
    for task in client.live(exported):
        sweep_dir = Path(os.path.realpath(exported[task.partition("_")[0]]))
        targets.setdefault(sweep_dir, _Target(sweep_dir)).jobs.add(task)
    return targets


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


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
    known = ", ".join(map(str, targets.values()))
    if wanted:
        return f"Sweep {wanted} does not go on below {directory!r}. These do: {known}."
    count = len(targets)
    text = f"{count} sweeps go on below {directory!r}: {known}"
    return f"{text}. Name one with --sweep ID, or stop all of them with --all."


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
            if (target.directory / LEDGER).exists():  # its jobs are seen to next
                return f"The launcher of sweep {sweep.sweep_id} is still at it."
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

    client = SlurmClient()
    # Some jobs have no run, not yet or not any more. They go first: none is to start meanwhile.
    others = sorted(target.jobs - {run.job_id for run in find()})
    client.cancel(others)
    stopped = stop_jobs(find, client)
    stopped.jobs += others
    stopped.left += _still_there(client, others)
    if not stopped.jobs and not stopped.runs:
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


def _still_there(client: SlurmClient, jobs: list[str]) -> list[str]:
    """Wait for jobs that were cancelled; those that are not gone in time."""
    until = time.monotonic() + _LAUNCHER_S
    while True:
        left = [job for job, seen in client.poll(jobs).items() if not seen.state.is_final]
        if not left or time.monotonic() > until:
            return left
        time.sleep(_LOOK_S * 5)


def _outcome(stopped: Stopped) -> str:
    """``8 runs: 6 cancelled, 2 completed``."""
    states = {state.value: count for state, count in stopped.states.items()}
    return f"{plural(len(stopped.runs), 'run')}: {_counts(states)}"
