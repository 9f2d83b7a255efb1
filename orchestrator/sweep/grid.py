"""The ``grid`` sweeper: every combination of the values given, as Hydra's basic sweeper."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from orchestrator.errors import OrchestratorError
from orchestrator.overrides import parse_override
from orchestrator.record import ErrorInfo
from orchestrator.sweep.compose import Composer
from orchestrator.sweep.directory import make_writable
from orchestrator.sweep.errors import RunsFailed, SweepError
from orchestrator.sweep.frozen import freeze
from orchestrator.sweep.nearest import with_nearest_key
from orchestrator.sweep.points import Points
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from hydra.core.override_parser.types import Override
    from hydra.core.utils import JobReturn
    from hydra.plugins.launcher import Launcher
    from hydra.types import TaskFunction

log = logging.getLogger(__name__)

_NAMED_FAILURES = 3
_LONG_AXIS = 64
_WHOLE_NUMBER = re.compile(r"[^=]*=-?\d+")


LookAt = Callable[[DictConfig, Collection[str]], None]
"""Called before the first job with the first point's task config and the keys that are swept."""


class Grid(Protocol):
    """What :func:`set_up` and :func:`sweep` need of the plugin class, and fill in."""

    max_batch_size: int | None
    params: Mapping[str, str] | None
    hydra_context: HydraContext | None
    config: DictConfig | None
    launcher: Launcher | None
    look_at: LookAt | None


def set_up(
    grid: Grid, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
) -> None:
    """Freeze the config files and make the launcher, which composes from the frozen ones."""
    frozen = HydraContext(
        config_loader=freeze(hydra_context.config_loader), callbacks=hydra_context.callbacks
    )
    grid.hydra_context = frozen
    grid.config = config
    # An app may look for its own mistakes before any job has to.
    grid.look_at = getattr(task_function, "look_at_sweep", None)
    grid.launcher = Plugins.instance().instantiate_launcher(
        hydra_context=frozen, task_function=task_function, config=config
    )


def sweep(grid: Grid, arguments: Sequence[str]) -> list[Sequence[JobReturn]]:
    """Run the sweep.

    Args:
        grid: the plugin, set up.
        arguments: overrides from the command line; they win over ``grid.params``.

    Returns:
        For each batch, what the launcher returned.

    Raises:
        SweepError: the sweep cannot be started as asked for.
        RunsFailed: after all batches, if any run failed.
        Exception: Hydra's own, for values that do not compose.
    """
    assert grid.hydra_context is not None
    assert grid.config is not None
    assert grid.launcher is not None
    params = [f"{key}={value}" for key, value in (grid.params or {}).items()]
    loader = grid.hydra_context.config_loader
    overrides = OverridesParser.create(loader).parse_overrides([*params, *arguments])
    # Our launchers have composed for themselves already: one memory serves both.
    composer = getattr(grid.launcher, "composer", None) or Composer(loader, grid.config)
    points = Points(axes(overrides), composer)
    parts = batches(points, grid.max_batch_size)
    _save_multirun(grid.config)
    check(points, grid.config)
    if grid.look_at is not None and points and _may_import_tasks(grid.config):
        _look(grid.look_at, points)
    return _launch(parts, grid.launcher)


def axes(overrides: Iterable[Override]) -> list[tuple[str, list[str]]]:
    """The axes of a grid, in order: a key given again keeps its place and takes new values.

    Raises:
        SweepError: an interval, which has no list of values.
    """
    found: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        found[key] = [f"{key}={value}" for value in _values(override)]
    return list(found.items())


def _values(override: Override) -> Iterator[str]:
    if not override.is_sweep_override():
        return iter([override.get_value_element_as_str()])
    if override.is_discrete_sweep():
        return override.sweep_string_iterator()
    raise SweepError(
        f"The grid sweeper cannot list the values of '{override.input_line}': an interval has "
        "no end of them. Give a list (key=1,2,3) or a range (key=range(1,10)), or choose a "
        "sweeper that searches intervals."
    )


def batches(points: Points, size: int | None) -> list[Points]:
    """Cut points into batches of at most ``size``; None is one batch.

    Raises:
        SweepError: a size below one.
    """
    if size is None:
        return [points]
    if size < 1:
        raise SweepError(
            f"hydra.sweeper.max_batch_size is {size}; give the most jobs to launch at once, "
            "1 or more, or null for all of them."
        )
    return [points[start : start + size] for start in range(0, len(points), size)]


def check(points: Points, master: DictConfig) -> None:
    """Compose every value of every axis once, beside the first values of the other axes.

    Raises:
        SweepError: a swept config sets parameters of the sweep itself.
        Exception: Hydra's own, for a value that does not compose.
    """
    composer = points.composer
    assert composer is not None
    if not points:
        return
    try:
        _try_each_value(points, composer, master)
    except ConfigCompositionException as error:
        groups = [text for text in points[0] if composer.chooses_group(text)]
        raise with_nearest_key(error, lambda _: composer.task_config(groups)) from error.__cause__


def _may_import_tasks(config: DictConfig) -> bool:
    """Whether the launcher's process imports tasks anyway; `preload` may say that it must not."""
    preload = OmegaConf.select(config, "hydra.launcher.preload", default="auto")
    return bool(preload == "auto")


def _look(look_at: LookAt, points: Points) -> None:
    assert points.composer is not None
    swept = {key.lstrip("+~") for key, values in points.axes if len(values) > 1}
    try:
        look_at(points.composer.task_config(points[0]), swept)
    except SweepError:
        raise
    except OrchestratorError as error:
        raise SweepError(str(error)) from error


def _try_each_value(points: Points, composer: Composer, master: DictConfig) -> None:
    start = time.perf_counter()
    first = points[0]
    for place, (_, values) in enumerate(points.axes):
        for value in _telling(values) if place == 0 else _telling(values)[1:]:
            point = [*first[:place], value, *first[place + 1 :]]
            if composer.chooses_group(value):
                _refuse_params(value, composer.compose(point), master)
            else:
                composer.task_config(point)
    log.debug("Composed each value of the sweep in %.2f s", time.perf_counter() - start)


def _telling(values: Sequence[str]) -> Sequence[str]:
    """The values that have to be tried; in a long row of whole numbers the ends stand for all."""
    if len(values) > _LONG_AXIS and all(_WHOLE_NUMBER.fullmatch(value) for value in values):
        return [values[0], values[-1]]
    return values


def _refuse_params(override: str, config: DictConfig, master: DictConfig) -> None:
    """Refuse a swept config that sets ``hydra.sweeper.params``: Hydra would drop them."""
    params, known = _params(config), _params(master)
    dropped = [key for key in params if key not in known or params[key] != known[key]]
    if not dropped:
        return
    key = parse_override(override).get_key_element()
    raise SweepError(
        f"'{override}' sets hydra.sweeper.params ({', '.join(dropped)}), which take no effect "
        f"while {key} itself is swept. Run each choice of {key} as a sweep of its own "
        f"('{override}' alone, then the next), or give these parameters on the command line."
    )


def _params(config: DictConfig) -> dict[str, Any]:
    params = OmegaConf.select(
        config, "hydra.sweeper.params", throw_on_resolution_failure=False, throw_on_missing=False
    )
    if not isinstance(params, DictConfig):
        return {}
    content: Any = OmegaConf.to_container(params)
    return dict(content)


def _save_multirun(config: DictConfig) -> None:
    sweep_dir = Path(config.hydra.sweep.dir)
    make_writable(sweep_dir)
    OmegaConf.save(config, sweep_dir / "multirun.yaml")


@dataclass
class _Failures:
    """What is kept of failed runs: how many, how many of these began, some names, the first error."""

    runs: int = 0
    failed: int = 0
    started: int = 0
    named: list[str] = field(default_factory=list)
    first: BaseException | None = None

    def add(self, job: JobReturn, point: Sequence[str]) -> None:
        self.runs += 1
        if job.status == JobStatus.COMPLETED or getattr(job, "submitted", False):
            return
        self.failed += 1
        self.started += bool(getattr(job, "began", True))
        if len(self.named) < _NAMED_FAILURES:
            self.named.append(" ".join(job.overrides or point) or "the run without overrides")
        # The public property writes to stderr and raises.
        result = job._return_value  # noqa: SLF001
        if self.first is None and isinstance(result, BaseException):
            self.first = result

    def text(self, *, resumes: bool) -> str:
        more = self.failed - len(self.named)
        names = "; ".join(self.named) + (f"; and {more} more" if more else "")
        error = "no result came back" if self.first is None else ErrorInfo.of(self.first).line
        text = (
            f"{self.failed} of {plural(self.runs, 'run')} failed: {names} (first error: {error})."
        )
        # A run that could not even be given a directory would fail again.
        if resumes and self.started:
            text += " Run the same command again to run only what is missing."
        return text


def _launch(parts: list[Points], launcher: Launcher) -> list[Sequence[JobReturn]]:
    returns: list[Sequence[JobReturn]] = []
    failures = _Failures()
    start = 0
    for points in parts:
        results = launcher.launch(points, initial_job_idx=start)
        start += len(points)
        for job, point in zip(results, points, strict=False):
            failures.add(job, point)
        returns.append(results)
    if failures.failed:
        # Only a launcher that skips finished runs may promise it; ours say so themselves.
        resumes = bool(getattr(launcher, "resumes", False))
        raise RunsFailed(failures.text(resumes=resumes)) from failures.first
    return returns
