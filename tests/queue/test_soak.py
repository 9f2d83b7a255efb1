"""Slow: a long sweep leaks neither memory nor descriptors. Run by `make test-slow`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from orchestrator.store import find_runs

APP = """
import atexit, os, sys, hydra

def peak():
    status = open("/proc/self/status").read()
    open(sys.argv[-1].split("=")[1] + ".peak", "w").write(status.split("VmHWM:")[1].split()[0])

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    return len(os.listdir("/proc/self/fd"))

if __name__ == "__main__":
    atexit.register(peak)
    main()
"""


def sweep(tmp_path, runs: int) -> tuple[int, list[float]]:
    (tmp_path / "app.py").write_text(APP)
    words = ["hydra/launcher=gpu_queue", "hydra/sweeper=grid", "hydra/callbacks=results"]
    name = tmp_path / f"out{runs}"
    subprocess.run(
        [sys.executable, "app.py", "-m", *words, f"+x=range({runs})", f"hydra.sweep.dir={name}"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    values = [run.read().return_value for run in find_runs(name)]
    return int((tmp_path / f"out{runs}.peak").read_text()), values


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_a_long_sweep_leaks_neither_memory_nor_descriptors(tmp_path):
    small, few = sweep(tmp_path, 100)
    large, many = sweep(tmp_path, 3000)
    assert len(many) == 3000
    assert (large - small) / 2900 <= 20, "KB of the launcher's memory per finished job"
    # What a job inherits does not grow with the number of jobs before it.
    assert max(many) <= max(few)
