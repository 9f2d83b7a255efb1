"""Times as Slurm writes them."""

from __future__ import annotations

import math
import re
from typing import Any

_TIME = re.compile(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?")


def minutes_of(value: Any) -> int | float | None:
    """Minutes of a time limit: a number is minutes, text is read as by sbatch and rounded up.

    ``90`` is minutes, then there are ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM`` and
    ``D-HH:MM:SS``. None for anything else, and for no time at all.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) and value > 0 else None
    seconds = seconds_of(str(value))
    return math.ceil(seconds / 60) if seconds else None


def seconds_of(text: str) -> int | None:
    """A time as Slurm writes it, in seconds; None for anything else."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)
