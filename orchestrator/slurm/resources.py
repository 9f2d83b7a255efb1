"""What each run's job asks Slurm for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from orchestrator.slurm.settings import SlurmSettings

# Keys of the launcher that go to submitit as they are.
RESOURCES = (
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "partition",
    "qos",
    "account",
    "constraint",
    "exclude",
    "nodelist",
    "gres",
    "cpus_per_gpu",
    "gpus_per_task",
    "mem_per_gpu",
    "mem_per_cpu",
    "comment",
    "additional_parameters",
    "setup",
    "teardown",
    "srun_args",
    "stderr_to_stdout",
    "signal_delay_s",
)


class Resources:
    """What each run's job asks Slurm for.

    Args:
        settings: the launcher's.
        raw: the same with its interpolations: these are looked up in each run's own config.

    Raises:
        SweepError: a value is none that sbatch could take.
    """

    def __init__(self, settings: SlurmSettings, raw: dict[str, Any]) -> None:
        self._common = {key: getattr(settings, key) for key in RESOURCES}
        check_text(self._common)
        self._varying = [key for key in RESOURCES if "${" in json.dumps(raw.get(key), default=str)]

    def of(self, config: DictConfig) -> dict[str, Any]:
        """The resources of one run; its whole config is asked where they may differ."""
        own = {
            key: _plain(OmegaConf.select(config, f"hydra.launcher.{key}", throw_on_missing=True))
            for key in self._varying
        }
        resources = {**self._common, **own}
        check_text(resources)
        # A job is not warned before it has had half of its time.
        half = 30 * float(resources["timeout_min"])
        resources["signal_delay_s"] = int(min(resources["signal_delay_s"], half))
        return resources


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_text(resources: dict[str, Any]) -> None:
    """Refuse text that would end a line of the batch script.

    Raises:
        SweepError: a value has a line end, or is not what sbatch could take.
    """
    extra = resources.get("additional_parameters") or {}
    for key, value in [*resources.items(), *extra.items()]:
        if key in ("setup", "teardown", "srun_args", "additional_parameters"):
            continue
        if isinstance(value, str) and not value.isprintable():
            expected = "text in one line, without control characters"
            raise SweepError(f"hydra.launcher.{key} is {value!r}; expected {expected}.")


def tasks_of(resources: dict[str, Any]) -> int:
    return int(resources["nodes"] or 1) * int(resources["tasks_per_node"] or 1)
