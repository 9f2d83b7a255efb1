"""What makes two runs the same run: the composed task config, less the keys to ignore."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.errors import OrchestratorError
from orchestrator.naming import run_name
from orchestrator.overrides import as_typed, hyperparams
from orchestrator.resolvers import RUN_NAME_RESOLVER
from orchestrator.settings import NamingSettings, ResultsSettings
from orchestrator.store import own_directory, planned_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class Identity:
    """A run's fingerprint, its readable name and the values that it was asked to vary."""

    fingerprint: str
    name: str
    hyperparams: dict[str, Any]
    seed: int | None


def identify(
    config: DictConfig, overrides: Sequence[str], settings: ResultsSettings, app: str = ""
) -> Identity:
    """Who a run is.

    Args:
        config: its composed config; the ``hydra`` node, if it is there, does not count.
        overrides: its task overrides, as typed.
        settings: the keys to ignore and the naming table.
        app: Hydra's job name (``hydra.job.name``), by default that of the app's file.
    """
    digest = fingerprint(plain_task(config), settings.ignore, app)
    values = hyperparams(overrides, settings.ignore)
    return Identity(
        fingerprint=digest,
        name=run_name(values, settings.naming, digest),
        hyperparams=values,
        seed=_seed(config, settings.seed_key),
    )


def _seed(config: DictConfig, key: str) -> int | None:
    with contextlib.suppress(OmegaConfBaseException):
        seed = OmegaConf.select(config, key, throw_on_missing=False)
        if isinstance(seed, int) and not isinstance(seed, bool):
            return seed
    return None


def plain_task(config: DictConfig) -> dict[Any, Any]:
    """The task part of a composed config as plain containers, interpolations unresolved."""
    content: dict[Any, Node] = config.__dict__["_content"]
    return {
        key: OmegaConf.to_container(node, resolve=False)
        if isinstance(node, (DictConfig, ListConfig))
        else _leaf(node)
        for key, node in content.items()
        if key != "hydra"
    }


def _leaf(node: Any) -> Any:
    """The value of a leaf that is not to be resolved; one of a union type is wrapped twice."""
    while isinstance(node, Node):
        node = node._value()  # noqa: SLF001 - the only way
    return node


def fingerprint(task: dict[Any, Any], ignore: Iterable[str] = (), app: str = "") -> str:
    """32 hexadecimal digits over the *unresolved* config: ``${now:}`` must not change it.

    Args:
        task: plain containers, as from `plain_task`; the keys to ignore are taken out of it.
        ignore: dotted keys that are not part of the identity.
        app: Hydra's job name; two apps with the same config may share an outputs directory.
    """
    for key in ignore:
        _drop(task, key.split("."))
    text = json.dumps([app, _canonical(task)], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def memory_shape(
    config: DictConfig, settings: ResultsSettings, app: str, keys: Sequence[str] | None
) -> str:
    """A digest of what decides on the memory that a run takes.

    Args:
        config: the run's composed config.
        settings: the keys that do not count: those to ignore, and the seed.
        app: Hydra's job name.
        keys: the dotted keys that decide; None: all that counts.
    """
    task = plain_task(config)
    if keys is not None:
        values = {key: _select(task, key.split(".")) for key in keys}
        return fingerprint(values, (), app)
    return fingerprint(task, (*settings.ignore, settings.seed_key), app)


def _select(content: Any, path: list[str]) -> Any:
    for part in path:
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _drop(content: Any, path: list[str]) -> None:
    *parents, last = path
    for part in parents:
        if not isinstance(content, dict) or part not in content:
            return
        content = content[part]
    if isinstance(content, dict):
        content.pop(last, None)


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        # JSON would take 1 and "1" for the same key.
        return {
            key if isinstance(key, str) else f"{type(key).__name__}:{key}": _canonical(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (bytes, PurePath)):
        return f"{type(value).__name__}:{value!r}"
    return value


def results_settings(hydra: DictConfig) -> ResultsSettings:
    """The settings in ``hydra.callbacks.results``; the defaults where it is not configured."""
    node = OmegaConf.select(hydra, "callbacks.results", throw_on_missing=False)
    settings = ResultsSettings() if node is None else read_settings(node)
    if settings.resume is None:
        settings.resume = hydra.runtime.choices.get("hydra/output") == "named"
    return settings


def read_settings(node: Any) -> ResultsSettings:
    """Settings from a config node or mapping; fields it does not name keep their defaults."""
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    values: dict[str, Any] = dict(cast("dict[str, Any]", plain))
    known = {field.name for field in fields(ResultsSettings)}
    naming = NamingSettings(**(values.pop("naming", None) or {}))
    chosen = {name: value for name, value in values.items() if name in known}
    return ResultsSettings(**chosen, naming=naming)


def name_in_config(below: str, *, _root_: DictConfig) -> str:
    """The resolver ``${orchestrator.run_name:sweep.dir}``: the name of the run's directory.

    ``below`` is the key in Hydra's node of the directory that it lies in.

    For Hydra's own launchers; ours asks the same functions before a job starts. While a job
    of a sweep is being set up (it has a number) the directory is made and owned; otherwise,
    as under ``--cfg``, nothing is touched.
    """
    hydra = _root_.hydra
    who = identify(_root_, as_typed(hydra), results_settings(hydra), hydra.job.name)
    choose = planned_directory if OmegaConf.is_missing(hydra.job, "num") else own_directory
    parent = OmegaConf.select(hydra, below)
    if parent is None:
        msg = f"${{{RUN_NAME_RESOLVER}:{below}}}: hydra.{below} is not set; expected the runs' parent directory"
        raise OrchestratorError(msg)
    return choose(Path(str(parent)) / who.name, who.fingerprint).name
