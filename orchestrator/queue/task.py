"""Calling the task function exactly as Hydra's ``run_job`` does, but without its copies.

``hydra.core.utils.run_job`` takes 14 ms a job, most of it deep copies of a config that a
process of its own does not need, and slow YAML. What a task, a callback or a reader of
``.hydra/`` can see is the same; a test holds the two side by side.
"""

from __future__ import annotations

import copy
import os
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from hydra._internal.callbacks import Callbacks


@dataclass(frozen=True)
class Task:
    """A task function and the callbacks that Hydra wraps round it."""

    function: Callable[[DictConfig], Any]
    callbacks: Callbacks


def number_job(config: DictConfig, num: int) -> None:
    """Give a composed config its place in the sweep, as every launcher does."""
    with open_dict(config):
        config.hydra.job.id = f"{config.hydra.job.name}_{num}"
        config.hydra.job.num = num


def output_dir(config: DictConfig) -> Path:
    """Where the config wants its job to write: absolute, resolved as Hydra does."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        sweep_dir = str(OmegaConf.select(config, "hydra.sweep.dir"))
        subdir = str(OmegaConf.select(config, "hydra.sweep.subdir"))
    finally:
        HydraConfig.instance().cfg = before
    return Path(sweep_dir, subdir).absolute()


def place_job(config: DictConfig, directory: str) -> DictConfig:
    """Point a numbered config at its directory and make it Hydra's current one.

    Returns:
        The ``hydra`` node as Hydra's own JobReturn carries it.
    """
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = directory
    HydraConfig.instance().set_config(config)
    hydra_cfg: Any = HydraConfig.instance().cfg  # declared as HydraConf, but a DictConfig
    return hydra_cfg  # type: ignore[no-any-return]


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


def call_task(task: Task, config: DictConfig, directory: str) -> JobReturn:
    """Run the task in this process, which is its own.

    Args:
        task: what to call.
        config: composed and numbered; it is changed.
        directory: absolute; it exists.
    """
    result = JobReturn()
    hydra_cfg = place_job(config, directory)
    task_cfg = task_copy(config)
    result.cfg, result.hydra_cfg = task_cfg, hydra_cfg
    result.overrides = OmegaConf.to_container(config.hydra.overrides.task)  # type: ignore[assignment]
    if works_in_output_dir(hydra_cfg):
        os.chdir(directory)
    result.working_dir = os.getcwd()  # noqa: PTH109
    configure_log(config.hydra.job_logging, config.hydra.verbose)
    if config.hydra.output_subdir is not None:
        _save_configs(Path(directory, config.hydra.output_subdir), task_cfg, hydra_cfg)
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


def _save_configs(directory: Path, task_cfg: DictConfig, hydra_cfg: DictConfig) -> None:
    directory.mkdir(exist_ok=True)
    for name, node in (
        ("config.yaml", task_cfg),
        ("hydra.yaml", hydra_cfg),
        ("overrides.yaml", hydra_cfg.hydra.overrides.task),
    ):
        (directory / name).write_text(OmegaConf.to_yaml(node), encoding="utf-8")
