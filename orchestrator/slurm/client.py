"""All that is asked of Slurm: through its command-line tools, each with a limit of time.

Their output is made independent of the user's own settings (``SQUEUE_FORMAT`` and its like) and
language. An error means that Slurm could not be asked, never that a job failed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from orchestrator.errors import OrchestratorError
from orchestrator.record import RunState
from orchestrator.slurm.states import Seen, base_of, collapse, expand, translate

# squeue itself gives up on a slurmctld that is down after 9 s.
TIMEOUT_S = 15.0
# sacct itself waits 45 s for a database that hangs, and what it says is only ever a supplement.
ACCOUNTING_TIMEOUT_S = 10.0
ACCOUNTING_PAUSE_S = 60.0
# scancel waits seconds by itself for jobs that are just starting.
_CANCEL_TIMEOUTS = 4
# What clocks of a cluster may differ by.
_CLOCKS_S = 3600.0
# On one command line: an argument may have 128 KiB.
_IDS_PER_CALL = 5000

_QUEUE = "JobArrayID:|,State:|,exit_code:|,RestartCnt:|,NodeList:|,Reason:|"
# Before Slurm 20.02 fields by name could not be told apart.
_OLD_QUEUE = "%i|%T|||%N|%r"
_QUEUE_FIELDS = 6
_OURS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_")
_COMMAND_CHARS = 80

Run = Callable[[Sequence[str], Mapping[str, str], float], "subprocess.CompletedProcess[str]"]


class SlurmUnreachable(OrchestratorError):  # noqa: N818 - reads as what happened
    """Slurm could not be asked: its tools are missing, fail, or do not answer."""


@dataclass(frozen=True)
class Limits:
    """What the cluster's configuration allows; Slurm's defaults where it does not say.

    Attributes:
        max_array_size: tasks in one array, numbered from 0.
        kill_wait_s: seconds between SIGTERM and SIGKILL.
        version: of Slurm; empty where it is unknown.
        requeue: whether jobs may be put back into the queue where sbatch is not told otherwise.
        cluster: its name; empty where it is unknown.
        min_job_age_s: seconds for which squeue knows jobs that ended; 0 is for ever.
    """

    max_array_size: int = 1001
    kill_wait_s: float = 30.0
    version: str = ""
    requeue: bool = True
    cluster: str = ""
    min_job_age_s: float = 300.0


@dataclass(frozen=True)
class Usage:
    """What a job was given: the time of all its tries, and what the last of them had.

    `gpus` is 0 on clusters that do not account for GPUs.
    """

    elapsed_seconds: float
    cpus: int
    gpus: float
    node: str


def _run(
    words: Sequence[str], environ: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
        check=False,
        # The terminal's Ctrl+C is for the launcher, which may want an answer all the more then.
        start_new_session=True,
    )


class SlurmClient:
    """Slurm, as its tools on this machine give it.

    Args:
        timeout_s: for a tool that asks slurmctld.
        accounting_timeout_s: for sacct.
        run: how a tool is run: its words, environment and timeout.
        clock: seconds, of a clock that does not jump.
        environ: the environment of the tools; this process's own by default.
    """

    def __init__(
        self,
        *,
        timeout_s: float = TIMEOUT_S,
        accounting_timeout_s: float = ACCOUNTING_TIMEOUT_S,
        run: Run = _run,
        clock: Callable[[], float] = time.monotonic,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._accounting_timeout_s = accounting_timeout_s
        self._run = run
        self._clock = clock
        self._environ = os.environ if environ is None else environ
        self._queue_format = f"--Format={_QUEUE}"
        self._accounting_from = -float("inf")
        # Jobs that waited when they were last seen.
        self._waiting: set[str] = set()

    def is_there(self) -> bool:
        """Whether jobs can be submitted from this machine."""
        return shutil.which("sbatch", path=self._environ.get("PATH")) is not None

    def poll(self, ids: Iterable[str]) -> dict[str, Seen]:
        """Where these jobs are, as far as slurmctld knows them; it forgets those that ended.

        Tasks that are cancelled before they start leave the queue without a trace; those that
        waited when this was asked before are CANCELLED where all of their array was that waited.

        Raises:
            SlurmUnreachable: squeue fails or does not answer.
        """
        wanted = set(ids)
        rows = list(_read_queue(self._queue())) if wanted else []
        found = _named(rows, wanted)
        self._waiting -= found.keys()
        for task in _withdrawn(rows, wanted & self._waiting):
            found[task] = Seen(RunState.CANCELLED, "CANCELLED")
        self._waiting |= {job for job, seen in found.items() if seen.state is RunState.PENDING}
        return found

    def _queue(self) -> str:
        # --all: partitions may be hidden. One question for all jobs: it does not grow with them.
        words = ("--noheader", "--all", "--states=all", f"--user={os.getuid()}")
        text = self._ask("squeue", *words, self._queue_format)
        if not re.search(r"^\d[^|]*$", text, re.MULTILINE):
            return text
        self._queue_format = f"--format={_OLD_QUEUE}"
        return self._ask("squeue", *words, self._queue_format)

    def ended(self, ids: Iterable[str], since: float = 0.0) -> dict[str, Seen]:
        """How jobs that slurmctld does not know any more ended, as far as accounting knows.

        Tasks that were cancelled before they started need not have an entry of their own: those
        of an array count as cancelled where all of it was that waited. Where tasks went that were
        cancelled while others of their array went on waiting, nobody knows.

        Args:
            ids: jobs that `poll` has not found.
            since: when the first of them was submitted, in seconds of the epoch: ids come again.
        """
        wanted = set(ids)
        table = self._accounting("JobID,State,ExitCode,NodeList", wanted, since)
        rows = list(_read_ends(table))
        named = _named(rows, wanted)
        for task in _withdrawn(rows, wanted - named.keys()):
            named[task] = Seen(RunState.CANCELLED, "CANCELLED")
        return {job: seen for job, seen in named.items() if seen.state.is_final}

    def usage(self, ids: Iterable[str], since: float = 0.0) -> dict[str, Usage]:
        """What these jobs were given, as far as accounting knows; nothing without accounting.

        Args:
            ids: jobs, in whatever state.
            since: as for `ended`.
        """
        wanted = set(ids)
        fields = "JobID,ElapsedRaw,AllocCPUS,AllocTRES,NodeList"
        found: dict[str, Usage] = {}
        for row in self._accounting(fields, wanted, since, "--duplicates"):
            if row[0] in wanted:
                used = _used(row)
                before = found[row[0]].elapsed_seconds if row[0] in found else 0.0
                found[row[0]] = replace(used, elapsed_seconds=before + used.elapsed_seconds)
        return found

    def cancel(self, ids: Iterable[str], *, only_waiting: bool = False) -> None:
        """Ends these jobs, or takes them out of the queue; those that ended stay as they are.

        Args:
            ids: of the jobs.
            only_waiting: let those that have started go on.

        Raises:
            SlurmUnreachable: scancel fails or does not answer.
        """
        rest = iter(dict.fromkeys(ids))
        while some := list(islice(rest, _IDS_PER_CALL)):
            timeout_s = _CANCEL_TIMEOUTS * self._timeout_s
            which = ["--state=PENDING"] if only_waiting else []
            self._ask("scancel", *which, *collapse(some), timeout_s=timeout_s)

    def live(self, arrays: Collection[str]) -> list[str]:
        """Tasks of some arrays that are in the queue or run.

        Raises:
            SlurmUnreachable: squeue fails or does not answer.
        """
        rows = _read_queue(self._queue()) if arrays else ()
        return [
            task
            for job, seen in rows
            if base_of(job) in arrays and not seen.state.is_final
            for task in expand(job)
        ]

    def find(self, comment: str) -> str:
        """The id of this user's job (or array) in the queue with a comment; empty: there is none.

        (What sbatch refuses may have left a job, too, which is over.) Where Slurm cannot be asked,
        none is found.
        """
        words = ("--noheader", f"--user={os.getuid()}", "--format=%F|%k")
        with contextlib.suppress(SlurmUnreachable):
            for line in self._ask("squeue", *words).splitlines():
                job, _, said = line.partition("|")
                if said.strip() == comment:
                    return job.strip()
        return ""

    def limits(self) -> Limits:
        """What the cluster allows.

        Raises:
            SlurmUnreachable: scontrol fails or does not answer.
        """
        return _read_limits(self._ask("scontrol", "show", "config"))

    # How tools are asked.

    def _accounting(
        self, fields: str, ids: Iterable[str], since: float, *more: str
    ) -> list[list[str]]:
        """Rows of sacct about all that belongs to these jobs' arrays; none where it fails."""
        bases = sorted({base_of(job) for job in ids})
        if not bases or self._clock() < self._accounting_from:
            return []
        words = ["--allocations", "--parsable2", "--noheader", f"--format={fields}"]
        if since > _CLOCKS_S:
            # In UTC, as the environment is: local times are not unique in autumn.
            start = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since - _CLOCKS_S))
            words.append(f"--starttime={start}")
        # By the arrays: a question about a task that never started has no answer.
        words += [*more, f"--jobs={','.join(bases)}"]
        try:
            text = self._ask("sacct", *words, timeout_s=self._accounting_timeout_s)
        except SlurmUnreachable:
            self._accounting_from = self._clock() + ACCOUNTING_PAUSE_S
            return []
        rows = (line.split("|") for line in text.splitlines())
        return [row for row in rows if len(row) == fields.count(",") + 1]

    def _ask(self, program: str, *words: str, timeout_s: float | None = None) -> str:
        limit = timeout_s or self._timeout_s
        command = " ".join((program, *words))
        if len(command) > _COMMAND_CHARS:
            command = f"{command[:_COMMAND_CHARS]}..."
        try:
            done = self._run((program, *words), self._environment(), limit)
        except subprocess.TimeoutExpired:
            raise SlurmUnreachable(
                f"Slurm's {program} did not answer within {limit:g} s ({command}): `scontrol ping` "
                "says whether slurmctld is up."
            ) from None
        except FileNotFoundError:
            missing = program if self.is_there() else "sbatch"
            raise SlurmUnreachable(
                f"Slurm's {missing} is not on the PATH; start this on a login node of the "
                "cluster, or run on this machine with hydra/launcher=gpu_queue."
            ) from None
        except OSError as error:
            raise SlurmUnreachable(f"Slurm's {program} could not be started: {error}") from error
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split()) or "it said nothing"
            raise SlurmUnreachable(
                f"Slurm's {program} failed with exit code {done.returncode} ({command}): "
                f"{said[:1000]}. `scontrol ping` says whether slurmctld is up."
            )
        return done.stdout

    def _environment(self) -> dict[str, str]:
        own = {key: value for key, value in self._environ.items() if not key.startswith(_OURS)}
        # Unlimited: else what is in the brackets of an id is cut after 64 characters.
        return {**own, "LC_ALL": "C", "TZ": "UTC0", "SLURM_BITSTR_LEN": "0"}


# How answers are read.


def _named(rows: Iterable[tuple[str, Seen]], wanted: set[str]) -> dict[str, Seen]:
    """Those of the wanted jobs that rows are about.

    A task's own row counts: one in brackets may be of before it started.
    """
    bases = {base_of(job) for job in wanted}
    found: dict[str, Seen] = {}
    own = set()
    for name, seen in rows:
        if base_of(name) not in bases:
            continue
        for job in expand(name):
            if job in wanted and job not in own:
                found[job] = seen
        if name in wanted:
            own.add(name)
            found[name] = seen
    return found


def _withdrawn(rows: Iterable[tuple[str, Seen]], nowhere: Iterable[str]) -> list[str]:
    """Those of these tasks whose array was cancelled for all that had not started."""
    over = {
        base_of(name) for name, seen in rows if seen.state is RunState.CANCELLED and not seen.node
    }
    return [task for task in nowhere if "_" in task and base_of(task) in over]


def _read_queue(text: str) -> Iterator[tuple[str, Seen]]:
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) < _QUEUE_FIELDS:  # the name of a cluster
            continue
        job, word, code, restarts, node, reason = fields[:_QUEUE_FIELDS]
        seen = _seen(word, node, _exit_code(code))
        count = int(restarts) if restarts.isdecimal() else 0
        yield job, replace(seen, reason=_reason(reason, seen.exit_code), restarts=count)


def _reason(text: str, exit_code: str) -> str:
    # Slurm 22 calls it so, too, when a signal ends the script of a job that was running.
    if text == "JobLaunchFailure" and exit_code not in {"", "0:0", "0:1"}:
        return ""
    return "" if text == "None" else text


def _read_ends(rows: Iterable[Sequence[str]]) -> Iterator[tuple[str, Seen]]:
    for job, word, code, node in rows:
        yield job, _seen(word, "" if node == "None assigned" else node, code)


def _seen(word: str, node: str, exit_code: str) -> Seen:
    # Of a word that is not known here all that is certain is that the job is not over.
    state = translate(word) or RunState.RUNNING
    # Out of memory has a signal of its own that does not exist.
    told = state.is_final and not word.startswith("OUT_OF_ME")
    return Seen(state, word, node, exit_code=exit_code if told else "")


def _exit_code(text: str) -> str:
    """``code:signal``, of which squeue gives the status of `wait` before Slurm 23."""
    return f"{int(text) >> 8 & 255}:{int(text) & 127}" if text.isdecimal() else text


def _used(row: Sequence[str]) -> Usage:
    _, elapsed, cpus, tres, node = row
    return Usage(
        float(elapsed) if elapsed.isdecimal() else 0.0,
        int(cpus) if cpus.isdecimal() else 0,
        _gpus(tres),
        "" if node == "None assigned" else node,
    )


def _gpus(tres: str) -> float:
    """GPUs in ``cpu=4,gres/gpu:a100=2,gres/gpu=2``; the sum by type is not always there."""
    counts = re.findall(r"(?:^|,)gres/gpu(:[^=,]*)?=(\d+)", tres)
    whole = [float(count) for kind, count in counts if not kind]
    return whole[0] if whole else sum((float(count) for _, count in counts), 0.0)


def _read_limits(text: str) -> Limits:
    found = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE))
    default = Limits()
    size = _number(found.get("MaxArraySize"), default.max_array_size)
    most = re.search(r"\bmax_array_tasks=(\d+)", found.get("SchedulerParameters", ""))
    return Limits(
        max_array_size=int(min(size, float(most[1])) if most else size),
        kill_wait_s=_number(found.get("KillWait"), default.kill_wait_s),
        version=found.get("SLURM_VERSION", ""),
        requeue=_number(found.get("JobRequeue"), default.requeue) != 0,
        cluster=found.get("ClusterName", ""),
        min_job_age_s=_number(found.get("MinJobAge"), default.min_job_age_s),
    )


def _number(text: str | None, default: float) -> float:
    """The number that a setting starts with (``30 sec``)."""
    match = re.match(r"\d+", text or "")
    return float(match[0]) if match else float(default)
