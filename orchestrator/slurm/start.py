"""The first process of a Slurm job (of each of its tasks): ``python -m orchestrator.slurm.start STEM``.

It reads what the job is to do from ``STEM_<array index>.pkl``. Kept light: every job pays for it.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.slurm.pack import Pack


def pack_file(stem: str, index: str | int) -> str:
    """Where the pack of one array task is; a job that is no array has index 0."""
    return f"{stem}_{index}.pkl"


def main() -> None:
    """Do what the pack says; the exit status is 0 if all of it went well."""
    # What is imported stays: there is nothing to collect until the first run.
    gc.disable()
    path = pack_file(sys.argv[1], os.environ.get("SLURM_ARRAY_TASK_ID") or 0)
    with open(path, "rb") as file:  # noqa: PTH123
        if os.fstat(file.fileno()).st_uid != os.getuid():
            sys.exit(f"{path} is another user's: what it says is not done.")
        pack: Pack = pickle.load(file)  # noqa: S301 - our own launcher has written it
    gc.enable()
    pack(path)


if __name__ == "__main__":
    main()
