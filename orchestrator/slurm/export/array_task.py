"""``python -m orchestrator.slurm.export.array_task LIST [OFFSET]``: one task of an exported array.

It becomes the command of the run that the list names for ``$SLURM_ARRAY_TASK_ID``, with
``hydra/launcher=slurm_array_task`` as its launcher. Standard library only: each task waits for it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LAUNCHER = "hydra/launcher=slurm_array_task"
_TASK = "SLURM_ARRAY_TASK_ID"


def dump_list(head: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> bytes:
    """A run list: what all runs share in the first line, then a line for each run.

    Args:
        head: ``cwd``, ``sweep_id``, ``kill_wait_s``, ``shared`` (whether runs share a task),
            ``queue`` (settings of the local queue).
        runs: first ``task`` (the number in the array), then ``index`` (in the sweep), ``name``,
            ``directory``, ``overrides``, ``words`` (the command line of this run alone).
    """
    # (ASCII: words that are not UTF-8 come back as they were.)
    return "".join(f"{json.dumps(line)}\n" for line in (head, *runs)).encode("ascii")


def read_task(path: str, task: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a run list says of all runs, and the runs of one task.

    Raises:
        OSError: there is no such file.
        ValueError: it is no run list.
    """
    # Only the lines that are wanted are parsed: there may be many.
    start = f'{{"task": {task}, '
    with open(path, encoding="ascii") as lines:  # noqa: PTH123
        head = json.loads(next(lines, ""))
        return head, [json.loads(line) for line in lines if line.startswith(start)]


def quoted(text: str) -> str:
    """A text as the value of an override, whatever is in it."""
    # A backslash counts only before a quote, and before an interpolation.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (found[2] and "\\'"), text)
    return "'" + escaped.replace("${", "\\${") + "'"


def task_words(path: str, task: int) -> list[str]:
    """The words that say which task it is; see `orchestrator.slurm.export.array_queue`."""
    return [
        LAUNCHER,
        f"hydra.launcher.array_list={quoted(path)}",
        f"hydra.launcher.array_task={task}",
    ]


def main() -> None:
    """Become the command of this task."""
    path = os.path.abspath(sys.argv[1])  # noqa: PTH100 - light
    if _TASK not in os.environ:
        sys.exit(f"{_TASK} is not set: submit the script with sbatch, or set it to try one task.")
    task = int(os.environ[_TASK]) + int(sys.argv[2] if len(sys.argv) > 2 else 0)  # noqa: PLR2004
    try:
        head, runs = read_task(path, task)
    except (OSError, ValueError) as error:
        sys.exit(f"The run list cannot be read: {error}. Export the sweep again.")
    if not runs:
        sys.exit(f"{path} has no run for task {task}: see its `task` numbers.")
    print("Runs:", *(run["name"] for run in runs), flush=True)
    os.chdir(head["cwd"])
    # This interpreter, and not the one of the login node: lines before may have chosen another.
    words = [sys.executable, *runs[0]["words"][1:], *task_words(path, task)]
    os.execv(sys.executable, words)  # noqa: S606


if __name__ == "__main__":
    main()
