"""One GPU of this machine with torch, or a stubbed one; and sweeps on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

APP = Path(__file__).with_name("app.py")
QUEUE = (
    "hydra/launcher=gpu_queue",
    "hydra/sweeper=grid",
    "hydra/output=named",
    "hydra/callbacks=results",
)


class Box:
    """A GPU and a place for sweeps. Memory in GB."""

    def __init__(self, directory, env, uuid, total):
        self.directory, self.env, self.uuid, self.total = directory, env, uuid, total

    def start(self, *words):
        where = (
            f"hydra.launcher.gpus=[{self.uuid}]",
            f"hydra.launcher.lease_dir={self.directory}/l",
        )
        return subprocess.Popen(
            [sys.executable, str(APP), "-m", *QUEUE, *where, *words],
            cwd=self.directory,
            env={**os.environ, **self.env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *words, expect=0):
        sweep = self.start(*words)
        text, _ = sweep.communicate(timeout=240)
        assert sweep.returncode == expect, text
        return text

    def stop(self, sweep):
        sweep.send_signal(signal.SIGINT)
        text, _ = sweep.communicate(timeout=60)
        return text

    def records(self):
        paths = sorted((self.directory / "outputs").glob("*/run.json"))
        return [json.loads(path.read_bytes()) for path in paths]

    def used(self):
        """GB in use, as nvidia-ml-py says in a process of its own."""
        code = (
            "import sys, pynvml as n; n.nvmlInit();"
            "print(n.nvmlDeviceGetMemoryInfo(n.nvmlDeviceGetHandleByUUID(sys.argv[1])).used)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, self.uuid],
            env={**os.environ, **self.env},
            check=True,
            capture_output=True,
            text=True,
        )
        return int(done.stdout) / 1e9

    def until(self, condition, patience=60.0):
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)


def _real():
    """UUID and GB of the GPU with the most free memory; or why there is none."""
    code = (
        "import pynvml as n; n.nvmlInit();"
        "h = [n.nvmlDeviceGetHandleByIndex(i) for i in range(n.nvmlDeviceGetCount())];"
        "m = [(n.nvmlDeviceGetMemoryInfo(x), n.nvmlDeviceGetUUID(x)) for x in h];"
        "b = max(m, key=lambda x: x[0].free); print(b[1], b[0].total);"
        "import torch; torch.ones(1, device='cuda')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["?"])[-1]
    uuid, total = done.stdout.split()[:2]
    return (uuid, int(total) / 1e9), ""


@pytest.fixture(params=["stubbed", "real"])
def box(request, tmp_path, nvml):
    if request.param == "stubbed":
        nvml.gpus([nvml.gpu("GPU-only", total=24 * 10**9, used=10**8)])
        return Box(tmp_path, nvml.env, "GPU-only", 24.0)
    found, why_not = _real()
    if found is None:
        pytest.skip(f"no GPU that torch can use: {why_not}")
    return Box(tmp_path, {}, *found)
