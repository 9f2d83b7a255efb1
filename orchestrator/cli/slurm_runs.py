"""Runs of sweeps on a cluster, for commands that cost nothing more where there are none."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.results.status import Placed
from orchestrator.store import SWEEPS
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.results.reading import FoundRun, Reading
    from orchestrator.slurm.client import SlurmClient
    from orchestrator.slurm.reconcile import Given, Standing

# As in `orchestrator.slurm.ledger`, which is not loaded where there is none of these.
LEDGER = "slurm.json"
# How long a listing may take to write down what accounting says.
_ACCOUNT_S = 2.0


@dataclass(frozen=True)
class Member:
    """A run of a sweep that was given to Slurm, and that sweep's directory."""

    found: FoundRun
    sweep_dir: Path


def members(runs: Iterable[FoundRun]) -> list[Member]:
    """Those runs whose sweeps were given to Slurm."""
    sweeps: dict[tuple[Path, str, bool], Path | None] = {}
    chosen = []
    for run in runs:
        record = run.record
        if not record.sweep_id or (record.state.is_final and not record.slurm_job_id):
            continue
        key = (run.files.path.parent, record.sweep_id, bool(record.slurm_job_id))
        if key not in sweeps:
            sweeps[key] = _sweep_dir(*key)
        sweep_dir = sweeps[key]
        if sweep_dir is not None:
            chosen.append(Member(run, sweep_dir))
    return chosen


def _sweep_dir(parent: Path, sweep_id: str, by_id: bool) -> Path | None:
    """The directory of a sweep, in the nearest outputs directory that knows it.

    Where the runs themselves know their jobs (``by_id``) it need not have a ledger.
    """
    real = Path(os.path.realpath(parent))
    for root in (real, *real.parents):
        sweep_dir = root / SWEEPS / sweep_id
        if (sweep_dir / LEDGER).is_file() or (by_id and sweep_dir.is_dir()):
            return sweep_dir
    return None


@dataclass
class Asked:
    """Runs as Slurm sees them.

    Attributes:
        placed: the job of each, its node, and what it waits for, by the run's directory.
        notes: what the user should know, in sentences.
        client: that was asked; None where there was nothing to ask.
    """

    placed: dict[Path, Placed] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    client: SlurmClient | None = None


def ask(reading: Reading) -> Asked:
    """Find out where runs are that were given to Slurm; those that are dead get final records.

    Args:
        reading: its runs are replaced by what is found.
    """
    known = members(reading.runs)
    if not known:
        return Asked()
    from orchestrator.slurm.client import SlurmClient
    from orchestrator.slurm.reconcile import find_given

    asked = Asked(client=SlurmClient())
    findings = find_given((m.found.files, m.found.record, m.sweep_dir) for m in known)
    if findings.foreign:
        asked.notes.append(
            f"{plural(findings.foreign, 'run')} of another user, who alone can ask Slurm, shown as "
            "recorded."
        )
    if findings.given:
        _ask(asked, reading, findings.given)
    return asked


def _ask(asked: Asked, reading: Reading, given: Sequence[Given]) -> None:
    from orchestrator.slurm.client import SlurmUnreachable
    from orchestrator.slurm.reconcile import standings

    assert asked.client is not None
    asked.placed = {run.run.path: Placed(run.job_id) for run in given}
    try:
        found = standings(given, asked.client)
    except SlurmUnreachable as error:
        asked.notes.append(_unasked(given, asked.client, error))
        return
    for path, standing in found.items():
        asked.placed[path] = Placed(standing.job_id, standing.node, standing.reason)
    reading.runs = [_replaced(run, found.get(run.files.path)) for run in reading.runs]
    unsaved = [standing.unsaved for standing in found.values() if standing.unsaved]
    if unsaved:
        count = plural(len(unsaved), "run")
        asked.notes.append(f"The final state of {count} could not be written: {unsaved[0]}.")


def _replaced(run: FoundRun, standing: Standing | None) -> FoundRun:
    if standing is None:
        return run
    return replace(run, record=standing.record, state=standing.state)


def _unasked(given: Sequence[Given], client: SlurmClient, error: Exception) -> str:
    why = str(error) if client.is_there() else "it is not installed on this machine."
    return f"Slurm could not be asked about {plural(len(given), 'run')}, shown as recorded: {why}"


def account(asked: Asked, reading: Reading, below: str) -> None:
    """See to what accounting says of sweeps that have ended: once.

    Args:
        asked: what Slurm was asked before.
        reading: all runs below a directory.
        below: that directory; a sweep whose outputs reach beyond it is left alone.
    """
    if asked.client is None or not asked.client.is_there():
        return
    from orchestrator.slurm.accounting import account as account_sweep
    from orchestrator.slurm.accounting import is_due

    by_sweep: dict[Path, list[FoundRun]] = {}
    for member in members(reading.runs):
        by_sweep.setdefault(member.sweep_dir, []).append(member.found)
    top = Path(os.path.realpath(below))
    for sweep_dir, runs in by_sweep.items():
        ended = all(run.record.state.is_final for run in runs)
        if ended and sweep_dir.is_relative_to(top) and is_due(sweep_dir, time.time()):
            directories = [run.files for run in runs]
            account_sweep(sweep_dir, asked.client, directories, limit_s=_ACCOUNT_S)
