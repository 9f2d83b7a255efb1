"""What the launches of one launcher have in common: their sweep, its results, its last words."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.overrides import as_typed
from orchestrator.sweep.directory import make_writable
from orchestrator.sweep.errors import SweepError
from orchestrator.sweep.points import Points
from orchestrator.sweeps import Sweep, code_change, code_directory, code_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from omegaconf import DictConfig

    from orchestrator.queue.answers import Answers
    from orchestrator.queue.plan import Planner
    from orchestrator.queue.progress import Progress
    from orchestrator.sweeps import SweepGpu


class SweepBook:
    """Keeps ``sweep.json`` and the results file of all launches of one launcher.

    Sweepers with batches launch several times: all that is one sweep.
    """

    def __init__(
        self, config: DictConfig, planner: Planner, function: Callable[[DictConfig], Any]
    ) -> None:
        self._config = config
        self._planner = planner
        self._function = function
        self._sweep: Sweep | None = None
        self._launches = 0
        self._last_results: weakref.finalize[..., SweepBook] | None = None

    @property
    def sweep(self) -> Sweep:
        """The sweep, once it has points."""
        assert self._sweep is not None
        return self._sweep

    def extend(self, points: Sequence[Sequence[str]], gpus: Sequence[SweepGpu] = ()) -> Sweep:
        """The sweep, with some more points.

        Raises:
            SweepError: its directory, or that of the results file, cannot be written.
        """
        sweep = self._sweep
        if sweep is None:
            results_file = self._planner.results.results_file
            make_writable(self._planner.sweep_dir)
            if results_file is not None:
                make_writable(Path(results_file).absolute().parent, "results_file=PATH")
            sweep = self._sweep = Sweep(
                self._planner.sweep_dir,
                overrides=as_typed(self._config.hydra),
                axes=_axes(points),
                versions=code_versions(code_directory(self._function)),
                results_file=None if results_file is None else Path(results_file).absolute(),
                gpus=gpus,
            )
        else:
            sweep.reopen()
        if self._last_results is not None:  # this launch will see to it
            self._last_results.detach()
        self._launches += 1
        sweep.total += len(points)
        sweep.write()
        return sweep

    def close(self, progress: Progress, answers: Answers, *, complete: bool) -> str:
        """Write down how a launch has ended, and say how many runs were done before it.

        Args:
            progress: counts the states.
            answers: of each point.
            complete: every run has ended.

        Returns:
            A sentence on where the results are.

        Raises:
            SweepError: every run has ended, but their records or results are not on the disk.
        """
        sweep = self.sweep
        sweep.states.update({state.value: count for state, count in progress.states.items()})
        if progress.skipped:
            sweep.states["SKIPPED"] += progress.skipped
        results, written = self._write_results(sweep, complete=complete)
        if progress.skipped:
            change = code_change(answers.answered_by, sweep.versions)
            notes = "; ".join(filter(None, (change, f"run again with {self._no_resume()}")))
            progress.say(f"{progress.skipped} of {progress.total} done already; {notes}")
        if complete and (answers.unsaved or not written):
            progress.say(f"All runs ended ({counts(progress)}). {results}")
            msg = (
                f"The records of {answers.unsaved} runs or the results file are not on the "
                "disk (see above). Make room, then run the same command again."
            )
            raise SweepError(msg)
        return results

    def _write_results(self, sweep: Sweep, *, complete: bool) -> tuple[str, bool]:
        if complete and self._launches > 1 and not sweep.is_cheap_to_write():
            # Sweepers that launch a few runs at a time would write all of them each time.
            self._last_results = weakref.finalize(self, sweep.end, complete=True)
            return "", True
        try:
            path = sweep.end(complete=complete)
        except OSError as error:
            text = (
                f"The sweep's results file could not be written ({error}); every run's own "
                "record has its part, and orchestrator-aggregate merges them."
            )
            return text, False
        return f"Results: {path}" if complete else f"Results so far: {path}.", True

    def _no_resume(self) -> str:
        # Our own app has a short name for it.
        short = "resume" in self._config and "resume" in self._planner.results.ignore
        return "resume=false" if short else " ".join(self._planner.no_resume)


def counts(progress: Progress) -> str:
    """How many runs of this launch came to which state."""
    states = {state.value: count for state, count in progress.states.items()}
    said = ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))
    return said or "nothing was left to run"


def _axes(points: Sequence[Sequence[str]]) -> dict[str, Any]:
    if not isinstance(points, Points):
        return {}
    return {key: [text.split("=", 1)[-1] for text in values] for key, values in points.axes}
