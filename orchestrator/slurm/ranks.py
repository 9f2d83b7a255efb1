"""Jobs of several tasks: the first does the run and records it, the others have their own logs."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from orchestrator.record import ErrorInfo
from orchestrator.store import RunDir, read_bytes, write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    from orchestrator.slurm.pack import Pack

RANKS = "ranks"
_ERROR = "error.json"


class RankError(msgspec.Struct, frozen=True):
    """How a rank failed, and in which Slurm job (and which start of it)."""

    job: str
    rank: int
    error: ErrorInfo


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
        install_warning_handler,
        redirect,
        reseed,
    )
    from orchestrator.queue.spawn import load_config, load_task
    from orchestrator.queue.task import call_task

    run = pack.runs[0]
    own = rank_dir(Path(run.directory), rank)
    own.mkdir(parents=True, exist_ok=True)
    (own / _ERROR).unlink(missing_ok=True)
    install_warning_handler()
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    install_sigterm_handler()
    redirect(RunDir(own))
    home = RunDir(Path(run.directory))
    active = current_run.ActiveRun(RunDir(own), home=home, managed=True)
    current_run.activate(active)
    try:
        task = load_task(io.BytesIO(pack.common))
        config = load_config(io.BytesIO(run.config))
        reseed(run.record.fingerprint)
        returned = call_task(task, config, run.directory, logs=str(own))
        returned.return_value  # noqa: B018 - raises what the task has raised
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            raise
        traceback.print_exc()
        _tell(own, rank, error)
        raise SystemExit(1) from None
    sys.exit(0)


def error_of_ranks(run: Path) -> ErrorInfo | None:
    """Why a run's rank has failed in this start of this job; None where none has."""
    for path in sorted((run / RANKS).glob(f"*/{_ERROR}")):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found = msgspec.json.decode(read_bytes(path), type=RankError)
            if found.job == _this_start():
                message = f"in rank {found.rank}: {found.error.message} (see {path.parent})"
                return msgspec.structs.replace(found.error, message=message)
    return None


def _this_start() -> str:
    restarts = os.environ.get("SLURM_RESTART_COUNT") or "0"
    return f"{os.environ.get('SLURM_JOB_ID')}.{restarts}"


def _tell(own: Path, rank: int, error: BaseException) -> None:
    if type(error).__name__ in ("EndedBySignal", "Preempted"):
        return
    with contextlib.suppress(OSError):
        told = RankError(_this_start(), rank, ErrorInfo.of(error))
        write_atomic(own / _ERROR, msgspec.json.encode(told))
