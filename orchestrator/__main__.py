"""``python -m orchestrator``: the shipped Hydra app. It trains what ``task._target_`` names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


def conf_dir() -> Path:
    """The app's configs: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def run_task(cfg: DictConfig) -> Any:
    """Call the function that the config names, with the config.

    Raises:
        OrchestratorError: the config names no function.
    """
    from hydra.utils import get_method

    from orchestrator.errors import OrchestratorError

    target = cfg.get("task", {}).get("_target_")
    if not target:
        msg = (
            "The config has no task._target_. Set it to the function that trains, e.g. "
            "task._target_=my_package.my_module.train"
        )
        raise OrchestratorError(msg)
    return get_method(target)(cfg)


def main() -> None:
    """The console script ``orchestrator``, and ``python -m orchestrator``."""
    import hydra

    # As `python -m` does: a task in the current directory can be named.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run_task)()


if __name__ == "__main__":
    main()
