"""Runs pooled over seeds: one setting per combination of the other hyperparameters."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.record import RunState, from_plain, to_plain
from orchestrator.results import statistics
from orchestrator.results.scores import default_mode, score

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.results.reading import FoundRun

ABSENT = "-"
# A run that was cancelled has not failed: the same command again ends it.
_UNFINISHED = frozenset({RunState.PENDING, RunState.RUNNING, RunState.CANCELLED})


@dataclass(frozen=True)
class Setting:
    """The runs that differ in nothing but their seed."""

    hyperparams: dict[str, Any]
    runs: tuple[FoundRun, ...]

    @property
    def failed(self) -> int:
        """How many ended without a result: FAILED, TIMEOUT and LOST."""
        return len(self.runs) - self.completed - self.unfinished

    @property
    def unfinished(self) -> int:
        """How many have not come to an end: PENDING, RUNNING and CANCELLED."""
        return sum(run.state in _UNFINISHED for run in self.runs)

    @property
    def completed(self) -> int:
        return sum(run.state is RunState.COMPLETED for run in self.runs)


@dataclass(frozen=True)
class Row:
    """A setting with the statistics of one score over its completed runs."""

    setting: Setting
    scored: tuple[tuple[FoundRun, float], ...]
    mean: float
    standard_error: float

    @property
    def n(self) -> int:
        return len(self.scored)

    @property
    def without(self) -> int:
        """How many runs are completed, but have no such score."""
        return self.setting.completed - self.n

    def best_run(self, mode: statistics.Mode) -> FoundRun:
        """The run with the best score: the one to look at or to run again."""
        index = statistics.best_index([value for _, value in self.scored], mode)
        return self.scored[index or 0][0]


@dataclass(frozen=True)
class Comparison:
    """The settings from best to worst, and what tells them apart."""

    metric: str | None
    mode: statistics.Mode
    keys: list[str]
    same: dict[str, str]
    rows: list[Row]

    @property
    def best(self) -> Row | None:
        """The first row, if it has a score that is a number."""
        return self.rows[0] if self.rows and not math.isnan(self.rows[0].mean) else None


def pool(runs: Sequence[FoundRun], seed_key: str) -> list[Setting]:
    """Group runs by their hyperparameters without the seed, in order of appearance.

    A run that has not a key differs from one that has; `telling.told_apart` comes before this.
    """
    return [
        Setting(_without(group[0], seed_key), tuple(group)) for group in grouped(runs, seed_key)
    ]


def grouped(runs: Iterable[FoundRun], seed_key: str) -> list[list[FoundRun]]:
    """The runs that have the same hyperparameters without the seed, in order of appearance."""
    groups: dict[bytes, list[FoundRun]] = {}
    for run in runs:
        identity = msgspec.json.encode(_without(run, seed_key), order="sorted")
        groups.setdefault(identity, []).append(run)
    return list(groups.values())


def _without(run: FoundRun, seed_key: str) -> dict[str, Any]:
    return {key: to_plain(value) for key, value in run.hyperparams.items() if key != seed_key}


def varying_keys(settings: Sequence[Setting]) -> list[str]:
    """The keys that some setting has otherwise than another, in order of appearance."""
    return [key for key in _all_keys(settings) if len(_texts(settings, key)) > 1]


def constant_values(settings: Sequence[Setting]) -> dict[str, str]:
    """The keys that every setting has alike, with that value as text."""
    return {
        key: next(iter(texts))
        for key in _all_keys(settings)
        if len(texts := _texts(settings, key)) == 1
    }


def _all_keys(settings: Iterable[Setting]) -> dict[str, None]:
    return {key: None for setting in settings for key in setting.hyperparams}


def _texts(settings: Iterable[Setting], key: str) -> set[str]:
    return {shown(setting, key) for setting in settings}


def shown(setting: Setting, key: str) -> str:
    """A hyperparameter as a table shows it; text that reads like another type is quoted."""
    if key not in setting.hyperparams:
        return ABSENT
    value = setting.hyperparams[key]
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False) if _looks_typed(value) else value


def _looks_typed(text: str) -> bool:
    if isinstance(from_plain(text), float):
        return False  # a record writes NaN and infinity as these words
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text in ("", ABSENT)
    return True


def ranked(settings: Sequence[Setting], name: str, mode: statistics.Mode) -> list[Row]:
    """The settings from best to worst mean score; those without a score come last."""
    rows = [_row(setting, name) for setting in settings]
    return [rows[index] for index in statistics.ranking([row.mean for row in rows], mode)]


def compare(
    runs: Sequence[FoundRun], metric: str | None, mode: statistics.Mode | None, seed_key: str
) -> Comparison:
    """Pool runs into settings and rank them by a metric (None: none has been recorded)."""
    settings = pool(runs, seed_key)
    way: statistics.Mode = mode or default_mode(metric or "")
    return Comparison(
        metric=metric,
        mode=way,
        keys=varying_keys(settings),
        same=constant_values(settings),
        rows=ranked(settings, metric or "", way),
    )


def _row(setting: Setting, name: str) -> Row:
    completed = (run for run in setting.runs if run.state is RunState.COMPLETED)
    pairs = ((run, score(run.record, name)) for run in completed)
    scored = tuple((run, value) for run, value in pairs if value is not None)
    values = [value for _, value in scored]
    return Row(
        setting,
        scored,
        mean=float(statistics.mean(values)),
        standard_error=float(statistics.standard_error(values)),
    )
