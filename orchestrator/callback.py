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

from hydra.experimental.callback import Callback

from orchestrator import run as current_run
from orchestrator.identity import identify, read_settings
from orchestrator.overrides import as_typed
from orchestrator.processes import boot_id, hostname, own_identity
from orchestrator.record import ErrorInfo, RunRecord, RunState, from_plain, to_plain
from orchestrator.run import ActiveRun
from orchestrator.store import RunDir, RunLock, find_runs
from orchestrator.sweeps import Sweep, code_versions, rerun_command

if TYPE_CHECKING:
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
        # Workers of any launcher on this machine inherit it.
        os.environ[_SWEEP_VARIABLE] = self._sweep.sweep_id

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the sweep's results; Hydra does not call this where a job has failed."""
        sweep, self._sweep = self._sweep, None
        if sweep is None:
            return
        os.environ.pop(_SWEEP_VARIABLE, None)
        for run in find_runs(sweep.root):
            record = run.try_read()
            if record is not None and record.sweep_id == sweep.sweep_id:
                sweep.add_run(len(sweep.runs) if record.index is None else record.index, run.path)
        sweep.total = len(sweep.runs)
        sweep.write(ended=True)
        sweep.write_results(complete=True)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        active = current_run.active()
        if active is not None and active.managed:
            return
        run = RunDir(Path(config.hydra.runtime.output_dir))
        run.path.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock.acquire(run)
        earlier = run.try_read()
        run.set_aside(whole=False)
        self._record = self._first_record(config, run, earlier)
        run.write(self._record)
        current_run.activate(ActiveRun(run))
        atexit.register(self._on_exit, os.getpid())

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

    def _first_record(
        self, config: DictConfig, run: RunDir, earlier: RunRecord | None
    ) -> RunRecord:
        hydra = config.hydra
        overrides = as_typed(hydra)
        who = identify(config, overrides, self._settings)
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
            attempts=(*earlier.attempts, earlier.as_attempt()) if earlier else (),
            host=hostname(),
            boot_id=boot_id(),
            pid=pid,
            pid_started=started,
            started_at=time.time(),
            command=rerun_command(overrides, as_typed(hydra, "hydra")),
            versions=code_versions(hydra.runtime.cwd),
        )

    def _finish(self, state: RunState, **changes: Any) -> None:
        record, active = self._record, current_run.active()
        assert record is not None
        assert active is not None
        returned = changes.get("return_value")
        scalars = from_plain(returned) if isinstance(returned, dict) else {}
        numbers = {k: v for k, v in scalars.items() if isinstance(v, (int, float))}
        now = time.time()
        final = record.advance(
            state,
            ended_at=now,
            duration_seconds=round(now - (record.started_at or now), 3),
            metrics={**active.metrics, **numbers},
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
