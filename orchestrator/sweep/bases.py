"""One choice of config groups, composed by Hydra, from which points are derived."""

from __future__ import annotations

import copy
import os
import pickle
import re
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.defaults_list import create_defaults_list
from hydra.conf import ConfigSourceInfo
from hydra.core.utils import JobRuntime
from hydra.types import RunMode
from omegaconf import (
    Container,
    DictConfig,
    ListConfig,
    OmegaConf,
    UnionNode,
    open_dict,
    read_write,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hydra._internal.config_repository import CachingConfigRepository
    from hydra.core.override_parser.types import Override
    from omegaconf import Node

_CALLS_RESOLVER = re.compile(r"\$\{[^}]*:")
_PLAIN = (str, int, float, bool, bytes, Path, Enum, type(None))


class Base:
    """A composition without value overrides, and the means to copy it.

    Args:
        config: the whole config as Hydra has it just before it applies value overrides;
            owned by this object from here on.
    """

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self._fresh = _copier(config)

    def copy(self) -> DictConfig:
        """A copy of the whole config, to be changed at will."""
        return self._fresh()

    def copy_task(self) -> DictConfig:
        """A copy of the config without its ``hydra`` node."""
        return self._fresh_task()

    def take(self) -> DictConfig:
        """The config itself; this object must not be used again."""
        return self._config

    @cached_property
    def _fresh_task(self) -> Callable[[], DictConfig]:
        return _copier(without_hydra(self.copy()))


def without_hydra(config: DictConfig) -> DictConfig:
    """The same object with its ``hydra`` node removed, as Hydra does before a task."""
    with read_write(config), open_dict(config):
        del config["hydra"]
    return config


def _copier(config: DictConfig) -> Callable[[], DictConfig]:
    # Unpickling costs a fifth of deepcopy; classes made inside a function cannot be pickled.
    try:
        data = pickle.dumps(config, pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001 - any class may refuse in its own way
        return partial(copy.deepcopy, config)
    return partial(pickle.loads, data)


def compose_base(
    loader: ConfigLoaderImpl, config_name: str | None, hydra_overrides: list[str], groups: list[str]
) -> Base | None:
    """Compose one choice of config groups the way ``ConfigLoaderImpl`` does.

    Args:
        loader: Hydra's loader.
        config_name: the primary config.
        hydra_overrides: overrides of Hydra's own node, groups and values.
        groups: choices of the task's config groups, in the order given.

    Returns:
        The base, or None where a derived point may differ from Hydra's result.

    Raises:
        Exception: whatever Hydra raises for these overrides.
    """
    loader.ensure_main_config_source_available()
    parsed, repo = loader._parse_overrides_and_create_caching_repo(  # noqa: SLF001
        config_name, [*hydra_overrides, *groups]
    )
    loader.validate_sweep_overrides_legal(parsed, run_mode=RunMode.RUN, from_shell=True)
    defaults = create_defaults_list(
        repo=repo,
        config_name=config_name,
        overrides_list=parsed,
        prepend_hydra=True,
        skip_missing=False,
    )
    config = loader._compose_config_from_defaults_list(defaults.defaults, repo)  # noqa: SLF001
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config.hydra, False)
    apply(defaults.config_overrides, config)
    if _resolves_in_defaults(repo) or not all(_is_plain(node) for node in leaves(config)):
        return None
    config.hydra.overrides.hydra.extend(hydra_overrides)
    with open_dict(config.hydra):
        config.hydra.runtime.choices.update(defaults.overrides.known_choices)
    config.hydra.runtime.version = hydra.__version__
    config.hydra.runtime.version_base = version.getbase()
    config.hydra.runtime.config_sources = [
        ConfigSourceInfo(path=source.path, schema=source.scheme(), provider=source.provider)
        for source in repo.get_sources()
    ]
    # Hydra's own composition starts from an empty cache and takes the master's at its end.
    OmegaConf.clear_cache(config)
    return Base(config)


def apply(overrides: list[Override], config: DictConfig) -> None:
    """Apply value overrides in place, in Hydra's own way."""
    ConfigLoaderImpl._apply_overrides_to_config(overrides, config)  # noqa: SLF001


def finish(config: DictConfig, task: Sequence[Override], config_name: str | None) -> None:
    """Set, in place, the parts of the ``hydra`` node that differ from point to point."""
    node = config.hydra
    node.overrides.task.extend([override.input_line for override in task])
    with open_dict(node):
        for key in node.job.env_copy:
            node.job.env_set[key] = os.environ[key]
    node.runtime.cwd = os.getcwd()  # noqa: PTH109 - Hydra's own call, byte for byte
    if "name" not in node.job:
        node.job.name = JobRuntime.instance().get("name")
    dirname = node.job.config.override_dirname
    node.job.override_dirname = get_overrides_dirname(
        overrides=list(task),
        kv_sep=dirname.kv_sep,
        item_sep=dirname.item_sep,
        exclude_keys=dirname.exclude_keys,
    )
    node.job.config_name = config_name


def leaves(node: Node | None) -> Iterator[Node]:
    """All nodes below (and at) ``node`` that hold no other node."""
    content: Any = None if node is None else node.__dict__.get("_content")
    if isinstance(node, DictConfig) and isinstance(content, dict):
        for child in content.values():
            yield from leaves(child)
    elif isinstance(node, ListConfig) and isinstance(content, list):
        for child in content:
            yield from leaves(child)
    elif node is not None:
        yield node


def _is_plain(node: Node) -> bool:
    """Whether a copy of the node is as good as the node (an arbitrary object's may not be)."""
    if isinstance(node, UnionNode):
        return True
    return isinstance(node, Container) or isinstance(node._value(), _PLAIN)  # noqa: SLF001


def _resolves_in_defaults(repo: CachingConfigRepository) -> bool:
    """Whether a defaults list calls a resolver, whose answer may change with time."""
    return any(
        _CALLS_RESOLVER.search(repr(default))
        for result in repo.cache.values()
        if result is not None
        for default in result.defaults_list or ()
    )
