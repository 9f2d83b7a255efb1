"""The body of ``hydra/launcher=slurm``."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from orchestrator.queue.answers import Answers
from orchestrator.queue.book import SweepBook, counts
from orchestrator.queue.context import nobody_listens
from orchestrator.queue.plan import Planner
from orchestrator.queue.progress import SettingsCount, make_progress
from orchestrator.queue.resources import check_settings
from orchestrator.queue.retry import FailureLimit
from orchestrator.queue.signals import StopSignals
from orchestrator.queue.task import Task, number_job
from orchestrator.record import ErrorInfo, RunState
from orchestrator.slurm.check import check
from orchestrator.slurm.client import SlurmClient, SlurmUnreachable
from orchestrator.slurm.ledger import Ledgers
from orchestrator.slurm.states import collapse
from orchestrator.slurm.submit import Asked, Resources, Submitter, write_waiting
from orchestrator.slurm.watch import Waiting, Watcher
from orchestrator.store import SWEEPS, RunDir
from orchestrator.sweep.compose import Composer
from orchestrator.sweep.errors import SweepError
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from orchestrator.queue.plan import Plan
    from orchestrator.queue.progress import Progress
    from orchestrator.queue.spawn import Shipper
    from orchestrator.queue.wire import Ended
    from orchestrator.slurm.settings import SlurmSettings
    from orchestrator.sweeps import Sweep

# How long after the jobs were cancelled the last of them may take to be gone, beside the time
# that Slurm gives their processes.
_CANCEL_S = 20.0


@dataclass
class _Launch:
    """What the answers of one launch are made of."""

    composer: Composer
    planner: Planner
    sweep: Sweep
    progress: Progress
    ended: Callable[[Plan, Ended], None] = nobody_listens


class SlurmLaunches:
    """Everything between Hydra's ``setup`` and the end of its last ``launch``."""

    def __init__(
        self,
        settings: SlurmSettings,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        self._settings = settings
        self._config = config
        self._task = Task(task_function, hydra_context.callbacks)
        self.composer = Composer(hydra_context.config_loader, config)
        self._planner = Planner(self.composer, config, settings.queue)
        self._planner.shapes = settings.queue.memory_per_job_gb is not None
        self._book = SweepBook(config, self._planner, task_function)
        self._client = SlurmClient()
        self._raw: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            config.hydra.launcher, resolve=False
        )
        self._shipper: Shipper | None = None
        self._failures = 0

    @property
    def resumes(self) -> bool:
        return self._planner.resume

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Run the jobs on the cluster; one JobReturn each, in the order given.

        Raises:
            SweepError: the settings ask for what cannot be, Slurm refuses or cannot be reached,
                or records are not on the disk.
            SystemExit: a signal ended the sweep, or left it to Slurm.
        """
        settings = self._settings
        check(settings, self._config)
        check_settings(settings.queue)
        limit = FailureLimit(self._planner.results.on_failure)
        progress = make_progress(
            len(job_overrides), SettingsCount(job_overrides, self._planner.results.seed_key)
        )
        try:
            if settings.dry_run:
                return self._show(job_overrides, initial_job_idx, progress)
            limits = self._client.limits()
            sweep = self._book.extend(job_overrides)
            launch = _Launch(self.composer, self._planner, sweep, progress)
            answers = Answers(launch, len(job_overrides), initial_job_idx)
            progress.say(f"{plural(progress.total, 'run')}, outputs in {sweep.root}")
            with StopSignals() as signals:
                return self._launch(
                    job_overrides, initial_job_idx, answers, launch, signals, limits, limit
                )
        finally:
            progress.close()

    def _launch(
        self,
        points: Sequence[Sequence[str]],
        first: int,
        answers: Answers,
        launch: _Launch,
        signals: StopSignals,
        limits: Any,
        limit: FailureLimit,
    ) -> list[JobReturn]:
        progress, sweep = launch.progress, launch.sweep
        plans = list(self._plan(points, first, answers, launch, signals))
        known = self._under_way(plans)
        asked = list(
            self._ask([p for p in plans if p.index not in known], answers, launch, signals)
        )
        submitter = Submitter(
            self._settings,
            self._raw.get("queue") or {},
            limits,
            sweep,
            self._planner.results.on_failure,
            resume=self._planner.resume,
        )
        waiting = list(known.values())
        refused: SweepError | None = None
        if known:
            jobs = " ".join(collapse(run.job_id for run in waiting))
            progress.say(f"{plural(len(known), 'run')} under way already, in {jobs}.")
        try:
            for job_id, run in submitter.submit(
                asked, self._common(), lambda: bool(signals.received)
            ):
                waiting.append(
                    Waiting(
                        run.plan,
                        run.record,  # type: ignore[arg-type]
                        job_id,
                        sweep.directory,
                        submitter.ledger.submitted_at,
                    )
                )
        except SweepError as error:
            refused = error
        self._drop(asked, waiting, answers, refused)
        if asked and waiting:
            self._tell_submitted(waiting, len(known), submitter, progress)
        if not self._settings.wait:
            return self._leave_running(waiting, answers, launch, refused)
        watcher = Watcher(
            self._client,
            waiting,
            answers,
            progress,
            limit,
            longest_poll_s=self._settings.poll_interval_s,
        )
        watcher.failures = self._failures
        watcher.run(signals)
        if signals.received:
            self._interrupted(watcher, signals, answers, progress, limits.kill_wait_s)
        self._failures = watcher.failures
        results = self._book.close(progress, answers, complete=True)
        progress.say(f"All runs ended ({counts(progress)}). {results}")
        if refused is not None:
            raise refused
        return [result for result in answers.returns if result is not None]

    # --- before submission ---

    def _plan(
        self,
        points: Sequence[Sequence[str]],
        first: int,
        answers: Answers,
        launch: _Launch,
        signals: StopSignals,
    ) -> Iterator[Plan]:
        """The plans of those points that are not answered yet."""
        for index, overrides in enumerate(points):
            if signals.received:
                return
            num = first + index
            try:
                plan = self._planner.plan(index, num, overrides)
            except Exception as error:  # noqa: BLE001 - the point's own failure; the others go on
                answers.cannot_start(index, num, overrides, error)
                self._failures += 1
                continue
            if plan.done is not None:
                answers.take_recorded(plan, plan.done)
            elif not answers.is_repeat(plan):
                launch.sweep.add_run(num, plan.directory, plan.who.hyperparams)
                yield plan

    def _under_way(self, plans: Iterable[Plan]) -> dict[int, Waiting]:
        """Runs that a Slurm job of an earlier launch has, by the plan's index."""
        ledgers = Ledgers(self._planner.sweep_dir)
        found: dict[int, Waiting] = {}
        for plan in plans:
            record = RunDir(plan.directory).try_read()
            if (
                record is None
                or record.state.is_final
                or record.fingerprint != plan.who.fingerprint
            ):
                continue
            job_id = ledgers.job_of(record.sweep_id, record.index)
            ledger = ledgers.of(record.sweep_id)
            if job_id and ledger is not None:
                directory = self._planner.sweep_dir / SWEEPS / record.sweep_id
                found[plan.index] = Waiting(plan, record, job_id, directory, ledger.submitted_at)
        if not found:
            return {}
        seen = self._client.poll({run.job_id for run in found.values()})
        return {
            index: run
            for index, run in found.items()
            if run.job_id in seen and not seen[run.job_id].state.is_final
        }

    def _ask(
        self, plans: Sequence[Plan], answers: Answers, launch: _Launch, signals: StopSignals
    ) -> Iterator[Asked]:
        """Compose each run once and for all, and write the record of its waiting."""
        resources = Resources(self._settings, self._raw)
        for plan in plans:
            if signals.received:
                return
            try:
                config = self.composer.compose(plan.overrides)
                number_job(config, plan.num)
                wanted = resources.of(config)
                packed = self._ship().pack_config(config)
                record = write_waiting(
                    RunDir(plan.directory), self._planner.record(plan, launch.sweep)
                )
                if record is None:
                    raise SweepError(
                        f"{plan.directory} is being worked in by another launcher, which does not "
                        "do it on Slurm. Wait for it, and type the same command again."
                    )
            except Exception as error:  # noqa: BLE001 - the run's own failure; the others go on
                answers.cannot_start(plan.index, plan.num, plan.overrides, error)
                self._failures += 1
            else:
                yield Asked(plan, record, packed, wanted)

    def _ship(self) -> Shipper:
        if self._shipper is None:
            from orchestrator.queue.spawn import Shipper

            self._shipper = Shipper(self._task)
        return self._shipper

    def _common(self) -> bytes:
        return self._ship().common

    def _show(
        self, points: Sequence[Sequence[str]], first: int, progress: Progress
    ) -> list[JobReturn]:
        from orchestrator.slurm.dry_run import show

        return show(
            self._settings, self._raw, self._planner, self.composer, points, first, progress
        )

    # --- after submission ---

    def _drop(
        self,
        asked: Sequence[Asked],
        waiting: Sequence[Waiting],
        answers: Answers,
        refused: SweepError | None,
    ) -> None:
        """Runs that did not get as far as Slurm's queue are not left PENDING."""
        submitted = {run.plan.index for run in waiting}
        why = str(refused) if refused else "the sweep was stopped before it was submitted"
        for run in asked:
            if run.plan.index in submitted:
                continue
            record: Any = run.record
            error = ErrorInfo("NotSubmitted", why)
            state = RunState.FAILED if refused else RunState.CANCELLED
            record = record.advance(state, error=error, ended_at=time.time())
            with contextlib.suppress(OSError):
                RunDir(run.plan.directory).write(record)
            answers.refuse(run.plan, record)

    def _tell_submitted(
        self, waiting: Sequence[Waiting], known: int, submitter: Submitter, progress: Progress
    ) -> None:
        ids = collapse(run.job_id for run in waiting[known:])
        jobs = len({run.job_id for run in waiting[known:]})
        what = f"{plural(len(waiting) - known, 'run')} in {plural(jobs, 'job')}"
        progress.say(f"Submitted {what}: {' '.join(ids)}. Slurm's own logs: {submitter.folder}")

    def _leave_running(
        self,
        waiting: Sequence[Waiting],
        answers: Answers,
        launch: _Launch,
        refused: SweepError | None,
    ) -> list[JobReturn]:
        """Return without waiting: each run's JobReturn says that it is submitted."""
        for run in waiting:
            answers.leave(run.plan)
        launch.sweep.write()
        if waiting:
            launch.progress.say(_how_to_follow(launch.sweep.root))
        if refused is not None:
            raise refused
        return [result for result in answers.returns if result is not None]

    def _interrupted(
        self,
        watcher: Watcher,
        signals: StopSignals,
        answers: Answers,
        progress: Progress,
        kill_wait_s: float,
    ) -> None:
        """Cancel the jobs, or leave them, and end the program."""
        number = signals.received[0]
        root = self._planner.sweep_dir
        ids = " ".join(collapse(watcher.jobs))
        if self._settings.on_interrupt == "cancel" and number != signal.SIGHUP and watcher.left:
            progress.say(f"Cancelling {ids}; Ctrl+C again leaves what is left to Slurm.")
            progress.stopping(0)
            try:
                self._client.cancel(watcher.jobs)
            except SlurmUnreachable as error:
                progress.say(str(error))
            else:
                watcher.hurry()
                watcher.run(signals, time.monotonic() + kill_wait_s + _CANCEL_S)
        left = watcher.left
        results = self._book.close(progress, answers, complete=False)
        if left:
            ids = " ".join(collapse(watcher.jobs))
            progress.say(f"Left to Slurm: {watcher.summary()}, in {ids}. {_how_to_follow(root)}")
        else:
            progress.say(
                f"Stopped: {counts(progress)}. {results} "
                "The same command again runs what is missing."
            )
        raise SystemExit(128 + number)


def _how_to_follow(root: Path) -> str:
    return (
        f"orchestrator-status {root} shows the runs, orchestrator-status stop {root} cancels "
        "them, and the same command again waits for them."
    )
