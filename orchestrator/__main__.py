"""``python -m orchestrator``: the shipped Hydra app. It trains what ``task._target_`` names."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from omegaconf import DictConfig

_TARGET = "task._target_"
# The keys of conf/config.yaml that stand for settings of the results, and what these may be.
_SHORT_NAMES = {"resume": "true, false or null", "results_file": "a path or null"}


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
    from orchestrator.target import find_function

    return find_function(_target(cfg), _TARGET)(cfg)


def look_at_sweep(cfg: DictConfig, swept: Collection[str]) -> None:
    """Find out before the first job if the task is there.

    Args:
        cfg: the config of the sweep's first run.
        swept: the keys that are swept.

    Raises:
        OrchestratorError: it is not.
    """
    from orchestrator.target import find_function

    target = _target(cfg)
    # Several tasks are imported by the jobs that need them.
    if not {"task", _TARGET} & set(swept):
        find_function(target, _TARGET)


# The grid sweeper looks for it.
run_task.look_at_sweep = look_at_sweep  # type: ignore[attr-defined]


def _target(cfg: DictConfig) -> str:
    target = cfg.get("task", {}).get("_target_")
    if not target:
        raise OrchestratorError(
            "The config has no task._target_. Set it to the function that trains, e.g. "
            "task._target_=my_package.my_module.train"
        )
    return str(target)


def main() -> None:
    """The console script ``orchestrator``, and ``python -m orchestrator``."""
    try:
        _main()
    except KeyboardInterrupt:
        # A sweep that runs has its own way to stop, and a task in this process its traceback.
        if _in_a_run():
            raise
        sys.exit(128 + signal.SIGINT)


def _main() -> None:
    import hydra
    from hydra._internal import utils

    # As `python -m` does: a task in the current directory can be named.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    _take_the_name_of_slurm()
    report = utils.run_and_report
    utils.run_and_report = lambda func: report(partial(_in_sentences, func))
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run_task)()


def _take_the_name_of_slurm() -> None:
    """In this app ``hydra/launcher=submitit_slurm`` is ours, which has all of its keys.

    After the scan of all plugins, which Hydra would do next and does once: the last one to store
    a name has it.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    launchers["submitit_slurm.yaml"] = launchers["slurm.yaml"]


def _in_sentences(function: Callable[[], Any]) -> Any:
    """Call a function; an error of ours ends the program with its text alone.

    Hydra would add how to get a stack trace, of which a mistake on the command line needs none.
    """
    from hydra.errors import ConfigCompositionException
    from omegaconf.errors import InterpolationValidationError

    if os.environ.get("HYDRA_FULL_ERROR", "0") == "1":
        return function()
    try:
        return function()
    except OrchestratorError as error:
        sys.exit(str(error))
    except ConfigCompositionException as error:
        from orchestrator.sweep.nearest import with_nearest_key

        raise with_nearest_key(error, _config_without) from error.__cause__
    except InterpolationValidationError as error:
        name = str(error.full_key).rpartition(".")[2]
        if name not in _SHORT_NAMES:
            raise
        sys.exit(f"{name} is {error.value!r}; expected {_SHORT_NAMES[name]}")


def _config_without(key: str) -> DictConfig:
    """The config of this command line without what it says of one key."""
    from hydra._internal.utils import get_args
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    arguments = get_args()
    overrides = [text for text in arguments.overrides if text.partition("=")[0] != key]
    name = arguments.config_name or "config"
    loader = GlobalHydra.instance().config_loader()
    return loader.load_configuration(name, overrides, run_mode=RunMode.MULTIRUN)


def _in_a_run() -> bool:
    run = sys.modules.get("orchestrator.run")
    return run is not None and run.active() is not None


if __name__ == "__main__":
    main()
