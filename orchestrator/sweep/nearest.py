"""What a mistyped key may have meant."""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from omegaconf import DictConfig

# Hydra's words for a key that the config has not.
_NO_SUCH_KEY = re.compile(r"Could not override '([^']+)'")

_QUESTION = "Did you mean"


def with_nearest_key(
    error: ConfigCompositionException, compose: Callable[[str], DictConfig]
) -> ConfigCompositionException:
    """Hydra's error, and ``Did you mean …?`` where it is about a key that resembles another.

    Args:
        error: the error.
        compose: gives the config that the key is not in, when asked with the key.
    """
    found = _NO_SUCH_KEY.match(str(error))
    keys: list[str] = []
    if found is not None:
        with suppress(Exception):  # there may be more wrong with these overrides
            keys = list(_dotted(OmegaConf.to_container(compose(found.group(1))), ""))
            keys = [key for key in keys if _is_hydras(key) == _is_hydras(found.group(1))]
    near = _near(found.group(1), keys) if found is not None else []
    if not near or _QUESTION in str(error):
        return error
    told = ConfigCompositionException(f"{error}\n{_QUESTION} {' or '.join(near)}?")
    told.__cause__ = error.__cause__
    return told.with_traceback(error.__traceback__)


def _is_hydras(key: str) -> bool:
    return key == "hydra" or key.startswith("hydra.")


def _near(wanted: str, keys: Sequence[str]) -> list[str]:
    near = difflib.get_close_matches(wanted, keys, n=3, cutoff=0.7)
    if near:
        # Beside a very near one the others are not worth reading.
        return near[:1]
    last = wanted.rpartition(".")[2]  # the right word in the wrong place
    return [key for key in keys if key.rpartition(".")[2] == last][:3]


def _dotted(content: Any, prefix: str) -> Iterator[str]:
    if prefix:
        yield prefix
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _dotted(value, f"{prefix}.{key}" if prefix else str(key))
