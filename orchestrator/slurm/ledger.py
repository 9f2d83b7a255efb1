"""``slurm.json`` in a sweep's directory: which Slurm job does which of its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from orchestrator.store import SWEEPS, read_bytes, write_atomic

if TYPE_CHECKING:
    from pathlib import Path

LEDGER = "slurm.json"
# Beside it, a file for each array that an exported script was submitted as, once a task has begun.
ARRAYS = "arrays"
SCHEMA_VERSION = 1


class Job(msgspec.Struct, frozen=True):
    """One Slurm job: its id as squeue has it, and the runs in it, by their index in the sweep."""

    id: str
    runs: tuple[int, ...]


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs of one sweep, in the order of their submission."""

    schema_version: int = SCHEMA_VERSION
    # Seconds since the epoch; accounting is asked for what came after.
    submitted_at: float = 0.0
    # Another cluster on the same file system means other jobs by the same ids; empty: not known.
    cluster: str = ""
    # Where submitit keeps scripts, pickles and logs of the jobs.
    folder: str = ""
    jobs: tuple[Job, ...] = ()


class Ledgers:
    """The ledgers of the sweeps below an outputs directory, each read once.

    Args:
        root: the directory that the sweeps write to.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._found: dict[str, Ledger | None] = {}
        self._jobs: dict[str, dict[int, str]] = {}

    def of(self, sweep_id: str) -> Ledger | None:
        """A sweep's ledger; None where it has none."""
        if sweep_id not in self._found:
            found = read_ledger(self._root / SWEEPS / sweep_id) if sweep_id else None
            self._found[sweep_id] = found
            jobs = found.jobs if found else ()
            self._jobs[sweep_id] = {run: job.id for job in jobs for run in job.runs}
        return self._found[sweep_id]

    def job_of(self, sweep_id: str, index: int | None) -> str:
        """The id of the job that does a sweep's run; empty where there is none."""
        self.of(sweep_id)
        return "" if index is None else self._jobs[sweep_id].get(index, "")


def read_ledger(sweep_dir: Path) -> Ledger | None:
    """The ledger in a sweep's own directory; None where there is none that can be read."""
    try:
        return msgspec.json.decode(read_bytes(sweep_dir / LEDGER), type=Ledger)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def write_ledger(sweep_dir: Path, ledger: Ledger) -> None:
    write_atomic(sweep_dir / LEDGER, msgspec.json.encode(ledger) + b"\n", durable=True)
