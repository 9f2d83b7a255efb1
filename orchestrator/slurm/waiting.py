"""A run that is waited for, and a question to Slurm that nobody waits for."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.record import RunRecord, RunState
from orchestrator.slurm.client import SlurmUnreachable
from orchestrator.slurm.pack import ENDED
from orchestrator.store import RunDir

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.queue.plan import Plan
    from orchestrator.slurm.client import SlurmClient
    from orchestrator.slurm.states import Seen


@dataclass(eq=False)
class Waiting:
    """A run that is waited for, and the Slurm job that does it."""

    plan: Plan
    record: RunRecord
    job_id: str
    sweep_dir: Path
    submitted_at: float
    # Where Slurm's own logs of the jobs are.
    job_logs: str
    # Since when its job has been seen to be over, on the injected clock.
    over_since: float | None = None
    # What Slurm said last, while it knew the job.
    seen: Seen | None = None

    @property
    def run(self) -> RunDir:
        return RunDir(self.plan.directory)

    @property
    def never_began(self) -> bool:
        """Whether Slurm has said that the job ended without ever having had a node."""
        seen = self.seen
        return seen is not None and seen.state is RunState.CANCELLED and not seen.node

    @property
    def ended_file(self) -> Path:
        return self.sweep_dir / ENDED / str(self.record.index)


class Query:
    """One question to Slurm, asked beside the thread that listens to Ctrl+C.

    Args:
        client: asks Slurm.
        jobs: whose state is asked for.
    """

    def __init__(self, client: SlurmClient, jobs: list[str]) -> None:
        # How long the answer took; it may be heard of later.
        self.took_s = 0.0
        self.seen: dict[str, Seen] = {}
        self.error: SlurmUnreachable | None = None
        self.done = threading.Event()
        # A daemon: the program does not wait for a Slurm that does not answer.
        threading.Thread(target=self._ask, args=(client, jobs), daemon=True).start()

    def _ask(self, client: SlurmClient, jobs: list[str]) -> None:
        began = time.monotonic()
        try:
            self.seen = client.poll(jobs)
        except SlurmUnreachable as error:
            self.error = error
        finally:
            self.took_s = time.monotonic() - began
            self.done.set()
