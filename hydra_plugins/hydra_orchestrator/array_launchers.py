"""The two launchers behind ``orchestrator-export slurm``. Imported by every Hydra app: light.

They stand in for the launcher that a command has, so their node takes any key that another has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from orchestrator.sweep.compose import Composer


_HERE = "hydra_plugins.hydra_orchestrator.array_launchers"


class ListLauncher(Launcher):
    """Lists the runs and starts none; see `orchestrator.slurm.export.listing`."""

    module = "orchestrator.slurm.export.listing"

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.body: Any = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from importlib import import_module

        make = import_module(self.module).make
        self.body = make(self.settings, hydra_context, task_function, config)

    @property
    def composer(self) -> Composer | None:
        """For the sweeper, which would otherwise compose everything once more."""
        return self.body.composer if self.body else None

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        returns: Sequence[JobReturn] = self.body.launch(job_overrides, initial_job_idx)
        return returns


class ArrayTaskLauncher(ListLauncher):
    """Does the runs of one task of an array, here; see `orchestrator.slurm.export.array_queue`."""

    module = "orchestrator.slurm.export.array_queue"


for _name, _class in (("list_runs", ListLauncher), ("slurm_array_task", ArrayTaskLauncher)):
    ConfigStore.instance().store(
        group="hydra/launcher",
        name=_name,
        node=OmegaConf.create({"_target_": f"{_HERE}.{_class.__name__}"}, flags={"struct": False}),
        provider="orchestrator",
    )
