"""Sweeps on stubbed GPUs, and what their jobs said of themselves: where, when, how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

COMMON = (
    "hydra/launcher=gpu_queue",
    "hydra/callbacks=results",
    "hydra/output=named",
    "hydra.launcher.kill_grace_s=1",
)
APP = "gpu_app.py"


@dataclass
class Span:
    """A job as it told of itself; one that never said that it ended went on for ever."""

    name: str
    sweep: str
    start: float
    end: float
    uuids: tuple[str, ...]
    gb: float
    linger: float
    pid: int


class GpuSweeps:
    """A sandbox with a stub, where sweeps are started and judged."""

    # A GPU has so many seconds to answer, and is asked again after so many.
    IMPATIENT = {"watcher.GpuWatcher.fork.__func__.__defaults__": [1.5, 60.0]}
    # NVML's pids are then none of this machine's, as in a container.
    CONTAINER = {"attribution._FIRST_PID_NAMESPACE": "pid:[0]"}

    def __init__(self, sandbox, nvml):
        self.sandbox = sandbox
        self.nvml = nvml
        self.leases = sandbox.directory / "leases"
        self.until = sandbox.until

    def words(self, *words, method="auto"):
        common = (
            f"hydra.launcher.lease_dir={self.leases}",
            f"hydra.launcher.start_method={method}",
        )
        return (*common, *words)

    def start(self, *words, name="", method="auto", constants=None, env=None):
        """Start a sweep; ``constants``: of modules in orchestrator.queue, for its launcher."""
        env = {
            **self.nvml.env,
            "GPU_APP_SWEEP": name,
            "GPU_APP_CONSTANTS": json.dumps(constants or {}),
            **(env or {}),
        }
        words = self.words(*words, method=method)
        if name:
            words = (*words, f"hydra.sweep.dir=outputs-{name}")
        return self.sandbox.start(APP, *words, common=COMMON, env=env)

    def run(self, *words, expect=0, patience=120.0, **how):
        """Start a sweep and wait for its end; what it printed."""
        sweep = self.start(*words, **how)
        return self.end(sweep, expect, patience)

    @staticmethod
    def end(sweep, expect=0, patience=120.0):
        code = sweep.wait(patience)
        assert code == expect, f"exit status {code}, expected {expect}:\n{sweep.text}"
        assert "Traceback" not in sweep.text, sweep.text
        return sweep.text

    def order(self, *words, outputs="outputs"):
        """Type an order to the sweep that runs."""
        directory = str(self.sandbox.directory / outputs)
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli.status", *words, directory],
            env=os.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # --- what happened ---

    def records(self, outputs=None):
        """The last record of each x."""
        found = self.sandbox.records(outputs)
        return {record.hyperparams["x"]: record for record in found.values()}

    def events(self):
        path = self.sandbox.state / "events"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def spans(self, sweep=None):
        """All jobs, in the order of their starts; a try of a run is a job of its own."""
        found, running = [], {}
        for event in self.events():
            if event["event"] == "start":
                uuids = tuple(filter(None, (event["visible"] or "").split(",")))
                facts = {key: event[key] for key in ("name", "sweep", "gb", "linger", "pid")}
                span = Span(start=event["time"], end=float("inf"), uuids=uuids, **facts)
                running[event["pid"]] = span
                found.append(span)
            else:
                running[event["pid"]].end = event["time"]
        return sorted(
            (span for span in found if sweep in (None, span.sweep)), key=lambda span: span.start
        )

    def running(self):
        """Jobs that have started and not ended."""
        return [span for span in self.spans() if span.end == float("inf")]

    def wait_for_running(self, count, sweep=None):
        def check():
            assert sweep is None or sweep.process.poll() is None, sweep.text
            return len(self.running()) >= count

        self.until(check, lambda: f"{count} running jobs, {sweep and sweep.text}")

    def most_jobs(self, spans=None):
        """The most jobs that there ever were at once on each GPU."""
        return self._most(spans, lambda _: 1, linger=False)

    def most_gb(self, spans=None):
        """The most memory that jobs ever took, or were about to take, of each GPU."""
        return self._most(spans, lambda span: span.gb, linger=True)

    def _most(self, spans, size, *, linger):
        changes = []
        for span in self.spans() if spans is None else spans:
            for uuid in span.uuids:
                changes.append((span.start, size(span), uuid))
                changes.append((span.end + linger * span.linger, -size(span), uuid))
        now, most = Counter(), Counter()
        for _, change, uuid in sorted(changes):
            now[uuid] += change
            most[uuid] = max(most[uuid], now[uuid])
        return dict(most)

    def overlaps(self, one, other):
        """Whether two jobs had a GPU at the same time."""
        together = one.start < other.end and other.start < one.end
        return together and bool(set(one.uuids) & set(other.uuids))

    def leases_held(self):
        """Leases in all tables, as another launcher would see them."""
        from orchestrator.queue.leases import LeaseTables

        uuids = [path.name.removesuffix(".leases") for path in self.leases.glob("*.leases")]
        tables = LeaseTables(uuids, self.leases)
        try:
            return [entry for uuid in uuids for entry in tables.entries(uuid)]
        finally:
            tables.close()

    def claimants(self):
        """Launchers that wait for a GPU, and have said so."""
        return {entry.launcher for entry in self.leases_held() if entry.kind.name == "WAIT"}
