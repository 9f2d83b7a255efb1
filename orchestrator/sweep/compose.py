"""Fast composition: Hydra's own result, without composing from files for every point."""

from __future__ import annotations

import re
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, ListConfig, OmegaConf

from orchestrator.overrides import parse_override
from orchestrator.sweep import bases
from orchestrator.sweep.frozen import freeze

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hydra._internal.config_repository import CachingConfigRepository
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override
    from omegaconf import Node

    from orchestrator.sweep.bases import Base

_HYDRA_KEY = re.compile(r"hydra(?![\w-])")
_PLAIN_KEY = re.compile(r"[\w$-]+(\.[\w$-]+)*")
# A base is about 300 KB; a sweep rarely meets more choices of groups than this at once.
_MAX_BASES = 256
_MAX_OVERRIDES = 65_536


class _Plan(NamedTuple):
    """A point's overrides, told apart."""

    groups: tuple[str, ...]
    values: list[Override]
    task: list[Override]


class _UnsureError(Exception):
    """Derivation might differ from Hydra's composition here."""


class Composer:
    """Composes the points of one sweep.

    Hydra composes once per distinct choice of config groups; a point is a copy of that,
    with its value overrides applied by Hydra's own function. Whatever cannot be derived with
    certainty (anything under ``hydra``, sweeps, defaults lists that call resolvers, keys
    reached through an interpolation, objects as values) is composed by Hydra in full.
    All YAML files are held in memory from construction on.

    Args:
        config_loader: Hydra's loader (``hydra_context.config_loader``); it is not changed.
        master: the sweep's own config, as the sweeper or launcher got it. Its overrides of
            Hydra's node are read now, its cache of resolved values at each composition.
    """

    def __init__(self, config_loader: ConfigLoader, master: DictConfig) -> None:
        self.loader = freeze(config_loader)
        self._master = master
        hydra_overrides: Any = OmegaConf.to_container(master.hydra.overrides.hydra)
        self._hydra_overrides: list[str] = hydra_overrides
        self._config_name: str | None = master.hydra.job.config_name
        self._repo = self._open_repo()
        self._bases: OrderedDict[tuple[str, ...], Base | None] = OrderedDict()
        self._kinds: dict[str, tuple[Override, bool] | None] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Compose one point.

        Returns:
            A new config equal to ``config_loader.load_sweep_config(master, overrides)``.

        Raises:
            Exception: what Hydra raises for these overrides, unchanged.
        """
        # Hydra, asked again, gives its own error, or its own result where only we failed.
        with suppress(Exception):
            return self._derive(overrides, in_place=False)
        return self._compose_in_full(overrides)

    def compose_in_place(self, overrides: Sequence[str]) -> DictConfig:
        """Compose one point as :meth:`compose`, using up the base instead of copying it.

        It is meant for a process that composes one point and ends; a later call for the same
        choice of groups composes the base anew.
        """
        with suppress(Exception):
            return self._derive(overrides, in_place=True)
        return self._compose_in_full(overrides)

    def prepare(self, overrides: Sequence[str]) -> None:
        """Have the base of a point in memory, for processes forked from this one.

        Raises nothing: composing the point will, if there is a reason.
        """
        with suppress(Exception):
            self._base(self._plan(overrides).groups)

    def task_config(self, overrides: Sequence[str]) -> DictConfig:
        """The task's part of one point, for a fingerprint or a check.

        It has the content, types and flags of ``compose(overrides)`` without its ``hydra``
        node, and nothing is resolved. Interpolations of Hydra's node (``${hydra.job.name}``)
        cannot be resolved in it, and it carries no cache of resolved values.

        Raises:
            Exception: what Hydra raises for these overrides, unchanged; what only concerns the
                ``hydra`` node, such as a missing variable of ``hydra.job.env_copy``, is not seen.
        """
        with suppress(Exception):
            plan = self._plan(overrides)
            config = self._base(plan.groups).copy_task()
            _apply(plan.values, config)
            return config
        config = bases.without_hydra(self._compose_in_full(overrides))
        OmegaConf.clear_cache(config)
        return config

    def known(self, overrides: Sequence[str]) -> dict[str, Any]:
        """What was found out about overrides, to be sent to a fork of this process."""
        return {text: self._kinds[text] for text in overrides if text in self._kinds}

    def learn(self, known: dict[str, Any]) -> None:
        """Take in what `known` gave in the process that this one was forked from."""
        self._kinds.update(known)

    def chooses_group(self, override: str) -> bool:
        """Whether an override chooses a config group, or is of a kind only Hydra can judge."""
        with suppress(Exception):
            kind = self._kind(override)
            return kind is None or kind[1]
        return True

    def _compose_in_full(self, overrides: Sequence[str]) -> DictConfig:
        return self.loader.load_sweep_config(self._master, list(overrides))

    def _derive(self, overrides: Sequence[str], *, in_place: bool) -> DictConfig:
        plan = self._plan(overrides)
        base = self._base(plan.groups)
        if in_place:
            del self._bases[plan.groups]
        config = base.take() if in_place else base.copy()
        _apply(plan.values, config)
        bases.finish(config, plan.task, self._config_name)
        OmegaConf.copy_cache(from_config=self._master, to_config=config)
        return config

    def _base(self, groups: tuple[str, ...]) -> Base:
        if groups not in self._bases:
            assert isinstance(self.loader, ConfigLoaderImpl)
            self._bases[groups] = None  # stays so if this fails: then Hydra composes in full
            self._bases[groups] = bases.compose_base(
                self.loader, self._config_name, self._hydra_overrides, list(groups)
            )
            if len(self._bases) > _MAX_BASES:
                self._bases.popitem(last=False)
        self._bases.move_to_end(groups)
        base = self._bases[groups]
        if base is None:
            raise _UnsureError
        return base

    def _plan(self, overrides: Sequence[str]) -> _Plan:
        groups, values, task = [], [], []
        for text in overrides:
            kind = self._kind(text)
            if kind is None:
                raise _UnsureError
            override, is_group = kind
            task.append(override)
            if is_group:
                groups.append(text)
            else:
                values.append(override)
        return _Plan(tuple(groups), values, task)

    def _kind(self, text: str) -> tuple[Override, bool] | None:
        """The override and whether it chooses a group; None if Hydra should judge."""
        if text not in self._kinds:
            if len(self._kinds) >= _MAX_OVERRIDES:
                self._kinds.clear()
            self._kinds[text] = self._judge(parse_override(text))
        return self._kinds[text]

    def _judge(self, override: Override) -> tuple[Override, bool] | None:
        key = override.key_or_group
        if self._repo is None or override.is_sweep_override() or _HYDRA_KEY.match(key):
            return None
        # The same question, in the same words, as in Hydra's `Overrides`.
        if not isinstance(override.value(), dict) and self._repo.group_exists(key):
            return override, True
        if override.package is not None or not _PLAIN_KEY.fullmatch(key):
            return None
        return override, False

    def _open_repo(self) -> CachingConfigRepository | None:
        """The sources as composition sees them, or None if nothing can be derived."""
        if type(self.loader) is not ConfigLoaderImpl:
            return None
        with suppress(Exception):
            return self.loader._parse_overrides_and_create_caching_repo(  # noqa: SLF001
                self._config_name, self._hydra_overrides
            )[1]
        return None


def _apply(overrides: list[Override], config: DictConfig) -> None:
    for override in overrides:
        if _reads_interpolation(override, config):
            raise _UnsureError
        bases.apply([override], config)


def _reads_interpolation(override: Override, config: DictConfig) -> bool:
    """Whether applying an override may resolve an interpolation.

    That could reach into the ``hydra`` node, which at this moment is not what it is in Hydra.
    """
    value = override.value()
    if override.is_delete() and value is not None:
        return True
    node: Node | None = config
    *parents, last = override.key_or_group.split(".")
    for part in parents:
        node = _child(node, part)
        if node is None:
            return False
        if node._is_interpolation():  # noqa: SLF001
            return True
    node = _child(node, last)
    if node is None:
        return False
    if isinstance(value, (dict, list)):
        return any(leaf._is_interpolation() for leaf in bases.leaves(node))  # noqa: SLF001
    reads = override.is_add() or override.is_delete()
    return reads and node._is_interpolation()  # noqa: SLF001


def _child(node: Node | None, key: str) -> Node | None:
    found: Node | list[Node | None] | None = None
    if isinstance(node, DictConfig):
        found = node._get_node(key, validate_access=False)  # noqa: SLF001
    elif isinstance(node, ListConfig):
        found = node._get_node(int(key), validate_access=False)  # noqa: SLF001
    return None if isinstance(found, list) else found
