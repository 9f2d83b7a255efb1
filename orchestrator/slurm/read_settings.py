"""The launcher's settings, from Hydra's node and a cluster file."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from orchestrator.queue.settings import QueueSettings
from orchestrator.slurm.settings import SlurmSettings
from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Mapping


def read_settings(values: Mapping[str, Any]) -> SlurmSettings:
    """Settings as a launcher is given them.

    What a cluster file says holds where the config still has the default.

    Raises:
        OrchestratorError: the cluster file cannot be read as one.
    """
    plain: dict[str, Any] = {
        name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in values.items()
    }
    for name in plain.keys() - {field.name for field in fields(SlurmSettings)}:
        raise SweepError(
            f"hydra.launcher has no key {name!r}.{_nearest(name)} What else sbatch takes goes into "
            "hydra.launcher.additional_parameters."
        )
    plain["queue"] = QueueSettings(**(plain.get("queue") or {}))
    settings = SlurmSettings(**plain)
    if settings.cluster_file:
        from orchestrator.slurm.cluster_file import read_cluster_file

        _fill_in(settings, read_cluster_file(Path(settings.cluster_file)))
    return settings


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, [field.name for field in fields(SlurmSettings)], n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _fill_in(settings: Any, said: Mapping[str, Any]) -> None:
    """Take in what a file says where the config has the default; mappings key by key."""
    default = type(settings)()
    for name, value in said.items():
        own = getattr(settings, name)
        if name == "queue":
            _fill_in(own, value)
        elif isinstance(value, dict):
            setattr(settings, name, {**value, **own})
        elif own == getattr(default, name):
            setattr(settings, name, value)
