"""orchestrator-status stop of sweeps on this machine; on Slurm: tests/slurm/test_status.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from orchestrator.cli import stop as stop_module
from orchestrator.cli.status import main
from orchestrator.processes import boot_id, hostname
from orchestrator.record import RunRecord, RunState
from orchestrator.slurm.ledger import Job, Ledger, write_ledger
from orchestrator.store import RunDir

APP = """
import time
import hydra
from hydra.core.config_store import ConfigStore

ConfigStore.instance().store(name="config", node={"x": 0, "seconds": 0})


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    time.sleep(cfg.seconds)
    return cfg.x


if __name__ == "__main__":
    main()
"""
WORDS = (
    *("-m", "hydra/launcher=gpu_queue", "hydra/callbacks=results", "hydra/output=named"),
    *("hydra.launcher.gpus=[]", "hydra.launcher.max_processes=2", "hydra.launcher.kill_grace_s=2"),
)


def invoke(*arguments):
    return CliRunner().invoke(main, ["stop", *map(str, arguments)])


def said(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    return result.stderr


def make_sweep(root, name, **changes):
    """A sweep's directory, as if this very process were its launcher."""
    content = {
        "sweep_id": name,
        "host": hostname(),
        "boot_id": boot_id(),
        "pid": os.getpid(),
        "started_at": time.time(),
        "ended_at": None,
        **changes,
    }
    directory = root / ".sweeps" / name
    directory.mkdir(parents=True)
    (directory / "sweep.json").write_text(json.dumps(content))
    return directory


def wait_for(check, what, patience=60.0):
    deadline = time.monotonic() + patience
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path):
    """Starts a sweep in a directory of its own."""
    (tmp_path / "app.py").write_text(APP)
    started = []

    def begin(*words):
        command = [sys.executable, "app.py", *WORDS, *words]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **options)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def states(outputs):
    return [RunDir(p.parent).read().state for p in sorted(outputs.glob("*/run.json"))]


def test_a_sweep_on_this_machine_ends_as_by_ctrl_c(start, tmp_path):
    outputs = tmp_path / "outputs"
    process = start("x=0,1,2,3,4,5", "seconds=60")
    wait_for(lambda: states(outputs).count(RunState.RUNNING) == 2, "two runs going on")
    text = said(outputs)
    assert text.startswith("Sweep ")
    assert text.endswith(" has ended: 2 cancelled.\n")
    assert process.wait(10) == 128 + signal.SIGTERM
    assert states(outputs) == [RunState.CANCELLED] * 2
    assert said(outputs) == f"Nothing is left to stop below '{outputs}'.\n"


def test_of_two_sweeps_the_one_that_is_named_ends(start, tmp_path):
    sweeps = {}
    for name in ("a", "b"):
        outputs = tmp_path / "outputs" / name
        sweeps[name] = start("x=0", "seconds=60", f"hydra.sweep.dir={outputs}")
    for name in sweeps:
        wait_for(lambda n=name: states(tmp_path / "outputs" / n) == [RunState.RUNNING], name)
    assert "2 sweeps go on below" in refused(tmp_path / "outputs")
    (directory,) = (tmp_path / "outputs" / "b" / ".sweeps").iterdir()
    assert "1 cancelled" in said(tmp_path / "outputs", "--sweep", directory.name)
    sweeps["b"].wait(10)
    assert sweeps["a"].poll() is None
    assert states(tmp_path / "outputs" / "a") == [RunState.RUNNING]


@pytest.mark.parametrize(
    "changes",
    [
        {"ended_at": 5.0},
        {"boot_id": "an earlier one"},
        # The pid belongs to a process that is younger than the sweep.
        {"started_at": 1000.0},
        {"pid": -1},
    ],
)
def test_a_process_that_is_not_the_launcher_gets_no_signal(tmp_path, changes, monkeypatch):
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signalled"))
    make_sweep(tmp_path, "s1", **changes)
    assert said(tmp_path) == f"Nothing is left to stop below '{tmp_path}'.\n"
    assert said(tmp_path, "--sweep", "s1").startswith("Nothing is left")


def test_a_sweep_of_another_machine_is_said_and_not_guessed(tmp_path):
    make_sweep(tmp_path, "s1", host="elsewhere", pid=77)
    assert "sweep s1 on elsewhere as process 77. Type it there." in refused(tmp_path)


def test_another_users_launcher_is_a_sentence(tmp_path, monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    make_sweep(tmp_path, "s1")
    assert "is another user's" in refused(tmp_path)


def test_a_launcher_that_does_not_end_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(stop_module, "_LAUNCHER_S", 0.2)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        make_sweep(tmp_path, "s1")
        text = refused(tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "was asked to end and has not within 0.2 s" in text
    assert f"kill -TERM {os.getpid()}" in text


def test_what_is_not_there_is_a_sentence(tmp_path):
    assert "does not exist" in refused(tmp_path / "no")
    RunDir(tmp_path / "a").write(RunRecord(model_name="a", state=RunState.COMPLETED))
    assert said(tmp_path).startswith("Nothing is left to stop")
    make_sweep(tmp_path, "s1")
    assert "Sweep s2 does not go on below" in refused(tmp_path, "--sweep", "s2")


def leave_slurm_sweep(root, name="s0"):
    """A sweep that a cluster did, or does: its launcher ended, or was killed."""
    directory = make_sweep(root, name, pid=-1)
    record = {"model_name": "a", "sweep_id": name, "index": 0, "fingerprint": "a"}
    RunDir(root / "a").write(RunRecord(**record, state=RunState.PENDING))
    write_ledger(directory, Ledger(submitted_at=time.time(), jobs=(Job("7_0", (0,)),)))


def without_slurm(tmp_path, monkeypatch, how):
    """A machine without Slurm's tools, or with some that do not answer."""
    tools = tmp_path / "tools"
    tools.mkdir()
    if how == "away":
        for name in ("squeue", "scontrol", "sacct", "scancel"):
            (tools / name).write_text("#!/bin/sh\nexit 1\n")
            (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))


@pytest.mark.parametrize("how", ["none", "away"])
def test_a_sweep_of_this_machine_beside_one_on_slurm_ends_without_it(
    start, tmp_path, monkeypatch, how
):
    outputs = tmp_path / "outputs"
    process = start("x=0", "seconds=60")
    wait_for(lambda: states(outputs) == [RunState.RUNNING], "a run going on")
    leave_slurm_sweep(outputs)
    without_slurm(tmp_path, monkeypatch, how)
    text = said(outputs)
    assert text.endswith(" has ended: 1 cancelled.\n")
    assert process.wait(10) == 128 + signal.SIGTERM
    assert RunDir(outputs / "a").read().state is RunState.PENDING, "nobody knows about that one"


@pytest.mark.parametrize("how", ["none", "away"])
def test_a_sweep_on_slurm_alone_says_that_slurm_cannot_be_asked(tmp_path, monkeypatch, how):
    leave_slurm_sweep(tmp_path / "outputs")
    without_slurm(tmp_path, monkeypatch, how)
    text = refused(tmp_path / "outputs")
    assert "Slurm" in text
    assert "Nothing is left" not in text
    assert RunDir(tmp_path / "outputs" / "a").read().state is RunState.PENDING


def test_all_sweeps_of_this_machine_end(start, tmp_path):
    processes = []
    for name in ("a", "b"):
        outputs = tmp_path / "outputs" / name
        processes.append(start("x=0", "seconds=60", f"hydra.sweep.dir={outputs}"))
    for name in ("a", "b"):
        wait_for(lambda n=name: states(tmp_path / "outputs" / n) == [RunState.RUNNING], name)
    text = refused(tmp_path / "outputs")
    assert "--sweep ID" in text
    assert "--all" in text
    text = said(tmp_path / "outputs", "--all")
    assert text.count(" has ended: 1 cancelled.") == 2
    for process in processes:
        assert process.wait(10) == 128 + signal.SIGTERM
    assert said(tmp_path / "outputs", "--all").startswith("Nothing is left to stop")


def test_help_names_it():
    text = CliRunner().invoke(main, ["--help"]).stdout
    assert "stop" in text
    assert "--sweep ID" in CliRunner().invoke(main, ["stop", "--help"]).stdout
