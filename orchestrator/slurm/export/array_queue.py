"""``hydra/launcher=slurm_array_task``: one task of an exported array does its runs here.

They go through the local queue, on what Slurm gave. Which they are stands in the run list, and
what is COMPLETED is not done again.
"""

from __future__ import annotations

import os
import signal
import tempfile
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf, open_dict, read_write

from orchestrator.queue.book import SweepBook
from orchestrator.queue.job import THREAD_VARIABLES
from orchestrator.queue.launcher import GpuQueue
from orchestrator.queue.needs import Needs
from orchestrator.queue.plan import Planner
from orchestrator.queue.resources import jobs_at_a_time
from orchestrator.queue.settings import QueueSettings
from orchestrator.record import RunState
from orchestrator.slurm.allocation import allocated_cores, job_id, queue_settings
from orchestrator.slurm.export.array_task import LAUNCHER, read_task
from orchestrator.slurm.ledger import ARRAYS
from orchestrator.store import RunDir
from orchestrator.sweep.directory import make_writable
from orchestrator.sweep.errors import SweepError
from orchestrator.sweeps import Sweep, code_directory, code_versions
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from orchestrator.queue.answers import Answers
    from orchestrator.queue.link import ServerLink
    from orchestrator.queue.places import Places
    from orchestrator.queue.plan import Plan, Seat
    from orchestrator.queue.progress import Progress
    from orchestrator.queue.wire import JobRequest
    from orchestrator.record import RunRecord
    from orchestrator.sweep.compose import Composer
    from orchestrator.sweeps import SweepGpu

_SIGNALLED = 128


def make(
    settings: Mapping[str, Any],
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
) -> ArrayQueue:
    """The body of the launcher.

    Args:
        settings: ``array_list`` and ``array_task``, and the keys of the launcher that the sweep's
            command chose.
        hydra_context: Hydra's.
        task_function: the app's.
        config: the config of this command.

    Raises:
        SweepError: the run list cannot be read, or has no such task.
    """
    path, task = str(settings["array_list"]), int(settings["array_task"])
    try:
        head, runs = read_task(path, task)
    except (OSError, ValueError) as error:
        raise SweepError(
            f"The run list cannot be read: {error}. Export the sweep again."
        ) from error
    if not runs:
        raise SweepError(f"{path} has no run for task {task}. Export the sweep again.")
    return ArrayQueue((head, runs), settings, hydra_context, task_function, config)


def _queue_settings(
    head: Mapping[str, Any], given: Mapping[str, Any], *, alone: bool
) -> QueueSettings:
    """The settings of the local queue that another launcher's keys stand for."""
    plain: dict[str, Any] = {
        name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in given.items()
    }
    known = {field.name for field in fields(QueueSettings)}
    own = {name: value for name, value in plain.items() if name in known}
    settings = QueueSettings(**{**own, **(plain.get("queue") or {}), **head["queue"]})
    if alone:  # it has all that there is
        settings.memory_per_job_gb = None
    if not job_id():
        return settings
    if settings.gpus:  # those of another machine
        settings.gpus = "auto"
    return queue_settings(settings, shared=not alone, kill_wait_s=head["kill_wait_s"])


class ArrayQueue(GpuQueue):
    """The local queue for the runs of one task.

    Args:
        listed: what the run list says of all runs, and those of this task; see `read_task`.
        given: the launcher's keys.
        hydra_context: Hydra's.
        task_function: the app's.
        config: the config of this command.
    """

    def __init__(
        self,
        listed: tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]],
        given: Mapping[str, Any],
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        self._head, self._runs = head, runs = listed
        self._alone = not self._head["shared"]
        settings = _queue_settings(head, given, alone=self._alone)
        super().__init__(settings, hydra_context, task_function, config)
        planner = ArrayPlanner(self.composer, config, settings, runs)
        planner.shipper = self._planner.shipper
        self._planner = planner
        self._book = ArrayBook(config, planner, task_function, head["sweep_id"])
        # Sweepers save multirun.yaml where the sweep writes, and all tasks would at once.
        self._scratch = tempfile.TemporaryDirectory(prefix="orchestrator-task-")
        assert planner.sweep_dir
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = self._scratch.name

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Do the task's runs, whichever of them the sweeper knows.

        Raises:
            SystemExit: one has not ended well; with its own status, if it is the only one.
        """
        self._scratch.cleanup()
        results = super().launch([run["overrides"] for run in self._runs], 0)
        if any(result.status is not JobStatus.COMPLETED for result in results):
            raise SystemExit(self._status() if self._alone else 1)
        return results

    def _status(self) -> int:
        """The exit status of the only run."""
        sweep = self._book.sweep
        records = [RunDir(sweep.root / path).try_read() for path in sweep.runs.values()]
        code = records[0].returncode if records and records[0] else None
        return 1 if not code else code if code > 0 else _SIGNALLED - code

    def _start_server(self) -> ServerLink:
        # Slurm's SIGTERM comes to every process of the job; the server then has records to write.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return super()._start_server()
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def _tell(self, progress: Progress, sweep_dir: Path) -> None:
        assert self._places is not None
        where = (
            self._where if self._places.gpus or not job_id() else plural(allocated_cores(), "core")
        )
        progress.say(f"{plural(progress.total, 'run')} on {where}, outputs in {sweep_dir}")

    def _make_needs(self) -> Needs:
        if self._alone:
            none = Needs(replace(self._settings, gpus_per_job=0), {})
            self._settings.gpus_per_job = len(super()._make_places(none).gpus)
            return Needs(self._settings, {})
        raw: Any = OmegaConf.to_container(self._config.hydra.launcher, resolve=False)
        node = "hydra.launcher.queue" if "queue" in raw else "hydra.launcher"
        raw = {k: v for k, v in raw.get("queue", raw).items() if k not in self._head["queue"]}
        needs = Needs(self._settings, raw, node)
        self._planner.shapes = needs.learns
        for record in self._planner.completed() if needs.learns else ():
            needs.learn(record.memory_shape, record.peak_gpu_memory_gb)
        return needs

    def _make_places(self, needs: Needs) -> Places:
        places = super()._make_places(needs)
        said = self._settings.threads or any(os.environ.get(name) for name in THREAD_VARIABLES)
        if job_id() and not said:
            self._settings.threads = max(1, allocated_cores() // jobs_at_a_time(places, needs))
        return places


class ArrayPlanner(Planner):
    """Plans the runs of one task: each keeps its number in the sweep."""

    def __init__(
        self,
        composer: Composer,
        config: DictConfig,
        launcher: QueueSettings,
        runs: Sequence[Mapping[str, Any]],
    ) -> None:
        super().__init__(composer, config, launcher)
        self._runs = runs
        # A record's command is the user's own.
        words = self._hydra_overrides
        self._hydra_overrides = words[: len(words) - words[::-1].index(LAUNCHER) - 1]

    @property
    def resume(self) -> bool:
        """Always: the script may be submitted again."""
        return True

    @cached_property
    def _done(self) -> dict[str, Path]:
        # Each task would read every record of the sweep; the run list says where to look.
        return {}

    def plan(self, index: int, num: int, overrides: Sequence[str], *, dry: bool = False) -> Plan:
        run = self._runs[index]
        plan = super().plan(index, run["index"], overrides, dry=True)
        for directory in (plan.directory, Path(run["directory"])):
            record = RunDir(directory).try_read()
            if record is not None and _answers(record, plan):
                return replace(plan, directory=directory, done=record)
        return super().plan(index, run["index"], overrides, dry=dry)

    def record(self, plan: Plan, sweep: Sweep) -> RunRecord:
        return msgspec.structs.replace(super().record(plan, sweep), slurm_job_id=job_id())

    def request(self, plan: Plan, seat: Seat, sweep: Sweep) -> JobRequest:
        return replace(super().request(plan, seat, sweep), in_allocation=bool(job_id()))


def _answers(record: RunRecord, plan: Plan) -> bool:
    return record.state is RunState.COMPLETED and record.fingerprint == plan.who.fingerprint


class ArrayBook(SweepBook):
    """Writes nothing: the sweep's own files were written when it was started, or exported."""

    def __init__(self, config: DictConfig, planner: Planner, function: Any, sweep_id: str) -> None:
        super().__init__(config, planner, function)
        self._sweep_id = sweep_id

    def extend(self, points: Sequence[Sequence[str]], gpus: Sequence[SweepGpu] = ()) -> Sweep:
        make_writable(self._planner.sweep_dir)
        self._sweep = _UnwrittenSweep(
            self._planner.sweep_dir,
            total=len(points),
            gpus=gpus,
            sweep_id=self._sweep_id,
            versions=code_versions(code_directory(self._function)),
        )
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            # What `orchestrator-status stop` cancels: waiting tasks have no records.
            folder = self._sweep.directory / ARRAYS
            folder.mkdir(parents=True, exist_ok=True)
            (folder / array).touch()
        return self._sweep

    def close(self, progress: Progress, answers: Answers, *, complete: bool) -> str:
        if progress.skipped:
            progress.say(
                f"{progress.skipped} of {progress.total} done already; remove a run's directory "
                "to have it done again"
            )
        if complete and answers.unsaved:
            raise SweepError("The run's record is not on the disk (see above). Make room.")
        return "orchestrator-aggregate merges their records."


class _UnwrittenSweep(Sweep):
    def write(self, *, ended: bool = False) -> None: ...
    def write_partial_now_and_then(self) -> None: ...
    def write_results(self, *, complete: bool) -> Path:
        return self.directory
