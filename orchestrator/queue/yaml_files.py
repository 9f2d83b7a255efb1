"""The three files in ``.hydra/``, as OmegaConf writes them but by libyaml's emitter.

PyYAML's own emitter takes several times as long as everything else Hydra does for a job.
libyaml writes the same bytes for plain text; where a text might be folded, escaped or
quoted differently, OmegaConf's own way is taken.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_omega_conf_dumper

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig, ListConfig

# Printable ASCII and line ends; the two emitters break long lines at the same spaces.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_./@-]{1,100}")
_SAME_IN_BOTH = re.compile(r"[\x20-\x7e\n]*")


def save_configs(directory: Path, task: DictConfig, hydra: DictConfig) -> None:
    """Write ``config.yaml``, ``hydra.yaml`` and ``overrides.yaml``.

    Args:
        directory: Hydra's output subdirectory; made if missing.
        task: the task's config.
        hydra: the config with Hydra's node alone.
    """
    directory.mkdir(exist_ok=True)
    for name, node in (
        ("config.yaml", task),
        ("hydra.yaml", hydra),
        ("overrides.yaml", hydra.hydra.overrides.task),
    ):
        (directory / name).write_text(to_yaml(node), encoding="utf-8")


def to_yaml(config: DictConfig | ListConfig) -> str:
    """What ``OmegaConf.to_yaml(config)`` returns, byte for byte."""
    dumper = _fast_dumper()
    if dumper is None:
        return OmegaConf.to_yaml(config)
    content = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    if not _is_plain(content):
        return OmegaConf.to_yaml(config)
    text: str = yaml.dump(
        content, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=dumper
    )
    return text


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return _SAME_IN_BOTH.fullmatch(value) is not None
    if isinstance(value, dict):
        return all(_is_plain_key(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float))


def _is_plain_key(key: Any) -> bool:
    return isinstance(key, str) and _PLAIN_KEY.fullmatch(key) is not None


@lru_cache(maxsize=1)
def _fast_dumper() -> Any:
    """OmegaConf's dumper on libyaml's emitter; None where PyYAML was built without it."""
    emitter = getattr(yaml, "CDumper", None)
    if emitter is None:
        return None
    original = get_omega_conf_dumper()
    names = ("yaml_representers", "yaml_multi_representers")
    return type("FastDumper", (emitter,), {name: getattr(original, name) for name in names})
