"""Statistics of repeated measurements: pure functions of arrays, over the last axis.

NaN is a result (a diverged run), so it is never left out in silence: it makes the
statistics of its group NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Mode = Literal["max", "min"]


def mean(values: ArrayLike) -> NDArray[np.float64]:
    """The arithmetic mean over the last axis.

    Args:
        values: shape ``(..., n)``.

    Returns:
        Shape ``(...)``; NaN where ``n`` is 0.
    """
    array = _as_floats(values)
    with np.errstate(all="ignore"):
        return _empty(array) if array.shape[-1] == 0 else _shifted_mean(array)


def standard_error(values: ArrayLike) -> NDArray[np.float64]:
    """The standard error of the mean over the last axis.

    ``sqrt(sum((x - mean)**2) / (n - 1)) / sqrt(n)``: the sample standard deviation
    (``ddof=1``) over the root of the number of values.

    Args:
        values: shape ``(..., n)``.

    Returns:
        Shape ``(...)``; NaN where ``n`` is less than 2, for one value says nothing of spread.
    """
    array = _as_floats(values)
    count = array.shape[-1]
    if count < 2:  # noqa: PLR2004 - the formula divides by count - 1
        return _empty(array)
    with np.errstate(all="ignore"):
        # Scaled, so that the squares of very large and very small deviations stay in range.
        deviations = array - _shifted_mean(array)[..., None]
        scale = np.max(np.abs(deviations), axis=-1)
        safe = np.where((scale > 0) & np.isfinite(scale), scale, 1.0)
        squares = np.sum((deviations / safe[..., None]) ** 2, axis=-1)
        error: NDArray[np.float64] = safe * np.sqrt(squares / (count - 1)) / np.sqrt(count)
    return error


def best_index(scores: ArrayLike, mode: Mode) -> int | None:
    """Where the highest or lowest score is; the first of equals.

    Args:
        scores: shape ``(n,)``; NaN is never the best.
        mode: ``"max"`` or ``"min"``.

    Returns:
        An index, or None where there is no score but NaN.
    """
    order = ranking(scores, mode)
    if len(order) == 0 or np.isnan(_as_floats(scores)[order[0]]):
        return None
    return int(order[0])


def ranking(scores: ArrayLike, mode: Mode) -> NDArray[np.int64]:
    """The indices from best to worst; NaN comes last, equals keep their order.

    Args:
        scores: shape ``(n,)``.
        mode: ``"max"`` or ``"min"``.

    Returns:
        Shape ``(n,)``.
    """
    array = _as_floats(scores)
    return np.argsort(-array if mode == "max" else array, kind="stable").astype(np.int64)


def _as_floats(values: ArrayLike) -> NDArray[np.float64]:
    return np.atleast_1d(np.asarray(values, dtype=np.float64))


def _empty(array: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.full(array.shape[:-1], np.nan)


def _shifted_mean(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean as first value plus mean difference: equal values give exactly that value."""
    first: Any = array[..., :1]
    shifted = first[..., 0] + np.mean(array - first, axis=-1)
    # An infinite first value makes the differences NaN where the plain mean is infinite.
    result: NDArray[np.float64] = np.where(np.isfinite(shifted), shifted, np.mean(array, axis=-1))
    return result
