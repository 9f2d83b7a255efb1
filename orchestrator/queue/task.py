"""Calling the task function exactly as Hydra's ``run_job`` does, but without its copies.

``hydra.core.utils.run_job`` takes 14 ms a job, most of it deep copies of a config that a
process of its own does not need, and slow YAML. What a task, a callback or a reader of
``.hydra/`` can see is the same; a test holds the two side by side.
"""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import version
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import (
    JobReturn,
    JobRuntime,
    JobStatus,
    _flush_loggers,
    configure_log,
    env_override,
)
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from orchestrator.queue.yaml_files import save_configs, to_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hydra._internal.callbacks import Callbacks


@dataclass(frozen=True)
class Task:
    """A task function and the callbacks that Hydra wraps round it."""

    function: Callable[[DictConfig], Any]
    callbacks: Callbacks


def number_job(config: DictConfig, num: int) -> None:
    """Give a composed config its place in the sweep, as Hydra's basic launcher does."""
    with open_dict(config):
        config.hydra.job.id = str(num)
        config.hydra.job.num = num


def name_job(config: DictConfig, job_id: str) -> None:
    """Give a numbered config the id that its job has elsewhere; without one it stays its number."""
    if job_id:
        with read_write(config), open_dict(config):
            config.hydra.job.id = job_id


@contextmanager
def as_current(config: DictConfig) -> Iterator[None]:
    """Make a config Hydra's current one, for ``${hydra:...}``, and then the one before again."""
    before = HydraConfig.instance().cfg
    make_current(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def make_current(config: DictConfig) -> DictConfig:
    """What ``HydraConfig.set_config`` does, but on the ``hydra`` node itself, not on a copy.

    Returns:
        A config with that node alone, as Hydra's own JobReturn carries it.
    """
    OmegaConf.set_readonly(config.hydra, True)
    alone = DictConfig({}, flags={"no_deepcopy_set_nodes": True})
    alone["hydra"] = config.hydra
    alone._set_flag("no_deepcopy_set_nodes", None)  # noqa: SLF001 - nobody copies it with that
    config.hydra._set_parent(config)  # noqa: SLF001 - as Hydra: it still sees the task's part
    HydraConfig.instance().cfg = alone  # type: ignore[assignment]
    return alone


def output_dir(config: DictConfig) -> Path:
    """Where the config wants its job to write: absolute, resolved as Hydra does."""
    with as_current(config):
        sweep_dir = str(OmegaConf.select(config, "hydra.sweep.dir"))
        subdir = str(OmegaConf.select(config, "hydra.sweep.subdir"))
    return Path(sweep_dir, subdir).absolute()


def place_job(config: DictConfig, directory: str) -> DictConfig:
    """Point a numbered config at its directory and make it Hydra's current one."""
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = directory
    return make_current(config)


def rehearse(config: DictConfig, directory: str) -> None:
    """Do what every job will, short of its effects: grammars learn, modules are imported.

    Args:
        config: composed and numbered; it is changed.
        directory: any.
    """
    with as_current(config):
        hydra_cfg = place_job(config, directory)
        OmegaConf.to_container(config.hydra.job_logging, resolve=True)
        to_yaml(hydra_cfg)


def works_in_output_dir(hydra_cfg: DictConfig) -> bool:
    """Whether the job changes its directory; unset means what ``version_base`` means by it."""
    chdir = hydra_cfg.hydra.job.chdir
    return not version.base_at_least("1.2") if chdir is None else bool(chdir)


def task_copy(config: DictConfig) -> DictConfig:
    """A deep copy of the task's part of a composed config; the ``hydra`` node is not copied."""
    content = config.__dict__["_content"]
    config.__dict__["_content"] = {k: v for k, v in content.items() if k != "hydra"}
    try:
        return copy.deepcopy(config)
    finally:
        config.__dict__["_content"] = content


def call_task(task: Task, config: DictConfig, directory: str, logs: str | None = None) -> JobReturn:
    """Run the task in this process, which is its own.

    Args:
        task: what to call.
        config: composed and numbered; it is changed.
        directory: absolute; it exists.
        logs: where Hydra's log goes, for a further rank of a run; only the first writes the
            configs.
    """
    result = JobReturn()
    if logs is not None:
        place_job(config, logs)
        configure_log(config.hydra.job_logging, config.hydra.verbose)
    hydra_cfg = place_job(config, directory)
    task_cfg = task_copy(config)
    result.cfg, result.hydra_cfg = task_cfg, hydra_cfg
    result.overrides = OmegaConf.to_container(config.hydra.overrides.task)  # type: ignore[assignment]
    if works_in_output_dir(hydra_cfg):
        os.chdir(directory)
    result.working_dir = os.getcwd()  # noqa: PTH109
    if logs is None:
        configure_log(config.hydra.job_logging, config.hydra.verbose)
    if logs is None and config.hydra.output_subdir is not None:
        save_configs(Path(directory, config.hydra.output_subdir), task_cfg, hydra_cfg)
    with env_override(hydra_cfg.hydra.job.env_set):
        task.callbacks.on_job_start(config=config, task_function=task.function)
        try:
            result.return_value = task.function(task_cfg)
            result.status = JobStatus.COMPLETED
        except Exception as error:  # noqa: BLE001 - as Hydra: the caller decides
            result.return_value = error
            result.status = JobStatus.FAILED
    result.task_name = JobRuntime.instance().get("name")
    _flush_loggers()
    task.callbacks.on_job_end(config=config, job_return=result)
    return result
