"""Jobs as forks of the process that has imported the app."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from orchestrator.queue.job import (
    forget_parent,
    give_up,
    limit_blas_threads,
    set_up_process,
    work,
)
from orchestrator.queue.task import Task, call_task, number_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

    from orchestrator.queue.keeper import JobBody, Preparation
    from orchestrator.queue.wire import JobRequest
    from orchestrator.record import RunRecord
    from orchestrator.sweep.compose import Composer


def forked_jobs(task: Task, composer: Composer) -> tuple[JobBody, Preparation]:
    """What a job server needs to know of jobs that are forked."""

    def config_of(request: JobRequest) -> DictConfig:
        config = composer.compose_in_place(list(request.overrides))
        number_job(config, request.num)
        return config

    return forked_body(task, config_of), preparation(composer)


def preparation(composer: Composer) -> Preparation:
    """What a keeper does before it forks a job: compose what the job starts from, set threads."""

    def prepare(request: JobRequest) -> None:
        composer.learn(request.parsed)
        composer.prepare(list(request.overrides))
        limit_blas_threads(request.threads)

    return prepare


def forked_body(task: Task, config_of: Callable[[JobRequest], DictConfig]) -> JobBody:
    """What a forked child does: the task, with the config that a run's request means."""

    def body(request: JobRequest, record: RunRecord, outcome_fd: int) -> None:
        try:
            forget_parent()
            set_up_process(request, record)
        except BaseException as error:  # noqa: BLE001 - the last frame of the process
            give_up(error, outcome_fd)

        def load() -> Callable[[], JobReturn]:
            return partial(call_task, task, config_of(request), request.directory)

        work(load, request, outcome_fd)

    return body
