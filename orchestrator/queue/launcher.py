"""The body of ``hydra/launcher=gpu_queue``."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from orchestrator.overrides import as_typed, parse_override
from orchestrator.processes import boot_id, hostname
from orchestrator.queue.book import SweepBook, counts
from orchestrator.queue.context import Context
from orchestrator.queue.control import CONTROL_NAME, Control
from orchestrator.queue.job import THREAD_VARIABLES
from orchestrator.queue.link import ServerLink, forked_server, spawned_server
from orchestrator.queue.needs import Needs
from orchestrator.queue.plan import Planner
from orchestrator.queue.progress import SettingsCount, make_progress
from orchestrator.queue.resources import cores, jobs_at_a_time, make_places, start_watcher
from orchestrator.queue.retry import FailureLimit, RetryPolicy
from orchestrator.queue.scheduler import Scheduler
from orchestrator.queue.signals import StopSignals
from orchestrator.queue.start_method import choose
from orchestrator.queue.task import Task, number_job, rehearse
from orchestrator.record import RunState
from orchestrator.sweep.compose import Composer
from orchestrator.sweep.errors import SweepError
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from orchestrator.queue.places import Places
    from orchestrator.queue.progress import Progress
    from orchestrator.queue.settings import QueueSettings


class GpuQueue:
    """Everything between Hydra's ``setup`` and the end of its last ``launch``."""

    def __init__(
        self,
        settings: QueueSettings,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        self._settings = settings
        self._config = config
        self._task = Task(task_function, hydra_context.callbacks)
        self.composer = Composer(hydra_context.config_loader, config)
        # What jobs have in common is then in the memory that all of them are forked from.
        self._rehearse()
        for name in _to_preload(settings.preload, config):
            _import(name)
        _load_lazy_parts()
        self._planner = Planner(self.composer, config, settings)
        self._book = SweepBook(config, self._planner, task_function)
        # Before a sweeper computes, a thread starts or NVML is touched.
        self._server = self._start_server()
        self._watcher = start_watcher(settings, self._method)
        self._places: Places | None = None
        self._where = ""
        self._control: Control | None = None
        self._failures = 0
        self._told = False

    @property
    def resumes(self) -> bool:
        return self._planner.resume

    def _rehearse(self) -> None:
        # Whatever is wrong with the first point, the sweeper will say it better.
        with contextlib.suppress(Exception):
            config = self.composer.compose(_first_point(as_typed(self._config.hydra)))
            number_job(config, 0)
            rehearse(config, os.devnull)

    def _start_server(self) -> ServerLink:
        self._method, self._method_reason = choose(self._settings.start_method)
        if self._method == "fork":
            from orchestrator.queue.forked import forked_jobs

            self._planner.shipper = None
            return forked_server(partial(forked_jobs, self._task, self.composer))
        from orchestrator.queue.spawn import Shipper

        self._planner.shipper = Shipper(self._task)
        return spawned_server()

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Run the jobs; one JobReturn each, in the order given.

        Raises:
            SweepError: the settings ask for what this machine has not, or the outputs
                directory cannot be written, or records are not on the disk.
            SystemExit: a signal ended the sweep, or so many failures that it was to stop.
        """
        settings = self._settings
        needs = self._make_needs()
        retry = RetryPolicy(settings.retries, settings.retry_on)
        limit = FailureLimit(self._planner.results.on_failure)
        places = self._make_places(needs)
        sweep = self._book.extend(job_overrides, self._places.gpus if self._places else ())
        if self._control is None:
            self._control = Control(sweep.directory / CONTROL_NAME)
        progress = make_progress(
            len(job_overrides), SettingsCount(job_overrides, self._planner.results.seed_key)
        )
        places.say = progress.say
        self._tell(progress, sweep.root)
        context = Context(
            composer=self.composer,
            planner=self._planner,
            sweep=sweep,
            places=places,
            needs=needs,
            retry=retry,
            limit=limit,
            control=self._control,
            threads=settings.threads or _threads(jobs_at_a_time(places, needs)),
            progress=progress,
            make_server=self._start_server,
            server=self._server,
            failures=self._failures,
        )
        with StopSignals() as signals:
            scheduler = Scheduler(job_overrides, initial_job_idx, context, signals)
            try:
                scheduler.run()
            except BaseException:
                with contextlib.suppress(OSError):
                    sweep.write_results(complete=False)
                raise
            finally:
                self._server, self._failures = context.server, context.failures
                progress.close()
            self._finish(scheduler, context, signals)
        return [result for result in scheduler.answers.returns if result is not None]

    def _make_needs(self) -> Needs:
        raw = OmegaConf.to_container(self._config.hydra.launcher, resolve=False)
        assert isinstance(raw, dict)
        needs = Needs(self._settings, raw)  # type: ignore[arg-type]
        self._planner.shapes = needs.learns
        if needs.learns:
            for record in self._planner.completed():
                needs.learn(record.memory_shape, record.peak_gpu_memory_gb)
        return needs

    def _make_places(self, needs: Needs) -> Places:
        if self._places is None:
            self._places, self._where = make_places(self._settings, self._watcher)
            weakref.finalize(self, self._places.close)
        reason = "" if needs.constant is None else self._places.impossible(needs.constant)
        if reason:
            raise SweepError(f"No job of this sweep would ever find a place: {reason}.")
        return self._places

    def _tell(self, progress: Progress, sweep_dir: Path) -> None:
        if not self._told:
            progress.say(f"Jobs start by {self._method}: {self._method_reason}.")
            progress.say(f"Running on {self._where}.")
        progress.say(f"{plural(progress.total, 'run')}, outputs in {sweep_dir}")
        self._told = True

    def _finish(self, scheduler: Scheduler, context: Context, signals: StopSignals) -> None:
        progress = context.progress
        stopped = bool(signals.received or scheduler.closed)
        results = self._book.close(progress, scheduler.answers, complete=not stopped)
        if not stopped:
            progress.say(f"All runs ended ({counts(progress)}). {results}")
            return
        left = progress.total - progress.ended
        if signals.received:
            ended = plural(progress.states[RunState.CANCELLED], "running job")
            why = f"{ended} ended, {left} not started."
        else:
            why = f"{scheduler.closed} {plural(left, 'run')} not started."
        progress.say(f"Stopped: {why} {results} The same command again runs what is missing.")
        raise SystemExit(128 + signals.received[0] if signals.received else 1)


def _first_point(arguments: Sequence[str]) -> list[str]:
    """The arguments of a sweep with the first value of each that is swept."""
    point = []
    for text in arguments:
        override = parse_override(text)
        if override.is_sweep_override():
            value = (
                next(override.sweep_string_iterator(), None)
                if override.is_discrete_sweep()
                else None
            )
            point += [] if value is None else [f"{override.get_key_element()}={value}"]
        else:
            point.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
    return point


def _to_preload(preload: Any, config: DictConfig) -> list[str]:
    if preload == "auto":
        preload = OmegaConf.select(config, "task._target_", throw_on_missing=False)
    if not preload:
        return []
    return [preload] if isinstance(preload, str) else [str(name) for name in preload]


def _threads(slots: int) -> int:
    """The threads of each job: what the user's environment says, else its share of the cores."""
    for name in THREAD_VARIABLES:
        said = os.environ.get(name, "").split(",")[0].strip()
        if said.isdecimal() and int(said):
            return int(said)
    return max(1, cores() // slots)


def _load_lazy_parts() -> None:
    """Have in memory what every job would otherwise load or look up for itself."""
    boot_id()
    hostname()
    if "numpy" in sys.modules:  # which brings its generators only when asked
        importlib.import_module("numpy.random")


def _import(name: str) -> None:
    """Import the module that a dotted name lies in; the job reports it if that fails."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        except Exception:  # noqa: BLE001 - the job meets the same error, and reports it
            return
        return
