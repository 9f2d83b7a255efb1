"""Handing arrays of jobs to Slurm, through submitit."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import secrets
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.record import RunState
from orchestrator.slurm.batch import IGNORE_WARNING, batch_command
from orchestrator.slurm.client import SlurmUnreachable
from orchestrator.slurm.cut import cut
from orchestrator.slurm.ledger import Job, Ledger, read_ledger, write_ledger
from orchestrator.slurm.pack import ENDED, JobTime, Pack, PackedRun
from orchestrator.slurm.resources import tasks_of
from orchestrator.slurm.start import pack_file
from orchestrator.slurm.states import base_of
from orchestrator.store import RunLock, write_atomic
from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from orchestrator.queue.settings import QueueSettings
    from orchestrator.record import RunRecord
    from orchestrator.slurm.client import Limits, SlurmClient
    from orchestrator.slurm.cut import Array, Asked
    from orchestrator.slurm.settings import SlurmSettings
    from orchestrator.store import RunDir
    from orchestrator.sweeps import Sweep

# A task that fails ends the others of its job, which would wait for it for ever.
_END_TOGETHER = "--kill-on-bad-exit=1"
# What configures Slurm's tools stays; these variables of sbatch would win over what we ask for.
_CONFIGURES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER")
_OURS_TO_SAY = (
    "SBATCH_ARRAY_INX",
    "SBATCH_CLUSTERS",
    "SBATCH_JOB_NAME",
    "SBATCH_OPEN_MODE",
    "SBATCH_SIGNAL",
    "SBATCH_TIMELIMIT",
    "SBATCH_WAIT",
)


class Submitter:
    """Hands packs of runs to Slurm.

    Args:
        settings: the launcher's.
        raw_queue: the settings of the local queue in each job, with their interpolations.
        client: asks Slurm.
        limits: the cluster's.
        sweep: whose runs they are.
        on_failure: `ResultsSettings.on_failure`.
        resume: whether a COMPLETED record answers.
    """

    def __init__(
        self,
        settings: SlurmSettings,
        raw_queue: dict[str, Any],
        client: SlurmClient,
        limits: Limits,
        sweep: Sweep,
        *,
        on_failure: Any,
        resume: bool,
    ) -> None:
        self._settings = settings
        self._raw_queue = raw_queue
        self._client = client
        self._limits = limits
        self._sweep = sweep
        self._on_failure = on_failure
        self._resume = resume
        # (A sweep in batches has jobs of earlier ones.)
        self.ledger = read_ledger(sweep.directory) or Ledger(
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
        # What is unpickled there is nobody else's to write.
        for folder in (self._sweep.directory / ENDED, Path(self.folder)):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        limits, settings = self._limits, self._settings
        cuts = cut(asked, settings.runs_per_job, limits.max_array_size, settings.array_parallelism)
        submitted: list[str] = []
        for array in cuts:
            if stopped():
                return
            after = "" if array.after is None else submitted[array.after]
            ids = self._submit_array(array, common, after)
            submitted.append(base_of(ids[0]))
            self._enter(ids, array.packs)
            for job, pack in zip(ids, array.packs, strict=True):
                yield from ((job, run) for run in pack)

    def _enter(self, ids: Sequence[str], chosen: Sequence[Sequence[Asked]]) -> None:
        jobs = tuple(
            Job(job, tuple(run.plan.num for run in pack))
            for job, pack in zip(ids, chosen, strict=True)
        )
        ledger = msgspec.structs.replace(self.ledger, jobs=(*self.ledger.jobs, *jobs))
        try:
            write_ledger(self._sweep.directory, ledger)
        except OSError as error:  # nobody would know of these jobs
            with contextlib.suppress(SlurmUnreachable):
                self._client.cancel(ids)
            what = f"{self._sweep.directory} cannot be written ({error})"
            raise SweepError(f"{what}: jobs {' '.join(ids)} were cancelled. Make room.") from error
        self.ledger = ledger

    def _submit_array(self, array: Array, common: bytes, after: str) -> list[str]:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        tag = secrets.token_hex(4)
        stem = str(Path(self.folder, tag))
        for index, pack in enumerate(array.packs):
            data = pickle.dumps(self._pack(pack, common), protocol=pickle.HIGHEST_PROTOCOL)
            write_atomic(Path(pack_file(stem, index)), data)
        parameters, command = self._parameters(array, stem, after)
        # By this a job is found that Slurm has taken although sbatch has failed.
        comment = parameters.setdefault("comment", f"orchestrator {tag}")
        try:
            # (submitit prints what sbatch says; it is in the error, too.)
            with contextlib.redirect_stderr(io.StringIO()), as_from_a_login_node():
                job_id = _submit(self.folder, parameters, command, len(array.packs))
        except (FailedJobError, FailedSubmissionError) as error:
            found = self._client.find(comment) if tag in comment else ""
            if not found:
                raise SweepError(_refusal(error)) from error
            job_id = found
        except (TypeError, ValueError, AssertionError) as error:
            raise SweepError(f"submitit does not take these settings: {error}") from error
        if len(array.packs) == 1:
            return [job_id]
        return [f"{job_id}_{index}" for index in range(len(array.packs))]

    def _parameters(self, array: Array, stem: str, after: str) -> tuple[dict[str, Any], str]:
        """What submitit is given, and the command of the batch script."""
        settings, resources = self._settings, array.packs[0][0].resources
        several, is_array = tasks_of(resources) > 1, len(array.packs) > 1
        parameters = {key: value for key, value in resources.items() if value is not None}
        extra = {
            str(k): v for k, v in (parameters.pop("additional_parameters", None) or {}).items()
        }
        srun: list[str] = []
        if settings.use_srun or (settings.use_srun is None and several):
            srun = self._srun(parameters.pop("srun_args", None) or [], several, is_array)
        if not several:
            # Slurm's warning goes to the first process, which hands it on to the runs alone.
            extra["signal"] = f"B:USR2@{resources['signal_delay_s']}"
        if settings.max_num_timeout and "no-requeue" not in extra:
            extra.setdefault("requeue", True)  # which a cluster may refuse by default
        if after:
            wanted = extra.get("dependency")
            extra["dependency"] = f"{wanted},afterany:{after}" if wanted else f"afterany:{after}"
        python = settings.python or shlex.quote(sys_executable())
        command = batch_command(python, stem, srun, parameters.pop("teardown", None) or [])
        parameters |= {
            "setup": [IGNORE_WARNING, *(parameters.get("setup") or [])],
            "array_parallelism": array.at_a_time,
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
def as_from_a_login_node() -> Iterator[None]:
    """While sbatch is called: it inherits nothing of another Slurm job, and nothing that wins over us.

    Ctrl+C at a terminal goes to every process of its group; it waits until sbatch has answered.
    """
    before = dict(os.environ)
    for name in before:
        of_a_job = name.startswith(("SLURM_", "SLURMD_", "PMI_", "PMIX_"))
        if name in _OURS_TO_SAY or (of_a_job and name not in _CONFIGURES):
            del os.environ[name]
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
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
        "timeout_min, gpus_per_node, mem_gb, …; fewer jobs: runs_per_job)."
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
        found = run.try_read_anew()
        if found is not None and found.fingerprint == record.fingerprint:
            done = found.state is RunState.COMPLETED and resume
            if done or (not found.state.is_final and found.sweep_id != before):
                return found
        record = msgspec.structs.replace(record, attempts=run.begin_attempt())
        run.write(record)
    finally:
        lock.release()
    return record
