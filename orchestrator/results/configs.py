"""What a run's saved config says: ``.hydra/config.yaml`` and ``.hydra/hydra.yaml``.

These are read only where records alone do not tell runs apart: parsing them costs more than
all the rest.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.store import read_bytes

if TYPE_CHECKING:
    from orchestrator.results.reading import FoundRun

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Absent:
    """What a config has where it has nothing; None is a value."""


ABSENT = Absent()


class SavedConfig:
    """The config of one run, its interpolations unresolved; each file is read when needed."""

    def __init__(self, run: FoundRun) -> None:
        self._files = run.files.path / ".hydra"
        self._task: Any = None
        self._nodes: dict[str, Any] = {}

    def text(self) -> str:
        """The task's config as saved; empty where nothing was saved."""
        return self._read("config.yaml")

    def leaves(self) -> dict[str, Any]:
        """Dotted key to value; a list is one value."""
        found: dict[str, Any] = {}
        _collect(self._parsed(), "", found)
        return found

    def value(self, key: str) -> Any:
        """What a hyperparameter of this name was; `ABSENT` where the config has no such key.

        A config group's is the name of its choice, not all that the choice brought.
        """
        value = self._parsed()
        for part in key.split("."):
            value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
        if value is ABSENT or isinstance(value, dict):
            choices = self._node("runtime").get("choices")
            choice = choices.get(key, ABSENT) if isinstance(choices, dict) else ABSENT
            return choice if choice is not ABSENT else value
        return value

    @property
    def app(self) -> str:
        """Hydra's job name."""
        return str(self._node("job").get("name") or "")

    @property
    def ignored(self) -> tuple[str, ...]:
        """The keys that were not part of the run's identity."""
        results = self._node("callbacks").get("results")
        keys = results.get("ignore") if isinstance(results, dict) else None
        return tuple(map(str, keys)) if isinstance(keys, list) else ()

    def _parsed(self) -> Any:
        if self._task is None:
            content = _parse(self.text())
            self._task = content if isinstance(content, dict) else {}
        return self._task

    def _node(self, name: str) -> dict[str, Any]:
        """A node right below ``hydra``; the file is long, so only that part is parsed."""
        if name not in self._nodes:
            found = re.search(rf"(?m)^  {name}:.*\n(?:   .*\n)*", self._read("hydra.yaml"))
            parsed = _parse(found.group()) if found else None
            node = parsed.get(name) if isinstance(parsed, dict) else None
            self._nodes[name] = node if isinstance(node, dict) else {}
        node = self._nodes[name]
        assert isinstance(node, dict)
        return node

    def _read(self, name: str) -> str:
        try:
            return read_bytes(self._files / name).decode("utf-8", "replace")
        except OSError:
            return ""


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - both loaders are safe ones
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _collect(value: Any, prefix: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            _collect(item, f"{prefix}.{key}" if prefix else str(key), found)
    elif prefix:
        found[prefix] = value
