"""What must not grow with a sweep: the wait for its first job, and the launcher's memory."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contenders import check_results, multirun_words, queue_words, seeds
from meter import measure, reap_all

if TYPE_CHECKING:
    from contenders import Arena
    from peers import Peers

SMALL, LARGE = 8, 5_000
# BasicSweeper's cost is linear, and large: a smaller sweep shows it as well.
BASIC_LARGE = 200
MEMORY_SMALL, MEMORY_LARGE = 200, 1_200
_PATIENCE_S = 300.0


@dataclass(frozen=True)
class FirstJob:
    """When the first job of a sweep started, counted from the start of the command."""

    after_s: float
    # CPU of the launcher process (not of jobs) by then, as seen within a few ms.
    launcher_cpu_s: float


def first_job(words: list[str], arena: Arena) -> FirstJob:
    """Start a sweep, note when its first job starts, and stop it as Ctrl+C does."""
    shutil.rmtree(arena.out, ignore_errors=True)
    told = arena.root / "first"
    told.unlink(missing_ok=True)
    env = {**arena.environment(words), "BENCH_FIRST_FILE": str(told)}
    with arena.log.open("wb") as output:
        start = time.time()
        process = subprocess.Popen(words, cwd=arena.work, env=env, stdout=output, stderr=output)
        try:
            moment = _wait_for(told, process)
            cpu = _cpu_of(process.pid)
        finally:
            # A short sweep may have ended by itself.
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
    reap_all()
    return FirstJob(moment - start, cpu)


def _wait_for(told: Path, process: subprocess.Popen[bytes]) -> float:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        if told.exists() and (text := told.read_text()):
            return float(text)
        if process.poll() is not None:
            break
        time.sleep(0.002)
    msg = f"no job started; the command was {process.args}"
    raise RuntimeError(msg)


def _cpu_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def median_first_job(words: list[str], arena: Arena, repeats: int) -> FirstJob:
    runs = [first_job(words, arena) for _ in range(repeats)]
    return FirstJob(
        statistics.median(run.after_s for run in runs),
        statistics.median(run.launcher_cpu_s for run in runs),
    )


def first_jobs(arena: Arena, peers: Peers, repeats: int) -> dict[str, dict[int, FirstJob]]:
    """For ours and for Hydra's own sweeper: number of points to the first job's start."""
    python = peers.python("plain")
    found: dict[str, dict[int, FirstJob]] = {"ours": {}, "basic": {}}
    for jobs in (SMALL, LARGE):
        words = queue_words(arena.app, arena.out, "hydra.launcher.start_method=fork", seeds(jobs))
        found["ours"][jobs] = median_first_job(words, arena, repeats)
    for jobs in (SMALL, BASIC_LARGE):
        words = multirun_words(python, arena.app, arena.out, seeds(jobs))
        found["basic"][jobs] = median_first_job(words, arena, repeats)
    return found


def memory_growth(arena: Arena) -> dict[int, int]:
    """Number of jobs to the launcher's peak memory in KB, as itself read it at its end."""
    found = {}
    for jobs in (MEMORY_SMALL, MEMORY_LARGE):
        shutil.rmtree(arena.out, ignore_errors=True)
        told = arena.root / f"peak-{jobs}"
        words = queue_words(arena.app, arena.out, "hydra.launcher.start_method=fork", seeds(jobs))
        env = {**arena.environment(words), "BENCH_PEAK_FILE": str(told)}
        measure(words, cwd=arena.work, env=env, log=arena.log)
        check_results(arena.out, jobs)
        found[jobs] = int(told.read_text())
    return found
