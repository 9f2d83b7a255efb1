"""Inside a Slurm job: its runs go through the local queue; a warning of Slurm's ends in a requeue."""

from __future__ import annotations

import contextlib
import io
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.queue.context import Context
from orchestrator.queue.control import CONTROL_NAME, Control
from orchestrator.queue.link import ServerLink, forked_server, spawned_server
from orchestrator.queue.needs import Needs
from orchestrator.queue.progress import Progress, SettingsCount
from orchestrator.queue.resources import make_places, start_watcher
from orchestrator.queue.retry import FailureLimit, RetryPolicy
from orchestrator.queue.spawn import load_task
from orchestrator.queue.start_method import choose
from orchestrator.queue.wire import Ended
from orchestrator.record import ErrorInfo, RunState
from orchestrator.slurm.allocation import allocated_cores, job_id, queue_settings
from orchestrator.slurm.packed import Configs, NoBook, PackPlanner, ignore_slurm, packed_jobs
from orchestrator.slurm.ranks import error_of_ranks
from orchestrator.slurm.within import PackScheduler, PackSignals
from orchestrator.store import RunDir, RunLock, completed_runs, write_atomic
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from orchestrator.queue.places import Places
    from orchestrator.queue.plan import Plan
    from orchestrator.queue.task import Task
    from orchestrator.slurm.pack import Pack, PackedRun

_REQUEUE_S = 60.0
# What Slurm's signals cut short: it may be put back into the queue and go on.
_CUT_SHORT = (RunState.TIMEOUT, RunState.CANCELLED)


class PackJob:
    """The runs of one Slurm job, from its first process."""

    def __init__(self, pack: Pack, path: Path) -> None:
        self._pack = pack
        self._path = path
        self._settings = queue_settings(pack)
        self._runs = {run.num: run for run in pack.runs}
        self._ended: dict[int, Ended] = {}
        self._signals = PackSignals(pack.time)

    def run(self) -> None:
        """Do the runs.

        Raises:
            SystemExit: with status 1, where a run has not ended well.
        """
        with self._signals:
            scheduler, context = self._prepare()
            try:
                scheduler.run()
            finally:
                context.progress.close()
                context.server.close()
        self._finish()

    def _prepare(self) -> tuple[PackScheduler, Context]:
        pack, settings = self._pack, self._settings
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
        overrides = [run.record.overrides for run in pack.runs]
        progress = Progress(len(pack.runs), SettingsCount(overrides, "seed"))
        count = plural(len(pack.runs), "run")
        on = where if places.gpus else plural(allocated_cores(), "core")
        progress.say(f"Job {job_id()}: {count} by {method} ({reason}), on {on}.")
        places.say = progress.say
        needs = self._needs(places)
        context = Context(
            composer=Configs(pack.runs),
            planner=PackPlanner(pack, settings, ships=method != "fork"),
            sweep=NoBook(Path(pack.sweep_dir).name),
            places=places,
            needs=needs,
            retry=RetryPolicy(settings.retries, settings.retry_on),
            limit=FailureLimit(pack.on_failure),
            control=Control(Path(pack.sweep_dir) / CONTROL_NAME),
            threads=settings.threads or max(1, allocated_cores() // _at_a_time(places, needs)),
            progress=progress,
            make_server=make_server,
            server=server,
            ended=self._hear,
        )
        return PackScheduler(overrides, 0, context, self._signals, pack.time), context

    def _needs(self, places: Places) -> Needs:
        pack = self._pack
        raw: Mapping[str, Any] = pack.raw if pack.shared else {}
        needs = Needs(self._settings, raw, "hydra.launcher.queue")
        if needs.learns:
            for _, record in completed_runs(Path(pack.sweep_dir).parent.parent):
                needs.learn(record.memory_shape, record.peak_gpu_memory_gb)
        return needs

    def _server_maker(self, task: Task | None) -> Callable[[], ServerLink]:
        if task is None:
            return partial(spawned_server, before=ignore_slurm)
        configs = {run.num: run.config for run in self._pack.runs}
        return partial(forked_server, partial(packed_jobs, task, configs))

    # --- ends ---

    def _hear(self, plan: Plan, ended: Ended) -> None:
        self._ended[plan.num] = ended
        cut_short = ended.record.state in _CUT_SHORT and self._signals.told
        if not cut_short:
            self._report(plan.num)

    def _report(self, num: int) -> None:
        """Tell the launcher, if one waits."""
        if self._pack.reports and num in self._ended:
            data = pickle.dumps(self._ended[num], protocol=pickle.HIGHEST_PROTOCOL)
            with contextlib.suppress(OSError):  # the run's own record has all that matters
                write_atomic(self._pack.ended_file(num), data)

    def _finish(self) -> None:
        missing = [run for run in self._pack.runs if self._is_missing(run)]
        if missing and self._signals.warned:
            self._go_on_later(missing)
        for run in missing:
            self._give_up(run)
        well = (ended.record.state is RunState.COMPLETED for ended in self._ended.values())
        if missing or not all(well):
            sys.exit(1)

    def _is_missing(self, run: PackedRun) -> bool:
        """Whether a run has not begun, or was cut short by a signal of Slurm's."""
        ended = self._ended.get(run.num)
        return ended is None or (self._signals.told and ended.record.state in _CUT_SHORT)

    def _go_on_later(self, missing: Sequence[PackedRun]) -> None:
        """Put the job back into Slurm's queue, where that is possible: then this ends here."""
        pack = self._pack
        if self._signals.timed_out:
            if pack.time.timeouts_left < 1:
                return
            pack = pack.after_timeout()
        for run in missing:
            _wait_again(run)
        try:
            write_atomic(self._path, pickle.dumps(pack, protocol=pickle.HIGHEST_PROTOCOL))
            requeue()
        except (subprocess.SubprocessError, OSError) as error:
            print(f"Slurm does not take the job back into its queue: {error}", flush=True)
        else:
            sys.exit(1)

    def _give_up(self, run: PackedRun) -> None:
        """The final record of a run that this job will not go on with."""
        found = RunDir(Path(run.directory)).try_read() or run.record
        ended = self._ended.get(run.num)
        if ended is None:
            error = ErrorInfo("SLURM_ENDED", "its Slurm job ended before it could begin")
            record = found.advance(RunState.CANCELLED, ended_at=time.time(), error=error)
            ended = Ended(record)
        elif (
            found.state is RunState.PENDING
        ):  # it was to go back into the queue, which Slurm has refused
            ended = replace(ended, record=msgspec.structs.replace(ended.record, attempts=()))
        failure = error_of_ranks(Path(run.directory))
        if failure is not None:
            record = msgspec.structs.replace(ended.record, state=RunState.FAILED, error=failure)
            ended = replace(ended, record=record)
        if ended.record != found:
            with contextlib.suppress(OSError):
                RunDir(Path(run.directory)).write(ended.record)
        self._ended[run.num] = ended
        if failure is not None or self._signals.timed_out or not self._signals.received:
            # Else Slurm itself may put the job back into its queue; the launcher asks it.
            self._report(run.num)


def requeue() -> None:
    """Have Slurm put this job back into its queue; it ends this process.

    Raises:
        OSError: there is no scontrol here.
        subprocess.SubprocessError: Slurm does not do it.
    """
    words = ["scontrol", "requeue", job_id()]
    subprocess.run(
        words, check=True, timeout=_REQUEUE_S, stdin=subprocess.DEVNULL, capture_output=True
    )
    print(f"Slurm has job {job_id()} back in its queue.", flush=True)


def _load(common: bytes) -> Task | None:
    try:
        return load_task(io.BytesIO(common))
    except BaseException as error:  # noqa: BLE001 - an app may do anything when it is imported
        print(f"The app could not be loaded: {ErrorInfo.of(error).line}", file=sys.stderr)
        return None


def _at_a_time(places: Places, needs: Needs) -> int:
    gpus = 1 if needs.constant is None else needs.constant.gpus
    return max(1, places.size // max(gpus, 1)) if places.gpus else places.size


def _wait_again(run: PackedRun) -> None:
    """A run that was cut short is PENDING again, its attempt among the earlier ones."""
    files = RunDir(Path(run.directory))
    lock = RunLock.acquire(files)
    try:
        files.write(msgspec.structs.replace(run.record, attempts=files.begin_attempt()))
    finally:
        if lock is not None:
            lock.release()
