"""Hydra's own suites for launchers, with both start methods."""

from __future__ import annotations

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import (
    BatchedSweeperTestSuite,
    IntegrationTestSuite,
    LauncherTestSuite,
)

METHODS = ("fork", "spawn")
COMMON = ["hydra.launcher.max_processes=2", "hydra.launcher.kill_grace_s=1"]


def test_the_launcher_is_discovered():
    names = [plugin.__name__ for plugin in Plugins.instance().discover(Launcher)]
    assert "GpuQueueLauncher" in names


def _method(name: str) -> list[str]:
    return [*COMMON, f"hydra.launcher.start_method={name}"]


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("gpu_queue", _method(name)) for name in METHODS],
    ids=METHODS,
)
class TestLauncher(LauncherTestSuite):
    """Everything Hydra expects of a launcher, its tasks being closures."""


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("gpu_queue", [*_method(name), "hydra.sweeper.max_batch_size=2"]) for name in METHODS],
    ids=METHODS,
)
class TestBatches(BatchedSweeperTestSuite):
    """Several launches of one launcher, numbered on."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({}, ["-m", "hydra/launcher=gpu_queue", *_method(name)]) for name in METHODS],
    ids=METHODS,
)
class TestIntegration(IntegrationTestSuite):
    """Apps started as processes of their own."""
