"""From a point of the sweep to a job: who it is, where it goes, whether it is done already."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from omegaconf import DictConfig, OmegaConf

from orchestrator.identity import Identity, identify, memory_shape, results_settings
from orchestrator.overrides import as_typed
from orchestrator.queue.environment import job_environment
from orchestrator.queue.task import number_job, output_dir
from orchestrator.queue.wire import JobRequest
from orchestrator.record import RunRecord, RunState
from orchestrator.resolvers import RUN_NAME_RESOLVER
from orchestrator.store import RunDir, completed_runs, own_directory, planned_directory
from orchestrator.sweeps import rerun_command

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from orchestrator.queue.places import Place
    from orchestrator.queue.settings import QueueSettings
    from orchestrator.queue.spawn import Shipper
    from orchestrator.sweep.compose import Composer
    from orchestrator.sweeps import Sweep

# Hydra's default, and ours: where these are to be found needs no composition.
_NUMBERED_SUBDIR = "${hydra.job.num}"
_RESUME = "hydra.callbacks.results.resume"
_NAMED_SUBDIR = "${" + RUN_NAME_RESOLVER + ":sweep.dir}"


@dataclass(frozen=True)
class Plan:
    """One point, identified and placed."""

    index: int
    num: int
    overrides: tuple[str, ...]
    who: Identity
    directory: Path
    # The record that answers, where the run is done already.
    done: RunRecord | None = None
    # What decides on the memory that it takes; empty where nobody asks.
    shape: str = ""


@dataclass(frozen=True)
class Seat:
    """What one try of a run is given.

    Args:
        place: where it goes.
        totals: the memory of each GPU there, in bytes; 0 where it is not known.
        threads: how many it may use.
        attempt: 1 for its first try in this launch.
        cpu_only: the launch gives out no GPUs.
    """

    place: Place
    totals: Sequence[int]
    threads: int
    attempt: int
    cpu_only: bool

    def request(self, settings: QueueSettings, record: RunRecord, directory: Path) -> JobRequest:
        """The job for a run whose record is still PENDING."""
        gpus = self.place.gpus
        record = msgspec.structs.replace(
            record,
            gpu_id=gpus[0].index if gpus else None,
            gpu_uuids=tuple(gpu.uuid for gpu in gpus),
        )
        num = record.index or 0
        return JobRequest(
            num=num,
            overrides=record.overrides,
            directory=str(directory),
            record=record,
            resume=False,
            env=job_environment(
                settings,
                gpus,
                self.place.need,
                self.totals,
                os.environ,
                num=num,
                name=record.model_name,
                directory=str(directory),
                attempt=self.attempt,
                cpu_only=self.cpu_only,
            ),
            threads=self.threads,
            timeout_s=settings.timeout_s,
            kill_grace_s=settings.kill_grace_s,
        )


class Planner:
    """Plans the points of one launch.

    Args:
        composer: composes the points.
        config: the sweep's own config.
        launcher: the settings of the queue.
    """

    def __init__(
        self,
        composer: Composer,
        config: DictConfig,
        launcher: QueueSettings,
    ) -> None:
        self.results = results_settings(config.hydra)
        self._composer = composer
        self._config = config
        self._launcher = launcher
        # Packs jobs for fresh interpreters; None while jobs are forked.
        self.shipper: Shipper | None = None
        # Whether plans tell the shape of their runs.
        self.shapes = False
        self._hydra_overrides = as_typed(config.hydra, "hydra")
        self._app = str(config.hydra.job.name)
        self._cwd = os.getcwd()  # noqa: PTH109
        self._subdir = _plain_subdir(config)
        self._named = self._subdir == _NAMED_SUBDIR

    @property
    def resume(self) -> bool:
        return bool(self.results.resume)

    @cached_property
    def sweep_dir(self) -> Path:
        return Path(str(self._config.hydra.sweep.dir)).absolute()

    @cached_property
    def _done(self) -> dict[str, Path]:
        done: dict[str, Path] = {}
        if self.resume:
            for run, record in completed_runs(self.sweep_dir):
                done.setdefault(record.fingerprint, run.path)
        return done

    def completed(self) -> Iterator[RunRecord]:
        """The records of all finished runs of this outputs directory."""
        return (record for _, record in completed_runs(self.sweep_dir))

    def plan(self, index: int, num: int, overrides: Sequence[str], *, dry: bool = False) -> Plan:
        """Identify a point and give it a directory, made and owned.

        Args:
            index: the point's place in this launch.
            num: Hydra's number of it.
            overrides: as typed.
            dry: only say what the directory would be.

        Raises:
            Exception: Hydra's own, where the point cannot be composed.
            OSError: its directory cannot be made.
        """
        config = self._composer.task_config(overrides)
        who = identify(config, overrides, self.results, self._app)
        done = self._recorded(who)
        if done is not None:
            return Plan(index, num, tuple(overrides), who, done[0], done[1])
        wanted = self._wanted_directory(num, overrides, who)
        choose = planned_directory if dry else own_directory
        directory = choose(wanted, who.fingerprint)
        shape = ""
        if self.shapes:
            shape = memory_shape(config, self.results, self._app, self._launcher.memory_keys)
        return Plan(index, num, tuple(overrides), who, directory, shape=shape)

    def _wanted_directory(self, num: int, overrides: Sequence[str], who: Identity) -> Path:
        if self._named:
            return self.sweep_dir / who.name
        if self._subdir == _NUMBERED_SUBDIR:
            return self.sweep_dir / str(num)
        config = self._composer.compose(overrides)
        number_job(config, num)
        return output_dir(config)

    def remember(self, plan: Plan, record: RunRecord) -> None:
        """A run has ended; if well, it answers the same run under another name from now on."""
        if self.resume and record.state is RunState.COMPLETED:
            self._done[plan.who.fingerprint] = plan.directory

    def _recorded(self, who: Identity) -> tuple[Path, RunRecord] | None:
        path = self._done.get(who.fingerprint)
        record = RunDir(path).try_read() if path else None
        if path is None or record is None or record.state is not RunState.COMPLETED:
            return None
        return path, record

    def record(self, plan: Plan, sweep: Sweep) -> RunRecord:
        """The record of a run that waits for its start."""
        return RunRecord(
            model_name=plan.directory.name if self._named else plan.who.name,
            sweep_id=sweep.sweep_id,
            index=plan.num,
            overrides=plan.overrides,
            hyperparams=plan.who.hyperparams,
            fingerprint=plan.who.fingerprint,
            seed=plan.who.seed,
            state=RunState.PENDING,
            command=self._command(plan.overrides),
            cwd=self._cwd,
            versions=sweep.versions,
            memory_shape=plan.shape,
        )

    def request(self, plan: Plan, seat: Seat, sweep: Sweep) -> JobRequest:
        """The job for a plan, at a place."""
        request = seat.request(self._launcher, self.record(plan, sweep), plan.directory)
        return replace(
            request,
            resume=self.resume,
            parsed=self._composer.known(plan.overrides),
            payload=self._payload(plan),
        )

    def _command(self, overrides: Sequence[str]) -> str:
        words = self._hydra_overrides
        if self.resume:
            words = (*(word for word in words if not word.startswith(_RESUME)), *self.no_resume)
        return rerun_command(overrides, words)

    @property
    def no_resume(self) -> tuple[str, ...]:
        """What to type for a run to be done again."""
        configured = "results" in (self._config.hydra.callbacks or {})
        return (*(() if configured else ("hydra/callbacks=results",)), f"{_RESUME}=false")

    def _payload(self, plan: Plan) -> bytes | None:
        if self.shipper is None:
            return None
        config = self._composer.compose(plan.overrides)
        number_job(config, plan.num)
        return self.shipper.pack(config)


def _plain_subdir(config: DictConfig) -> str:
    """The unresolved subdirectory, if nothing else of a job's own decides where it writes."""
    sweep = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    assert isinstance(sweep, dict)
    root = re.sub(r"\$\{now:[^}]*\}", "", str(sweep["dir"]))
    return "" if "${" in root else str(sweep["subdir"])
