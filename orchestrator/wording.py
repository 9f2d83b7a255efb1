"""Words that every message shares: how many, and how long."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """``1 run``, ``2 runs``; for all nouns whose plural ends in s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them: ``3.2s``, ``4m05s``, ``2h03m``, ``3d04h``; ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 59.95:  # noqa: PLR2004 - the last that does not read 60.0s
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_rest = divmod(minutes, 60)
    days, hours_rest = divmod(hours, 24)
    if days:
        return f"{days}d{hours_rest:02d}h"
    return f"{hours}h{minutes_rest:02d}m" if hours else f"{minutes}m{rest:02d}s"
