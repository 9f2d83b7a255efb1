"""A real Slurm for the tests of this folder; see `tests/slurm/cluster.py`.

One cluster takes a second of CPU to start and next to nothing afterwards, so one serves all
tests, one after the other: `pytest -n auto --dist loadgroup` runs them in one worker, by the mark
below. Without `loadgroup` every worker that gets one of them starts a cluster of its own; their
ports and folders differ, so that is only slower.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _load(path):
    # Tests are imported without a package; helpers come by path.
    name = f"slurm_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


cluster = _load(HERE / "cluster.py")
sweeps = _load(HERE / "sweeps.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.xdist_group("slurm"))


@pytest.fixture(scope="session")
def _slurm():
    if reason := cluster.why_not():
        pytest.skip(reason)
    with cluster.Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def slurm(_slurm):
    """Slurm of 4 simulated nodes with 8 CPUs and 2 GPUs each, for the whole session."""
    return _slurm


@pytest.fixture
def sweep(slurm, tmp_path):
    """Sweeps of the app of `sweeps.py`, in a directory of their own."""
    made = sweeps.Sweeps(slurm, tmp_path)
    yield made
    made.end()


@pytest.fixture(autouse=True)
def _reset(request):
    """Whatever a test leaves behind, the next one finds idle nodes and an empty queue."""
    yield
    if "slurm" in request.fixturenames:
        request.getfixturevalue("slurm").reset()
