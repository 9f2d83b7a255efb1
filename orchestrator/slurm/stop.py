"""Cancelling what is left of a sweep's Slurm jobs, until none is left."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.slurm.reconcile import of_this_cluster, standings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from orchestrator.record import RunState
    from orchestrator.slurm.client import SlurmClient
    from orchestrator.slurm.reconcile import Given, Standing

# Beside the time that Slurm gives the processes of a job.
_CANCEL_S = 20.0
_FIRST_LOOK_S = 0.25
_LONGEST_LOOK_S = 2.0


@dataclass
class Stopped:
    """What stopping some runs came to.

    Attributes:
        jobs: that were cancelled, in order.
        runs: what became of the runs, by their directories.
        left: jobs that were not gone when the time was up.
    """

    jobs: list[str] = field(default_factory=list)
    runs: dict[Path, Standing] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def states(self) -> Counter[RunState]:
        return Counter(standing.state for standing in self.runs.values())


def stop_jobs(
    find: Callable[[], Sequence[Given]],
    client: SlurmClient,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Stopped:
    """Cancel the jobs that do these runs, wait until they are gone, and see to their records.

    A job ends as a whole: with it end all of the runs that share it.

    Args:
        find: the runs without a final record, as they are on the disk. It is asked again, since
            a launcher may go on to submit.
        client: asks Slurm.
        clock: in seconds.
        sleep: waits between two looks.

    Raises:
        SlurmUnreachable: Slurm could not be asked; what was cancelled before is.
    """
    stopping = _Stopping(client, clock, sleep)
    until = clock() + client.limits().kill_wait_s + _CANCEL_S
    while stopping.take(find()) and clock() < until:
        stopping.wait(until)
    given = [
        run
        for run in stopping.given.values()
        if not run.record.state.is_final or run.job_id in stopping.cancelled
    ]
    # (By now nobody but Slurm itself has anything to say of them.)
    runs = standings(given, client, cancelled=stopping.cancelled, sleep=sleep)
    return Stopped(list(stopping.cancelled), runs, stopping.live)


class _Stopping:
    def __init__(
        self, client: SlurmClient, clock: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._client = client
        self._clock = clock
        self._sleep = sleep
        self.given: dict[Path, Given] = {}
        # In order, each once.
        self.cancelled: dict[str, None] = {}
        # Jobs that were not gone when Slurm was last asked.
        self.live: list[str] = []

    def take(self, given: Sequence[Given]) -> bool:
        """Cancel the jobs of these runs; whether any of all jobs was not gone yet."""
        here = of_this_cluster(given, self._client)
        self.given |= {run.run.path: run for run in here}
        self._look()
        new = [job for job in self.live if job not in self.cancelled]
        if new:
            self._client.cancel(new)
            self.cancelled |= dict.fromkeys(new)
        return bool(self.live)

    def wait(self, until: float) -> None:
        """Wait until all jobs that are known here are gone."""
        pause = _FIRST_LOOK_S
        while self.live and self._clock() < until:
            self._sleep(pause)
            pause = min(pause * 1.5, _LONGEST_LOOK_S)
            self._look()

    def _look(self) -> None:
        ids = dict.fromkeys(run.job_id for run in self.given.values() if run.job_id)
        seen = self._client.poll(ids)
        self.live = [job for job in ids if job in seen and not seen[job].state.is_final]
