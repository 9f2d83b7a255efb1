"""Fixtures for the whole suite."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def _load(path):
    # Tests are imported without a package; helpers come by path.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_stub = _load(Path(__file__).parent / "nvml" / "stub.py")


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory):
    """The stubbed libnvidia-ml.so.1, compiled once for all workers."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    library = _stub.build(base / "nvml-stub")
    if library is None:
        pytest.skip("no C compiler to build the NVML stub with")
    return library


@pytest.fixture
def nvml(nvml_library, tmp_path):
    """Stubbed GPUs; see `tests/nvml/stub.py`."""
    return _stub.NvmlStub(nvml_library, tmp_path / "nvml")
