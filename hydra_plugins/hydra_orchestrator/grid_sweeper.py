"""``hydra/sweeper=grid``. Executed at every start of every Hydra app: it imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper

from hydra_plugins.hydra_orchestrator._store import store_later

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from orchestrator.sweep.grid import LookAt


class GridSweeper(Sweeper):
    """Every combination of the values given; see ``GridSweeperConf`` for the settings."""

    def __init__(
        self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None
    ) -> None:
        self.max_batch_size = max_batch_size
        self.params = params
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.look_at: LookAt | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher."""
        from orchestrator.sweep import grid

        grid.set_up(self, hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep; see :func:`orchestrator.sweep.grid.sweep`."""
        from orchestrator.sweep import grid

        return grid.sweep(self, arguments)


store_later("hydra/sweeper", "grid", "orchestrator.sweep.settings:GridSweeperConf")
