"""For simulated jobs: take memory of a stubbed GPU. Needs nothing but the standard library.

sys.path.insert(0, os.environ["NVML_STUB_TOOLS"])
import use_gpu
end = use_gpu.occupy(2 * 10**9)
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

_numbers = itertools.count()


def visible():
    """The UUIDs that CUDA_VISIBLE_DEVICES names; without it, the first GPU."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is not None:
        return [word.strip() for word in mask.split(",") if word.strip()]
    lines = (Path(os.environ["NVML_STUB_DIR"]) / "gpus").read_text().splitlines()
    return [line.split("|")[0] for line in lines[:1]]


def occupy(size, delay=0.0, linger=0.0, uuids=None):
    """Use ``size`` bytes of each visible GPU, from ``delay`` seconds on, while this process lives.

    Returns what ends it; the memory (without the process) then stays for ``linger`` seconds.
    """
    uuids, pid = visible() if uuids is None else uuids, os.getpid()
    path = Path(os.environ["NVML_STUB_DIR"]) / f"use-{pid}-{next(_numbers)}"
    begin = time.time() + delay
    _write(path, [f"{uuid} {pid} {size} {begin} inf" for uuid in uuids])

    def end():
        until = time.time() + linger
        if linger > 0:
            _write(path, [f"{uuid} 0 {size} {begin} {until}" for uuid in uuids])
        else:
            path.unlink(missing_ok=True)

    return end


def _write(path, lines):
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(f"{line}\n" for line in lines))
    new.replace(path)
