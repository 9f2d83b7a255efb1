"""Real sweeps of a small app on the cluster of `cluster.py`, as a user types them.

What each run does stands in a file, not on the command line: so neither its name nor its
fingerprint tells, and a second command can be the very same. Runs wait for gates instead of
sleeping, and note their starts and ends in one file that they all append to.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

APP = """
import json
import os
import signal
import sys
import time
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore

import orchestrator
from beside import HOME  # a module beside the app

ConfigStore.instance().store(name="config", node={"x": 0, "n": 1, "text": "", "seed": 0})


def note(word, cfg):
    keys = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_CPUS_PER_TASK", "SLURM_RESTART_COUNT")
    told = {key: os.environ.get(key) for key in (*keys, "SLURMD_NODENAME")}
    line = json.dumps([word, cfg.x, time.time(), os.getpid(), told]) + "\\n"
    with (HOME / "notes").open("a") as file:
        file.write(line)


def behave(what, cfg):
    if what == "raise":
        raise ValueError("as asked")
    if what == "exit":
        os._exit(3)
    if what == "sys.exit":
        sys.exit("good bye")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if what.startswith("until "):  # another run's note
        while what.removeprefix("until ") not in (HOME / "notes").read_text():
            time.sleep(0.02)
    if what.startswith("sleep "):
        time.sleep(float(what.removeprefix("sleep ")))
    if what == "gate":
        end = time.monotonic() + 90
        while not ((HOME / "open").exists() or (HOME / f"open-{cfg.x}").exists()):
            assert time.monotonic() < end
            time.sleep(0.02)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    note("start", cfg)
    print("hello from", cfg.x, flush=True)
    orchestrator.log_metrics(0, loss=cfg.x / 2)
    plan = json.loads((HOME / "plan.json").read_text())
    for what in plan.get(str(cfg.x), plan.get("all", "")).split(", "):
        behave(what, cfg)
    note("end", cfg)
    told = {"score": cfg.x, "attempt": orchestrator.attempt(), "text": cfg.text}
    if "model" in cfg:
        told["width"] = cfg.model.width
    return told


if __name__ == "__main__":
    main()
"""
WORDS = (
    *("-m", "hydra/launcher=slurm", "hydra/sweeper=grid", "hydra/callbacks=results"),
    *("hydra/output=named", "hydra.launcher.timeout_min=5"),
)
LIMIT_S = 100.0
_PAUSE_S = 0.05


class Ended:
    """How a command ended: its status, all that it said, and how long it took."""

    def __init__(self, status, text, seconds):
        self.status = status
        self.text = text
        self.seconds = seconds

    def __repr__(self):
        return f"status {self.status} after {self.seconds:.1f} s\n{self.text}"


class Running:
    """A command that was started."""

    def __init__(self, words, *, cwd, env, log):
        self._log = log
        self._began = time.monotonic()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self):
        return self._log.read_text(errors="replace")

    @property
    def pid(self):
        return self._process.pid

    @property
    def is_going_on(self):
        return self._process.poll() is None

    def signal(self, number):
        self._process.send_signal(number)

    def wait(self, timeout=LIMIT_S):
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {timeout:g} s:\n{self.text}") from None
        return Ended(status, self.text, time.monotonic() - self._began)

    def says(self, *texts, timeout=30.0):
        """Waits until it has said all this."""

        def check():
            said = self.text
            if all(text in said for text in texts):
                return True
            assert self.is_going_on, f"it ended without {texts}:\n{said}"
            return False

        until(check, timeout, lambda: f"{texts} in:\n{self.text}")

    @property
    def array(self):
        """The array (or job) that it says it has submitted."""
        self.says("Submitted")
        line = next(line for line in self.text.splitlines() if line.startswith("Submitted"))
        return line.split()[-1].split("_")[0].rstrip(".")

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Sweeps:
    """Sweeps of the app in one directory."""

    def __init__(self, slurm, directory):
        self.slurm = slurm
        self.directory = directory
        self._started = []
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "app.py").write_text(APP)
        (directory / "beside.py").write_text(
            f"from pathlib import Path\nHOME = Path({str(directory)!r})\n"
        )
        (directory / "notes").touch()
        self.plan({})

    # The commands.

    def start(self, *words, app="app.py", base=WORDS, cwd=None):
        log = self.directory / f"log-{len(self._started)}"
        command = [*([app] if isinstance(app, str) else app), *base, *map(str, words)]
        running = Running(command, cwd=cwd or self.directory, env=self.slurm.env, log=log)
        self._started.append(running)
        return running

    def run(self, *words, timeout=LIMIT_S, **options):
        return self.start(*words, **options).wait(timeout)

    def end(self):
        for running in self._started:
            running.end()

    # What the runs do.

    def plan(self, what):
        """By `x`: words of the app's, one after the other."""
        plan = {str(x): words for x, words in what.items()}
        (self.directory / "plan.json").write_text(json.dumps(plan))

    def open(self, *which):
        """Gates: of these `x`, or all."""
        for x in which or ("",):
            (self.directory / (f"open-{x}" if which else "open")).touch()

    # What came of it.

    @property
    def outputs(self):
        return self.directory / "outputs"

    def records(self, outputs=None):
        """Records by `x`."""
        found = {}
        for path in sorted((outputs or self.outputs).glob("*/run.json")):
            record = json.loads(path.read_bytes())
            found[record["hyperparams"]["x"]] = record
        return found

    def states(self, outputs=None):
        return {x: record["state"] for x, record in self.records(outputs).items()}

    def directory_of(self, x):
        return next(p.parent for p in self.outputs.glob("*/run.json") if self._is(p, x))

    def _is(self, path, x):
        return json.loads(path.read_bytes())["hyperparams"]["x"] == x

    def notes(self, word=None):
        """What runs have noted: word, x, time, pid, Slurm's variables."""
        lines = (self.directory / "notes").read_text().splitlines()
        notes = [json.loads(line) for line in lines]
        return [note for note in notes if word in (None, note[0])]

    def started(self):
        """The `x` of all starts, a run that was started twice twice."""
        return sorted(note[1] for note in self.notes("start"))

    def until_started(self, *xs, timeout=30.0):
        until(lambda: set(xs) <= set(self.started()), timeout, lambda: f"starts of {xs}: {self}")

    def until_states(self, wanted, timeout=30.0):
        """Waits until these records say so (or one of a set); how long that took."""
        began = time.monotonic()

        def check():
            states = self.states()
            return all(
                states.get(x) in ({state} if isinstance(state, str) else state)
                for x, state in wanted.items()
            )

        until(check, timeout, lambda: f"{wanted}: {self}")
        return time.monotonic() - began

    def at_a_time(self):
        """The most runs that were going on at one moment."""
        changes = [(note[2], 1 if note[0] == "start" else -1) for note in self.notes()]
        most = now = 0
        for _, change in sorted(changes):
            now += change
            most = max(most, now)
        return most

    def job(self, x):
        """The job of a run, as squeue names it."""
        (ledger,) = self.outputs.glob(".sweeps/*/slurm.json")
        index = self.records()[x]["index"]
        jobs = json.loads(ledger.read_bytes())["jobs"]
        (found,) = [job["id"] for job in jobs if index in job["runs"]]
        return found

    def jobs(self):
        """The jobs of all sweeps, as squeue names them."""
        ledgers = sorted(self.outputs.glob(".sweeps/*/slurm.json"))
        return [job["id"] for path in ledgers for job in json.loads(path.read_bytes())["jobs"]]

    def sacct(self, *jobs):
        """Accounting's words of these jobs, once it has heard of the ends."""
        rows = self.slurm.wait(*(jobs or self.jobs()))
        return {row["JobID"]: row["State"].split()[0] for row in rows}

    def __repr__(self):
        logs = [running.text for running in self._started]
        return "\n".join([f"{self.states()}, started {self.started()}", *logs])


def until(check, timeout, what):
    end = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < end, f"waited {timeout:g} s for {what()}"
        time.sleep(_PAUSE_S)
