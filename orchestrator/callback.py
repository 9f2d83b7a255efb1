"""``hydra/callbacks=results``: records and curves under any launcher.

Under this project's launchers the keeper of each job writes the record, and this has
nothing left to do. Under Hydra's own, joblib's and submitit's it writes the record itself;
a run whose process is killed there is found LOST by whoever looks next.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from hydra.experimental.callback import Callback

from orchestrator import run as current_run
from orchestrator.identity import Identity, identify, read_settings
from orchestrator.overrides import as_typed
from orchestrator.processes import boot_id, hostname, own_identity
from orchestrator.record import Attempt, ErrorInfo, RunRecord, RunState, numbers_in, to_plain
from orchestrator.run import ActiveRun
from orchestrator.store import RunDir, RunLock, find_runs, own_directory
from orchestrator.sweeps import Sweep, code_directory, code_versions, rerun_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig


_OUR_LAUNCHERS = "hydra_plugins.hydra_orchestrator."
_SWEEP_VARIABLE = "ORCHESTRATOR_SWEEP_ID"


class ResultsCallback(Callback):
    """Writes the run record where no launcher of ours does.

    Args:
        settings: the fields of `orchestrator.settings.ResultsSettings`.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = read_settings(settings)
        self._record: RunRecord | None = None
        self._lock: RunLock | None = None
        self._sweep: Sweep | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Launchers pickle callbacks for their workers; a run in progress stays here.
        nothing = dict.fromkeys(("_record", "_lock", "_sweep"))
        return {"_settings": self._settings, **nothing}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if str(config.hydra.launcher.get("_target_")).startswith(_OUR_LAUNCHERS):
            return
        results_file = self._settings.results_file
        self._sweep = Sweep(
            Path(str(config.hydra.sweep.dir)).absolute(),
            overrides=as_typed(config.hydra),
            results_file=None if results_file is None else Path(results_file).absolute(),
        )
        self._sweep.write()
        # Workers of any launcher on this machine inherit it.
        os.environ[_SWEEP_VARIABLE] = self._sweep.sweep_id
        # A failed job ends the whole sweep without `on_multirun_end`.
        atexit.register(self._end_sweep, os.getpid())

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        atexit.unregister(self._end_sweep)
        self._end_sweep(os.getpid())

    def _end_sweep(self, pid: int) -> None:
        """Write the sweep's results from the records that name it."""
        sweep, self._sweep = self._sweep, None
        if sweep is None or os.getpid() != pid:
            return
        os.environ.pop(_SWEEP_VARIABLE, None)
        for run in find_runs(sweep.root):
            record = run.try_read()
            if record is not None and record.sweep_id == sweep.sweep_id:
                sweep.add_run(len(sweep.runs) if record.index is None else record.index, run.path)
                sweep.states[record.state.value] += 1
        sweep.total = len(sweep.runs)
        sweep.write(ended=True)
        sweep.write_results(complete=True)

    def on_job_start(
        self, config: DictConfig, *, task_function: Callable[..., Any] | None = None, **_: Any
    ) -> None:
        active = current_run.active()
        if active is not None and active.managed:
            return
        run = RunDir(Path(config.hydra.runtime.output_dir))
        who = self._identify(config)
        # Hydra has decided where the run writes: whoever owns the directory may be asked no more.
        own_directory(run.path, who.fingerprint)
        self._lock = RunLock.acquire(run)
        if self._lock is None:
            self._stay_out_of(run)
            return
        # Hydra has written its files here already, so they stay; all else is as in the queue.
        earlier = run.try_read()
        run.set_aside(whole=False)
        attempts = earlier.with_last_attempt() if earlier else ()
        self._record = self._first_record(config, run, who, attempts)
        if task_function is not None:
            versions = code_versions(code_directory(task_function))
            self._record = msgspec.structs.replace(self._record, versions=versions)
        run.write(self._record)
        current_run.activate(ActiveRun(run, attempt=len(attempts) + 1))
        atexit.register(self._on_exit, os.getpid())

    def _stay_out_of(self, run: RunDir) -> None:
        """Somebody else works in this directory: leave its record and its curves alone."""
        aside = run.attempts / f"unrecorded-{os.getpid()}"
        aside.mkdir(parents=True, exist_ok=True)
        current_run.activate(ActiveRun(RunDir(aside)))
        print(
            f"{run.path} is being worked in by another process: this run is not recorded, and "
            f"what it logs and saves is in {aside}. Give each its own hydra.sweep.dir.",
            file=sys.stderr,
        )

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if self._record is None:
            return
        from hydra.core.utils import JobStatus

        value = job_return._return_value  # noqa: SLF001 - the property raises a failure
        if job_return.status is JobStatus.COMPLETED:
            plain = None
            with contextlib.suppress(Exception):
                plain = to_plain(value)
            self._finish(RunState.COMPLETED, return_value=plain, returncode=0)
        else:
            self._finish(RunState.FAILED, error=ErrorInfo.of(value), returncode=1)

    def _identify(self, config: DictConfig) -> Identity:
        hydra = config.hydra
        return identify(config, as_typed(hydra), self._settings, hydra.job.name)

    def _first_record(
        self, config: DictConfig, run: RunDir, who: Identity, attempts: tuple[Attempt, ...]
    ) -> RunRecord:
        hydra, overrides = config.hydra, as_typed(config.hydra)
        pid, started = own_identity()
        named = hydra.runtime.choices.get("hydra/output") == "named"
        return RunRecord(
            model_name=run.path.name if named else who.name,
            sweep_id=os.environ.get(_SWEEP_VARIABLE, ""),
            index=None if "num" not in hydra.job else hydra.job.num,
            overrides=overrides,
            hyperparams=who.hyperparams,
            fingerprint=who.fingerprint,
            seed=who.seed,
            state=RunState.RUNNING,
            attempts=attempts,
            host=hostname(),
            boot_id=boot_id(),
            pid=pid,
            pid_started=started,
            started_at=time.time(),
            command=rerun_command(overrides, as_typed(hydra, "hydra")),
            # The task may have been sent to another directory (hydra.job.chdir).
            cwd=hydra.runtime.cwd,
        )

    def _finish(self, state: RunState, **changes: Any) -> None:
        record, active = self._record, current_run.active()
        assert record is not None
        assert active is not None
        now = time.time()
        final = record.advance(
            state,
            ended_at=now,
            duration_seconds=round(now - (record.started_at or now), 3),
            metrics={**active.metrics, **numbers_in(changes.get("return_value"))},
            **changes,
        )
        try:
            active.directory.write(final)
        finally:
            self._record = None
            current_run.activate(None)
            if self._lock is not None:
                self._lock.release()
            atexit.unregister(self._on_exit)

    def _on_exit(self, pid: int) -> None:
        """The interpreter ends in the middle of a job: Ctrl+C and sys.exit skip `on_job_end`."""
        if self._record is None or os.getpid() != pid:
            return
        interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
        state = RunState.CANCELLED if interrupted else RunState.FAILED
        kind = "KeyboardInterrupt" if interrupted else "SystemExit"
        self._finish(state, error=ErrorInfo(kind, "the process ended before its task returned"))
