"""Who is compared, how each is called, and the proof that it did the work."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meter import Usage, measure
from peers import clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from peers import Peers

SLOTS = 2
APPS = Path(__file__).resolve().parent / "apps"


class WrongResultError(Exception):
    """A contender did not leave the N results that were asked for."""


@dataclass(frozen=True)
class Contender:
    """One way to run N jobs of the same app.

    Args:
        name: as in the table.
        words: the command for an app, a number of jobs and an output directory.
        stdin: what it reads, for a number of jobs.
        note: what a reader of the table must know.
    """

    name: str
    words: Callable[[str, int, Path], list[str]]
    stdin: Callable[[int], str] = lambda jobs: ""
    note: str = ""


def seeds(jobs: int) -> str:
    return f"seed=range(0,{jobs})"


def queue_words(app: str, out: Path, *more: str) -> list[str]:
    """Our sweeper and launcher on CPU slots, so that every machine compares the same."""
    return [
        sys.executable, app, "-m",
        "hydra/sweeper=grid",
        "hydra/launcher=gpu_queue",
        "hydra.launcher.gpus=[]",
        f"hydra.launcher.max_processes={SLOTS}",
        f"hydra.sweep.dir={out}",
        *more,
    ]  # fmt: skip


def multirun_words(python: str, app: str, out: Path, *more: str) -> list[str]:
    return [python, app, "-m", f"hydra.sweep.dir={out}", *more]


def make_contenders(peers: Peers) -> list[Contender]:
    plain = peers.python("plain")

    def queue(method: str) -> Callable[[str, int, Path], list[str]]:
        option = f"hydra.launcher.start_method={method}"
        return lambda app, jobs, out: queue_words(app, out, option, seeds(jobs))

    def xargs(app: str, jobs: int, out: Path) -> list[str]:
        each = [plain, app, "seed={}", f"hydra.run.dir={out}/{{}}"]
        return ["xargs", f"-P{SLOTS}", "-I{}", *each]

    return [
        Contender("fork", queue("fork"), note="gpu_queue, start_method=fork, grid sweeper"),
        Contender("spawn", queue("spawn"), note="gpu_queue, start_method=spawn, grid sweeper"),
        Contender(
            "basic",
            lambda app, jobs, out: multirun_words(plain, app, out, seeds(jobs)),
            note="Hydra's own launcher: one job at a time in one process",
        ),
        Contender(
            "joblib",
            lambda app, jobs, out: multirun_words(
                peers.python("joblib"), app, out,
                "hydra/launcher=joblib", f"hydra.launcher.n_jobs={SLOTS}", seeds(jobs),
            ),
            note=f"n_jobs={SLOTS}; worker processes serve many jobs",
        ),
        Contender(
            "submitit_local",
            lambda app, jobs, out: multirun_words(
                peers.python("submitit"), app, out, "hydra/launcher=submitit_local", seeds(jobs)
            ),
            note="has no limit of slots: all jobs are started at once",
        ),
        Contender(
            "xargs", xargs, lambda jobs: "".join(f"{n}\n" for n in range(jobs)),
            note=f"xargs -P{SLOTS} python app.py seed=K",
        ),
    ]  # fmt: skip


class Arena:
    """The one directory that every contender runs in, so that all paths are the same.

    Args:
        root: an existing folder; the app and each contender's last outputs lie below it.
        torch: a folder with torch for the peers' interpreters, or None.
    """

    def __init__(self, root: Path, app: str, torch: Path | None = None) -> None:
        self.root = root
        self.app = app
        self.log = root / "output.log"
        self._torch = torch
        self._work = root / "work"
        self.out = self._work / "out"
        shutil.copytree(APPS, self._work, dirs_exist_ok=True)

    def run(self, contender: Contender, jobs: int) -> Usage:
        """Run a sweep of ``jobs``, assert its results, and keep them under the name.

        Raises:
            WrongResultError: not N of N.
            CommandFailedError: the command failed.
        """
        shutil.rmtree(self.out, ignore_errors=True)
        words = contender.words(self.app, jobs, self.out)
        usage = measure(
            words,
            cwd=self._work,
            env=self.environment(words),
            log=self.log,
            stdin=contender.stdin(jobs),
        )
        check_results(self.out, jobs)
        kept = self.results_of(contender.name)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        self.out.rename(kept)
        return usage

    def results_of(self, name: str) -> Path:
        return self.root / "results" / name

    @property
    def work(self) -> Path:
        return self._work

    def environment(self, words: list[str]) -> dict[str, str]:
        environment = clean_environment()
        if self._torch is not None and sys.executable not in words:
            environment["PYTHONPATH"] = os.fspath(self._torch)
        return environment


def check_results(out: Path, jobs: int) -> None:
    """Every job ran once, in a directory of its own, with the config that it was to have."""
    done = {path.parent.name: path.read_text() for path in out.glob("*/done")}
    if done != {str(number): str(number) for number in range(jobs)}:
        raise WrongResultError(f"{len(done)} of {jobs} results in {out}: {done}")
    for number in range(jobs):
        folder = out / str(number) / ".hydra"
        config = (folder / "config.yaml").read_text().splitlines()
        if f"seed: {number}" not in config or len(config) < 30:
            raise WrongResultError(f"{folder}/config.yaml is not of the job seed={number}")
        if (folder / "overrides.yaml").read_text() != f"- seed={number}\n":
            raise WrongResultError(f"{folder}/overrides.yaml is not of the job seed={number}")
