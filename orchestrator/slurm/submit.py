"""From runs to Slurm jobs: packs, arrays within the cluster's limits, and submitit's executor."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import secrets
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.record import RunState
from orchestrator.slurm.batch import batch_command
from orchestrator.slurm.ledger import Job, Ledger, write_ledger
from orchestrator.slurm.pack import ENDED, JobTime, Pack, PackedRun
from orchestrator.slurm.resources import tasks_of
from orchestrator.slurm.start import pack_file
from orchestrator.store import RunLock, write_atomic
from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from orchestrator.queue.plan import Plan
    from orchestrator.queue.settings import QueueSettings
    from orchestrator.record import RunRecord
    from orchestrator.slurm.client import Limits
    from orchestrator.slurm.settings import SlurmSettings
    from orchestrator.store import RunDir
    from orchestrator.sweeps import Sweep

# A task that fails ends the others of its job, which would wait for it for ever.
_END_TOGETHER = "--kill-on-bad-exit=1"


@dataclass(frozen=True)
class Asked:
    """A run to submit: its plan, its record, its config, and what its job asks Slurm for."""

    plan: Plan
    record: RunRecord
    config: bytes
    resources: dict[str, Any]


def packs(asked: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Runs that share a job: those that ask for the same, in their order, at most ``size``."""
    groups: dict[str, list[Asked]] = {}
    for run in asked:
        groups.setdefault(json.dumps(run.resources, sort_keys=True, default=str), []).append(run)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def arrays(sizes: int, most: int) -> list[int]:
    """Cut so many jobs into arrays of nearly equal sizes, none larger than ``most``."""
    count = -(-sizes // most)
    return [sizes // count + (number < sizes % count) for number in range(count)]


def lanes(count: int, at_a_time: int) -> list[int]:
    """How many tasks of each array may run at a time, ``at_a_time`` in all; 0: it has to wait.

    Arrays of nearly equal sizes end at about the same time, so an equal share for each wastes
    nothing. Where there are more arrays than places, the others follow one after the other.
    """
    share, more = divmod(at_a_time, count)
    return [share + (number < more) for number in range(count)]


class Submitter:
    """Hands packs of runs to Slurm.

    Args:
        settings: the launcher's.
        raw_queue: the settings of the local queue in each job, with their interpolations.
        limits: the cluster's.
        sweep: whose runs they are.
        on_failure: `ResultsSettings.on_failure`.
        resume: whether a COMPLETED record answers.
    """

    def __init__(
        self,
        settings: SlurmSettings,
        raw_queue: dict[str, Any],
        limits: Limits,
        sweep: Sweep,
        on_failure: Any,
        *,
        resume: bool,
    ) -> None:
        self._settings = settings
        self._raw_queue = raw_queue
        self._limits = limits
        self._sweep = sweep
        self._on_failure = on_failure
        self._resume = resume
        self.ledger = Ledger(
            submitted_at=time.time(), folder=str(self.folder), cluster=limits.cluster
        )

    @property
    def folder(self) -> str:
        """Where scripts, packs and Slurm's own logs are; without the part that differs by job."""
        wanted = self._settings.submitit_folder or str(self._sweep.directory / "slurm")
        return wanted.partition("%")[0].rstrip("/")

    def submit(
        self, asked: Sequence[Asked], common: bytes, stopped: Callable[[], bool]
    ) -> Iterator[tuple[str, Asked]]:
        """Submit the runs; the ledger knows each array as soon as Slurm has it.

        Args:
            asked: the runs.
            common: what all of them share, see `spawn.load_task`.
            stopped: asked before each array.

        Yields:
            Each run's job id, for those that were submitted.

        Raises:
            SweepError: sbatch refuses; those before are in the queue.
        """
        if not asked:
            return
        (self._sweep.directory / ENDED).mkdir(parents=True, exist_ok=True)
        by_resources: dict[str, list[list[Asked]]] = {}
        for pack in packs(asked, self._settings.runs_per_job):
            key = json.dumps(pack[0].resources, sort_keys=True, default=str)
            by_resources.setdefault(key, []).append(pack)
        sizes = [
            (group, size)
            for group in by_resources.values()
            for size in arrays(len(group), self._limits.max_array_size)
        ]
        throttles = lanes(len(sizes), self._settings.array_parallelism)
        starts: dict[int, int] = {}
        last = ""
        for (group, size), throttle in zip(sizes, throttles, strict=True):
            if stopped():
                return
            start = starts.get(id(group), 0)
            starts[id(group)] = start + size
            chosen = group[start : start + size]
            after = "" if throttle else last
            ids = self._submit_array(chosen, common, throttle or 1, after)
            last = ids[0].partition("_")[0]
            self._enter(ids, chosen)
            for job, pack in zip(ids, chosen, strict=True):
                yield from ((job, run) for run in pack)

    def _enter(self, ids: Sequence[str], chosen: Sequence[Sequence[Asked]]) -> None:
        jobs = tuple(
            Job(job, tuple(run.plan.num for run in pack))
            for job, pack in zip(ids, chosen, strict=True)
        )
        self.ledger = msgspec.structs.replace(self.ledger, jobs=(*self.ledger.jobs, *jobs))
        write_ledger(self._sweep.directory, self.ledger)

    def _submit_array(
        self, chosen: Sequence[Sequence[Asked]], common: bytes, throttle: int, after: str
    ) -> list[str]:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        stem = str(Path(self.folder, secrets.token_hex(4)))
        for index, pack in enumerate(chosen):
            data = pickle.dumps(self._pack(pack, common), protocol=pickle.HIGHEST_PROTOCOL)
            write_atomic(Path(pack_file(stem, index)), data)
        parameters, command = self._parameters(
            chosen[0][0].resources, stem, len(chosen) > 1, throttle, after
        )
        try:
            # (submitit prints what sbatch says; it is in the error, too.)
            with contextlib.redirect_stderr(io.StringIO()), _outside_of_jobs():
                job_id = _submit(self.folder, parameters, command, len(chosen))
        except (FailedJobError, FailedSubmissionError) as error:
            raise SweepError(_refusal(error)) from error
        except (TypeError, ValueError, AssertionError) as error:
            raise SweepError(f"submitit does not take these settings: {error}") from error
        if len(chosen) == 1:
            return [job_id]
        return [f"{job_id}_{index}" for index in range(len(chosen))]

    def _parameters(
        self, resources: dict[str, Any], stem: str, is_array: bool, throttle: int, after: str
    ) -> tuple[dict[str, Any], str]:
        """What submitit is given, and the command of the batch script."""
        settings, several = self._settings, tasks_of(resources) > 1
        parameters = {key: value for key, value in resources.items() if value is not None}
        extra = {
            str(k): v for k, v in (parameters.pop("additional_parameters", None) or {}).items()
        }
        srun: list[str] = []
        if settings.use_srun or (settings.use_srun is None and several):
            srun = self._srun(parameters.pop("srun_args", None) or [], several, is_array)
        if not several:
            # Slurm's warning goes to the first process, which hands it on to the runs alone.
            extra.setdefault("signal", f"B:USR2@{resources['signal_delay_s']}")
        if after:
            extra["dependency"] = f"afterany:{after}"
        python = settings.python or shlex.quote(sys_executable())
        command = batch_command(python, stem, srun, parameters.pop("teardown", None) or [])
        parameters |= {
            "array_parallelism": throttle,
            "use_srun": False,
            "additional_parameters": extra,
        }
        return parameters, command

    def _srun(self, wanted: Sequence[str], several: bool, is_array: bool) -> list[str]:
        """The words of srun: a log for each task, as submitit names them."""
        log = str(Path(self.folder, "%A_%a_%t_log" if is_array else "%j_%t_log"))
        errors = [] if self._settings.stderr_to_stdout else ["--error", f"{log}.err"]
        together = [_END_TOGETHER] if several else []
        return ["srun", "--unbuffered", "--output", f"{log}.out", *errors, *together, *wanted]

    def _pack(self, runs: Sequence[Asked], common: bytes) -> Pack:
        settings, resources = self._settings, runs[0].resources
        queue: QueueSettings = settings.queue
        return Pack(
            sweep_dir=str(self._sweep.directory),
            common=common,
            runs=tuple(PackedRun(str(run.plan.directory), run.record, run.config) for run in runs),
            shared=settings.runs_per_job > 1,
            settings=replace(queue),
            raw=self._raw_queue,
            on_failure=self._on_failure,
            resume=self._resume,
            reports=settings.wait,
            time=JobTime(
                limit_s=60.0 * float(resources["timeout_min"]),
                signal_delay_s=float(resources["signal_delay_s"]),
                kill_wait_s=self._limits.kill_wait_s,
                timeouts_left=settings.max_num_timeout,
            ),
        )


def _submit(folder: str, parameters: dict[str, Any], command: str, count: int) -> str:
    """Have submitit write the batch script and call sbatch; the id of the job or array.

    It would also pickle what each job does, and move it in place when sbatch has answered,
    when a job may already look for it; and in the job it takes 0.1 s of imports.
    """
    from submitit.slurm.slurm import SlurmExecutor

    executor = SlurmExecutor(folder)
    executor.update_parameters(**executor._convert_parameters(parameters))  # noqa: SLF001
    if count > 1:
        executor.parameters["map_count"] = count
    return str(executor._submit_command(command).job_id)  # noqa: SLF001


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Submit as if from a login node: a job inherits what another Slurm job has in its environment.

    What configures Slurm's tools (``SLURM_CONF``) stays.
    """
    keep = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER")
    before = dict(os.environ)
    for name in before:
        if name.startswith(("SLURM_", "SLURMD_", "PMI_", "PMIX_")) and name not in keep:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def sys_executable() -> str:
    import sys

    # Not resolved: the python of a virtual environment is a link to another's.
    return os.path.abspath(sys.executable)  # noqa: PTH100


def _refusal(error: Exception) -> str:
    """What sbatch said, in one line."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if "error:" in line]
    said = "; ".join(dict.fromkeys(line.partition("error:")[2].strip() for line in lines))
    said = " ".join((said or text.strip()[-500:]).split()).rstrip(".")
    return (
        f"sbatch refuses the job: {said}. Change what hydra.launcher asks for (partition, account, "
        "timeout_min, gpus_per_node, mem_gb, …)."
    )


def write_waiting(run: RunDir, record: RunRecord, before: str, *, resume: bool) -> RunRecord | None:
    """Write the record of a run that is about to be submitted.

    Args:
        run: its directory.
        record: PENDING.
        before: the sweep that had the run when this launch looked at it.
        resume: whether a COMPLETED record answers instead.

    Returns:
        The record as written; what somebody else has made of the run in the meantime: it is
        COMPLETED, or another sweep's now; None where somebody works on it.
    """
    lock = RunLock.acquire(run)
    if lock is None:
        return None
    try:
        # A directory that is opened is looked at anew by the clients of a file server.
        with os.scandir(run.path):
            pass
        found = run.try_read()
        if found is not None and found.fingerprint == record.fingerprint:
            done = found.state is RunState.COMPLETED and resume
            if done or (not found.state.is_final and found.sweep_id != before):
                return found
        record = msgspec.structs.replace(record, attempts=run.begin_attempt())
        run.write(record)
    finally:
        lock.release()
    return record
