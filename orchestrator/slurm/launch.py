"""One launch on a cluster: plan, submit, wait; or leave it to Slurm."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

from orchestrator.queue.answers import Answers
from orchestrator.queue.book import counts
from orchestrator.queue.context import nobody_listens
from orchestrator.queue.task import number_job
from orchestrator.record import ErrorInfo, RunState
from orchestrator.slurm.accounting import account
from orchestrator.slurm.check import check_tasks
from orchestrator.slurm.client import SlurmUnreachable
from orchestrator.slurm.cut import Asked
from orchestrator.slurm.ledger import Ledger, Ledgers
from orchestrator.slurm.pack import ENDED
from orchestrator.slurm.settle import was_cut_short
from orchestrator.slurm.states import collapse
from orchestrator.slurm.submit import write_waiting
from orchestrator.slurm.waiting import Waiting
from orchestrator.slurm.watch import Watcher
from orchestrator.store import SWEEPS, RunDir
from orchestrator.sweep.errors import SweepError
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from hydra.core.utils import JobReturn

    from orchestrator.queue.book import SweepBook
    from orchestrator.queue.plan import Plan, Planner
    from orchestrator.queue.progress import Progress
    from orchestrator.queue.retry import FailureLimit
    from orchestrator.queue.signals import StopSignals
    from orchestrator.queue.spawn import Shipper
    from orchestrator.queue.wire import Ended
    from orchestrator.slurm.client import SlurmClient
    from orchestrator.slurm.resources import Resources
    from orchestrator.slurm.settings import SlurmSettings
    from orchestrator.slurm.submit import Submitter
    from orchestrator.sweep.compose import Composer
    from orchestrator.sweeps import Sweep

# How long the last of the cancelled jobs may take to be gone, beside the time that Slurm gives
# their processes.
_CANCEL_S = 20.0
# How long accounting is given to hear of the last job, at most, and as a share of the sweep;
# orchestrator-status asks later, too.
_ACCOUNTING_S = 2.0
_SAY_S = 10.0
_ACCOUNTING_SHARE = 0.02


@dataclass(eq=False)
class SlurmLaunch:
    """The points of one launch, from Hydra's call to its answer."""

    points: Sequence[Sequence[str]]
    first_num: int
    _: KW_ONLY
    settings: SlurmSettings
    resources: Resources
    composer: Composer
    planner: Planner
    book: SweepBook
    progress: Progress
    limit: FailureLimit
    client: SlurmClient
    submitter: Submitter
    shipper: Shipper
    kill_wait_s: float
    # Over all launches of the launcher.
    failures: int
    ended: Callable[[Plan, Ended], None] = nobody_listens
    answers: Answers = field(init=False)
    waiting: list[Waiting] = field(default_factory=list)
    # Whose sweep's each run was when it was looked at, by the plan's index.
    known: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.answers = Answers(self, len(self.points), self.first_num)

    @property
    def sweep(self) -> Sweep:
        return self.book.sweep

    def run(self, signals: StopSignals) -> list[JobReturn]:
        """Submit what is missing and, unless the settings say otherwise, wait for all of it.

        Raises:
            SweepError: Slurm refuses a job, or records are not on the disk.
            SystemExit: a signal has come.
        """
        plans = list(self._plan(signals))
        self._find_under_way(plans)
        known = {run.plan.index for run in self.waiting}
        missing = [
            plan
            for plan in plans
            if plan.index not in known and self.answers.returns[plan.index] is None
        ]
        asked = list(self._ask(missing, signals))
        refused = self._submit(asked, signals)
        if not self.settings.wait and not signals.received:
            self._leave()
        else:
            self._wait(signals)
        if refused is not None:
            raise refused
        return [result for result in self.answers.returns if result is not None]

    # --- before submission ---

    def _plan(self, signals: StopSignals) -> Iterator[Plan]:
        """The plans of those points that are not answered yet."""
        for index, overrides in enumerate(self.points):
            if signals.received:
                return
            num = self.first_num + index
            try:
                plan = self.planner.plan(index, num, overrides)
            except Exception as error:  # noqa: BLE001 - the point's own failure; the others go on
                self._cannot_start(index, num, overrides, error)
                continue
            if plan.done is not None:
                self.answers.take_recorded(plan, plan.done)
            elif not self.answers.is_repeat(plan):
                self.sweep.add_run(num, plan.directory, plan.who.hyperparams)
                yield plan

    def _cannot_start(
        self, index: int, num: int, overrides: Sequence[str], error: Exception
    ) -> None:
        self.failures += 1
        self.answers.cannot_start(index, num, overrides, error)

    def _find_under_way(self, plans: Sequence[Plan]) -> None:
        """Take up runs that a Slurm job of an earlier launch does, or waits to do."""
        ledgers = Ledgers(self.planner.sweep_dir)
        found = []
        for plan in plans:
            record = RunDir(plan.directory).try_read()
            self.known[plan.index] = "" if record is None else record.sweep_id
            if record is None or (record.state.is_final and not was_cut_short(record)):
                continue
            job_id = ledgers.job_of(record.sweep_id, record.index) or record.slurm_job_id
            ledger = ledgers.of(record.sweep_id) or Ledger(submitted_at=record.started_at or 0.0)
            if job_id and record.fingerprint == plan.who.fingerprint:
                directory = self.planner.sweep_dir / SWEEPS / record.sweep_id
                if self._is_elsewhere(plan, ledger.cluster) or self._is_foreign(plan, directory):
                    continue
                found.append(
                    Waiting(plan, record, job_id, directory, ledger.submitted_at, ledger.folder)
                )
        seen = self.client.poll({run.job_id for run in found}) if found else {}
        for run in found:
            if run.job_id in seen and not seen[run.job_id].state.is_final:
                self.waiting.append(run)
        if self.waiting:
            jobs = " ".join(collapse(run.job_id for run in self.waiting))
            count = plural(len(self.waiting), "run")
            self.progress.say(f"{count} under way already, in Slurm's {jobs}.")

    def _is_elsewhere(self, plan: Plan, cluster: str) -> bool:
        """Whether another cluster, which cannot be asked here, has a run; its point is answered."""
        here = self.submitter.ledger.cluster
        if not cluster or not here or cluster == here:
            return False
        error = SweepError(
            f"{plan.directory} was submitted on the cluster {cluster!r}, and this is {here!r}: "
            f"type it there; or there, orchestrator-status stop {self.sweep.root}."
        )
        self._cannot_start(plan.index, plan.num, plan.overrides, error)
        return True

    def _is_foreign(self, plan: Plan, sweep_dir: Path) -> bool:
        """Whether another user, who alone sees their jobs, has submitted a run."""
        with contextlib.suppress(OSError, KeyError):
            if sweep_dir.stat().st_uid != os.getuid():
                error = SweepError(f"{plan.directory} was submitted by {sweep_dir.owner()}.")
                self._cannot_start(plan.index, plan.num, plan.overrides, error)
                return True
        return False

    def _ask(self, plans: Sequence[Plan], signals: StopSignals) -> Iterator[Asked]:
        """Compose each run once and for all, and write the record of its waiting."""
        say_at = time.monotonic() + _SAY_S
        for number, plan in enumerate(plans):
            if signals.received:
                return
            if time.monotonic() >= say_at:
                say_at = time.monotonic() + _SAY_S
                self.progress.say(f"Composed {number} of {plural(len(plans), 'run')}.")
            try:
                asked = self._ask_one(plan)
            except Exception as error:  # noqa: BLE001 - the run's own failure; the others go on
                self._cannot_start(plan.index, plan.num, plan.overrides, error)
            else:
                if asked is not None:
                    yield asked

    def _ask_one(self, plan: Plan) -> Asked | None:
        config = self.composer.compose(plan.overrides)
        number_job(config, plan.num)
        wanted = self.resources.of(config)
        check_tasks(self.settings, wanted)
        packed = self.shipper.pack_config(config)
        record = self.planner.record(plan, self.sweep)
        before = self.known.get(plan.index, "")
        found = write_waiting(RunDir(plan.directory), record, before, resume=self.planner.resume)
        if found is None or (found.sweep_id != record.sweep_id and not found.success):
            raise SweepError(
                f"{plan.directory} is being worked in, or was submitted just now, by another "
                "launcher. Wait for it, and type the same command again."
            )
        if found.sweep_id != record.sweep_id:  # it has been done while this launch was planned
            self.answers.take_recorded(plan, found)
            return None
        return Asked(plan, found, packed, wanted)

    # --- submission ---

    def _submit(self, asked: Sequence[Asked], signals: StopSignals) -> SweepError | None:
        """Hand the runs to Slurm; an error of it is for later, when what it took has ended."""
        refused: SweepError | None = None
        before = len(self.waiting)
        try:
            for job_id, run in self.submitter.submit(
                asked, self.shipper.common, lambda: bool(signals.received)
            ):
                since = self.submitter.ledger.submitted_at
                directory = self.sweep.directory
                logs = self.submitter.folder
                self.waiting.append(Waiting(run.plan, run.record, job_id, directory, since, logs))
        except SweepError as error:
            refused = error
        new = self.waiting[before:]
        taken = {run.plan.index for run in new}
        left = [run for run in asked if run.plan.index not in taken]
        self._drop(left, refused, say=bool(new))
        if refused is not None and not new:
            raise refused
        if new:
            ids = list(dict.fromkeys(run.job_id for run in new))
            what = f"{plural(len(new), 'run')} in {plural(len(ids), 'job')}"
            self.progress.say(f"Submitted {what} to Slurm: {' '.join(collapse(ids))}.")
            self.sweep.write()
        return refused

    def _drop(self, asked: Sequence[Asked], refused: SweepError | None, *, say: bool) -> None:
        """Runs that did not get as far as Slurm's queue are not left PENDING."""
        if asked and refused is not None and say:
            self.progress.say(f"{plural(len(asked), 'run')} not submitted: {refused}")
        if refused is not None:
            why = str(refused)
        else:
            why = "the sweep was stopped before it was submitted"
        for run in asked:
            error = ErrorInfo("NotSubmitted", why)
            record = run.record.advance(RunState.CANCELLED, error=error, ended_at=time.time())
            with contextlib.suppress(OSError):
                RunDir(run.plan.directory).write(record)
            self.answers.refuse(run.plan, record)

    # --- after submission ---

    def _leave(self) -> None:
        """Return without waiting: each run's JobReturn says that it is submitted."""
        for run in self.waiting:
            self.answers.leave(run.plan)
        self.book.close(self.progress, self.answers, complete=False)
        if self.waiting:
            again = "the same command without hydra.launcher.wait=false waits for them"
            self.progress.say(_how_to_follow(self.sweep.root, again))

    def _wait(self, signals: StopSignals) -> None:
        watcher = Watcher(
            self.client,
            self.waiting,
            self.answers,
            self.progress,
            self.limit,
            failures=self.failures,
            longest_poll_s=self.settings.poll_interval_s,
        )
        if not signals.received:
            watcher.run(signals)
        self.failures = watcher.failures
        if signals.received:
            self._interrupted(watcher, signals)
        results = self.book.close(self.progress, self.answers, complete=True)
        self.progress.say(f"All runs ended ({counts(self.progress)}). {results}")
        patience = min(_ACCOUNTING_S, self.progress.elapsed_seconds() * _ACCOUNTING_SHARE)
        shutil.rmtree(self.sweep.directory / ENDED, ignore_errors=True)
        account(self.sweep.directory, self.client, patience_s=patience, limit_s=_ACCOUNTING_S)

    def _interrupted(self, watcher: Watcher, signals: StopSignals) -> None:
        """Cancel the jobs, or leave them, and end the program."""
        number = signals.received[0]
        # A connection that is lost is no wish to end what runs on the cluster.
        cancel = self.settings.on_interrupt == "cancel" and number != signal.SIGHUP
        # (Two may have come before anybody could look: the second one leaves.)
        if cancel and watcher.jobs and len(signals.received) == 1:
            self._cancel(watcher, signals)
        results = self.book.close(self.progress, self.answers, complete=False)
        if watcher.jobs:
            ids = " ".join(collapse(watcher.jobs))
            follow = _how_to_follow(self.sweep.root, "the same command again waits for them")
            what = "Cancelled, and not gone yet" if self.progress.brief else "Left to Slurm"
            self.progress.say(f"{what}: {watcher.summary()}, in {ids}. {follow}")
        else:
            again = "The same command again runs what is missing."
            said = counts(self.progress) if self.progress.ran else "nothing was submitted"
            self.progress.say(f"Stopped: {said}. {results} {again}")
        raise SystemExit(128 + number)

    def _cancel(self, watcher: Watcher, signals: StopSignals) -> None:
        jobs = watcher.own_jobs(self.sweep.directory)
        if jobs:
            ids = " ".join(collapse(jobs))
            self.progress.say(f"Cancelling {ids}; Ctrl+C again leaves what is left to Slurm.")
        if others := [job for job in watcher.jobs if job not in jobs]:
            others_ids = " ".join(collapse(others))
            self.progress.say(f"{others_ids} goes on: it does runs of another sweep, too.")
        self.progress.stopping(0)
        self.progress.brief = True
        failed = threading.Event()
        # Beside this thread: a second Ctrl+C does not wait for a Slurm that does not answer.
        cancelling = threading.Thread(target=self._cancel_jobs, args=(jobs, failed), daemon=True)
        cancelling.start()
        watcher.hurry()
        ours = set(jobs)
        watcher.run(
            signals,
            time.monotonic() + self.kill_wait_s + _CANCEL_S,
            lambda: failed.is_set() or ours.isdisjoint(watcher.jobs),
        )
        self.progress.brief = not (failed.is_set() or ours.isdisjoint(watcher.jobs))

    def _cancel_jobs(self, jobs: Sequence[str], failed: threading.Event) -> None:
        try:
            self.client.cancel(jobs)
        except SlurmUnreachable as error:
            self.progress.say(str(error))
            failed.set()


def _how_to_follow(root: Path, again: str) -> str:
    return (
        f"orchestrator-status {root} shows the runs, orchestrator-status stop {root} cancels "
        f"them, and {again}."
    )
