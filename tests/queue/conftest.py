"""Real sweeps as processes of their own, found and ended by a mark in their environment."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import psutil
import pytest

from orchestrator.store import RunDir, find_runs

APPS = Path(__file__).parent / "apps"
MARK = "SWEEP_TEST_MARK"
# For conditions that come true in well under a second on an idle machine.
PATIENCE_S = 60.0
COMMON = (
    "hydra/launcher=gpu_queue",
    "hydra/callbacks=results",
    "hydra/output=named",
    "hydra.launcher.max_processes=2",
    "hydra.launcher.gpus=[]",
    "hydra.launcher.kill_grace_s=1",
)


def wait_until(condition, what, patience=PATIENCE_S):
    """Poll until a condition holds; its value."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        if time.monotonic() > deadline:
            text = what() if callable(what) else what
            pytest.fail(f"waited {patience:.0f} s for: {text}")
        time.sleep(0.02)
    return value


class SweepRun:
    """One start of an app."""

    def __init__(self, words, *, cwd, env, log, **popen):
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                words,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=popen.pop("stdout", file),
                stderr=popen.pop("stderr", subprocess.STDOUT),
                start_new_session=True,
                **popen,
            )

    @property
    def pid(self):
        return self.process.pid

    @property
    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, patience=PATIENCE_S):
        """The exit status; as a shell gives it where a signal ended the process."""
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the sweep did not end in {patience:.0f} s:\n{self.text}")
        return code if code >= 0 else 128 - code

    def signal(self, number):
        os.kill(self.pid, number)

    def signal_group(self, number):
        os.killpg(self.pid, number)


class Sandbox:
    """A directory where an app is swept, again and again if need be."""

    def __init__(self, directory):
        self.directory = directory
        self.outputs = directory / "outputs"
        self.state = directory / "state"
        self.state.mkdir(parents=True)
        self.mark = uuid.uuid4().hex
        self.env = {**os.environ, MARK: self.mark, "SWEEP_STATE": str(self.state)}
        self.env.pop("CUDA_VISIBLE_DEVICES", None)
        self._sweeps = []

    def start(self, app, *words, common=COMMON, mode="-m", env=None, python=(), **popen):
        sweep = SweepRun(
            [sys.executable, *python, str(APPS / app), mode, *common, *words],
            cwd=self.directory,
            env={**self.env, **(env or {})},
            log=self.directory / f"log-{len(self._sweeps) + 1}.txt",
            **popen,
        )
        self._sweeps.append(sweep)
        return sweep

    def run(self, app, *words, expect=0, patience=120.0, **how):
        """Start an app and wait for its end; what it printed."""
        sweep = self.start(app, *words, **how)
        code = sweep.wait(patience)
        assert code == expect, f"exit status {code}, expected {expect}:\n{sweep.text}"
        return sweep.text

    @staticmethod
    def until(condition, what, patience=PATIENCE_S):
        return wait_until(condition, what, patience)

    # --- what is there ---

    def records(self, outputs=None):
        """Directory name to record, every one readable."""
        return {run.path.name: run.read() for run in find_runs(outputs or self.outputs)}

    def record(self, name):
        return RunDir(self.outputs / name).read()

    def states(self):
        return Counter(record.state.value for record in self.records().values())

    def ledger(self):
        with contextlib.suppress(FileNotFoundError):
            return Counter((self.state / "ledger").read_text().splitlines())
        return Counter()

    def held(self):
        return sorted(path.name for path in self.state.glob("held-*"))

    def open_gate(self):
        (self.state / "gate").touch()

    def close_gate(self):
        (self.state / "gate").unlink()

    def partial_results(self):
        return list(self.outputs.glob(".sweeps/*/train_sweep_results.json.partial"))

    # --- processes ---

    def processes(self):
        """Every living process that inherited this sandbox's environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def nobody_left(self, patience=20.0):
        wait_until(
            lambda: not self.processes(),
            lambda: f"the end of {[(p.pid, p.cmdline()) for p in self.processes()]}",
            patience,
        )

    def kill_all(self):
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, 5)
        for sweep in self._sweeps:
            sweep.process.wait(PATIENCE_S)


@pytest.fixture
def sandbox(tmp_path):
    place = Sandbox(tmp_path / "work")
    yield place
    place.kill_all()


@pytest.fixture(scope="module")
def make_sandbox():
    """Makes sandboxes for sweeps that many tests look at."""
    places = []

    def make(directory):
        places.append(Sandbox(directory))
        return places[-1]

    yield make
    for place in places:
        place.kill_all()


@pytest.fixture(scope="session")
def gpu_sweeps_module():
    # (Tests are imported without a package.)
    spec = importlib.util.spec_from_file_location(
        "gpu_sweeps", Path(__file__).with_name("gpu_sweeps.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for dataclasses
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpus(gpu_sweeps_module, sandbox, nvml):
    """Sweeps on stubbed GPUs; see `gpu_sweeps.py`."""
    return gpu_sweeps_module.GpuSweeps(sandbox, nvml)
