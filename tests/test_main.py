"""``python -m orchestrator``: mistakes on its command line, and Ctrl+C before it sweeps."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

TRAIN = """
import orchestrator

def train(cfg):
    return {"accuracy": cfg.training.lr}

def train_late(cfg):
    raise ValueError("no:\\n  the reason")
"""


@pytest.fixture
def shell(tmp_path):
    """Run the app in a directory with a project in it."""
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project" / "train.py").write_text(TRAIN)

    def run(*words, expect=0, module="orchestrator"):
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    run.directory = tmp_path
    return run


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["task._target_=my_project.train.trian", "seed=range(6)"],
            (
                "task._target_=my_project.train.trian: my_project.train has no 'trian'. "
                "Did you mean my_project.train.train?\n"
            ),
        ),
        (["task._target_="], "The config has no task._target_. "),
        (["resume=maybe"], "resume is 'maybe'; expected true, false or null\n"),
        (["results_file=[a]"], "results_file is ['a']; expected a path or null\n"),
    ],
)
def test_a_mistake_is_one_sentence_before_the_first_job(shell, words, text):
    done = shell(*words, expect=1)
    assert done.stderr.startswith(text)
    assert done.stderr.count("\n") == 1
    assert not list((shell.directory / "outputs").glob("*seed*"))


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("training.epoch=1", "Did you mean training.epochs?"),
        ("training.epoch=1,2", "Did you mean training.epochs?"),
        ("hydra.launcher.max_proceses=1", "Did you mean hydra.launcher.max_processes?"),
        ("epochs=1", "Did you mean training.epochs?"),
    ],
)
def test_a_mistyped_key_gets_the_nearest(shell, word, hint):
    lines = shell(word, expect=1).stderr.splitlines()
    assert lines.count(hint) == 1


def test_a_task_that_is_not_to_be_preloaded_is_left_to_its_jobs(shell):
    words = ["task._target_=my_project.train.trian", "hydra.launcher.preload=[]"]
    done = shell(*words, expect=1)
    assert "FAILED trian: OrchestratorError: task._target_=my_project.train.trian: " in done.stdout
    assert "1 of 1 run failed" in done.stderr


def test_a_task_swept_over_is_left_to_its_jobs(shell):
    tasks = "task._target_=my_project.train.train,my_project.train.train_late"
    done = shell("-m", tasks, "training.lr=0.1", expect=1)
    assert "FAILED train_late_lr_0.1: ValueError: no: the reason (see " in done.stdout
    assert "1 of 2 runs failed" in done.stderr
    assert done.stderr.rstrip().endswith("Run the same command again to run only what is missing.")
    assert "HYDRA_FULL_ERROR" not in done.stderr
    assert (shell.directory / "outputs" / "train_lr_0.1" / "run.json").exists()


def test_a_point_that_no_directory_can_hold_is_not_said_to_be_missing(shell):
    (shell.directory / "outputs").mkdir()
    (shell.directory / "outputs" / "train_lr_0.1").touch()
    words = ["task._target_=my_project.train.train", "training.lr=0.1"]
    done = shell(*words, expect=1)
    assert "Run the same command again" not in done.stderr


def test_one_run_in_this_process_for_a_debugger(shell):
    words = ["task._target_=my_project.train.train", "hydra/launcher=basic", "training.lr=0.1"]
    shell(*words)
    record = json.loads((shell.directory / "outputs/train_lr_0.1/run.json").read_text())
    assert record["state"] == "COMPLETED"
    assert record["cwd"] == str(shell.directory)


INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == MODULE:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from orchestrator.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["hydra", "orchestrator.sweep.grid", "orchestrator.queue.plan"])
def test_ctrl_c_while_it_starts_is_quiet(tmp_path, module):
    code = INTERRUPTED.replace("MODULE", repr(module))
    done = subprocess.run(
        [sys.executable, "-c", code, "training.epochs=100000"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_in_a_task_that_runs_in_this_process_has_its_traceback(shell):
    (shell.directory / "stops.py").write_text("def train(cfg): raise KeyboardInterrupt\n")
    done = shell("task._target_=stops.train", "hydra/launcher=basic", expect=-signal.SIGINT)
    assert 'stops.py", line 1, in train' in done.stderr
    (record,) = (shell.directory / "outputs").glob("*/run.json")
    assert json.loads(record.read_text())["state"] == "CANCELLED"
