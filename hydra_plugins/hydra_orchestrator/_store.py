"""Configs for Hydra's store that are made when somebody asks for them.

Hydra imports (and runs a second time) our plugin modules at each start of every Hydra app on the
machine, most of which never look at our configs: those apps are not to pay for them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf


class _ConfigToBe(ConfigNode):
    """A `ConfigNode` whose config comes to be when it is first read."""

    @property
    def node(self) -> DictConfig:
        made: Any = self.__dict__["node"]
        if not isinstance(made, DictConfig):
            module, name, below = made
            settings = getattr(import_module(module), name)
            made = OmegaConf.structured({below: settings} if below else settings)
            self.__dict__["node"] = made
        assert isinstance(made, DictConfig)
        return made

    @node.setter
    def node(self, made: Any) -> None:
        self.__dict__["node"] = made


def store_later(group: str, name: str, settings: str, below: str = "") -> None:
    """Store a structured config under ``group/name``.

    Args:
        group: of Hydra's config groups.
        name: of the config.
        settings: its class, as ``module:name``.
        below: the key to put it below, if any.
    """
    module, _, class_name = settings.partition(":")
    folder = ConfigStore.instance().repo
    for part in group.split("/"):
        folder = folder.setdefault(part, {})
    file = f"{name}.yaml"
    node: Any = (module, class_name, below)
    folder[file] = _ConfigToBe(file, node, group, None, "orchestrator")
