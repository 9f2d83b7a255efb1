"""Sweeps of trainings as Hydra plugins. Importing this package loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.run import (
        Preempted,
        attempt,
        is_preempted,
        log_metrics,
        run_dir,
        run_in,
        save_arrays,
    )

__version__ = "0.1.0"
__all__ = [
    "Preempted",
    "__version__",
    "attempt",
    "is_preempted",
    "log_metrics",
    "run_dir",
    "run_in",
    "save_arrays",
]

_HOME = {name: "orchestrator.run" for name in __all__ if name != "__version__"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        msg = f"module 'orchestrator' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
