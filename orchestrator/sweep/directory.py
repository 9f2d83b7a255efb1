"""The directory that a sweep writes to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from pathlib import Path


def make_writable(path: Path, setting: str = "hydra.sweep.dir=PATH") -> None:
    """Make a directory, and find out now rather than at the first run's end if it works.

    Args:
        path: the directory.
        setting: what to type for another.

    Raises:
        SweepError: it cannot be made, or not be written in.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".orchestrator.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        msg = (
            f"The outputs directory {path} cannot be written ({error.strerror}). "
            f"Choose another with {setting}."
        )
        raise SweepError(msg) from error
