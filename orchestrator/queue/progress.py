"""What the user sees of a running sweep: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.record import RunRecord, RunState

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN_NAMES = 8


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
        if record.state is not RunState.COMPLETED:
            self.say(failure_line(record, directory))
        self.report(record)

    def report(self, record: RunRecord) -> None:
        took = "" if record.duration_seconds is None else f" in {clock(record.duration_seconds)}"
        self.say(
            f"{self.headline('runs')}: {record.model_name}{took} "
            f"[{self.settings.complete} of {self.settings.total} settings{self._remaining()}]"
        )

    def headline(self, noun: str) -> str:
        share = 100 * self.ended / self.total if self.total else 100.0
        return f"Completed {self.ended} out of {self.total} {noun} ({share:.2f}%)"

    def _remaining(self) -> str:
        left = self.remaining_seconds()
        return "" if left is None else f"; about {clock(left)} left"

    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._began

    def remaining_seconds(self) -> float | None:
        left = self.total - self.ended
        if not left or not self.ran:
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
        failed = self.ran - self.states[RunState.COMPLETED]
        bar.add_row(
            ProgressBar(total=max(self.total, 1), completed=self.ended, width=40),
            f"{self.ended}/{self.total} runs",
            f"{self.settings.complete}/{self.settings.total} settings",
            Text(f"{failed} failed", style="red") if failed else "",
            f"{clock(self.elapsed_seconds())} elapsed{self._remaining()}",
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
    """Why a run failed, in one line, and where the rest is written, if it has a directory."""
    reason = "no reason known"
    if record.error is not None:
        first = (record.error.message.strip().splitlines() or [""])[0]
        reason = f"{record.error.type}: {first}"[:300]
    where = f" (see {directory}/train_stderr.log)" if directory else ""
    return f"{record.state.value} {record.model_name}: {reason}{where}"


def clock(seconds: float) -> str:
    """Seconds as a person reads them: 3.2 s, 4:05, 1:02:03."""
    if seconds < 60:  # noqa: PLR2004 - seconds in a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
