"""Override strings of Hydra's command line, parsed once each."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


@lru_cache(maxsize=65_536)
def parse_override(text: str) -> Override:
    """Parse one override; the same text is parsed once, for the grammar costs over 0.1 ms.

    Args:
        text: an override as typed, e.g. ``training.epochs=10``, ``+a=1`` or ``~b``.

    Returns:
        Hydra's parsed override. It is shared by all callers: do not change it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


def as_typed(hydra: DictConfig, kind: str = "task") -> tuple[str, ...]:
    """The overrides that a ``hydra`` node records, their interpolations unresolved.

    Args:
        hydra: the node.
        kind: ``task`` or ``hydra``.
    """
    from omegaconf import OmegaConf

    texts: Any = OmegaConf.to_container(hydra.overrides[kind], resolve=False)
    return tuple(texts)


def hyperparams(overrides: Iterable[str], ignore: Iterable[str] = ()) -> dict[str, Any]:
    """What a run was asked to vary: dotted key to plain value, in the order given.

    A deletion (``~key``) is kept as ``{"~key": None}``; keys of Hydra's own node and
    those in ``ignore`` (with everything below them) are left out.
    """
    ignored = tuple(ignore)
    values: dict[str, Any] = {}
    for text in overrides:
        override = parse_override(text)
        key = override.key_or_group
        if override.is_hydra_override() or is_below(key, ignored):
            continue
        if override.is_delete():
            values[f"~{key}"] = None
        else:
            values[key] = override.value()
    return values


def is_below(key: str, roots: tuple[str, ...]) -> bool:
    """Whether a dotted key or config group is one of ``roots`` or lies under one."""
    return any(
        key == root or key.startswith((f"{root}.", f"{root}/", f"{root}@")) for root in roots
    )
