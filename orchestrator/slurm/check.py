"""Settings of the Slurm launcher that no cluster could meet: a sentence before anything starts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.queue.needs import Needs
from orchestrator.queue.resources import check_settings
from orchestrator.queue.retry import RetryPolicy
from orchestrator.queue.start_method import choose
from orchestrator.slurm.resources import tasks_of
from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from omegaconf import DictConfig

    from orchestrator.queue.settings import QueueSettings
    from orchestrator.slurm.settings import SlurmSettings

_GRID = "hydra_plugins.hydra_orchestrator.grid_sweeper."
_ON_INTERRUPT = ("cancel", "leave")


def check_queue(settings: QueueSettings, raw: Mapping[str, Any]) -> None:
    """Refuse settings of the jobs' local queue that no job could meet.

    Raises:
        SweepError: what a setting is, and what it should be.
    """
    try:
        check_settings(settings)
        choose(settings.start_method)
        RetryPolicy(settings.retries, settings.retry_on)
        Needs(settings, raw, "hydra.launcher.queue")
    except SweepError as error:
        text = str(error).replace("hydra.launcher.", "hydra.launcher.queue.")
        raise SweepError(text) from error


def check(settings: SlurmSettings, config: DictConfig) -> None:
    """Refuse what cannot be.

    Raises:
        SweepError: what a setting is, and what it should be.
    """
    if settings.on_interrupt not in _ON_INTERRUPT:
        raise _wrong("on_interrupt", settings.on_interrupt, f"one of {', '.join(_ON_INTERRUPT)}")
    for name in ("array_parallelism", "runs_per_job"):
        _at_least(settings, name, 1)
    for name in ("max_num_timeout", "signal_delay_s"):
        _at_least(settings, name, 0)
    _check_sweeper(settings, config)
    folder = (settings.submitit_folder or "").removesuffix("%j")
    for path in (Path(str(config.hydra.sweep.dir)).absolute(), Path(folder).absolute()):
        if "%" in str(path) or "\\" in str(path) or not str(path).isprintable():
            expected = "a path without %, backslashes and line ends, which Slurm reads otherwise"
            raise SweepError(f"The sweep would write to {str(path)!r}; expected {expected}.")
    with suppress(TypeError, ValueError):  # (an interpolation of the run's own config)
        check_tasks(settings, vars(settings))


def check_tasks(settings: SlurmSettings, resources: dict[str, Any]) -> None:
    """Refuse runs that would share a job of several tasks.

    Raises:
        SweepError: they would.
    """
    if settings.runs_per_job > 1 and tasks_of(resources) > 1:
        raise SweepError(
            f"hydra.launcher.runs_per_job is {settings.runs_per_job} and each job has several "
            "tasks (nodes, tasks_per_node); runs share a job of one task only. Set one of them "
            "to 1."
        )


def _check_sweeper(settings: SlurmSettings, config: DictConfig) -> None:
    """Other sweepers need the results of a launch."""
    if settings.wait and not settings.dry_run:
        return
    sweeper = str(config.hydra.sweeper.get("_target_"))
    if not sweeper.startswith(_GRID):
        name = "dry_run=true" if settings.dry_run else "wait=false"
        raise SweepError(
            f"hydra.launcher.{name} is for hydra/sweeper=grid; {sweeper.rpartition('.')[2]} needs "
            "the results of each launch. Choose hydra/sweeper=grid, or leave it out."
        )


def _at_least(settings: SlurmSettings, name: str, least: int) -> None:
    value: Any = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(name, value, f"a whole number, {least} or more")


def _wrong(name: str, value: Any, expected: str) -> SweepError:
    return SweepError(f"hydra.launcher.{name} is {value!r}; expected {expected}.")
