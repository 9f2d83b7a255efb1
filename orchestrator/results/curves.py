"""The curve of a run, ``metrics.jsonl``: one JSON object per logged step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK = 8192
# A line that cannot be read in the last megabyte is not a curve of ours.
_LIMIT = 1 << 20


def last_step(path: Path) -> dict[str, Any] | None:
    """The last complete line, read from the end of the file.

    A line that is still being written (no line end yet), or that is not a JSON object, is
    passed over for the one before it. None where there is no such line, or no file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _last_object(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _last_object(descriptor: int) -> dict[str, Any] | None:
    size = os.fstat(descriptor).st_size
    span = _BLOCK
    while True:
        start = max(0, size - span)
        data = os.pread(descriptor, size - start, start)
        # What follows the last line end is half written; what precedes the first is cut,
        # unless the file begins there.
        lines = data.split(b"\n")[:-1]
        for line in reversed(lines if start == 0 else lines[1:]):
            step = _parse(line)
            if step is not None:
                return step
        if start == 0 or span >= _LIMIT:
            return None
        span *= 4


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        step = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return step if isinstance(step, dict) else None
