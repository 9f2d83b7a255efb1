"""What one Slurm job is to do: some runs, frozen at submission."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record import RunState

if TYPE_CHECKING:
    from orchestrator.queue.settings import QueueSettings
    from orchestrator.record import RunRecord

# In the directory of the sweep: one file for each run that has ended, for the launcher.
ENDED = "ended"


@dataclass(frozen=True)
class PackedRun:
    """One run: its directory, its record while it waits, and its config."""

    directory: str
    record: RunRecord
    # As `spawn.load_config` reads it: composed, and numbered.
    config: bytes

    @property
    def num(self) -> int:
        return self.record.index or 0


@dataclass(frozen=True)
class JobTime:
    """What a job knows of its time, in seconds."""

    limit_s: float
    # How long before the limit Slurm says so.
    signal_delay_s: float
    # How long a process has between SIGTERM and SIGKILL.
    kill_wait_s: float
    # How often it may still be put back into the queue when its time was up.
    timeouts_left: int = 0


@dataclass(frozen=True)
class Pack:
    """The runs of one Slurm job, and how they share what Slurm gives it."""

    # .sweeps/<sweep_id>
    sweep_dir: str
    # As `spawn.load_task` reads it: the same for all jobs of a sweep.
    common: bytes
    runs: tuple[PackedRun, ...]
    # Whether several runs were to share the job: else one has all of it.
    shared: bool
    settings: QueueSettings
    # The same with its interpolations.
    raw: dict[str, Any]
    on_failure: Any
    # Whether a COMPLETED record of another sweep answers, too.
    resume: bool
    time: JobTime

    def __call__(self, path: str) -> None:
        """Do the runs; called in the Slurm job, once in each of its tasks.

        Args:
            path: the file that this was read from.

        Raises:
            SystemExit: with status 1, where a run has not ended well.
        """
        from orchestrator.slurm.ranks import own_rank, run_rank

        rank = own_rank()
        if rank:
            run_rank(self, rank)
        else:
            from orchestrator.slurm.work import PackJob

            PackJob(self, Path(path)).run()

    def after_timeout(self) -> Pack:
        """The same once its time was up."""
        return replace(self, time=replace(self.time, timeouts_left=self.time.timeouts_left - 1))

    def answers(self, found: RunRecord, asked: RunRecord) -> bool:
        """Whether a record answers: of this sweep, from before a requeue, or of any at all."""
        ours = self.resume or found.sweep_id == asked.sweep_id
        done = found.state is RunState.COMPLETED
        return done and ours and found.fingerprint == asked.fingerprint

    def ended_file(self, num: int) -> Path:
        return Path(self.sweep_dir, ENDED, str(num))
