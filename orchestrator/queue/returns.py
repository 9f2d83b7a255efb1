"""What Hydra's sweepers get for each run: a JobReturn that derives its configs when asked."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobRuntime, JobStatus

from orchestrator.errors import OrchestratorError
from orchestrator.record import RunRecord, RunState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from orchestrator.queue.context import Composes


class RunFailed(OrchestratorError):  # noqa: N818 - reads as what happened
    """A run failed, and its own exception could not be brought here."""


class QueueJobReturn(JobReturn):
    """A JobReturn of a few hundred bytes.

    One composed config is 250 KB: a sweep that kept one for every finished run would fill
    the memory. ``cfg`` and ``hydra_cfg`` are composed again, from sources held since the
    sweep began, each time somebody reads them.
    """

    def __init__(
        self, composer: Composes, overrides: Sequence[str], num: int, directory: str
    ) -> None:
        self._composer = composer
        self._num = num
        self._directory = directory
        self.overrides = list(overrides)
        self.status = JobStatus.UNKNOWN
        # Whether it waits, or runs, on a cluster, and nobody waits for it here.
        self.submitted = False
        self._return_value: Any = None

    def __repr__(self) -> str:
        return f"QueueJobReturn({self.status.name}, {self._directory!r}, {self._return_value!r})"

    def _configs(self) -> tuple[DictConfig, DictConfig]:
        from orchestrator.queue.task import as_current, number_job, place_job, task_copy

        config = self._composer.compose(self.overrides or [])
        number_job(config, self._num)
        with as_current(config):
            return task_copy(config), place_job(config, self._directory)

    @property
    def cfg(self) -> DictConfig:  # type: ignore[override]
        return self._configs()[0]

    @property
    def hydra_cfg(self) -> DictConfig:  # type: ignore[override]
        return self._configs()[1]

    @property
    def working_dir(self) -> str:  # type: ignore[override]
        import os

        from orchestrator.queue.task import works_in_output_dir

        return self._directory if works_in_output_dir(self.hydra_cfg) else os.getcwd()  # noqa: PTH109

    @property
    def began(self) -> bool:
        """Whether the run got as far as a directory of its own."""
        return bool(self._directory)

    @property
    def task_name(self) -> str:  # type: ignore[override]
        return str(JobRuntime.instance().get("name"))

    def complete(self, value: Any) -> None:
        self.status = JobStatus.COMPLETED
        self._return_value = value

    def fail(self, error: BaseException) -> None:
        self.status = JobStatus.FAILED
        self._return_value = error

    def take(self, record: RunRecord, value: bytes | None) -> None:
        """Fill this from a final record and the pickled value or exception that came with it."""
        if record.state is RunState.COMPLETED:
            self.complete(
                record.return_value if value is None else _load(value, record.return_value)
            )
            return
        error = None if value is None else _load(value, None)
        # A return value that came before a crash is no exception to raise.
        if not isinstance(error, Exception):
            info = record.error
            detail = f"{info.type}: {info.message}" if info else record.state.value
            error = RunFailed(
                f"run {record.model_name} ended as {record.state.value} ({detail}); "
                f"its logs are in {self._directory}"
            )
        self.fail(error)


def _load(data: bytes, otherwise: Any) -> Any:
    try:
        return pickle.loads(data)  # noqa: S301 - from our own job
    except Exception:  # noqa: BLE001 - a value that pickles need not unpickle
        return otherwise
