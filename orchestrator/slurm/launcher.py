"""The body of ``hydra/launcher=slurm``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from orchestrator.queue.book import SweepBook
from orchestrator.queue.plan import Planner
from orchestrator.queue.progress import SettingsCount, make_progress
from orchestrator.queue.retry import FailureLimit
from orchestrator.queue.signals import StopSignals
from orchestrator.queue.task import Task
from orchestrator.slurm.check import check, check_queue
from orchestrator.slurm.client import SlurmClient, SlurmUnreachable
from orchestrator.slurm.launch import SlurmLaunch
from orchestrator.slurm.resources import Resources
from orchestrator.slurm.submit import Submitter
from orchestrator.sweep.compose import Composer
from orchestrator.sweep.errors import SweepError
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from orchestrator.queue.progress import Progress
    from orchestrator.queue.spawn import Shipper
    from orchestrator.slurm.client import Limits
    from orchestrator.slurm.settings import SlurmSettings

# A service that hangs is not to keep anybody from hearing that a run was cancelled.
_ACCOUNTING_S = 4.0


class SlurmLaunches:
    """Everything between Hydra's ``setup`` and the end of its last ``launch``."""

    def __init__(
        self,
        settings: SlurmSettings,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        self._settings = settings
        self._config = config
        self._task = Task(task_function, hydra_context.callbacks)
        self.composer = Composer(hydra_context.config_loader, config)
        self._planner = Planner(self.composer, config, settings.queue)
        self._planner.shapes = settings.queue.memory_per_job_gb is not None
        self._book = SweepBook(config, self._planner, task_function)
        self._client = SlurmClient(accounting_timeout_s=_ACCOUNTING_S)
        raw = OmegaConf.to_container(config.hydra.launcher, resolve=False)
        assert isinstance(raw, dict)
        self._raw: dict[str, Any] = {str(key): value for key, value in raw.items()}
        self._shipper: Shipper | None = None
        self._limits: Limits | None = None
        # Over all launches.
        self._failures = 0

    @property
    def resumes(self) -> bool:
        return self._planner.resume

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Run the jobs on the cluster; one JobReturn each, in the order given.

        Raises:
            SweepError: the settings ask for what cannot be, Slurm refuses or cannot be asked, or
                records are not on the disk.
            SystemExit: a signal ended the sweep, or left it to Slurm.
        """
        try:
            return self._launch(job_overrides, initial_job_idx)
        except SlurmUnreachable as error:
            raise SweepError(str(error)) from error

    def _launch(self, job_overrides: Sequence[Sequence[str]], first_num: int) -> list[JobReturn]:
        check(self._settings, self._config)
        check_queue(self._settings.queue, self._raw.get("queue") or {})
        limit = FailureLimit(self._planner.results.on_failure)
        if self._settings.dry_run:
            return self._show(job_overrides, first_num)
        resources = Resources(self._settings, self._raw)
        # (Before anything is written: whether there is a cluster at all.)
        self._limits = self._limits or self._client.limits()
        self._book.extend(job_overrides)
        progress = make_progress(
            len(job_overrides), SettingsCount(job_overrides, self._planner.results.seed_key)
        )
        try:
            with StopSignals() as signals:
                launch = self._make_launch(job_overrides, first_num, resources, progress, limit)
                try:
                    return launch.run(signals)
                finally:
                    self._failures = launch.failures
        finally:
            progress.close()

    def _make_launch(
        self,
        points: Sequence[Sequence[str]],
        first_num: int,
        resources: Resources,
        progress: Progress,
        limit: FailureLimit,
    ) -> SlurmLaunch:
        assert self._limits is not None
        sweep = self._book.sweep
        progress.say(f"{plural(progress.total, 'run')}, outputs in {sweep.root}")
        submitter = Submitter(
            self._settings,
            self._raw.get("queue") or {},
            self._client,
            self._limits,
            sweep,
            on_failure=self._planner.results.on_failure,
            resume=self._planner.resume,
        )
        return SlurmLaunch(
            points,
            first_num,
            settings=self._settings,
            resources=resources,
            composer=self.composer,
            planner=self._planner,
            book=self._book,
            progress=progress,
            limit=limit,
            client=self._client,
            submitter=submitter,
            shipper=self._ship(),
            kill_wait_s=self._limits.kill_wait_s,
            failures=self._failures,
        )

    def _ship(self) -> Shipper:
        if self._shipper is None:
            from orchestrator.queue.spawn import Shipper

            self._shipper = Shipper(self._task)
        return self._shipper

    def _show(self, points: Sequence[Sequence[str]], first_num: int) -> list[JobReturn]:
        from orchestrator.slurm.dry_run import DryRun

        dry = DryRun(self._settings, self._raw, self._planner, self.composer, self._client)
        return dry.show(points, first_num)
