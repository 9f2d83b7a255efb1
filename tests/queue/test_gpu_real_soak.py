"""Three real sweeps at once on eight stubbed GPUs, with pauses and a kill, watched from outside.

SOAK_JOBS says how many jobs there are in all.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GB = 10**9
TOTAL = 80 * GB
UUIDS = [f"GPU-{letter * 4}-{n}" for n, letter in enumerate("abcdefgh")]
# By the name of a sweep: its limit, and the sizes of its jobs in GB.
SWEEPS = {
    "one": (1, (5, 30, 70)),
    "two": (2, (5, 20, 39)),
    "four": (4, (3, 10, 19, 45)),
}
# What was running when its launcher was killed lives at most so much longer.
KILL_S = 5.0
# Reads NVML as anybody could, and writes down what there is: "time {uuid: [used, pids]}".
SAMPLER = """
import json, sys, time
import pynvml
pynvml.nvmlInit()
uuids, path = sys.argv[2:], sys.argv[1]
handles = [(uuid, pynvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids]
with open(path, "w", buffering=1) as file:
    while True:
        began = time.monotonic()
        seen = {}
        for uuid, handle in handles:
            pids = [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
            used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
            if pids or used:
                seen[uuid] = [used, pids]
        file.write(json.dumps([began, seen]) + chr(10))
        time.sleep(max(0.0, began + 0.02 - time.monotonic()))
"""


@dataclass
class Live:
    """A sweep, and the words that start it again."""

    name: str
    words: tuple[str, ...]
    run: object


class Soak:
    def __init__(self, gpus, jobs, chance):
        self.gpus, self.chance = gpus, chance
        self.each = max(jobs // len(SWEEPS), 10)
        self.orders = Counter()
        self.live = {name: self._begin(name, *SWEEPS[name]) for name in SWEEPS}

    def _begin(self, name, limit, sizes):
        chance = self.chance
        # (Short lists: Hydra parses all of them for each run. Their lengths share no factor.)
        values = {
            "of": [chance.choice(sizes) for _ in range(13)],
            "for_seconds": [round(chance.uniform(0.1, 0.6), 2) for _ in range(11)],
            "+delays": chance.sample([0, 0, 0, 0.05, 0.1, 0.2, 0.3], 7),
            "+lingers": chance.sample([0, 0, 0, 0.2, 0.8], 5),
        }
        words = (
            f"x=range({self.each})",
            *(f"{key}={json.dumps(value).replace(' ', '')}" for key, value in values.items()),
            "gb=${mine}",
            "seconds=${my_seconds}",
            'delay="${at:${delays},${x}}"',
            'linger="${at:${lingers},${x}}"',
            "hydra.launcher.memory_per_job_gb=${mine}",
            f"hydra.launcher.max_processes_per_gpu={limit}",
        )
        return Live(name, words, self._start(name, words))

    def _start(self, name, words):
        return self.gpus.start(*words, name=name, constants={"line._CLAIM_S": 1.0})

    def hear(self):
        """Wait until all sweeps can be given orders."""
        for live in self.live.values():
            run = live.run
            self.gpus.until(
                lambda run=run: "runs, outputs in" in run.text, lambda run=run: run.text
            )

    def ended(self, name):
        return self.live[name].run.process.poll() is not None

    def done(self):
        return sum(event["event"] == "end" for event in self.gpus.events())

    def order(self, name, *words):
        """An order, typed; it may come too late for a sweep that is about to end."""
        directory = self.gpus.sandbox.directory / f"outputs-{name}"
        command = [sys.executable, "-m", "orchestrator.cli.status", *words, str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or self.live[name].run.wait() == 0, done.stderr
        self.orders[words[0]] += done.returncode == 0

    def disturb(self):
        """Pause a sweep, or one GPU for it, for a moment."""
        names = [name for name in self.live if not self.ended(name)]
        if not names:
            return
        name = self.chance.choice(names)
        gpu = (
            ("--gpu", str(self.chance.randrange(len(UUIDS)))) if self.chance.random() < 0.5 else ()
        )
        self.order(name, "pause", *gpu)
        time.sleep(self.chance.uniform(0.0, 1.5))
        self.order(name, "resume", *gpu)

    def kill(self, name):
        """Kill a launcher while its jobs run, and type its command again; when that was."""
        live, gpus = self.live[name], self.gpus
        gpus.until(lambda: [s for s in gpus.running() if s.sweep == name], lambda: live.run.text)
        live.run.signal(signal.SIGKILL)
        at = time.monotonic()
        assert live.run.wait() == 128 + signal.SIGKILL
        live.run = self._start(name, live.words)
        self.hear()
        return at

    def wait(self, patience):
        """Disturb until all have ended."""
        deadline = time.monotonic() + patience
        while not all(map(self.ended, self.live)):
            texts = "\n".join(live.run.text[-2000:] for live in self.live.values())
            assert time.monotonic() < deadline, texts
            self.disturb()
            time.sleep(self.chance.uniform(0.0, 2.0))
        for live in self.live.values():
            self.gpus.end(live.run)


@contextlib.contextmanager
def sampler(gpus):
    """Somebody who looks at the GPUs all the time; where it writes."""
    path = gpus.sandbox.state / "samples"
    env = {**os.environ, **gpus.nvml.env}
    words = [sys.executable, "-c", SAMPLER, str(path), *UUIDS]
    with subprocess.Popen(words, env=env) as process:
        try:
            yield path
            assert process.poll() is None
        finally:
            process.kill()


@pytest.fixture
def endless_lists(gpu_sweeps_module, monkeypatch, tmp_path):
    """An app whose values of each x begin again after the last."""
    source = (Path(__file__).parent / "apps" / "gpu_app.py").read_text()
    assert "values[x]" in source
    app = tmp_path / "gpu_app.py"
    app.write_text(source.replace("values[x]", "values[x % len(values)]"))
    monkeypatch.setattr(gpu_sweeps_module, "APP", str(app))


@pytest.mark.usefixtures("endless_lists")
def test_three_sweeps_with_pauses_and_a_kill(gpus):
    jobs = int(os.environ.get("SOAK_JOBS", "450"))
    chance = random.Random(jobs)
    gpus.nvml.gpus(UUIDS)
    began = time.monotonic()
    with sampler(gpus) as samples:
        soak = Soak(gpus, jobs, chance)
        soak.hear()
        victim = chance.choice(list(SWEEPS))
        while soak.done() < soak.each // 2:
            soak.disturb()
        assert not soak.ended(victim)
        killed_at = soak.kill(victim)
        soak.wait(patience=60 + 2.0 * jobs)
        took = time.monotonic() - began
    gpus.sandbox.nobody_left()
    assert not gpus.leases_held()
    spans = gpus.spans()
    cut = ran_once(gpus, soak, spans, victim, killed_at)
    most = limits_were_kept(spans, victim, killed_at)
    number, highest = never_over_full(samples, spans)
    first_s = another_starts_at_once(gpus)
    print(
        f"{3 * soak.each} jobs in {took:.0f} s ({sum(s.end - s.start for s in spans):.0f} s of "
        f"work in jobs), orders {dict(soak.orders)}, {victim} killed with {cut} jobs; at most "
        f"{most} jobs and {highest / GB:.0f} GB on a GPU in {number} samples; the next sweep had "
        f"all GPUs in {first_s:.1f} s"
    )


def ran_once(gpus, soak, spans, victim, killed_at):
    """Every run completed, and once; how many were cut by the kill."""
    starts = Counter((span.sweep, span.name) for span in spans)
    ends = Counter((span.sweep, span.name) for span in spans if span.end < float("inf"))
    cut = [s for s in spans if s.sweep == victim and s.start < killed_at < s.end]
    again = {(span.sweep, span.name) for span in cut}
    for name in SWEEPS:
        records = gpus.records(gpus.sandbox.directory / f"outputs-{name}")
        assert Counter(record.state.value for record in records.values()) == {
            "COMPLETED": soak.each
        }
        assert records.keys() == set(range(soak.each))
        for x, record in records.items():
            run = (name, str(x))
            assert starts[run] == 1 or (run in again and starts[run] == 2), run
            # (A job may have done its work, and have been killed before that was written down.)
            assert ends[run] == 1 or (run in again and ends[run] == starts[run]), run
            # (And one may have been killed before it could say that it began.)
            assert starts[run] - 1 <= len(record.attempts) <= (name == victim), run
    return len(cut)


def limits_were_kept(spans, victim, killed_at):
    """By what the jobs say: never more on a GPU than any of those there accepts."""
    for span in spans:
        if span.end == float("inf"):  # it could not say when it ended
            assert span.sweep == victim
            assert span.start < killed_at + KILL_S
            span.end = max(span.start, killed_at)
    changes = sorted(
        (at, change, span.uuids[0], span.sweep)
        for span in spans
        for at, change in ((span.start, 1), (span.end, -1))
    )
    now, most = defaultdict(Counter), 0
    for _, change, uuid, sweep in changes:
        now[uuid][sweep] += change
        here = +now[uuid]
        limit = min((SWEEPS[name][0] for name in here), default=4)
        assert here.total() <= limit, (uuid, here)
        most = max(most, here.total())
    return most


def never_over_full(samples, spans):
    """By what NVML shows: memory and jobs of each GPU; how many samples, the most memory."""
    of_pid = {span.pid: span.sweep for span in spans}
    number, highest = 0, 0
    for line in samples.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):  # the last word of somebody who was killed
            continue
        number += 1
        for uuid, (used, pids) in json.loads(line)[1].items():
            assert used <= TOTAL, (uuid, used)
            highest = max(highest, used)
            limits = [SWEEPS[of_pid[pid]][0] for pid in pids]
            assert len(pids) <= min(limits, default=4), (uuid, pids)
    assert number > 100
    return number, highest


def another_starts_at_once(gpus):
    """A sweep after all others has every GPU to itself; seconds until it had."""
    began = time.monotonic()
    sweep = gpus.start("x=range(8)", "gate=true", name="next")
    gpus.until(lambda: len(gpus.spans("next")) == len(UUIDS), lambda: sweep.text)
    took = time.monotonic() - began
    assert took < 20
    assert {span.uuids[0] for span in gpus.spans("next")} == set(UUIDS)
    gpus.sandbox.open_gate()
    gpus.end(sweep)
    gpus.sandbox.nobody_left()
    assert not gpus.leases_held()
    return took
