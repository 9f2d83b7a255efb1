"""Config sources held in memory: a YAML edited or deleted while jobs wait changes nothing."""

from __future__ import annotations

import copy
import io
import os
from collections import deque
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.object_type import ObjectType

# A config folder may be a project's root with data and outputs below it. What lies beyond
# these bounds is read, and kept from then on, when a config first asks for it. Launchers
# that pickle the loader pickle these texts with every job.
_MAX_ENTRIES = 20_000
_MAX_BYTES = 4 * 2**20
_MAX_DEPTH = 12


def freeze(config_loader: ConfigLoader) -> ConfigLoader:
    """Return a config loader that answers from what the files held now.

    Folders of YAML files (``file://`` and ``pkg://`` sources, also those of
    ``hydra.searchpath``) are frozen; other sources stay as they are. The given loader is
    not changed. A loader already frozen, or not Hydra's own, is returned itself.
    """
    if type(config_loader) is not ConfigLoaderImpl:
        return config_loader
    if type(config_loader.repository) is not ConfigRepository:
        return config_loader
    frozen = copy.copy(config_loader)
    frozen.repository = FrozenRepository(config_loader.repository)
    return frozen


class FrozenTree:
    """What a folder of YAML files, with all below it, held when it was first looked at.

    Paths are relative to ``root``, with ``/``; one that leaves the root (``../x``) is
    looked up as well, and kept from then on.
    """

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(root)  # noqa: PTH100 - links stay as Hydra sees them
        # Folder to name to whether that is a folder (None: neither folder nor file).
        self._folders: dict[str, dict[str, bool | None]] = {}
        self._texts: dict[str, str] = {}
        self._bytes = 0
        self._exists = Path(self._root).is_dir()
        if self._exists:
            self._read_ahead()

    def is_folder(self, path: str) -> bool:
        """Whether ``path`` was a folder."""
        folder = self._relative(path)
        if not folder:
            return self._exists
        parent, _, name = folder.rpartition("/")
        if name == "..":
            return Path(self.absolute(folder)).is_dir()
        return self._entries(parent).get(name) is True

    def is_file(self, path: str) -> bool:
        """Whether ``path`` was a file."""
        parent, _, name = self._relative(path).rpartition("/")
        return self._entries(parent).get(name) is False

    def names(self, path: str) -> list[str]:
        """The names that the folder ``path`` held."""
        return list(self._entries(self._relative(path)))

    def text(self, path: str) -> str:
        """The text of a file.

        Raises:
            OSError, UnicodeDecodeError: it could not be read, now as when it was frozen.
        """
        file = self._relative(path)
        if file not in self._texts:
            self._texts[file] = _read(self.absolute(file))
        return self._texts[file]

    def absolute(self, path: str) -> str:
        """``path`` on the disk."""
        return os.path.join(self._root, path)  # noqa: PTH118 - an absolute path wins, as in Hydra

    def _relative(self, path: str) -> str:
        relative = os.path.relpath(self.absolute(path), self._root)
        return "" if relative == "." else relative.replace(os.sep, "/")

    def _entries(self, folder: str) -> dict[str, bool | None]:
        if folder not in self._folders:
            if not self.is_folder(folder):
                return {}
            self._folders[folder] = entries = _scan(self.absolute(folder))
            for name, is_folder in entries.items():
                if is_folder is False and name.endswith((".yaml", ".yml")):
                    self._keep_text(f"{folder}/{name}" if folder else name)
        return self._folders[folder]

    def _keep_text(self, file: str) -> None:
        path = self.absolute(file)
        try:
            size = os.stat(path).st_size  # noqa: PTH116 - paths are plain strings here
            if self._bytes + size <= _MAX_BYTES:
                self._texts[file] = _read(path)
                self._bytes += size
        except (OSError, UnicodeDecodeError):
            return  # the same error comes, with Hydra's words, if a config asks for the file

    def _read_ahead(self) -> None:
        queue, seen = deque([""]), 0
        while queue and seen < _MAX_ENTRIES:
            folder = queue.popleft()
            entries = self._entries(folder)
            seen += len(entries)
            if folder and (".hydra" in entries or "multirun.yaml" in entries):
                continue  # what earlier runs wrote
            if folder.count("/") < _MAX_DEPTH:
                queue.extend(
                    f"{folder}/{name}" if folder else name
                    for name, is_folder in entries.items()
                    if is_folder and not name.startswith((".", "__"))
                )


def _scan(folder: str) -> dict[str, bool | None]:
    try:
        with os.scandir(folder) as found:
            return {entry.name: _kind(entry) for entry in found}
    except OSError:
        return {}


def _kind(entry: os.DirEntry[str]) -> bool | None:
    try:
        return True if entry.is_dir() else False if entry.is_file() else None
    except OSError:
        return None


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:  # noqa: PTH123 - half the cost of Path.open
        return file.read()


class _NamedText(io.StringIO):
    """A text whose YAML errors name the file that it came from."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


class FrozenSource(ConfigSource):
    """A ``file://`` or ``pkg://`` source that answers from a :class:`FrozenTree`."""

    def __init__(self, source: ConfigSource, tree: FrozenTree) -> None:
        # The base class would cut the scheme off the path, which is cut already.
        self.provider = source.provider
        self.path = source.path
        self._scheme = source.scheme()
        self._available = source.available()
        self._tree = tree

    def scheme(self) -> str:  # type: ignore[override]  # static in Hydra, always called on an instance
        """The scheme of the source that was frozen."""
        return self._scheme

    def load_config(self, config_path: str) -> ConfigResult:
        """Parse the frozen text of a config.

        Raises:
            ConfigLoadError: there was no such file.
        """
        name = self._normalize_file_name(config_path)
        path = os.path.realpath(self._tree.absolute(name))
        if not self._tree.is_file(name):
            raise ConfigLoadError(f"Config not found : {path}")
        text = self._tree.text(name)
        return ConfigResult(
            config=OmegaConf.load(_NamedText(text, path)),
            path=self.full_path(),
            provider=self.provider,
            header=self._get_header_dict(text[:512]),
        )

    def available(self) -> bool:
        """Whether the source could be used when it was frozen."""
        return self._available

    def is_group(self, config_path: str) -> bool:
        """Whether it was a folder."""
        return self._tree.is_folder(config_path)

    def is_config(self, config_path: str) -> bool:
        """Whether it was a YAML file, named with or without its suffix."""
        return self._tree.is_file(self._normalize_file_name(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names of the configs and groups in a group, sorted."""
        found: list[str] = []
        for name in self._tree.names(config_path):
            path = os.path.join(config_path, name)  # noqa: PTH118 - the root's path is ""
            self._list_add_result(found, path, name, results_filter)
        return sorted(set(found))

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenSource:
        return self


class FrozenRepository(ConfigRepository):
    """Hydra's repository over frozen sources."""

    def __init__(self, repository: ConfigRepository) -> None:
        self._trees: dict[str, FrozenTree] = {}
        self.sources = [self._frozen(source) for source in repository.get_sources()]

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        """Take the sources of another search path; Hydra does so for ``hydra.searchpath``."""
        super().initialize_sources(config_search_path)
        self.sources = [self._frozen(source) for source in self.sources]

    def _frozen(self, source: ConfigSource) -> ConfigSource:
        root = _folder_of(source)
        if root is None:
            return source
        if root not in self._trees:
            self._trees[root] = FrozenTree(root)
        return FrozenSource(source, self._trees[root])

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenRepository:
        # Hydra copies the repository for each composition, to give the copy other sources.
        # The frozen trees are shared; so is the schema source, which hands out copies.
        copied = copy.copy(self)
        copied.sources = [
            source
            if type(source).__name__ == "StructuredConfigSource"
            else copy.deepcopy(source, memo)
            for source in self.sources
        ]
        return copied


def _folder_of(source: ConfigSource) -> str | None:
    """The folder on disk that a source of Hydra's own reads, if it reads one."""
    # By name: Hydra executes its source modules twice, so there are two of each class.
    kind = type(source)
    if not kind.__module__.startswith("hydra._internal.core_plugins."):
        return None
    if kind.__name__ == "FileConfigSource":
        return os.path.abspath(source.path)  # noqa: PTH100 - links stay as Hydra sees them
    if kind.__name__ == "ImportlibResourcesConfigSource":
        try:
            files = resources.files(source.path)
        except (ImportError, TypeError, ValueError):
            return None
        return str(files) if isinstance(files, Path) else None
    return None
