"""The function that a config names by a dotted path: found, or a sentence on what is wrong."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.record import ErrorInfo


def find_function(path: str, key: str) -> Any:
    """What a dotted path names.

    Args:
        path: ``package.module.function``, as Hydra's ``get_method`` takes it.
        key: the key of the config that names it, for the text of an error.

    Raises:
        OrchestratorError: there is no such module or function, it is something else, or its
            module cannot be imported.
    """
    module, rest = _nearest_module(path, key)
    found: Any = module
    holder = module.__name__
    for name in rest:
        if not hasattr(found, name):
            hint = _suggestion(holder, _names_in(found), name)
            raise OrchestratorError(f"{key}={path}: {holder} has no {name!r}.{hint}")
        found, holder = getattr(found, name), f"{holder}.{name}"
    if not callable(found):
        kind = "a module" if isinstance(found, ModuleType) else f"of type {type(found).__name__}"
        hint = _suggestion(path, _own_functions(found), "")
        raise OrchestratorError(
            f"{key}={path} is {kind}, expected a function that takes the config.{hint}"
        )
    return found


def _nearest_module(path: str, key: str) -> tuple[ModuleType, list[str]]:
    """The module that the path lies in, imported, and what of the path follows."""
    parts = path.split(".")
    if not all(parts):
        raise OrchestratorError(f"{key}={path} is not a dotted path such as my_project.train.train")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        try:
            return importlib.import_module(name), parts[end:]
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise _broken(path, key, error) from error
        except Exception as error:
            raise _broken(path, key, error) from error
    raise OrchestratorError(
        f"{key}={path}: there is no module {parts[0]!r}; modules are looked for in the current "
        f"directory and in what is installed.{_suggestion('', _modules_here(), parts[0])}"
    )


def _modules_here() -> list[str]:
    """What can be imported from the current directory."""
    return [entry.stem for entry in Path.cwd().iterdir() if entry.is_dir() or entry.suffix == ".py"]


def _broken(path: str, key: str, error: Exception) -> OrchestratorError:
    if isinstance(error, SyntaxError):
        file, line, text = error.filename, error.lineno, f"SyntaxError: {error.msg}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith("<frozen")]
        file, line, text = own[-1].filename, own[-1].lineno, ErrorInfo.of(error).line
    return OrchestratorError(f"{key}={path}: its import failed: {text} ({file}, line {line})")


def _names_in(found: Any) -> list[str]:
    names = [name for name in dir(found) if not name.startswith("_")]
    if isinstance(found, ModuleType) and hasattr(found, "__path__"):
        names += [module.name for module in pkgutil.iter_modules(found.__path__)]
    return names


def _own_functions(found: Any) -> list[str]:
    """The functions that a module defines itself."""
    if not isinstance(found, ModuleType):
        return []
    return [
        name
        for name, value in vars(found).items()
        if callable(value)
        and getattr(value, "__module__", "") == found.__name__
        and not name.startswith("_")
    ]


def _suggestion(prefix: str, names: list[str], wanted: str) -> str:
    """`` Did you mean …?`` with the nearest names; with all (three), where nothing was named."""
    near = difflib.get_close_matches(wanted, names, n=3) if wanted else names[:3]
    paths = [f"{prefix}.{name}" if prefix else name for name in near]
    return f" Did you mean {' or '.join(paths)}?" if paths else ""
