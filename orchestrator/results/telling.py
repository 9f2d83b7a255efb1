"""What tells runs apart beside the hyperparameters that their records hold.

A record holds the overrides of the sweep that ran it. Another sweep's runs were not given all
of these; a YAML file may have been edited between two sweeps; two apps may share a directory.
None of this may make one setting of two, or two of one: the saved configs say what was so.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.results.configs import ABSENT, SavedConfig
from orchestrator.results.settings_table import grouped
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from orchestrator.results.reading import FoundRun

# Where configs differ in more keys than this, their digest is the column.
_MANY = 6


def told_apart(runs: Sequence[FoundRun], seed_key: str) -> tuple[list[FoundRun], list[str]]:
    """The runs with all that tells them apart among their hyperparameters.

    Returns:
        The runs, and a sentence for each kind of thing that had to be added.
    """
    told, notes = filled(runs), []
    if next(_doubtful(told, seed_key), None) is None:
        return told, []
    for step in (_by_app, _by_config, _by_fingerprint):
        told, note = step(told, seed_key)
        notes += [note] if note else []
    return told, notes


def filled(runs: Sequence[FoundRun]) -> list[FoundRun]:
    """The runs with every key that some run was given, from the saved config where it lacks it."""
    keys = {key: None for run in runs for key in run.hyperparams if not key.startswith("~")}
    return _with_keys(runs, list(keys))


def _with_keys(runs: Sequence[FoundRun], keys: Sequence[str]) -> list[FoundRun]:
    if all(key in run.hyperparams for run in runs for key in keys):
        return list(runs)
    given = {key: _Numbers() for key in keys}
    for run in runs:
        for key, value in run.hyperparams.items():
            if key in given:
                given[key].note(value)
    return [_with_lacking(run, given) for run in runs]


def _with_lacking(run: FoundRun, given: dict[str, _Numbers]) -> FoundRun:
    have = run.hyperparams
    lacking = [key for key in given if key not in have]
    if not lacking:
        return run
    config = SavedConfig(run)
    values = {key: config.value(key) for key in lacking}
    return _adding(run, {k: given[k].written(v) for k, v in values.items() if v is not ABSENT})


def _adding(run: FoundRun, values: dict[str, Any]) -> FoundRun:
    return replace(run, added={**run.added, **values})


class _Numbers:
    """How the records write a key's numbers: a config of typed fields has 1.0 for their 1."""

    def __init__(self) -> None:
        self._written: dict[float, Any] = {}

    def note(self, value: Any) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self._written.setdefault(value, value)

    def written(self, value: Any) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return self._written.get(value, value) if is_number else value


def _doubtful(runs: Sequence[FoundRun], seed_key: str) -> Iterator[list[FoundRun]]:
    """Settings whose runs may differ in more than the seed.

    Runs of one sweep that were given the same have the same config: its files were read once.
    """
    for group in grouped(runs, seed_key):
        sweeps = {run.record.sweep_id for run in group}
        if len(group) > 1 and (len(sweeps) > 1 or "" in sweeps or _clashing(group, seed_key)):
            yield group


def _clashing(group: Iterable[FoundRun], seed_key: str) -> bool:
    """Whether there are two runs of one seed with different identities."""
    seen: dict[str, str] = {}
    return any(
        seen.setdefault(_seed(run, seed_key), run.record.fingerprint) != run.record.fingerprint
        for run in group
        if run.record.fingerprint
    )


def _seed(run: FoundRun, seed_key: str) -> str:
    return str(run.hyperparams.get(seed_key, run.record.seed))


def _by_app(runs: Sequence[FoundRun], seed_key: str) -> tuple[list[FoundRun], str]:
    apps = _Apps()
    mixed = {app for group in _doubtful(runs, seed_key) for app in apps.several(group)}
    if not mixed:
        return list(runs), ""
    name = _free_name("app", runs)
    labels = {run.directory: app for run in runs if (app := apps.of(run))}
    return _labelled(runs, name, labels), (
        f"runs of several apps ({', '.join(sorted(mixed))}) were given the same; "
        f"the column {name} tells them apart"
    )


class _Apps:
    """The app of each run: that of its sweep, which is read once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, run: FoundRun) -> str:
        key = run.record.sweep_id or f"in {run.directory}"
        if key not in self._known:
            self._known[key] = SavedConfig(run).app
        return self._known[key]

    def several(self, group: Iterable[FoundRun]) -> set[str]:
        apps = {app for run in group if (app := self.of(run))}
        return apps if len(apps) > 1 else set()


def _by_config(runs: Sequence[FoundRun], seed_key: str) -> tuple[list[FoundRun], str]:
    shown: dict[str, None] = {}
    digests: dict[str, str] = {}
    for group in _doubtful(runs, seed_key):
        kinds = _kinds(group, seed_key)
        keys = _differing_keys([leaves for leaves, _ in kinds])
        if len(keys) <= _MANY:
            shown.update(dict.fromkeys(keys))
            continue
        for leaves, same in kinds:
            digests.update(dict.fromkeys((run.directory for run in same), _digest(leaves, keys)))
    if not shown and not digests:
        return list(runs), ""
    told, columns = _with_keys(runs, list(shown)), list(shown)
    if digests:  # too many keys for a table
        columns.append(_free_name("config", runs))
        told = _labelled(told, columns[-1], digests)
    return told, (
        "runs that were given the same have different configs (a file was edited between two "
        f"sweeps?); these columns tell them apart: {', '.join(columns)}"
    )


def _labelled(runs: Iterable[FoundRun], name: str, labels: dict[str, str]) -> list[FoundRun]:
    """The runs, with a label each where there is one for their directory."""
    return [
        _adding(run, {name: labels[run.directory]}) if run.directory in labels else run
        for run in runs
    ]


def _kinds(group: Sequence[FoundRun], seed_key: str) -> list[tuple[dict[str, Any], list[FoundRun]]]:
    """The different configs of a setting, less the seed and what is ignored, and whose they are."""
    by_text: dict[str, list[FoundRun]] = defaultdict(list)
    for run in group:
        text = SavedConfig(run).text()
        if text:
            by_text[_without_seed(text, seed_key, _seed(run, seed_key))].append(run)
    if len(by_text) < 2:  # noqa: PLR2004 - there is nothing to compare
        return []
    kinds = []
    for same in by_text.values():
        config = SavedConfig(same[0])
        left_out = (seed_key, *config.ignored)
        leaves = {k: v for k, v in config.leaves().items() if not _is_below(k, left_out)}
        kinds.append((leaves, same))
    return kinds


def _without_seed(text: str, seed_key: str, seed: str) -> str:
    """A saved config without the line of its seed, as Hydra writes it."""
    *parents, name = seed_key.split(".")
    return f"\n{text}".replace(f"\n{'  ' * len(parents)}{name}: {seed}\n", "\n")


def _is_below(key: str, roots: Iterable[str]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def _differing_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    keys = {key: None for leaves in configs for key in leaves}
    return [key for key in keys if len({_text(leaves.get(key, ABSENT)) for leaves in configs}) > 1]


def _text(value: Any) -> str:
    return "" if value is ABSENT else json.dumps(value, sort_keys=True, default=str)


def _digest(leaves: dict[str, Any], keys: Sequence[str]) -> str:
    text = "\n".join(f"{key}={_text(leaves.get(key, ABSENT))}" for key in keys)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _by_fingerprint(runs: Sequence[FoundRun], seed_key: str) -> tuple[list[FoundRun], str]:
    """What is left: other identities for reasons that no saved config shows."""
    labels = {
        run.directory: run.record.fingerprint[:8]
        for group in grouped(runs, seed_key)
        if _clashing(group, seed_key)
        for run in group
    }
    if not labels:
        return list(runs), ""
    name = _free_name("fingerprint", runs)
    return _labelled(runs, name, labels), (
        f"{plural(len(labels), 'run')} were given the same, and their saved configs show no "
        "difference, but some of one seed have another identity; "
        f"the column {name} tells them apart"
    )


def _free_name(name: str, runs: Sequence[FoundRun]) -> str:
    taken = {key for run in runs for key in run.hyperparams}
    while name in taken:
        name = f"hydra.{name}"
    return name
