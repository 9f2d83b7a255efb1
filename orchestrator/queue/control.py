"""Pause, drain and resume: orders in ``control.json`` of a sweep that runs.

``orchestrator-status pause | drain | resume`` writes the file, the launcher polls it. To pause
is to start nothing new; to drain is the same, and a queue that is drained ends when what runs
has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Literal

import msgspec

from orchestrator.store import read_bytes, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

CONTROL_NAME = "control.json"
SCHEMA_VERSION = 1

Order = Literal["pause", "drain"]
QueueOrder = Literal["run", "pause", "drain"]


# What the user hears when the queue is told something.
SENTENCES = {
    "run": "The queue goes on.",
    "pause": "The queue is paused: what runs goes on, nothing is started until it is resumed.",
    "drain": "The queue is being drained: the sweep ends when what runs has ended.",
}


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What the user wants of a sweep; GPUs (or MIG instances) by UUID."""

    schema_version: int = SCHEMA_VERSION
    queue: QueueOrder = "run"
    gpus: dict[str, Order] = {}

    def give(self, order: Order, uuids: Collection[str] = ()) -> Orders:
        """The orders with one more, for some GPUs or, with none named, for the queue."""
        if not uuids:
            return msgspec.structs.replace(self, queue=order)
        return msgspec.structs.replace(self, gpus={**self.gpus, **dict.fromkeys(uuids, order)})

    def take_back(self, uuids: Collection[str] = ()) -> Orders:
        """The orders without those for some GPUs or, with none named, without any."""
        if not uuids:
            return Orders()
        left = {uuid: order for uuid, order in self.gpus.items() if uuid not in uuids}
        return msgspec.structs.replace(self, gpus=left)


class UnreadableOrdersError(Exception):
    """A ``control.json`` that holds no orders; the text says why."""


def read_orders(path: Path) -> Orders:
    """The orders in a file; where there is none, none were given.

    Raises:
        UnreadableOrdersError: the file cannot be read as orders.
    """
    try:
        orders = msgspec.json.decode(read_bytes(path), type=Orders)
    except FileNotFoundError:
        return Orders()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnreadableOrdersError(str(error)) from error
    if orders.schema_version > SCHEMA_VERSION:
        msg = f"it has schema {orders.schema_version}, this version reads {SCHEMA_VERSION}"
        raise UnreadableOrdersError(msg)
    return orders


def change_orders(path: Path, change: Callable[[Orders], Orders]) -> Orders:
    """Replace the orders at once, by what ``change`` makes of them; what is none counts as none.

    Raises:
        OSError: the sweep's directory cannot be written.
    """
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # no locks here: two commands at once may undo one
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        before = Orders()
        with contextlib.suppress(UnreadableOrdersError):
            before = read_orders(path)
        orders = change(before)
        write_atomic(path, msgspec.json.encode(orders) + b"\n")
    finally:
        os.close(descriptor)
    return orders


class Control:
    """The launcher's view of its sweep's orders.

    Attributes:
        queue: ``run``, ``pause`` or ``drain``.
        gpus: the GPUs that take no new run, by UUID, each with ``pause`` or ``drain``.
        problem: why the file's present content is ignored, as a sentence; else empty. The last
            orders that could be read then go on to hold.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._orders = Orders()
        self.problem = ""

    @property
    def queue(self) -> QueueOrder:
        return self._orders.queue

    @property
    def gpus(self) -> dict[str, Order]:
        return self._orders.gpus

    def poll(self) -> bool:
        """Whether the orders, or `problem`, are others than when this was last asked.

        While nobody writes the file it costs one stat.
        """
        seen = self._stat()
        if seen == self._seen:
            return False
        self._seen = seen
        before = (self._orders, self.problem)
        try:
            self._orders, self.problem = read_orders(self._path), ""
        except UnreadableOrdersError as error:
            self.problem = (
                f"{self._path} is ignored, for it holds no orders ({error}). Write it by "
                "orchestrator-status pause, drain or resume."
            )
        return before != (self._orders, self.problem)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)  # noqa: PTH116 - asked often
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
