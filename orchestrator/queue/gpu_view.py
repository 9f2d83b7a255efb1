"""What is known of the GPUs of a sweep: the last look at each, and who uses what there.

Times are seconds of the monotonic clock, memory is in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from orchestrator.queue.assign import Load
from orchestrator.queue.attribution import (
    Shares,
    by_growth,
    by_pids,
    in_first_pid_namespace,
    parent_of,
)
from orchestrator.queue.leases import Kind
from orchestrator.queue.places import Use

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from orchestrator.queue.assign import Rules
    from orchestrator.queue.gpus import Gpu, GpuSnapshot
    from orchestrator.queue.leases import Entry, LeaseTables
    from orchestrator.queue.places import Place
    from orchestrator.queue.watcher import Reading

# Reservations that others read shrink when the memory has been in use for so long, which is
# longer than any reading is old that a decision rests on: nobody then counts neither of both.
SETTLED_S = 4.0
# How many readings in a row must say that a GPU is lost.
_LOST_READINGS = 2
# What a driver keeps for itself on an idle GPU at most.
_IDLE_BYTES = 256_000_000
# What may be in use on a GPU that idles, and is then taken for the driver's own.
_DRIVER_BYTES = 1_500_000_000
# A job whose start a GPU's use has grown by so much since has shown its memory.
_SHOWN_BYTES = 64_000_000
# How long the memory of a job that declared nothing is waited for, where a threshold is set.
_UNSEEN_S = 30.0
# Where nobody knows how much it had, the memory of a job that has ended is gone after so long.
_GUESS_S = 2.0
# How often a job's utilisation is told to its keeper.
_TELL_S = 5.0
# By how much a peak has to rise to be told.
_TOLD_SHARE = 0.02


@dataclass
class GpuState:
    """What is known of one GPU."""

    snapshot: GpuSnapshot | None = None
    shares: Shares = field(default_factory=Shares)
    # In use while no sweep had a job there.
    baseline: int | None = None
    foreign: bool = False
    lost_readings: int = 0
    lost: bool = False
    error: str = ""
    # "pause" or "drain", by the user.
    closed: str = ""
    told_drained: bool = False
    last_start: float = float("-inf")

    @property
    def usable(self) -> bool:
        return not (self.lost or self.error or self.closed)

    @property
    def total(self) -> int:
        """Its memory; 0 where that is not known."""
        return 0 if self.snapshot is None else self.snapshot.total

    def use(self) -> Use:
        """What a job has here that is just given its place."""
        if self.snapshot is None:
            return Use()
        pids = frozenset(process.pid for process in self.snapshot.processes or ())
        return Use(before=self.snapshot.used, strangers=pids)

    @property
    def capacity(self) -> int:
        """What is free of its memory when it idles; 0 where that is not known."""
        kept = self.baseline or 0
        return self.total - (kept if kept <= _DRIVER_BYTES else 0)


class GpuView:
    """Learns from readings of NVML and from the tables of other sweeps.

    Args:
        gpus: those of this sweep.
        tables: shared with other sweeps; None as if alone.
        say: tells the user.
        pids_tell: whether NVML's pids are those that this process sees; None: it is looked at.
    """

    def __init__(
        self,
        gpus: Sequence[Gpu],
        tables: LeaseTables | None,
        say: Callable[[str], None],
        pids_tell: bool | None = None,
    ) -> None:
        self.gpus = tuple(gpus)
        self.states = {gpu.uuid: GpuState() for gpu in gpus}
        # When the last good reading was begun and when it came; why there is none.
        self.read_at = self.came_at = float("-inf")
        self.error = ""
        # Jobs whose GPU was lost; jobs whose use has changed enough to be told.
        self.lost: list[Place] = []
        self.changed: dict[Place, None] = {}
        self._tables = tables
        self._say = say
        self._pids_tell = in_first_pid_namespace() if pids_tell is None else pids_tell

    @property
    def answering(self) -> int:
        """How many of the GPUs answer."""
        return 0 if self.error else sum(not s.lost and not s.error for s in self.states.values())

    def others(self, uuid: str) -> list[Entry]:
        """What other sweeps have, or wait for, on a GPU."""
        if self._tables is None:
            return []
        return [entry for entry in self._tables.entries(uuid) if not entry.mine]

    def load(
        self,
        gpu: Gpu,
        places: Sequence[Place],
        rules: Rules,
        *,
        since: float,
        now: float,
        stagger_s: float,
    ) -> Load:
        """What a decision has to know of a GPU.

        Args:
            gpu: which.
            places: all that this sweep has.
            rules: what it accepts.
            since: since when the first in line waits.
            now: the time.
            stagger_s: least time between two starts on a GPU.
        """
        state = self.states[gpu.uuid]
        own = [place for place in places if gpu.uuid in place.uses]
        others = self.others(gpu.uuid)
        running = [entry for entry in others if entry.kind is Kind.RUN]
        limits = [entry.limit for entry in running]
        limits += [1 if place.need.alone else rules.per_gpu for place in own]
        snapshot = state.snapshot
        reserved = sum(entry.reserved for entry in running)
        guess = state.total // rules.per_gpu
        last_start = max(state.last_start, *(entry.since for entry in running), float("-inf"))
        # A threshold means nothing while a job's memory is still to come.
        unseen = rules.threshold is not None and any(_is_unseen(p, gpu.uuid, now) for p in own)
        return Load(
            gpu,
            total=state.total,
            used=snapshot.used if snapshot else 0,
            free=snapshot.free if snapshot else 0,
            measured=state.total > 0,
            reserved=reserved + sum(_reserved(place, gpu.uuid) for place in own),
            expected=reserved + sum(_expected(place, gpu.uuid, guess) for place in own),
            processes=len(own) + len(running),
            limit=min(limits, default=None),
            by_sweeps=state.shares.by_sweeps,
            foreign=state.foreign,
            usable=state.usable,
            closed={"pause": "it is paused", "drain": "it is drained"}.get(state.closed, ""),
            ready=now - last_start >= stagger_s and not unseen,
            awaited=any(e.kind is Kind.WAIT and e.since < since for e in others),
        )

    def take_in(self, reading: Reading, places: Sequence[Place], now: float) -> None:
        """Learn from a reading; ``places`` are all that this sweep has."""
        if reading.error != self.error:
            self.error = reading.error
            self._say(
                f"NVML does not answer ({reading.error}); running jobs go on, none is started on "
                "a GPU until it does."
                if reading.error
                else "NVML answers again."
            )
        if reading.error:
            return
        self.read_at, self.came_at = reading.time, now
        found = {snapshot.gpu.uuid: snapshot for snapshot in reading.snapshots}
        for gpu in self.gpus:
            here = [place for place in places if gpu.uuid in place.uses]
            self._look(gpu, found.get(gpu.uuid), here)

    def _look(self, gpu: Gpu, snapshot: GpuSnapshot | None, own: Sequence[Place]) -> None:
        state = self.states[gpu.uuid]
        self._note_health(gpu, state, snapshot, own)
        if snapshot is None or snapshot.lost or snapshot.error:
            return
        state.snapshot = snapshot
        others = [entry for entry in self.others(gpu.uuid) if entry.kind is Kind.RUN]
        if not own and not others:
            state.baseline = snapshot.used
        state.shares = self._share(gpu.uuid, snapshot, own, others)
        if state.shares.foreign is not None:
            state.foreign = state.shares.foreign
        elif not own and not others:
            state.foreign = bool(snapshot.processes) or snapshot.used > _IDLE_BYTES
        for place in own:
            if place.ended_at is None:
                self._note_use(place, gpu.uuid, snapshot, state.shares)

    def _note_health(
        self, gpu: Gpu, state: GpuState, snapshot: GpuSnapshot | None, own: Sequence[Place]
    ) -> None:
        lost = snapshot is None or snapshot.lost
        error = snapshot.error if snapshot is not None and not lost else ""
        state.lost_readings = state.lost_readings + 1 if lost else 0
        if lost and not state.lost and state.lost_readings >= _LOST_READINGS:
            state.lost = True
            why = snapshot.error if snapshot is not None else "NVML no longer lists it"
            self._say(f"GPU {gpu.label} ({gpu.uuid}) is lost: {why}. Going on without it.")
            self.lost += [place for place in own if place.ended_at is None]
        elif not lost and state.lost:
            state.lost = False
            self._say(f"GPU {gpu.label} ({gpu.uuid}) is back.")
        if error and not state.error:
            self._say(f"GPU {gpu.label} cannot be read ({error}); no job is started there for now.")
        state.error = error

    def _share(
        self, uuid: str, snapshot: GpuSnapshot, own: Sequence[Place], others: Sequence[Entry]
    ) -> Shares:
        roots = {place.root for place in own if place.root is not None}
        known = {pid: p.root for p in own if p.root is not None for pid in p.uses[uuid].pids}
        gone = {pid for p in own if p.ended_at is not None for pid in p.uses[uuid].pids}
        shares = by_pids(snapshot, roots | {e.root for e in others if e.root}, known, gone)
        if shares.pids and not self._pids_tell:
            self._pids_tell = True
        named = self._pids_tell and snapshot.processes is not None
        if named and not shares.silent:
            return shares
        baseline = self.states[uuid].baseline
        if baseline is None:  # jobs of others were there before the first look
            baseline = self.states[uuid].baseline = snapshot.used
        # (A keeper has one job after another: the one that still runs last.)
        in_order = sorted(own, key=lambda place: place.ended_at is None)
        jobs = [(place.root or 0, place.need.memory) for place in in_order]
        grown = by_growth(snapshot, jobs, baseline, len(others))
        return replace(grown, pids=shares.pids, foreign=shares.foreign) if named else grown

    def _note_use(self, place: Place, uuid: str, snapshot: GpuSnapshot, shares: Shares) -> None:
        use, root = place.uses[uuid], place.root or -1
        use.seen, use.used = shares.seen.get(root, 0), snapshot.used
        use.guessed = shares.guessed
        use.pids |= shares.pids.get(root, frozenset())
        use.looks.append((snapshot.time, use.seen))
        while len(use.looks) > 1 and use.looks[1][0] <= snapshot.time - SETTLED_S:
            use.looks.popleft()
        if use.lease is not None and place.need.memory:
            settled = use.looks[0][0] <= snapshot.time - SETTLED_S
            least = min(seen for _, seen in use.looks) if settled else 0
            use.lease.update(reserved=max(place.need.memory - least, 0))
        if snapshot.utilization is not None:
            place.busy += snapshot.utilization
            place.looks += 1
            if snapshot.time - place.told_at > _TELL_S:
                self.changed[place] = None
        if use.seen and use.seen > (place.peak or 0) * (1 + _TOLD_SHARE):
            place.peak = use.seen
            self.changed[place] = None

    def is_free(self, place: Place, uuid: str) -> bool:
        """Whether the memory of a job that has ended is free again, as far as can be seen."""
        state, use, ended = self.states[uuid], place.uses[uuid], place.ended_at
        snapshot = state.snapshot
        if state.lost:
            return True
        if snapshot is None or ended is None or snapshot.time < ended or state.error:
            return False
        if self._pids_tell and snapshot.processes is not None:
            listed = {process.pid for process in snapshot.processes}
            # (A process may have come and died between two looks.)
            ghosts = (pid for pid in listed - use.strangers if parent_of(pid) is None)
            return not use.pids & listed and not any(ghosts)
        # No pids: it is gone when most of what the job had is.
        if use.seen < _SHOWN_BYTES or snapshot.used <= use.used - use.seen // 2:
            return True
        return use.guessed and snapshot.time - ended >= _GUESS_S


def _reserved(place: Place, uuid: str) -> int:
    """What a job was promised and does not use yet."""
    if place.ended_at is not None or place.need.memory is None:
        return 0
    return max(place.need.memory - place.uses[uuid].seen, 0)


def _is_unseen(place: Place, uuid: str, now: float) -> bool:
    """Whether it is not known yet what a job that declared nothing will take."""
    if (
        place.need.memory is not None
        or place.ended_at is not None
        or now - place.since >= _UNSEEN_S
    ):
        return False
    use = place.uses[uuid]
    # (A guess gives a job that was just started a share of what others have.)
    return use.used < use.before + _SHOWN_BYTES if use.guessed else not use.seen


def _expected(place: Place, uuid: str, guess: int) -> int:
    """The same, with a guess for a job that declared nothing and shows nothing yet."""
    if place.need.memory is None and not place.uses[uuid].seen and place.ended_at is None:
        return guess
    return _reserved(place, uuid)
