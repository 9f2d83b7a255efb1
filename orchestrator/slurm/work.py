"""Inside a Slurm job: its runs go through the local queue, on what Slurm gave the job."""

from __future__ import annotations

import io
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.queue.context import Context
from orchestrator.queue.control import CONTROL_NAME, Control
from orchestrator.queue.link import ServerLink, forked_server, spawned_server
from orchestrator.queue.needs import Needs
from orchestrator.queue.progress import Progress, SettingsCount
from orchestrator.queue.resources import jobs_at_a_time, make_places, start_watcher
from orchestrator.queue.retry import FailureLimit, RetryPolicy
from orchestrator.queue.spawn import load_task
from orchestrator.queue.start_method import choose
from orchestrator.record import ErrorInfo
from orchestrator.slurm.allocation import allocated_cores, job_id, queue_settings
from orchestrator.slurm.endings import Endings
from orchestrator.slurm.packed import Configs, NoBook, PackPlanner, ignore_slurm, packed_jobs
from orchestrator.slurm.within import PackScheduler, PackSignals
from orchestrator.store import completed_runs
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from orchestrator.queue.settings import QueueSettings
    from orchestrator.queue.task import Task
    from orchestrator.slurm.pack import Pack


class PackJob:
    """The runs of one Slurm job, from its first process.

    Args:
        pack: what to do.
        path: the file that it was read from; a job that goes on later reads it again.
    """

    def __init__(self, pack: Pack, path: Path) -> None:
        self._pack = pack
        self._signals = PackSignals(pack.time)
        self._endings = Endings(pack, path, self._signals)

    def run(self) -> None:
        """Do the runs.

        Raises:
            SystemExit: with status 1, where a run has not ended well.
        """
        why_not: ErrorInfo | None = None
        with self._signals:
            try:
                why_not = self._do_all()
            except Exception as error:  # noqa: BLE001 - the runs that it kept from starting say it
                traceback.print_exc()
                why_not = ErrorInfo.of(error)
            self._endings.await_ranks()
        self._endings.finish(why_not)

    def _do_all(self) -> ErrorInfo | None:
        """Put the runs through the queue; why some of them were not begun, if somebody said."""
        pack = self._pack
        context = self._prepare(
            queue_settings(pack.settings, shared=pack.shared, kill_wait_s=pack.time.kill_wait_s)
        )
        overrides = [run.record.overrides for run in pack.runs]
        scheduler = PackScheduler(overrides, 0, context, self._signals, pack.time)
        try:
            scheduler.run()
        finally:
            context.progress.close()
            context.server.close()
        closed = "" if self._signals.told else scheduler.closed
        return ErrorInfo("NotStarted", closed) if closed else None

    def _prepare(self, settings: QueueSettings) -> Context:
        pack = self._pack
        task = _load(pack.common)
        method, reason = choose(settings.start_method)
        if task is None:  # the runs will meet what is wrong, and report it
            method, reason = "spawn", "the app could not be loaded"
        make_server = self._server_maker(task if method == "fork" else None)
        server = make_server()
        watcher = start_watcher(settings, method)
        places, where = make_places(settings, watcher)
        if not pack.shared:
            settings.gpus_per_job = len(places.gpus)
        needs = self._needs(settings)
        progress = self._make_progress(f"by {method} ({reason})", where if places.gpus else "")
        places.say = progress.say
        return Context(
            composer=Configs(pack.runs),
            planner=PackPlanner(pack, settings, ships=method != "fork"),
            sweep=NoBook(Path(pack.sweep_dir).name, self._endings.not_started),
            places=places,
            needs=needs,
            retry=RetryPolicy(settings.retries, settings.retry_on),
            limit=FailureLimit(pack.on_failure),
            control=Control(Path(pack.sweep_dir) / CONTROL_NAME),
            threads=settings.threads or max(1, allocated_cores() // jobs_at_a_time(places, needs)),
            progress=progress,
            make_server=make_server,
            server=server,
            ended=self._endings.hear,
        )

    def _make_progress(self, how: str, where: str) -> Progress:
        runs = self._pack.runs
        progress = Progress(
            len(runs), SettingsCount([run.record.overrides for run in runs], "seed")
        )
        on = where or plural(allocated_cores(), "core")
        progress.say(f"Job {job_id()}: {plural(len(runs), 'run')} {how}, on {on}.")
        return progress

    def _needs(self, settings: QueueSettings) -> Needs:
        pack = self._pack
        raw: Mapping[str, Any] = pack.raw if pack.shared else {}
        needs = Needs(settings, raw, "hydra.launcher.queue")
        if needs.learns:
            for _, record in completed_runs(Path(pack.sweep_dir).parent.parent):
                needs.learn(record.memory_shape, record.peak_gpu_memory_gb)
        return needs

    def _server_maker(self, task: Task | None) -> Callable[[], ServerLink]:
        if task is None:
            return partial(spawned_server, before=ignore_slurm)
        configs = {run.num: run.config for run in self._pack.runs}
        return partial(forked_server, partial(packed_jobs, task, configs))


def _load(common: bytes) -> Task | None:
    try:
        return load_task(io.BytesIO(common))
    except BaseException as error:  # noqa: BLE001 - an app may do anything when it is imported
        print(f"The app could not be loaded: {ErrorInfo.of(error).line}", file=sys.stderr)
        return None
