"""What the user sees of a running sweep: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.record import RunRecord, RunState
from orchestrator.store import RunDir
from orchestrator.wording import duration, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN_NAMES = 8
# A run that was cancelled has not failed: it was not let end.
_FAILURES = (RunState.FAILED, RunState.TIMEOUT, RunState.LOST)
# A keeper's word for a run that it ended because the sweep was stopped.
_STOPPED = "STOPPED"


class _Nowhere(io.StringIO):
    """Takes any text and keeps none."""

    def write(self, text: str) -> int:
        return len(text)


class SettingsCount:
    """How many settings are complete, a setting being what differs in more than the seed.

    Args:
        points: the override lists of the sweep.
        seed_key: the key that is pooled.
    """

    def __init__(self, points: Sequence[Sequence[str]], seed_key: str) -> None:
        self._seed = tuple(f"{sign}{seed_key}=" for sign in ("", "+", "++"))
        axes = getattr(points, "axes", ())
        if axes and len(points) == math.prod(len(values) for _, values in axes):
            # A whole grid: no need to look at each of its points.
            repeats = math.prod(len(values) for key, values in axes if key.lstrip("+") == seed_key)
            self.total = -(-len(points) // max(repeats, 1))
            self._left: Counter[tuple[str, ...]] | None = None
            self._repeats = repeats
        else:
            self._left = Counter(map(self._setting, points))
            self.total = len(self._left)
            self._repeats = 1
        self._done: Counter[tuple[str, ...]] = Counter()
        self.complete = 0

    def _setting(self, overrides: Sequence[str]) -> tuple[str, ...]:
        return tuple(text for text in overrides if not text.startswith(self._seed))

    def count(self, overrides: Sequence[str]) -> None:
        """One more run has ended."""
        setting = self._setting(overrides)
        self._done[setting] += 1
        needed = self._left[setting] if self._left is not None else self._repeats
        if self._done[setting] == needed:
            self.complete += 1
            del self._done[setting]


class Progress:
    """Counts runs and says what happens to them, a line each.

    Args:
        total: runs in this launch.
        settings: counts settings.
        stream: where lines go.
    """

    def __init__(self, total: int, settings: SettingsCount, stream: TextIO | None = None) -> None:
        self.total = total
        self.settings = settings
        self.states: Counter[RunState] = Counter()
        # Answered by an earlier sweep; and asked for more than once in this one.
        self.skipped = 0
        self.repeated = 0
        self.running: dict[int, str] = {}
        self._stream = stream or sys.stdout
        self._began = time.monotonic()
        self._stopping = False
        # Whether runs that are cancelled are only counted: the user has asked for it.
        self.brief = False

    @property
    def ended(self) -> int:
        return sum(self.states.values()) + self.skipped + self.repeated

    @property
    def ran(self) -> int:
        return sum(self.states.values())

    def interval(self) -> float | None:
        """How often `tick` wants to be called, in seconds; None if it need not be."""
        return None

    def say(self, text: str) -> None:
        """Print a line. A reader that is gone (``| head``, a closed terminal) ends no sweep."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._print(text)
        except (OSError, ValueError):
            if self._stream is sys.stdout:
                sys.stdout = _Nowhere()  # or the interpreter's last flush would fail as well
            self._stream = _Nowhere()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def stopping(self, running: int) -> None:
        """A signal has come; what runs is being ended, and nothing more is started."""
        self._stopping = True
        if running:
            jobs = plural(running, "running job")
            self.say(f"Stopping {jobs}; Ctrl+C once more kills what is left at once.")

    def retry(self, index: int, record: RunRecord, directory: str, how: str) -> None:
        """A run has failed and goes back into the queue."""
        self.running.pop(index, None)
        self.say(f"{failure_line(record, directory)}; {how}")

    def start(self, index: int, name: str, device: str) -> None:
        self.running[index] = f"{name} ({device})"

    def skip(self, overrides: Sequence[str]) -> None:
        self.skipped += 1
        self.settings.count(overrides)

    def repeat(self, overrides: Sequence[str]) -> None:
        self.repeated += 1
        self.settings.count(overrides)

    def end(self, index: int, overrides: Sequence[str], record: RunRecord, directory: str) -> None:
        """A run has ended: one line, and for a failure at once why and where to look."""
        self.running.pop(index, None)
        self.states[record.state] += 1
        self.settings.count(overrides)
        if self.brief and record.state is RunState.CANCELLED:
            return
        if record.state is not RunState.COMPLETED:
            self.say(failure_line(record, directory))
        self.report(record)

    def report(self, record: RunRecord) -> None:
        seconds = record.duration_seconds
        took = "" if seconds is None else f" in {duration(seconds)}"
        settings = f"{self.settings.complete} of {plural(self.settings.total, 'setting')}"
        self.say(
            f"{self.headline()}: {record.model_name}{took} [{settings}{self._remaining('; ')}]"
        )

    def headline(self) -> str:
        """How many have ended, in the words that scripts look for; then how many of them badly."""
        share = 100 * self.ended / self.total if self.total else 100.0
        done = f"Completed {self.ended} out of {self.total} runs ({share:.2f}%)"
        return ", ".join((done, *self._badly_ended()))

    def _badly_ended(self) -> list[str]:
        failed = sum(self.states[state] for state in _FAILURES)
        counts = {"failed": failed, "cancelled": self.states[RunState.CANCELLED]}
        return [f"{count} {word}" for word, count in counts.items() if count]

    def _remaining(self, before: str) -> str:
        left = self.remaining_seconds()
        return "" if left is None else f"{before}about {duration(left)} left"

    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._began

    def remaining_seconds(self) -> float | None:
        left = self.total - self.ended
        if not left or not self.ran or self._stopping:
            return None
        return self.elapsed_seconds() / self.ran * left

    def tick(self) -> None:
        """Draw again what changes with time."""

    def close(self) -> None:
        """Stop drawing."""


class LiveProgress(Progress):
    """On a terminal: lines scroll above a bar with counts, names of running jobs and times."""

    def __init__(self, total: int, settings: SettingsCount, stream: TextIO | None = None) -> None:
        super().__init__(total, settings, stream)
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=self._stream, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._live.start()
        self._drawn = 0.0

    def interval(self) -> float:
        return 0.5

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def start(self, index: int, name: str, device: str) -> None:
        super().start(index, name, device)
        self.tick()

    def report(self, record: RunRecord) -> None:
        self.tick()

    def tick(self) -> None:
        # Redrawing for each of many short runs would cost more than the runs.
        if time.monotonic() - self._drawn > 0.1:  # noqa: PLR2004 - ten times a second
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            self._live.update(self._picture(), refresh=True)

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=max(self.total, 1), completed=self.ended, width=40),
            f"{self.ended}/{plural(self.total, 'run')}",
            f"{self.settings.complete}/{plural(self.settings.total, 'setting')}",
            Text(", ".join(self._badly_ended()), style="red"),
            f"{duration(self.elapsed_seconds())} elapsed{self._remaining(', ')}",
        )
        names = list(self.running.values())
        lines = [Text(f"  running: {name}", style="dim") for name in names[:_SHOWN_NAMES]]
        if len(names) > _SHOWN_NAMES:
            lines.append(Text(f"  and {len(names) - _SHOWN_NAMES} more", style="dim"))
        return Group(bar, *lines)

    def close(self) -> None:
        self._draw()
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()


def make_progress(total: int, settings: SettingsCount) -> Progress:
    kind = LiveProgress if sys.stdout.isatty() else Progress
    return kind(total, settings)


def failure_line(record: RunRecord, directory: str) -> str:
    """Why a run failed, in one line, and which of its logs says more, if one does."""
    name = f"{record.state.value} {record.model_name}"
    if record.error is None:
        return f"{name}: no reason known{_see(directory)}"
    if record.error.type == _STOPPED:
        return f"{name}: stopped by Ctrl+C or a signal{_see(directory)}"
    return f"{name}: {record.error.line}{_see(directory)}"


def _see(directory: str) -> str:
    """The log with the traceback, or what else was printed; an empty one is not worth opening."""
    run = RunDir(Path(directory))
    for log in (run.stderr, run.stdout) if directory else ():
        with contextlib.suppress(OSError):
            if log.stat().st_size:
                return f" (see {log})"
    return ""
