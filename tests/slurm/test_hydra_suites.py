"""Hydra's own suites for launchers, on the cluster."""

from __future__ import annotations

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import (
    BatchedSweeperTestSuite,
    IntegrationTestSuite,
    LauncherTestSuite,
)

COMMON = ["hydra.launcher.timeout_min=5"]


@pytest.fixture(autouse=True)
def _environment(slurm, monkeypatch):
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)


def test_the_launcher_is_discovered():
    names = [plugin.__name__ for plugin in Plugins.instance().discover(Launcher)]
    assert "SlurmLauncher" in names


@pytest.mark.parametrize(("launcher_name", "overrides"), [("slurm", COMMON)])
class TestLauncher(LauncherTestSuite):
    """Everything Hydra expects of a launcher, its tasks being closures."""


@pytest.mark.parametrize(
    ("launcher_name", "overrides"), [("slurm", [*COMMON, "hydra.sweeper.max_batch_size=2"])]
)
class TestBatches(BatchedSweeperTestSuite):
    """Several launches of one launcher, numbered on."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=slurm", *COMMON])]
)
class TestIntegration(IntegrationTestSuite):
    """Apps started as processes of their own."""
