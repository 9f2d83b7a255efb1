"""The places that jobs run in. Here: on cores, by counting. On GPUs: `gpu_places`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.queue.needs import Need

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from orchestrator.queue.gpus import Gpu
    from orchestrator.queue.leases import Lease


@dataclass(frozen=True)
class Want:
    """A job that waits for a place; ``key`` is the caller's own."""

    need: Need
    key: Any = None


@dataclass(eq=False)
class Use:
    """What one job has of one GPU. Memory in bytes."""

    lease: Lease | None = None
    # What was in use there when it got its place, and by which processes.
    before: int = 0
    strangers: frozenset[int] = frozenset()
    # Its memory at the last look (or a guess at it), and all of the GPU's.
    seen: int = 0
    guessed: bool = False
    used: int = 0
    # Its processes as NVML numbers them.
    pids: set[int] = field(default_factory=set)
    # (time, seen) of the last looks, the oldest first.
    looks: deque[tuple[float, int]] = field(default_factory=deque)


@dataclass(eq=False)
class Place:
    """Where one job runs: a seat, and some GPUs or none."""

    need: Need = field(default_factory=lambda: Need(gpus=0))
    gpus: tuple[Gpu, ...] = ()
    since: float = 0.0
    uses: dict[str, Use] = field(default_factory=dict)
    # The keeper of the job, from which all its processes descend.
    root: int | None = None
    # When its processes were gone; its memory may take longer.
    ended_at: float | None = None
    # The highest memory on any one of its GPUs, in bytes; None while nothing was seen.
    peak: int | None = None
    # The utilisation of its GPUs, in percent, summed over so many looks.
    busy: float = 0.0
    told_at: float = float("-inf")
    looks: int = 0

    @property
    def lease_descriptors(self) -> tuple[int, ...]:
        return tuple(use.lease.fileno() for use in self.uses.values() if use.lease is not None)

    @property
    def utilization(self) -> float | None:
        """Mean utilisation of its GPUs in percent, whoever else computed there."""
        return self.busy / self.looks if self.looks else None

    def give_up_leases(self) -> None:
        for use in self.uses.values():
            if use.lease is not None:
                use.lease.release()

    def __str__(self) -> str:
        return f"gpu {','.join(gpu.label for gpu in self.gpus)}" if self.gpus else "cpu"


class Places:
    """Seats for jobs on the cores of this machine.

    Args:
        size: jobs at a time.
        on_purpose: the user wants no GPUs, whatever a job says that it needs.
    """

    gpus: tuple[Gpu, ...] = ()

    def __init__(self, size: int, *, on_purpose: bool = False) -> None:
        self.size = size
        self._on_purpose = on_purpose
        # Tells the user; a launch puts its own in place of it.
        self.say: Callable[[str], None] = print
        self._seated = 0

    def fill(self, wants: Sequence[Want]) -> list[tuple[Want, Place]]:
        """Give places to as many of the waiting as there is room for, first come first served."""
        given = [(want, Place(want.need)) for want in wants[: self.size - self._seated]]
        self._seated += len(given)
        return given

    def started(self, place: Place, root: int) -> None:
        """Hear which process is the root of all that a job starts."""
        place.root = root

    def give_back(self, place: Place) -> None:
        """All processes of a job have ended."""
        self._seated -= 1

    def impossible(self, need: Need) -> str:
        """Why a job will never find a place; empty if it may.

        (A job that needs one GPU, which is the default, makes do with a core.)
        """
        if need.gpus <= 1 or self._on_purpose:
            return ""
        return f"it needs {need.gpus} GPUs, this sweep has none"

    def totals(self, place: Place) -> list[int]:
        """Memory of each GPU of a place, in bytes; 0 where that is not known."""
        return []

    def room(self, gpus: int) -> int:
        """Memory that so many GPUs have each, at most, in bytes; 0 where that is not known."""
        return 0

    @property
    def releasing(self) -> bool:
        """Whether the memory of a job that has ended is still waited for."""
        return False

    # --- what only GPUs have: a process to listen to, and things to do at certain times ---

    def fileno(self) -> int | None:
        """A descriptor that is readable when `receive` has something to do."""
        return None

    def receive(self) -> None:
        """Take in what there is to read."""

    def check(self) -> None:
        """Do what is due."""

    def patience(self) -> float | None:
        """Seconds until `check` wants to be called; None while nothing is due."""
        return None

    def take_lost(self) -> list[Place]:
        """Places of running jobs whose GPU has been lost since the last call."""
        return []

    def take_changed(self) -> list[Place]:
        """Places of running jobs whose use has changed enough to be told."""
        return []

    def close_gpus(self, words: Mapping[str, str]) -> None:
        """Pause or drain the GPUs named by UUID, open all others."""

    def hopeless(self) -> str:
        """Why no waiting job will find a place any more; empty while one may."""
        return ""

    def close(self) -> None:
        """Let go of everything."""
