"""``hydra/launcher=slurm``. Imported at each start of every Hydra app: keep it light."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.plugins.launcher import Launcher

from hydra_plugins.hydra_orchestrator._store import store_later

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from orchestrator.slurm.launcher import SlurmLaunches
    from orchestrator.sweep.compose import Composer


class SlurmLauncher(Launcher):
    """Runs jobs on a Slurm cluster; see `orchestrator.slurm.launcher`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.launches: SlurmLaunches | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from orchestrator.slurm.launcher import SlurmLaunches
        from orchestrator.slurm.read_settings import read_settings

        settings = read_settings(self.settings)
        self.launches = SlurmLaunches(settings, hydra_context, task_function, config)

    @property
    def composer(self) -> Composer | None:
        """For the sweeper, which would otherwise compose everything once more."""
        return self.launches.composer if self.launches else None

    @property
    def resumes(self) -> bool:
        """Whether the same command again runs only what is missing."""
        return self.launches is not None and self.launches.resumes

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        if self.launches is None:
            msg = "launch() was called before setup()"
            raise RuntimeError(msg)
        return self.launches.launch(job_overrides, initial_job_idx)


store_later("hydra/launcher", "slurm", "orchestrator.slurm.settings:SlurmSettings")
