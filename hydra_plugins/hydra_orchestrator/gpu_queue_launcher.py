"""``hydra/launcher=gpu_queue``. Imported at each start of every Hydra app: keep it light."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.plugins.launcher import Launcher

from hydra_plugins.hydra_orchestrator._store import store_later

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from orchestrator.queue.launcher import GpuQueue
    from orchestrator.sweep.compose import Composer


class GpuQueueLauncher(Launcher):
    """Runs jobs on this machine's GPUs (or cores); see `orchestrator.queue.launcher`."""

    def __init__(self, **settings: Any) -> None:
        from orchestrator.queue.settings import GpuQueueSettings

        self.settings = GpuQueueSettings(**settings)
        self.queue: GpuQueue | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from orchestrator.queue.launcher import GpuQueue

        self.queue = GpuQueue(self.settings, hydra_context, task_function, config)

    @property
    def composer(self) -> Composer | None:
        """For the sweeper, which would otherwise compose everything once more."""
        return self.queue.composer if self.queue else None

    @property
    def resumes(self) -> bool:
        """Whether the same command again runs only what is missing."""
        return self.queue is not None and self.queue.resumes

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        if self.queue is None:
            msg = "launch() was called before setup()"
            raise RuntimeError(msg)
        return self.queue.launch(job_overrides, initial_job_idx)


store_later("hydra/launcher", "gpu_queue", "orchestrator.queue.settings:GpuQueueSettings")
