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
from orchestrator.store import RunDir, read_bytes, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import NoReturn

    from orchestrator.slurm.pack import Pack

RANKS = "ranks"
_ERROR = "error.json"
_DIED = "RankDied"
_LAST_WORDS_S = 1.5
_PAUSE_S = 0.05


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
    from orchestrator.queue.task import call_task, name_job
    from orchestrator.slurm.allocation import job_id

    run = pack.runs[0]
    own = rank_dir(Path(run.directory), rank)
    own.mkdir(parents=True, exist_ok=True)
    # What is to be believed where nothing else is said.
    _tell(own, rank, ErrorInfo(_DIED, "it was killed, or did not end when it was asked to"))
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
        name_job(config, job_id())
        reseed(run.record.fingerprint)
        returned = call_task(task, config, run.directory, logs=str(own))
        returned.return_value  # noqa: B018 - raises what the task has raised
    except BaseException as error:  # noqa: BLE001 - whatever it is, rank 0 is to hear of it
        if not isinstance(error, SystemExit) or error.code not in (0, None):
            traceback.print_exc()
            _say_why(own, rank, error)
            raise SystemExit(1) from None
    (own / _ERROR).unlink(missing_ok=True)
    sys.exit(0)


def _say_why(own: Path, rank: int, error: BaseException) -> None:
    if type(error).__name__ in ("EndedBySignal", PREEMPTED):  # as all others of the job
        (own / _ERROR).unlink(missing_ok=True)
    else:
        _tell(own, rank, ErrorInfo.of(error))


def error_of_ranks(run: Path) -> ErrorInfo | None:
    """Why a run's rank has failed in this start of this job; None where none has.

    Ranks that are asked to end take back what they left in case they die; they are given a
    moment for it.
    """
    give_up = time.monotonic() + _LAST_WORDS_S
    while True:
        errors = list(_errors(run))
        said = [error for error in errors if error.error.type != _DIED]
        if said or not errors or time.monotonic() > give_up:
            break
        time.sleep(_PAUSE_S)
    for found in said or errors:
        message = f"in rank {found.rank}: {found.error.message} (see {rank_dir(run, found.rank)})"
        return msgspec.structs.replace(found.error, message=message)
    return None


def _errors(run: Path) -> Iterator[RankError]:
    for path in sorted((run / RANKS).glob(f"*/{_ERROR}")):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found = msgspec.json.decode(read_bytes(path), type=RankError)
            if found.job == _this_start():
                yield found


def _this_start() -> str:
    restarts = os.environ.get("SLURM_RESTART_COUNT") or "0"
    return f"{os.environ.get('SLURM_JOB_ID')}.{restarts}"


def _tell(own: Path, rank: int, error: ErrorInfo) -> None:
    with contextlib.suppress(OSError):
        write_atomic(own / _ERROR, msgspec.json.encode(RankError(_this_start(), rank, error)))
