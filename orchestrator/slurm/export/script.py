"""The sbatch script that ``orchestrator-export slurm`` writes, and the run list beside it."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.slurm.export.array_task import dump_list
from orchestrator.store import write_atomic
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from orchestrator.slurm.export.listed import ListedRun, Listing

# Keys of hydra/launcher=slurm whose values sbatch takes as they are.
_SAME = (
    *("cpus_per_task", "gpus_per_node", "nodes", "partition", "qos", "account", "constraint"),
    *("exclude", "nodelist", "gres", "cpus_per_gpu", "gpus_per_task", "mem_per_gpu"),
    *("mem_per_cpu", "comment"),
)
_NAMES = {"tasks_per_node": "ntasks-per-node", "name": "job-name"}
_OPTION = re.compile(r"[A-Za-z][\w-]*", re.ASCII)

TEMPLATE = """\
#!/bin/bash
{directives}
#
# Written by orchestrator-export: {count} of sweep {sweep_id}.
# What each task runs stands in {list_name} beside this script.
{submit}

cd -- {cwd} || exit 1
{pre}
# Slurm's SIGTERM is for the run, which then writes its record; what follows is still done.
trap : TERM
code=0
{python} -m orchestrator.slurm.export.array_task {list_path} "${{1:-0}}" || code=$?
# Nothing below hides how the run ended.
trap 'exit "$code"' EXIT
{post}"""


@dataclass
class Job:
    """What each task of the array asks for, and what is done around its runs.

    Attributes:
        options: of sbatch, without their dashes; None where one takes no value.
        pre: lines of shell before the runs.
        post: lines of shell after them.
        python: the command that starts Python there; None: the interpreter of the sweep's command.
        parallel: tasks at a time; None: as many as Slurm likes.
        runs_per_task: runs that share a task through the local queue.
        queue: settings of that.
    """

    options: dict[str, str | None] = field(default_factory=dict)
    pre: list[str] = field(default_factory=list)
    post: list[str] = field(default_factory=list)
    python: str | None = None
    parallel: int | None = None
    runs_per_task: int = 1
    queue: dict[str, Any] = field(default_factory=dict)

    def take(self, settings: Mapping[str, Any]) -> None:
        """Take in keys of hydra/launcher=slurm, as a cluster file or a sweep's command has them.

        Raises:
            OrchestratorError: an option of sbatch is none.
        """
        self._take_resources(settings)
        for option, value in (settings.get("additional_parameters") or {}).items():
            self.option(str(option), None if value is True else str(value))
        if settings.get("setup") is not None:
            self.pre = [str(line) for line in settings["setup"]]
        if settings.get("teardown") is not None:
            self.post = [str(line) for line in settings["teardown"]]
        self.python = settings.get("python") or self.python
        self.parallel = settings.get("array_parallelism") or self.parallel
        self.runs_per_task = settings.get("runs_per_job") or self.runs_per_task
        self.queue |= settings.get("queue") or {}

    def _take_resources(self, settings: Mapping[str, Any]) -> None:
        said = {key: value for key, value in settings.items() if value is not None}
        for key in (*_SAME, *_NAMES):
            if key in said:
                self.option(_NAMES.get(key, key.replace("_", "-")), str(said[key]))
        if "timeout_min" in said:
            self.option("time", str(math.ceil(float(said["timeout_min"]))))
        if "mem_gb" in said:
            self.option("mem", f"{math.ceil(float(said['mem_gb']) * 1024)}M")

    def option(self, name: str, value: str | None) -> None:
        """Set an option of sbatch.

        Raises:
            OrchestratorError: it cannot be one.
        """
        if not _OPTION.fullmatch(name):
            raise OrchestratorError(
                f"{name!r} is no option of sbatch; expected a name without dashes, e.g. "
                "time=2:00:00 or exclusive"
            )
        if name == "array":
            raise OrchestratorError(
                "array is not yours to set: --indices says which runs, --parallel how many at a time"
            )
        if value is not None and not value.isprintable():
            raise OrchestratorError(f"option {name} is {value!r}; expected one line of plain text")
        self.options[name] = value


@dataclass(frozen=True)
class Written:
    """The files, and the arrays: an offset for each, and what ``--array`` is to say."""

    script: Path
    run_list: Path
    logs: Path
    arrays: tuple[tuple[int, str], ...]

    def calls(self, script: str) -> list[str]:
        """The lines of shell that submit all of it; the script has the first array in it."""
        words = [
            ("sbatch", f"--array={spec}" if number else "", shlex.quote(script), str(offset or ""))
            for number, (offset, spec) in enumerate(self.arrays)
        ]
        return [" ".join(filter(None, line)) for line in words]


def write_script(
    path: Path,
    job: Job,
    listing: Listing,
    runs: Sequence[ListedRun],
    *,
    array_size: int,
    kill_wait_s: float,
) -> Written:
    """Write the script and its run list, and make the directory of the logs.

    Args:
        path: the script's.
        job: what each task asks for.
        listing: the sweep.
        runs: those to export, at least one.
        array_size: tasks that an array may have, numbered from 0.
        kill_wait_s: seconds between SIGTERM and SIGKILL on the cluster.

    Raises:
        OSError: a file cannot be written.
    """
    path = path.absolute()
    logs = path.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    tasks, data = _run_list(job, listing, runs, kill_wait_s)
    # By its content: tasks of an earlier export that still wait have theirs.
    run_list = path.with_name(f"{path.stem}-{hashlib.sha256(data).hexdigest()[:8]}.jsonl")
    write_atomic(run_list, data)
    arrays = array_calls(tasks, array_size, job.parallel)
    written = Written(path, run_list, logs, tuple(arrays))
    options = {
        "output": f"{logs}/%A_%a.out".replace("%", "%%").replace("%%A_%%a", "%A_%a"),
        **job.options,
        "array": arrays[0][1],
    }
    text = TEMPLATE.format(
        directives="\n".join(map(_directive, options, options.values())),
        count=plural(len(runs), "run"),
        sweep_id=listing.sweep_id,
        list_name=run_list.name,
        submit="\n".join(f"#   {line}" for line in written.calls(path.name)),
        cwd=shlex.quote(listing.cwd),
        pre="".join(f"\n{line}" for line in job.pre) + ("\n" if job.pre else ""),
        python=job.python or shlex.quote(listing.python),
        list_path=shlex.quote(str(run_list)),
        post="".join(f"\n{line}" for line in job.post) + ("\n" if job.post else ""),
    )
    write_atomic(path, text.encode("utf-8", "surrogateescape"))
    return written


def _run_list(
    job: Job, listing: Listing, runs: Sequence[ListedRun], kill_wait_s: float
) -> tuple[list[int], bytes]:
    """Numbers of tasks, and the run list."""
    size = job.runs_per_task
    # A run that has a task alone gives it its number.
    numbers = [run.index if size == 1 else place // size for place, run in enumerate(runs)]
    entries = [
        {
            "task": number,
            "index": run.index,
            "name": run.name,
            "directory": run.directory,
            "overrides": run.overrides,
            "words": run.words,
        }
        for number, run in zip(numbers, runs, strict=True)
    ]
    head = {
        "sweep_id": listing.sweep_id,
        "cwd": listing.cwd,
        "kill_wait_s": kill_wait_s,
        "shared": size > 1,
        "queue": job.queue,
    }
    return sorted(set(numbers)), dump_list(head, entries)


def check_path(path: Path) -> None:
    """Refuse where Slurm would not write logs beside the script.

    Raises:
        OrchestratorError: its text says what the path may not have.
    """
    text = str(path.absolute())
    if not text.isprintable() or "\\" in text:
        raise OrchestratorError(
            f"the script would be {text!r}; expected a path without backslashes and line ends, "
            "which Slurm reads otherwise. Choose another with --output FILE"
        )


def _directive(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={shlex.quote(value)}"


def array_calls(
    tasks: Sequence[int], array_size: int, parallel: int | None = None
) -> list[tuple[int, str]]:
    """Offsets, and for each what ``--array`` is to say.

    Args:
        tasks: numbers, in order.
        array_size: Slurm's MaxArraySize: numbers are smaller.
        parallel: tasks at a time.
    """
    # (Slurm's own default is 1001, of which round offsets use 1000.)
    step = array_size - 1 if array_size % 10 == 1 and array_size > 1 else array_size
    groups: dict[int, list[int]] = {}
    for task in tasks:
        groups.setdefault(task // step * step, []).append(task % step)
    throttle = f"%{parallel}" if parallel else ""
    return [(offset, ranges(numbers) + throttle) for offset, numbers in groups.items()]


def ranges(numbers: Iterable[int]) -> str:
    """``0-5,7`` for numbers in order."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
