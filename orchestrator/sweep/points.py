"""The points of a sweep: a product of axes that is never held in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from orchestrator.sweep.compose import Composer

Axis = tuple[str, Sequence[str]]
"""A key as typed (``lr``, ``+db``, ``~x``) and its overrides (``lr=1``, ``lr=2``)."""


class Points(Sequence[list[str]]):
    """Every combination of the axes' overrides, the last axis fastest.

    A launcher may take it for the list of override lists that Hydra passes. Points are made
    when asked for, each a new list in the order of the axes; a slice is again lazy. No axes
    are one point without overrides; an axis without values leaves no points.

    Args:
        axes: the axes, outermost first.
        composer: what composes these points fast, for launchers that know it.
        window: which points of the whole product these are; all by default.
    """

    def __init__(
        self, axes: Sequence[Axis], composer: Composer | None = None, window: range | None = None
    ) -> None:
        self.axes = axes
        self.composer = composer
        total = math.prod(len(values) for _, values in axes)
        self._window = range(total) if window is None else window

    def __len__(self) -> int:
        return len(self._window)

    @overload
    def __getitem__(self, index: int) -> list[str]: ...

    @overload
    def __getitem__(self, index: slice) -> Points: ...

    def __getitem__(self, index: int | slice) -> list[str] | Points:
        if isinstance(index, slice):
            return Points(self.axes, self.composer, self._window[index])
        rest = self._window[index]
        point = []
        for _, values in reversed(self.axes):
            rest, digit = divmod(rest, len(values))
            point.append(values[digit])
        point.reverse()
        return point

    def __repr__(self) -> str:
        return f"Points({len(self)} of {' x '.join(key for key, _ in self.axes) or 'no axes'})"

    def __getstate__(self) -> dict[str, object]:
        # A composer belongs to this process: it holds a parser's results and open sources.
        return {**self.__dict__, "composer": None}
