"""The places of jobs on GPUs: what is free, what is promised, what is not free again yet.

A job's GPUs are its own from the decision until its memory is really gone. Times are seconds
of the monotonic clock, memory is in bytes.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from orchestrator.queue.assign import Load, Rules, impossible, schedule, why_not
from orchestrator.queue.gpu_view import GpuView
from orchestrator.queue.leases import Kind, LeaseError
from orchestrator.queue.line import Line
from orchestrator.queue.places import Place, Places, Want

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from orchestrator.queue.gpus import Gpu
    from orchestrator.queue.leases import LeaseTables
    from orchestrator.queue.needs import Need
    from orchestrator.queue.watcher import GpuWatcher, Reading

# A decision rests on a reading that came at most so long ago, and was begun at most so long ago
# (less than `gpu_view.SETTLED_S`).
_FRESH_S, _OLDEST_S = 1.0, 3.0
# How often NVML is read: while jobs run (oftener at first: half the age of the youngest), while
# others' jobs are waited for, while memory is about to be free; and while it does not answer.
_YOUNG_S, _RUNNING_S, _WAITING_S, _RELEASING_S, _SILENT_S = 0.1, 1.0, 0.2, 0.03, 1.0
_LOCK_RETRY_S, _TABLES_RETRY_S = 0.005, 1.0
_LOCK_COMPLAINT_S = 10.0
_HOPELESS_S = 120.0


class GpuPlaces(Places):
    """Gives GPUs to jobs.

    Args:
        gpus: those of this sweep.
        rules: what it accepts on each.
        size: jobs at a time in all; None: as many as fit.
        watcher: reads NVML; None goes by counts alone.
        tables: shared with other sweeps; None as if alone.
        stagger_s: least time between two starts on a GPU.
        release_timeout_s: how long to wait for a finished job's memory.
        cores: jobs at a time of those that need no GPU.
        clock: the time.
        pids_tell: whether NVML's pids are those that this process sees; None: it is looked at.
    """

    def __init__(
        self,
        gpus: Sequence[Gpu],
        rules: Rules,
        size: int | None,
        watcher: GpuWatcher | None,
        tables: LeaseTables | None,
        *,
        stagger_s: float = 0.0,
        release_timeout_s: float = 30.0,
        cores: int = 1,
        clock: Callable[[], float] = time.monotonic,
        pids_tell: bool | None = None,
    ) -> None:
        room = len(gpus) * rules.per_gpu
        super().__init__(room if size is None else min(size, room))
        self.gpus = tuple(gpus)
        self._most = math.inf if size is None else size
        self._cores, self._on_cores = cores, 0
        self._rules = rules
        self._watcher = watcher
        self._tables = tables
        self._stagger_s = stagger_s
        self._release_timeout_s = release_timeout_s
        self._clock = clock
        self._view = GpuView(gpus, tables, self._tell, pids_tell)
        self._places: list[Place] = []
        self._asked_at = float("-inf")
        self._line = Line(tables, rules.per_gpu, clock)
        self._lock_asked: float | None = None
        self._tables_error = ""
        self._retry_at: float | None = None
        # The fewest GPUs that a waiting job needs, and since when fewer than these answer.
        self._fewest = 1
        self._too_few_since: float | None = None
        # For whom the last decision, since which nothing has changed, found nothing.
        self._in_vain: tuple[int, ...] = ()

    def _tell(self, text: str) -> None:
        self.say(text)

    # --- giving ---

    def fill(self, wants: Sequence[Want]) -> list[tuple[Want, Place]]:
        given = self._fill_cores(wants)
        waiting = [want for want in wants if want.need.gpus > 0]
        seats = self._most - self._seated
        if not waiting or seats <= 0:
            self._nobody_waits()
            return given
        self._fewest = min(want.need.gpus for want in waiting)
        who = tuple(map(id, waiting))
        if self._retry_at is not None and self._clock() < self._retry_at:
            return given
        if who == self._in_vain or not self._can_decide(waiting[0]):
            return given
        try:
            given += self._decide(waiting, seats)
        finally:
            if self._tables is not None:
                self._tables.unlock()
        if not given and self._watcher is not None:  # whose next reading is the next chance
            self._in_vain = who
        return given

    def _fill_cores(self, wants: Sequence[Want]) -> list[tuple[Want, Place]]:
        """Places for jobs that need no GPU. A seat is kept for the first in line if it does."""
        on_cores = [want for want in wants if want.need.gpus == 0]
        kept = 1 if wants and wants[0].need.gpus else 0
        room = min(self._cores - self._on_cores, self._most - self._seated - kept)
        number = int(max(min(room, len(on_cores)), 0))
        self._on_cores += number
        self._seated += number
        return [(want, Place(want.need)) for want in on_cores[:number]]

    def _can_decide(self, first: Want) -> bool:
        """Whether there is a fresh reading and, which it then holds, the lock of the tables."""
        now = self._clock()
        view = self._view
        fresh = now - view.came_at <= _FRESH_S and now - view.read_at <= _OLDEST_S
        if self._watcher is not None and not fresh:
            self._line.turn_of(first)
            if not self._view.error:  # else it is asked from time to time
                self._ask()
            return False
        self._retry_at = None
        try:
            locked = self._tables is None or self._tables.try_lock()
        except LeaseError as error:
            self._wait_for_tables(error)
            return False
        if locked:
            self._lock_asked = None
            return True
        self._retry_at = now + _LOCK_RETRY_S
        if self._lock_asked is None:
            self._lock_asked = now
        elif now - self._lock_asked > _LOCK_COMPLAINT_S:
            self._lock_asked = now
            hint = "" if self._tables is None else self._tables.holder_hint()
            said = f"The lease tables have been locked for {_LOCK_COMPLAINT_S:.0f} s ({hint})"
            self.say(f"{said}; waiting. hydra.launcher.leases=false does without them.")
        return False

    def _decide(self, waiting: list[Want], seats: float) -> list[tuple[Want, Place]]:
        loads = self._loads(self._line.turn_of(waiting[0]))
        needs = [want.need for want in waiting]
        chosen, held = schedule(loads, needs, self._rules, self._line.held)
        chosen = chosen[: int(min(seats, len(chosen)))]
        given: list[tuple[Want, Place]] = []
        for number, gpus in chosen:
            place = self._occupy(waiting[number].need, gpus)
            if place is None:
                return given
            given.append((waiting[number], place))
            self._seated += 1
        left = [want for n, want in enumerate(waiting) if n not in {n for n, _ in chosen}]
        if left:
            self._wait_for(left[0], held, loads)
        else:
            self._nobody_waits()
        return given

    def _occupy(self, need: Need, gpus: tuple[Gpu, ...]) -> Place | None:
        """Take GPUs for a job; None where the tables cannot be written for now."""
        now = self._clock()
        place = Place(need, gpus, now)
        try:
            for gpu in gpus:
                use = place.uses[gpu.uuid] = self._view.states[gpu.uuid].use()
                if self._tables is not None:
                    use.lease = self._tables.add(
                        gpu.uuid,
                        Kind.RUN,
                        limit=1 if need.alone else self._rules.per_gpu,
                        reserved=need.memory or 0,
                        since=now,
                    )
        except LeaseError as error:
            place.give_up_leases()
            self._wait_for_tables(error)
            return None
        for gpu in gpus:
            self._view.states[gpu.uuid].last_start = now
        self._places.append(place)
        return place

    def _wait_for_tables(self, error: LeaseError) -> None:
        """A disk is full, say: what runs is not to suffer, what waits waits."""
        self._retry_at = self._clock() + _TABLES_RETRY_S
        if str(error) != self._tables_error:
            self._tables_error = str(error)
            self.say(f"{error} Nothing is started on a GPU until that is mended.")

    def _loads(self, since: float) -> list[Load]:
        now = self._clock()
        return [
            self._view.load(
                gpu, self._places, self._rules, since=since, now=now, stagger_s=self._stagger_s
            )
            for gpu in self.gpus
        ]

    # --- waiting ---

    def _wait_for(self, first: Want, held: frozenset[str], loads: Sequence[Load]) -> None:
        self._line.hold(held)
        if not self._seated and self._line.is_to_be_explained():
            reasons = "; ".join(
                f"GPU {x.gpu.label}: {why_not(x, first.need, self._rules) or 'it fits'}"
                for x in loads
            )
            number = first.need.gpus
            wanted = "a GPU" if number == 1 else f"{number} GPUs at a time"
            self.say(f"Waiting for {wanted}. {reasons}.")

    def _nobody_waits(self) -> None:
        self._line.clear()
        self._lock_asked = self._retry_at = self._too_few_since = None
        self._in_vain = ()

    def impossible(self, need: Need) -> str:
        return impossible([(gpu, self._view.states[gpu.uuid].capacity) for gpu in self.gpus], need)

    def room(self, gpus: int) -> int:
        # The same measure as in `impossible`: what is learned from it is never refused there.
        rooms = sorted((state.capacity for state in self._view.states.values()), reverse=True)
        return rooms[gpus - 1] if 0 < gpus <= len(rooms) else 0

    def totals(self, place: Place) -> list[int]:
        return [self._view.states[gpu.uuid].total for gpu in place.gpus]

    # --- taking back ---

    def started(self, place: Place, root: int) -> None:
        place.root = root
        for use in place.uses.values():
            if use.lease is not None:
                use.lease.update(root=root)

    def give_back(self, place: Place) -> None:
        super().give_back(place)
        self._in_vain = ()
        if not place.gpus:
            self._on_cores -= 1
            return
        place.ended_at = self._clock()
        for use in place.uses.values():
            if use.lease is not None:
                use.lease.update(reserved=0)
        if self._watcher is None:
            self._release(place)
        else:
            # A reading that was begun before now says nothing about its memory.
            self._ask()

    def _release_what_is_free(self) -> None:
        now = self._clock()
        for place in [place for place in self._places if place.ended_at is not None]:
            ended = place.ended_at or now
            if all(self._view.is_free(place, gpu.uuid) for gpu in place.gpus):
                self._release(place)
            elif now - ended > self._release_timeout_s:
                self._release(place)
                self.say(
                    f"Memory of a job on {place} is still in use {now - ended:.0f} s after its "
                    "end; going on without waiting for it (release_timeout_s)."
                )

    def _release(self, place: Place) -> None:
        self._in_vain = ()
        self._places.remove(place)
        self._view.changed.pop(place, None)
        place.give_up_leases()
        self._tell_of_drained()

    # --- watching ---

    def fileno(self) -> int | None:
        return None if self._watcher is None else self._watcher.fileno()

    def receive(self) -> None:
        reading = None if self._watcher is None else self._watcher.receive()
        if reading is not None:
            self.take_in(reading)

    @property
    def releasing(self) -> bool:
        return any(place.ended_at is not None for place in self._places)

    def take_in(self, reading: Reading) -> None:
        """Learn from a reading of all GPUs."""
        self._in_vain = ()
        self._view.take_in(reading, self._places, self._clock())
        self._release_what_is_free()
        if self._view.answering >= self._fewest:
            self._too_few_since = None
        elif self._too_few_since is None:
            self._too_few_since = self._clock()

    def check(self) -> None:
        if self._watcher is None:
            return
        now = self._clock()
        reading = self._watcher.check(now)
        if reading is not None:
            self.take_in(reading)
        interval = self._interval()
        if interval is not None and now >= self._asked_at + interval:
            self._ask()
        self._release_what_is_free()

    def _ask(self) -> None:
        if self._watcher is not None and not self._watcher.outstanding:
            self._asked_at = self._clock()
            self._watcher.ask()

    def _interval(self) -> float | None:
        if self._view.error:
            return _SILENT_S if self._places or self._line.waiting else None
        if self.releasing:
            return _RELEASING_S
        if not self._places:
            return None if not self._line.waiting else _WAITING_S
        youngest = self._clock() - max(place.since for place in self._places)
        longest = _RUNNING_S if not self._line.waiting else _WAITING_S
        return max(_YOUNG_S, min(youngest / 2, longest))

    def patience(self) -> float | None:
        now = self._clock()
        due = [self._retry_at] if self._retry_at is not None else []
        if self._watcher is None:
            # By counts alone, other sweeps' ends are seen only by looking.
            if self._line.waiting and (self._tables is not None or self._stagger_s):
                due.append(now + _WAITING_S)
        elif self._watcher.outstanding:
            deadline = self._watcher.deadline()
            due += [deadline] if deadline is not None else []
        else:
            interval = self._interval()
            due += [self._asked_at + interval] if interval is not None else []
        return max(min(due) - now, 0.0) if due else None

    def take_lost(self) -> list[Place]:
        lost, self._view.lost = self._view.lost, []
        return lost

    def take_changed(self) -> list[Place]:
        changed = list(self._view.changed)
        for place in changed:
            place.told_at = self._clock()
        self._view.changed.clear()
        return changed

    def hopeless(self) -> str:
        since = self._too_few_since
        if since is None or self._clock() - since < _HOPELESS_S:
            return ""
        which = "no GPU" if self._fewest == 1 else f"no {self._fewest} GPUs, which a job needs,"
        why = self._view.error or "those that do not are lost or cannot be read"
        return f"{which} answered in the last {_HOPELESS_S:.0f} s ({why})"

    # --- by the user ---

    def close_gpus(self, words: Mapping[str, str]) -> None:
        for gpu in self.gpus:
            self._in_vain = ()
            state, word = self._view.states[gpu.uuid], words.get(gpu.uuid, "")
            if word != state.closed:
                state.closed, state.told_drained = word, False
                text = {"": "takes jobs again", "pause": "is paused", "drain": "is being drained"}
                self.say(f"GPU {gpu.label} {text.get(word, word)}.")
        self._tell_of_drained()

    def _tell_of_drained(self) -> None:
        for gpu in self.gpus:
            state = self._view.states[gpu.uuid]
            busy = any(gpu.uuid in place.uses for place in self._places)
            if state.closed == "drain" and not busy and not state.told_drained:
                state.told_drained = True
                self.say(f"GPU {gpu.label} is drained: nothing of this sweep is left there.")

    def close(self) -> None:
        self._nobody_waits()
        if self._tables is not None:  # a lease then lasts until its job's keeper has ended
            self._tables.close()
