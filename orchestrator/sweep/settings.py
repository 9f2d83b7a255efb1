"""Settings of the sweepers: the schema that Hydra checks and ``--cfg hydra`` shows."""

# No `from __future__ import annotations`: OmegaConf reads the annotations themselves.
from dataclasses import dataclass
from typing import Dict, Optional  # noqa: UP035 - OmegaConf on Python 3.10 wants these forms


@dataclass(repr=False, eq=False)
class GridSweeperConf:
    """``hydra/sweeper=grid``: every combination of the values given."""

    _target_: str = "hydra_plugins.hydra_orchestrator.grid_sweeper.GridSweeper"
    # Most jobs handed to the launcher at once; null hands over the whole sweep.
    max_batch_size: Optional[int] = None  # noqa: UP045
    # Override to values, e.g. {lr: "1e-3,1e-4", +seed: "range(3)"}; the command line wins.
    params: Optional[Dict[str, str]] = None  # noqa: UP006, UP045
