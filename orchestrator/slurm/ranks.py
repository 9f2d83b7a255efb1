"""Jobs of several tasks: the first does the run and records it, the others have their own logs."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from orchestrator.record import PREEMPTED, ErrorInfo
from orchestrator.store import RANKS, RunDir, read_bytes, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import NoReturn

    from orchestrator.slurm.pack import Pack, PackedRun

_STATE = "rank.json"
_LAST_WORDS_S = 1.5
_PAUSE_S = 0.05


class RankState(msgspec.Struct, frozen=True):
    """How far a rank has come in one start of a Slurm job, and why it failed, if it has."""

    start: str
    rank: int
    ended: bool = False
    error: ErrorInfo | None = None


def own_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Which of its job's tasks this process is."""
    return int(environ.get("SLURM_PROCID") or 0)


def rank_dir(run: Path, rank: int) -> Path:
    return run / RANKS / str(rank)


def run_rank(pack: Pack, rank: int) -> NoReturn:
    """Do the run's task as a further rank: no record, logs and curves in ``ranks/<rank>``."""
    from orchestrator import run as current_run
    from orchestrator.queue.job import (
        install_sigterm_handler,
        limit_threads,
        redirect,
        reseed,
    )
    from orchestrator.queue.spawn import load_config, load_task
    from orchestrator.queue.task import call_task, name_job
    from orchestrator.slurm.allocation import job_id

    run = pack.runs[0]
    own = rank_dir(Path(run.directory), rank)
    own.mkdir(parents=True, exist_ok=True)
    state = RankState(_this_start(), rank)
    if _is_done(pack, run):
        _tell(own, msgspec.structs.replace(state, ended=True))
        sys.exit(0)
    _tell(own, state)
    threads = _set_environment(pack, run)
    signal.signal(signal.SIGUSR2, current_run.note_warning)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    install_sigterm_handler()
    redirect(RunDir(own))
    home = RunDir(Path(run.directory))
    active = current_run.ActiveRun(RunDir(own), home=home, managed=True)
    current_run.activate(active)
    try:
        task = load_task(io.BytesIO(pack.common))
        config = load_config(io.BytesIO(run.config))
        name_job(config, job_id())
        limit_threads(threads)
        reseed(run.record.fingerprint)
        returned = call_task(task, config, run.directory, logs=str(own))
        returned.return_value  # noqa: B018 - raises what the task has raised
    except BaseException as error:  # noqa: BLE001 - whatever it is, rank 0 is to hear of it
        if not isinstance(error, SystemExit) or error.code not in (0, None):
            traceback.print_exc()
            _tell(own, msgspec.structs.replace(state, ended=True, error=_own_error(error)))
            raise SystemExit(1) from None
    _tell(own, msgspec.structs.replace(state, ended=True))
    sys.exit(0)


def _is_done(pack: Pack, run: PackedRun) -> bool:
    """Whether somebody else has done the run while its job waited: rank 0 does not do it either."""
    from orchestrator.slurm.allocation import job_id

    found = RunDir(Path(run.directory)).try_read()
    if found is None or found.slurm_job_id == job_id():
        return False
    return pack.answers(found, run.record)


def _set_environment(pack: Pack, run: PackedRun) -> int:
    """Set the variables that rank 0 has from its local queue; returns the threads it may use."""
    from orchestrator.queue.environment import job_environment
    from orchestrator.queue.job import set_variables
    from orchestrator.queue.needs import Need
    from orchestrator.slurm.allocation import allocated_cores

    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    attempt = len(run.record.attempts) + 1 + restarts
    variables = job_environment(
        pack.settings,
        (),
        Need(gpus=0),
        (),
        os.environ,
        num=run.num,
        name=run.record.model_name,
        directory=run.directory,
        attempt=attempt,
        cpu_only=True,
    )
    threads = pack.settings.threads or allocated_cores()
    set_variables(variables, threads, attempt)
    return threads


def _own_error(error: BaseException) -> ErrorInfo | None:
    """What a rank has to say; nothing where all of them were asked to end."""
    return None if type(error).__name__ in ("EndedBySignal", PREEMPTED) else ErrorInfo.of(error)


def error_of_ranks(run: Path, until: Callable[[], bool] | None = None) -> ErrorInfo | None:
    """Why a run's rank has failed in this start of this job; None where none has.

    Args:
        run: the run's directory.
        until: where rank 0 has ended well, the others are waited for; until this is true.
            Where it is not given, all have been asked to end: they are given a moment.
    """
    give_up = time.monotonic() + _LAST_WORDS_S
    while True:
        states = list(_states(run))
        failed = [state for state in states if state.error is not None]
        silent = [state.rank for state in states if not state.ended]
        missing = until is not None and len(states) < _tasks() - 1
        if failed or not (silent or missing):
            break
        if until() if until is not None else time.monotonic() > give_up:
            break
        time.sleep(_PAUSE_S)
    for state in failed:
        assert state.error is not None
        where = rank_dir(run, state.rank)
        message = f"in rank {state.rank}: {state.error.message} (see {where})"
        return msgspec.structs.replace(state.error, message=message)
    if silent:
        message = f"rank {silent[0]} was killed, or did not end when it was asked to"
        return ErrorInfo("RankDied", f"{message} (see {rank_dir(run, silent[0])})")
    return None


def _tasks() -> int:
    return int(os.environ.get("SLURM_NTASKS") or 1)


def are_several() -> bool:
    """Whether this job has further ranks."""
    return "SLURM_STEP_ID" in os.environ and _tasks() > 1


def _states(run: Path) -> Iterator[RankState]:
    for path in sorted((run / RANKS).glob(f"*/{_STATE}")):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found = msgspec.json.decode(read_bytes(path), type=RankState)
            if found.start == _this_start():
                yield found


def _this_start() -> str:
    restarts = os.environ.get("SLURM_RESTART_COUNT") or "0"
    return f"{os.environ.get('SLURM_JOB_ID')}.{restarts}"


def _tell(own: Path, state: RankState) -> None:
    with contextlib.suppress(OSError):
        write_atomic(own / _STATE, msgspec.json.encode(state))
