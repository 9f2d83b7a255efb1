"""The commands of a batch script, by a real bash: signals and exit statuses, without Slurm."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from orchestrator.slurm.batch import IGNORE_WARNING, batch_command

STRICT = "set -euo pipefail"
# A job's first process: it notes its signals, and ends when it is told to.
FIRST = """
import os, signal, sys, time

home = os.path.dirname(os.path.abspath(__file__))


def note(text):
    with open(os.path.join(home, "notes"), "a") as file:
        file.write(text + "\\n")


def told(number, frame):
    note(signal.Signals(number).name)


def last_words(number, frame):
    note("SIGTERM")
    time.sleep(0.3)
    note("last words")
    sys.exit(3)


if os.environ.get("HEEDS", "1") == "1":
    signal.signal(signal.SIGUSR2, told)
    signal.signal(signal.SIGTERM, last_words)
note("began " + " ".join(sys.argv[1:]))
end = time.monotonic() + 20
while time.monotonic() < end:
    time.sleep(0.01)
    try:
        status = open(os.path.join(home, "status")).read()
    except OSError:
        continue
    if status:
        note("ends")
        if int(status) < 0:
            os.kill(os.getpid(), -int(status))
        sys.exit(int(status))
"""
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


class Script:
    """A job's batch script, run by bash in a session of its own as slurmstepd does."""

    def __init__(self, home):
        self.home = home
        (home / "first.py").write_text(FIRST)
        self.python = shlex.join([sys.executable, "-S", str(home / "first.py")])
        self._process = None

    def start(self, teardown=(), setup=(), srun=(), *, heeds=True):
        command = batch_command(self.python, str(self.home / "a b"), srun, teardown)
        path = self.home / "script.sh"
        path.write_text("\n".join(["#!/bin/bash", IGNORE_WARNING, *setup, command, ""]))
        self._process = subprocess.Popen(
            ["bash", str(path)],
            cwd=self.home,
            env={**os.environ, "HEEDS": str(int(heeds))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @property
    def notes(self):
        path = self.home / "notes"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def pid(self):
        return self._process.pid

    @property
    def is_going_on(self):
        return self._process.poll() is None

    def until(self, note):
        end = time.monotonic() + 20
        while not any(line.startswith(note) for line in self.notes):
            assert time.monotonic() < end, f"{note} in {self.notes}"
            assert self.is_going_on, self._process.communicate()
            time.sleep(0.01)

    def warn(self):
        """Slurm's warning: only the shell gets it."""
        os.kill(self.pid, signal.SIGUSR2)

    def cancel(self):
        """What ends the job: all of its processes get it."""
        os.killpg(self.pid, signal.SIGTERM)

    def let_end(self, status):
        new = self.home / "new"
        new.write_text(str(status))
        new.replace(self.home / "status")

    def wait(self):
        """Its exit status, and what it has said."""
        said, _ = self._process.communicate(timeout=20)
        return self._process.returncode, said

    def end(self):
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.communicate()


@pytest.fixture
def script(tmp_path):
    made = Script(tmp_path)
    yield made
    made.end()


@pytest.mark.parametrize("setup", [(), (STRICT,)], ids=["plain", "strict"])
@pytest.mark.parametrize("teardown", [(), ("echo bye",)], ids=["alone", "teardown"])
@pytest.mark.parametrize("status", [0, 3, 140, -signal.SIGKILL])
def test_the_exit_status_is_that_of_the_first_process(script, setup, teardown, status):
    script.let_end(status)
    script.start(teardown, setup)
    found, said = script.wait()
    assert script.notes[0] == f"began -u -m orchestrator.slurm.start {script.home / 'a b'}"
    # A shell says 128 more than the signal's number where the process was its child.
    assert found == (status if status >= 0 or not teardown else 128 - status)
    assert said.endswith("bye\n" if teardown else ""), said


def test_srun_starts_it_where_it_is_wanted(script):
    """Stands in for srun: whatever the words are, the command follows them."""
    script.let_end(5)
    script.start(srun=["env", "A=it's", "B=$(touch pwned)"])
    assert script.wait()[0] == 5
    assert script.notes[0].startswith("began ")
    assert not (script.home / "pwned").exists()


@pytest.mark.parametrize("setup", [(), (STRICT,)], ids=["plain", "strict"])
def test_lines_after_the_runs_do_not_hide_their_status(script, setup):
    script.let_end(4)
    script.start(["false", "echo $status", "(exit 9)"], setup)
    assert script.wait() == (4, "4\n")


@pytest.mark.parametrize("setup", [(), (STRICT,)], ids=["plain", "strict"])
def test_the_warning_is_handed_on_and_the_shell_waits_on(script, setup):
    """Several times, too: a second one may come while the first is being heeded."""
    script.start(["echo bye"], setup)
    script.until("began")
    for times in (1, 2, 3):
        script.warn()
        end = time.monotonic() + 20
        while script.notes.count("SIGUSR2") < times:
            assert time.monotonic() < end, script.notes
            time.sleep(0.01)
        assert script.is_going_on
    script.let_end(7)
    assert script.wait() == (7, "bye\n")
    assert script.notes[-1] == "ends"


def test_without_other_lines_the_process_takes_the_shells_place(script):
    script.start()
    script.until("began")
    script.warn()
    script.until("SIGUSR2")
    os.kill(script.pid, signal.SIGTERM)
    assert script.wait()[0] == 3
    assert script.notes[-1] == "last words"


@pytest.mark.parametrize("setup", [(), (STRICT,)], ids=["plain", "strict"])
@pytest.mark.parametrize("warned", [False, True])
def test_the_end_of_a_job_waits_for_last_words_and_does_the_teardown(script, setup, warned):
    script.start(["echo bye"], setup)
    script.until("began")
    if warned:
        script.warn()
        script.until("SIGUSR2")
    script.cancel()
    assert script.wait() == (3, "bye\n")
    assert script.notes[-1] == "last words"


@pytest.mark.parametrize("setup", [(), (STRICT,)], ids=["plain", "strict"])
def test_a_process_that_the_signal_ends_is_cleaned_up_after(script, setup):
    script.start(["echo bye"], setup, heeds=False)
    script.until("began")
    script.cancel()
    status, said = script.wait()
    assert status == 128 + signal.SIGTERM
    assert said.endswith("bye\n")


@pytest.mark.parametrize("teardown", [(), ("echo bye",)], ids=["alone", "teardown"])
@pytest.mark.parametrize("setup", [(), (STRICT,)], ids=["plain", "strict"])
def test_a_warning_before_anybody_listens_kills_nobody(script, setup, teardown):
    """It may come in the user's own lines, and before the process has said what it does with it."""
    lines = (*setup, "echo >> notes", "until [ -e go ]; do sleep 0.02; done")
    script.start(teardown, lines, heeds=False)
    script.until("")
    script.warn()
    time.sleep(0.05)
    (script.home / "go").touch()
    script.until("began")
    script.warn()
    time.sleep(0.05)
    assert script.is_going_on
    script.let_end(0)
    assert script.wait()[0] == 0


@pytest.mark.parametrize("setup", [(), (STRICT,)], ids=["plain", "strict"])
def test_a_warning_when_the_process_is_gone_ends_no_teardown(script, setup):
    script.let_end(6)
    script.start(
        ["echo tidying >> notes", "until [ -e go ]; do sleep 0.02; done", "echo bye"], setup
    )
    script.until("tidying")
    script.warn()
    time.sleep(0.05)
    (script.home / "go").touch()
    assert script.wait() == (6, "bye\n")
