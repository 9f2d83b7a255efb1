"""The GPUs as seen over time. NVML is called in a process of its own: a call of it may never end.

That process tells each GPU as soon as it is read, so this side knows which one a call hangs
on. The process is then killed and replaced, and that GPU is left alone for a while.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.queue.gpus import Gpu, GpuSnapshot
from orchestrator.queue.nvml_process import (
    Devices,
    Done,
    Failed,
    List,
    NvmlProcess,
    Opened,
    Read,
    forked,
    reap,
    spawned,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Opening NVML wakes up every GPU: seconds each, where no persistence daemon runs.
_OPEN_FACTOR = 3
# A GPU that has hung before is not waited for as long.
_SUSPECT_PATIENCE_S = 2.0
_CLOSE_S = 0.5


@dataclass(frozen=True)
class Reading:
    """All GPUs, asked for at ``time`` (`time.monotonic`): nothing in here is older.

    ``devices`` are those that jobs can be given now; ``snapshots`` are of these, of those that
    cannot be read, and of those that were lost. ``error`` says that NVML as a whole does not
    answer, and why; nothing else is known then.
    """

    time: float
    devices: tuple[Gpu, ...] = ()
    snapshots: tuple[GpuSnapshot, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class _Hung:
    """A GPU that is left alone until a time."""

    until: float
    error: str


class GpuWatcher:
    """Reads NVML when asked, and never waits for it.

    Args:
        start: starts the process that calls NVML.
        patience_s: how long a GPU may take to answer; opening NVML may take three times that.
        retry_s: how long a GPU that did not answer is left alone.
    """

    def __init__(
        self, start: Callable[[], NvmlProcess], patience_s: float = 10.0, retry_s: float = 60.0
    ) -> None:
        self._start = start
        self._patience_s = patience_s
        self._retry_s = retry_s
        # The process comes and goes; what it is registered in has one descriptor for good.
        self._selector = selectors.DefaultSelector()
        self._held: list[NvmlProcess] = []
        self._finish_off = weakref.finalize(
            self, _finish_off, self._selector, self._held, os.getpid()
        )
        self._known: dict[str, Gpu] = {}
        self._hung: dict[str, _Hung] = {}
        self._listed_at = float("-inf")
        # Whether nothing was to be had of NVML the last time.
        self._silent = True
        # The request in hand: since when, since when without an answer, what is still to be
        # read (None: what there is, too), and what is read.
        self._asked_at: float | None = None
        self._moved_at = 0.0
        self._left: list[Gpu] | None = None
        self._read: dict[str, GpuSnapshot] = {}
        self._opened = False
        self._deaths = 0
        self._ready: Reading | None = None

    @classmethod
    def fork(cls, patience_s: float = 10.0, retry_s: float = 60.0) -> GpuWatcher:
        return cls(forked, patience_s, retry_s)

    @classmethod
    def spawn(cls, patience_s: float = 10.0, retry_s: float = 60.0) -> GpuWatcher:
        return cls(spawned, patience_s, retry_s)

    # --- for an event loop ---

    def fileno(self) -> int:
        """Readable when `receive` has something to do; the same for as long as this lives."""
        return self._selector.fileno()

    @property
    def outstanding(self) -> bool:
        return self._asked_at is not None

    def ask(self) -> None:
        """Have all GPUs read, unless that is being done."""
        if self.outstanding:
            return
        now = self._asked_at = time.monotonic()
        self._deaths = 0
        self._read = {}
        self._left = None if self._is_to_list(now) else self._to_read(now)
        self._send()

    def receive(self) -> Reading | None:
        """A reading, once it is complete. Never waits."""
        inbox = self._held[0].inbox if self._held else None
        if inbox is not None:
            for answer in inbox.receive():
                self._hear(answer)
            if inbox.closed:
                self._drop()
                if self.outstanding and self._ready is None:
                    self._process_died()
        reading, self._ready = self._ready, None
        if reading is not None:
            self._asked_at = None
        return reading

    def deadline(self) -> float | None:
        """When `check` has something to do, unless `receive` gives the reading before."""
        if self._ready is not None:
            return self._moved_at
        return self._moved_at + self._patience() if self.outstanding else None

    def check(self, now: float) -> Reading | None:
        """Act on NVML's silence; a reading if that completes it (or if it has come by now)."""
        reap()
        reading = self.receive()
        deadline = self.deadline()
        if reading is not None or deadline is None or now < deadline:
            return reading
        self._run_out(f"NVML did not answer in {self._patience():g} s")
        return self.receive()

    def first(self, timeout_s: float) -> Reading:
        """Wait for a reading."""
        end = time.monotonic() + timeout_s
        self.ask()
        while True:
            now = time.monotonic()
            reading = self.check(now)
            if reading is not None:
                return reading
            if now >= end:
                return self._give_up(f"NVML did not answer in {timeout_s:g} s")
            deadline = self.deadline()
            self._selector.select(max(min(end, deadline or end) - now, 0.0))

    def close(self) -> None:
        """End the process; one that hangs in the driver is not waited for."""
        self._finish_off()

    # --- the request in hand ---

    def _is_to_list(self, now: float) -> bool:
        if self._silent:
            # With a driver that was loaded again, NVML must be opened again; an open that
            # brings nothing better is not repeated all the time.
            return not self._known or now >= self._listed_at + self._retry_s
        return False

    def _to_read(self, now: float) -> list[Gpu]:
        """Known GPUs but those that are left alone, whose snapshots are as good as made."""
        to_read = []
        for uuid, gpu in self._known.items():
            hung = self._hung.get(uuid)
            if hung is not None and now < hung.until:
                self._read[uuid] = GpuSnapshot(gpu, now, error=hung.error)
            else:
                to_read.append(gpu)
        return to_read

    def _send(self) -> None:
        self._moved_at = time.monotonic()
        if self._left is not None and not self._left:
            self._complete()
            return
        try:
            if not self._held:
                self._opened = False
                self._held.append(self._start())
                self._selector.register(self._held[0], selectors.EVENT_READ)
        except OSError as error:
            self._fail(f"the process that reads NVML does not start: {error}")
            return
        request = List() if self._left is None else Read(tuple(self._left))
        with contextlib.suppress(OSError):  # it is dead: `receive` sees that
            self._held[0].send(request)

    def _drop(self) -> None:
        """Have no process; the next request starts one."""
        while self._held:
            process = self._held.pop()
            self._selector.unregister(process)
            process.kill()

    def _hear(self, answer: Any) -> None:
        if not self.outstanding or self._ready is not None:
            return
        self._moved_at = time.monotonic()
        if isinstance(answer, GpuSnapshot):
            self._take(answer)
        elif isinstance(answer, Opened):
            self._opened = True
        elif isinstance(answer, Devices):
            self._listed_at = self._moved_at
            self._known.update((gpu.uuid, gpu) for gpu in answer.gpus)
            self._left = self._to_read(self._moved_at)
            self._send()
        elif isinstance(answer, Failed):
            self._fail(answer.error)
        elif isinstance(answer, Done):
            self._complete()

    def _take(self, snapshot: GpuSnapshot) -> None:
        uuid = snapshot.gpu.uuid
        self._read[uuid] = snapshot
        self._hung.pop(uuid, None)
        self._left = [gpu for gpu in self._left or () if gpu.uuid != uuid]

    def _complete(self) -> None:
        snapshots = tuple(self._read[uuid] for uuid in self._known if uuid in self._read)
        good = [s for s in snapshots if not s.lost and not s.error]
        self._silent = not good and not self._hung
        devices = tuple(s.gpu for s in snapshots if not s.lost)
        self._ready = Reading(self._asked_at or 0.0, devices, snapshots)

    def _fail(self, error: str) -> None:
        self._silent = True
        self._listed_at = float("-inf")
        self._ready = Reading(self._asked_at or 0.0, error=error)

    # --- what can go wrong ---

    def _patience(self) -> float:
        if self._left is None or not self._opened:
            return self._patience_s * _OPEN_FACTOR
        if self._left and self._left[0].uuid in self._hung:
            return min(_SUSPECT_PATIENCE_S, self._patience_s)
        return self._patience_s

    def _run_out(self, error: str) -> None:
        self._drop()
        if self._left is None or not self._opened:
            self._fail(f"{error} when it was opened")
        else:
            self._blame(self._left, error)

    def _process_died(self) -> None:
        """Try again once: somebody may have killed it. Then it is what was being read."""
        self._deaths += 1
        if self._deaths == 1:
            self._send()
        elif self._left is None or not self._opened:
            self._fail("the process that reads NVML dies")
        else:
            self._blame(self._left, "the process that reads NVML dies of it")

    def _blame(self, left: Sequence[Gpu], error: str) -> None:
        """Leave alone the GPU that was being read, all of its instances, and read the others."""
        now = time.monotonic()
        for gpu in left:
            if gpu.index == left[0].index:
                self._hung[gpu.uuid] = _Hung(now + self._retry_s, error)
                self._read[gpu.uuid] = GpuSnapshot(gpu, now, error=error)
        self._left = [gpu for gpu in left if gpu.uuid not in self._read]
        self._send()

    def _give_up(self, error: str) -> Reading:
        """End the request, with what there is."""
        self._drop()
        if self._left is None or not self._opened:
            self._fail(error)
        else:
            now = time.monotonic()
            self._read.update((g.uuid, GpuSnapshot(g, now, error=error)) for g in self._left)
            self._complete()
        reading = self.receive()
        assert reading is not None
        return reading


def _finish_off(selector: selectors.BaseSelector, held: list[NvmlProcess], owner: int) -> None:
    if os.getpid() != owner:  # a fork that drops its copy would take the launcher's with it
        return
    for process in held:
        selector.unregister(process)
        process.kill()
    held.clear()
    selector.close()
    end = time.monotonic() + _CLOSE_S
    while not reap() and time.monotonic() < end:
        time.sleep(0.005)


def make_watcher(method: str) -> GpuWatcher:
    """A watcher whose process is forked (``fork``) or a fresh interpreter (``spawn``)."""
    return GpuWatcher.fork() if method == "fork" else GpuWatcher.spawn()
