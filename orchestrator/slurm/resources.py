"""What each run's job asks Slurm for."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from orchestrator.slurm.amounts import minutes_of
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
        self._varying = [key for key in RESOURCES if "${" in json.dumps(raw.get(key), default=str)]
        # What holds for all runs is refused once, before anything is done.
        checked({k: v for k, v in self._common.items() if k not in self._varying})

    def of(self, config: DictConfig) -> dict[str, Any]:
        """The resources of one run; its whole config is asked where they may differ."""
        own = {
            key: _plain(OmegaConf.select(config, f"hydra.launcher.{key}", throw_on_missing=True))
            for key in self._varying
        }
        resources = checked({**self._common, **own})
        # A job is not warned before it has had half of its time.
        half = 30 * float(resources["timeout_min"])
        resources["signal_delay_s"] = int(min(resources["signal_delay_s"], half))
        return resources


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def checked(resources: dict[str, Any]) -> dict[str, Any]:
    """Resources as sbatch can take them: a time limit is in minutes.

    Args:
        resources: by the launcher's keys; some may be missing.

    Raises:
        SweepError: what one of them is, and what it should be.
    """
    check_text(resources)
    for key in resources.get("additional_parameters") or {}:
        if not re.fullmatch(r"[A-Za-z][\w-]*", str(key)):
            expected = "options of sbatch without their dashes"
            raise SweepError(
                f"hydra.launcher.additional_parameters has {key!r}; expected {expected}."
            )
        if (name := str(key).replace("_", "-")) in _NOT_ADDITIONAL:
            raise SweepError(
                f"hydra.launcher.additional_parameters has {name!r}; {_NOT_ADDITIONAL[name]}."
            )
    for key, (is_fine, expected) in _EXPECTED.items():
        value = resources.get(key)
        if value is not None and not is_fine(value):
            raise SweepError(f"hydra.launcher.{key} is {value!r}; expected {expected}.")
    memory = [
        key for key in ("mem_gb", "mem_per_cpu", "mem_per_gpu") if resources.get(key) is not None
    ]
    if len(memory) > 1:
        both = " and ".join(f"hydra.launcher.{key}" for key in memory)
        raise SweepError(f"{both} are set; Slurm takes one of them. Set the others to null.")
    if "timeout_min" not in resources:
        return resources
    minutes = minutes_of(resources["timeout_min"])
    if minutes is None:
        expected = "minutes, or a time as Slurm writes it (HH:MM:SS, D-HH:MM:SS)"
        got = repr(resources["timeout_min"])
        raise SweepError(f"hydra.launcher.timeout_min is {got}; expected {expected}.")
    return {**resources, "timeout_min": math.ceil(minutes)}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_gpus(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"\d+|[\w.:-]+(,[\w.:-]+)*", value) is not None
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_memory(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and value >= 0


_TAKEN = "that is the launcher's own to say: leave it out"
# What sbatch would be told twice, by key or by letter.
_NOT_ADDITIONAL = {
    **dict.fromkeys(("time", "t"), "set hydra.launcher.timeout_min instead"),
    "signal": "set hydra.launcher.signal_delay_s instead",
    **dict.fromkeys(("array", "a"), "set hydra.launcher.array_parallelism instead"),
    **dict.fromkeys(("nodes", "N"), "set hydra.launcher.nodes instead"),
    **dict.fromkeys(
        ("ntasks", "n", "ntasks-per-node"), "set hydra.launcher.tasks_per_node instead"
    ),
    **dict.fromkeys(
        (
            "output",
            "o",
            "error",
            "e",
            "open-mode",
            "parsable",
            "wait",
            "W",
            "wrap",
            "clusters",
            "M",
        ),
        _TAKEN,
    ),
}
_COUNT = (_is_count, "a whole number, 1 or more")
_GPUS = (_are_gpus, "a number of GPUs, or a type and a number (a100:2)")
_EXPECTED = {
    "nodes": _COUNT,
    "tasks_per_node": _COUNT,
    "cpus_per_task": _COUNT,
    "cpus_per_gpu": _COUNT,
    "gpus_per_node": _GPUS,
    "gpus_per_task": _GPUS,
    "mem_gb": (_is_memory, "GB as a number (for other units: hydra.launcher.mem_per_cpu=4000M)"),
}


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
