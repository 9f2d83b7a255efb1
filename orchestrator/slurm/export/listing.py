"""``hydra/launcher=list_runs``: what stands in for launching where runs are only to be listed.

Nothing is written below the sweep's directory, and no run begins.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf, open_dict, read_write

from orchestrator.overrides import as_typed
from orchestrator.queue.plan import Planner
from orchestrator.queue.settings import QueueSettings
from orchestrator.record import to_plain
from orchestrator.slurm.export.array_task import quoted
from orchestrator.slurm.export.listed import LIST_LAUNCHER, LISTING_FILE, ListedRun, Listing
from orchestrator.slurm.settings import SlurmSettings
from orchestrator.store import RunDir, observed_state, write_atomic
from orchestrator.sweep.compose import Composer
from orchestrator.sweep.errors import SweepError
from orchestrator.sweep.points import Points
from orchestrator.sweeps import Sweep, code_directory, code_versions, rerun_command

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from orchestrator.queue.plan import Plan

# Sweepers that need no results to name their runs.
_SWEEPERS = ("GridSweeper", "BasicSweeper")
# What a task of an array decides for itself, or what has no meaning for a single run.
_LEFT_OUT = ("hydra.sweeper.", "hydra.callbacks.results.resume=")
_RESOURCES = {field.name for field in fields(SlurmSettings)} - {"_target_", "queue"}


def make(
    settings: Mapping[str, Any],
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
) -> Lister:
    return Lister(settings, hydra_context, task_function, config)


@dataclass
class _Draft(Sweep):
    """A sweep whose ``sweep.json`` is written elsewhere: it may never come to be."""

    folder: Path = Path()

    @property
    def directory(self) -> Path:
        return self.folder


class Lister:
    """Writes ``listing.json``, and the ``sweep.json`` of a sweep that is new.

    Args:
        settings: ``list_to``, a directory; ``list_sweep``, the id of a sweep that is not new.
        hydra_context: Hydra's.
        task_function: the app's.
        config: the sweep's own; its ``hydra.sweep.dir`` is changed.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        self._to = Path(settings["list_to"])
        self._is_new = "list_sweep" not in settings
        self._config = config
        self.composer = Composer(hydra_context.config_loader, config)
        self._planner = Planner(self.composer, config, QueueSettings())
        self._planner.results.resume = True
        self._root = self._planner.sweep_dir
        self._words = self._own_words()
        _forget_added_words()
        self._sweep = _Draft(
            self._root,
            overrides=as_typed(config.hydra),
            versions=code_versions(code_directory(task_function)),
            sweep_id=settings.get("list_sweep", ""),
            folder=self._to,
        )
        self._runs: list[ListedRun] = []
        self._launcher: dict[str, Any] = {}
        self._varying: set[str] = set()
        # Sweepers save multirun.yaml where the sweep writes; a sweep may be going on there.
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = str(self._to)

    def _own_words(self) -> list[str]:
        """Hydra's words in the command as it was given."""
        hydra = self._config.hydra
        words = [*as_typed(hydra, "hydra")]
        end = len(words) - words[::-1].index(LIST_LAUNCHER) - 1
        words = [word for word in words[:end] if not word.startswith(_LEFT_OUT)]
        raw = OmegaConf.to_container(hydra.sweep, resolve=False)
        assert isinstance(raw, dict)
        if "${" in str(raw["dir"]):  # each task would get a time stamp of its own
            words.append(f"hydra.sweep.dir={quoted(str(hydra.sweep.dir))}")
        return words

    def launch(self, points: Sequence[Sequence[str]], first_num: int) -> list[JobReturn]:
        """List some runs, in place of launching them.

        Raises:
            SweepError: the sweeper would need their results, or one cannot be composed.
        """
        sweeper = str(self._config.hydra.sweeper.get("_target_")).rpartition(".")[2]
        if sweeper not in _SWEEPERS:
            raise SweepError(
                f"{sweeper} needs the results of its first runs to choose the next ones, so they "
                "cannot be listed. Choose hydra/sweeper=grid, or launch the sweep itself."
            )
        for index, point in enumerate(points):
            self._list(first_num + index, point)
        if isinstance(points, Points):
            self._sweep.axes = {
                key: [text.partition("=")[2] for text in texts] for key, texts in points.axes
            }
        self._write()
        # (Nobody reads what they returned.)
        return [JobReturn(overrides=list(p), status=JobStatus.COMPLETED) for p in points]

    def _list(self, num: int, point: Sequence[str]) -> None:
        try:
            plan = self._planner.plan(len(self._runs), num, point, dry=True)
            self._compare(plan)
        except Exception as error:
            raise SweepError(
                f"run {num} ({' '.join(point)}) cannot be composed: {error}"
            ) from error
        record = plan.done or RunDir(plan.directory).try_read()
        self._runs.append(
            ListedRun(
                index=num,
                name=self._planner.record(plan, self._sweep).model_name,
                directory=str(plan.directory),
                overrides=plan.overrides,
                words=tuple(shlex.split(rerun_command(plan.overrides, self._words))),
                state=None if record is None else observed_state(record),
            )
        )
        self._sweep.add_run(num, plan.directory)

    def _compare(self, plan: Plan) -> None:
        """Take in what a run's config says of the launcher, if it can differ among runs."""
        node = self._config.hydra.launcher
        if not self._runs:
            self._launcher = _asked(self.composer.compose(plan.overrides).hydra.launcher)
        elif "${" in str(OmegaConf.to_container(node, resolve=False)):
            asked = _asked(self.composer.compose(plan.overrides).hydra.launcher)
            self._varying |= {key for key in asked if asked[key] != self._launcher.get(key)}

    def _write(self) -> None:
        listing = Listing(
            sweep_id=self._sweep.sweep_id,
            root=str(self._root),
            cwd=os.getcwd(),  # noqa: PTH109
            job_name=str(self._config.hydra.job.name),
            python=os.path.abspath(sys.executable),  # noqa: PTH100 - links are kept
            launcher=self._launcher,
            varying=tuple(sorted(self._varying)),
            runs=tuple(self._runs),
        )
        text = json.dumps(msgspec.to_builtins(listing))
        write_atomic(self._to / LISTING_FILE, text.encode("ascii"))
        if self._is_new:
            self._write_sweep()

    def _write_sweep(self) -> None:
        self._sweep.total = len(self._runs)
        self._sweep.write()


def _forget_added_words() -> None:
    """Leave the command as it was given, without what `listed` has added to it."""
    if LIST_LAUNCHER in sys.argv:
        added = sys.argv[::-1].index(LIST_LAUNCHER) + 1
        sys.argv, sys.orig_argv = sys.argv[:-added], sys.orig_argv[:-added]


def _asked(node: DictConfig) -> dict[str, Any]:
    """The keys of hydra/launcher=slurm that a run's config sets."""
    values: Any = OmegaConf.to_container(node, resolve=True)
    return {str(key): to_plain(values[key]) for key in values if key in _RESOURCES}
