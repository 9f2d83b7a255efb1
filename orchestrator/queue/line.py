"""Who is first in line for GPUs, what is kept free for that job, and who is told of it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from orchestrator.queue.leases import Kind, LeaseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.queue.leases import Lease, LeaseTables
    from orchestrator.queue.places import Want

# After this long a waiting job is made known to other sweeps.
_CLAIM_S = 10.0
# After this long, and then again, the user hears why nothing starts.
_EXPLAIN_S, _EXPLAIN_AGAIN_S = 10.0, 600.0


class Line:
    """The first of the jobs that wait for GPUs; of those behind it nothing is remembered.

    Args:
        tables: shared with other sweeps; None as if alone.
        per_gpu: jobs that this sweep accepts on a GPU.
        clock: the time.
    """

    def __init__(
        self, tables: LeaseTables | None, per_gpu: int, clock: Callable[[], float]
    ) -> None:
        self._tables = tables
        self._per_gpu = per_gpu
        self._clock = clock
        self.waiting = False
        # The GPUs that are kept free for the first.
        self.held: frozenset[str] = frozenset()
        # Whose turn it is, and since when: of many that are looked at together only the first
        # has waited for long, or all of them would go before other sweeps.
        self._turn: tuple[Any, float] = (object(), 0.0)
        self._claims: dict[str, Lease] = {}
        self._explain_at: float | None = None

    def turn_of(self, first: Want) -> float:
        """Since when it is the turn of who waits first."""
        self.waiting = True
        if self._turn[0] is not first.key:
            self._turn = (first.key, self._clock())
            self._claim(frozenset())
        return self._turn[1]

    def hold(self, held: frozenset[str]) -> None:
        """Keep GPUs free for the first; other sweeps hear of it when it has waited for long."""
        self.held = held
        if self._clock() - self._turn[1] > _CLAIM_S:
            self._claim(held)

    def _claim(self, uuids: frozenset[str]) -> None:
        for uuid in self._claims.keys() - uuids:
            self._claims.pop(uuid).release()
        if self._tables is None:
            return
        with suppress(LeaseError):  # without it others may go first: no reason to stop
            for uuid in uuids - self._claims.keys():
                self._claims[uuid] = self._tables.add(
                    uuid, Kind.WAIT, limit=self._per_gpu, reserved=0, since=self._turn[1]
                )

    def is_to_be_explained(self) -> bool:
        """Whether it is time to tell the user why nothing starts."""
        now = self._clock()
        if self._explain_at is None:
            self._explain_at = now + _EXPLAIN_S
        if now < self._explain_at:
            return False
        self._explain_at = now + _EXPLAIN_AGAIN_S
        return True

    def clear(self) -> None:
        """Nobody waits."""
        self.waiting = False
        self.held = frozenset()
        self._explain_at = None
        self._claim(frozenset())
