"""Runs that were frozen at submission, as the local queue wants them."""

from __future__ import annotations

import io
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.identity import Identity
from orchestrator.queue.forked import forked_body
from orchestrator.queue.job import limit_blas_threads
from orchestrator.queue.plan import Plan
from orchestrator.queue.spawn import load_config
from orchestrator.queue.task import name_job
from orchestrator.slurm.allocation import job_id
from orchestrator.store import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from omegaconf import DictConfig

    from orchestrator.queue.keeper import JobBody, Preparation
    from orchestrator.queue.plan import Seat
    from orchestrator.queue.settings import QueueSettings
    from orchestrator.queue.task import Task
    from orchestrator.queue.wire import JobRequest
    from orchestrator.record import RunRecord
    from orchestrator.slurm.pack import Pack, PackedRun


def ignore_slurm() -> None:
    """Live on when Slurm signals every process of the job: records are still to be written.

    The jobs themselves have handlers of their own.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, signal.SIG_IGN)


def packed_jobs(task: Task, configs: Mapping[int, bytes]) -> tuple[JobBody, Preparation]:
    """What the job server needs to know: the task is in memory, the config is read in the job.

    Called in the server, first thing.
    """
    ignore_slurm()

    def prepare(request: JobRequest) -> None:
        limit_blas_threads(request.threads)

    def config_of(request: JobRequest) -> DictConfig:
        config = load_config(io.BytesIO(configs[request.num]))
        name_job(config, request.record.slurm_job_id)
        return config

    return forked_body(task, config_of), prepare


class Configs:
    """The runs' composed configs, by their overrides."""

    def __init__(self, runs: Sequence[PackedRun]) -> None:
        self._configs = {run.record.overrides: run.config for run in runs}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        return load_config(io.BytesIO(self._configs[tuple(overrides)]))


class PackPlanner:
    """Plans that were made at submission."""

    def __init__(self, pack: Pack, settings: QueueSettings, *, ships: bool) -> None:
        self._pack = pack
        self._settings = settings
        self._ships = ships

    def plan(self, index: int, num: int, overrides: Sequence[str]) -> Plan:
        run = self._pack.runs[index]
        record = run.record
        who = Identity(record.fingerprint, record.model_name, record.hyperparams, record.seed)
        done = RunDir(Path(run.directory)).try_read()
        if done is not None and not self._pack.answers(done, record):
            done = None
        directory = Path(run.directory)
        return Plan(index, run.num, record.overrides, who, directory, done, record.memory_shape)

    def request(self, plan: Plan, seat: Seat, sweep: Any) -> JobRequest:
        run = self._pack.runs[plan.index]
        record = msgspec.structs.replace(run.record, slurm_job_id=job_id())
        request = seat.request(self._settings, record, plan.directory)
        payload = self._pack.common + run.config if self._ships else None
        return replace(request, resume=self._pack.resume, payload=payload, in_allocation=True)

    def remember(self, plan: Plan, record: RunRecord) -> None:
        """Nobody asks again."""


class NoBook:
    """The sweep's own files are the launcher's to write.

    Args:
        sweep_id: of the sweep.
        not_started: hears of runs that could not be started.
    """

    def __init__(self, sweep_id: str, not_started: Callable[[RunRecord], None]) -> None:
        self.sweep_id = sweep_id
        self.add_unstarted = not_started

    def add_run(
        self, index: int, directory: Path, hyperparams: dict[str, Any] | None = None
    ) -> None:
        """The launcher knows."""

    def write_partial_now_and_then(self) -> None:
        """The launcher does."""
