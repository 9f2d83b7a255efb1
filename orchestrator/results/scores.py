"""What a run may be judged by: its metrics, its return value, its time and memory."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.record import RunState
from orchestrator.results.configs import ABSENT, SavedConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from orchestrator.record import RunRecord
    from orchestrator.results.reading import FoundRun
    from orchestrator.results.statistics import Mode

METRIC_PREFIX = "metrics."
RETURN_PREFIX = "return."
RETURN_VALUE = "return_value"
# Fields of the record that are numbers worth comparing, though never chosen unasked.
MEASURED_FIELDS = (
    "duration_seconds",
    "peak_gpu_memory_gb",
    "gpu_seconds",
    "core_seconds",
    "gpu_utilization",
)

_LOWER_IS_BETTER = re.compile(
    r"loss|losses|err|errors?|nll|mse|rmse|mae|perplexity|ppl|bpb|regret|costs?|wer|cer|fid"
    r"|duration|seconds|memory|latency"
)


def returned(record: RunRecord) -> dict[str, Any]:
    """The return value as columns: ``return_value``, or ``return.KEY`` for a mapping's scalars.

    A launcher copies the numbers of a returned mapping into the metrics; what is there with
    the same value is left out here.
    """
    value = record.return_value
    if value is None:
        return {}
    if not isinstance(value, dict):
        return {RETURN_VALUE: value}
    return {
        f"{RETURN_PREFIX}{key}": item
        for key, item in value.items()
        if isinstance(item, (str, bool, int, float)) and not _same(item, record.metrics.get(key))
    }


def _same(item: Any, metric: float | None) -> bool:
    if metric is None or isinstance(item, str):
        return False
    return item == metric or (item != item and metric != metric)  # noqa: PLR0124 - both NaN


def scores(record: RunRecord) -> dict[str, float]:
    """Every number that a run can be judged by, under the name that ``--metric`` takes."""
    found: dict[str, float] = dict(record.metrics)
    for name, value in returned(record).items():
        number = _number(value)
        if number is not None:
            found.setdefault(name, number)
    return found


def score(record: RunRecord, name: str) -> float | None:
    """One number of a run; None where it has none of that name."""
    if name in record.metrics:
        return record.metrics[name]
    if name in MEASURED_FIELDS:
        return _number(getattr(record, name))
    return _number(returned(record).get(name))


def _number(value: Any) -> float | None:
    if not isinstance(value, (bool, int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an int of more than 308 digits
        return math.inf if value > 0 else -math.inf


def score_counts(runs: Iterable[FoundRun]) -> dict[str, int]:
    """The names of all scores, sorted, and how many COMPLETED runs have each."""
    counts: Counter[str] = Counter()
    for run in runs:
        counted = run.state is RunState.COMPLETED
        for name in scores(run.record):
            counts[name] += counted
    return {name: counts[name] for name in sorted(counts)}


def choose_score(counts: Mapping[str, int], wanted: str | None) -> str | None:
    """The score to judge by.

    Args:
        counts: those that exist, as from `score_counts`.
        wanted: what the user asked for, with or without the prefix ``metrics.``; None for
            the default: what most completed runs have; of several the return value, else
            the first.

    Returns:
        A name; None where there is none and none was asked for.

    Raises:
        OrchestratorError: there is no score of the wanted name.
    """
    if wanted is None:
        return max(counts, key=lambda name: (counts[name], name == RETURN_VALUE), default=None)
    for name in (wanted, wanted.removeprefix(METRIC_PREFIX)):
        if name in counts or name in MEASURED_FIELDS:
            return name
    raise OrchestratorError(_unknown(wanted, list(counts)))


def check_seed_key(runs: Sequence[FoundRun], wanted: str) -> None:
    """Say so if no run was given the key that is to be pooled.

    Raises:
        OrchestratorError: the text names the nearest keys.
    """
    keys = {key: None for run in runs for key in run.hyperparams}
    if wanted in keys or SavedConfig(runs[0]).value(wanted) is not ABSENT:
        return
    near = difflib.get_close_matches(wanted, keys, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    others = f" There are: {', '.join(keys)}" if keys else ""
    raise OrchestratorError(f"no run has {wanted!r}{hint}{others}")


def _unknown(wanted: str, names: Sequence[str]) -> str:
    if not names:
        return f"no run has a metric {wanted!r}: none has logged or returned a number yet"
    near = difflib.get_close_matches(wanted.removeprefix(METRIC_PREFIX), names, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    others = ", ".join((*names, *MEASURED_FIELDS))
    return f"no run has a metric {wanted!r}.{hint} There are: {others}"


def default_mode(name: str) -> Mode:
    """``min`` where a word of the name means that less is better (loss, error, …), else ``max``."""
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return "min" if any(map(_LOWER_IS_BETTER.fullmatch, words)) else "max"
