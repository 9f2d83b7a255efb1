"""``hydra/callbacks=results`` without a launcher of ours: single runs, Hydra's own launchers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter

import msgspec
import pytest

from orchestrator.callback import ResultsCallback
from orchestrator.processes import boot_id, hostname
from orchestrator.record import RunState
from orchestrator.store import RunDir, RunLock, find_runs

APP = """
import os, sys
import hydra
from hydra.core.config_store import ConfigStore
from orchestrator.run import log_metrics

config = {"x": 0, "fails": False, "resume": None, "cluster": None}
ConfigStore.instance().store(name="config", node=config)

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    log_metrics(0, loss=cfg.x / 2)
    if cfg.fails and not os.path.exists("mended"):
        raise ValueError("not mended")
    with open("ledger", "a") as file:
        file.write(f"{os.path.basename(sys.argv[0])} {cfg.x}\\n")
    return {"score": cfg.x}

if __name__ == "__main__":
    main()
"""
NAMED = ("hydra/callbacks=results", "hydra/output=named")
QUEUE = ("-m", "hydra/launcher=gpu_queue", "hydra.launcher.gpus=[]", *NAMED)


class Place:
    """A directory with an app in it."""

    def __init__(self, directory):
        self.directory = directory
        self.outputs = directory / "outputs"
        self.add("app.py")

    def add(self, name):
        (self.directory / name).write_text(APP)

    def run(self, *words, app="app.py", expect=0):
        """What an app printed."""
        done = subprocess.run(
            [sys.executable, app, *words],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == expect, done.stdout
        return done.stdout

    def names(self):
        return [run.path.name for run in find_runs(self.outputs)]

    def ledger(self):
        return Counter((self.directory / "ledger").read_text().splitlines())

    def sweep_files(self):
        (directory,) = (self.outputs / ".sweeps").iterdir()
        return {path.name: json.loads(path.read_bytes()) for path in directory.iterdir()}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


# --- single runs ---


def test_the_same_single_run_three_times_has_one_directory(place):
    for _ in range(3):
        place.run(*NAMED, "x=5")
    assert place.names() == ["x_5"]
    run = RunDir(place.outputs / "x_5")
    record = run.read()
    assert record.state is RunState.COMPLETED
    assert [attempt.state for attempt in record.attempts] == [RunState.COMPLETED] * 2
    assert len({attempt.started_at for attempt in record.attempts}) == 2
    for part in (run, RunDir(run.attempts / "1"), RunDir(run.attempts / "2")):
        assert part.metrics.read_text().count("\n") == 1
        assert part.read().metrics == {"loss": 2.5, "score": 5}
    assert os.listdir(place.outputs) == ["x_5"]


def test_a_failed_single_run_is_finished_by_a_sweep_in_its_place(place):
    place.run(*NAMED, "fails=true", expect=1)
    run = RunDir(place.outputs / "fails_true")
    assert run.read().error.message == "not mended"
    (run.path / "checkpoint").write_text("weights")
    (place.directory / "mended").touch()
    text = place.run(*QUEUE, "fails=true")
    assert "done already" not in text
    assert place.names() == ["fails_true"]
    record = run.read()
    assert record.state is RunState.COMPLETED
    assert [attempt.state for attempt in record.attempts] == [RunState.FAILED]
    assert (run.path / "checkpoint").exists()
    assert "1 of 1 done already" in place.run(*QUEUE, "fails=true")


def test_an_attempt_that_never_said_how_it_ended_was_lost(place):
    place.run(*NAMED, "x=1")
    run = RunDir(place.outputs / "x_1")
    done = run.read()
    run.write(msgspec.structs.replace(done, state=RunState.RUNNING, success=False, ended_at=None))
    place.run(*NAMED, "x=1")
    (attempt,) = run.read().attempts
    assert attempt.state is RunState.LOST
    assert attempt.started_at == done.started_at


def test_a_directory_that_somebody_works_in_is_left_alone(place):
    place.run(*NAMED, "x=1")
    run = RunDir(place.outputs / "x_1")
    run.metrics.write_text('{"step": 0, "timestamp": 1, "loss": 7}\n')
    here = {"host": hostname(), "boot_id": boot_id(), "pid": os.getpid(), "ended_at": None}
    run.write(msgspec.structs.replace(run.read(), state=RunState.RUNNING, **here))
    before = {path: path.read_bytes() for path in (run.record, run.metrics, run.claim)}
    lock = RunLock.acquire(run)
    try:
        text = place.run(*NAMED, "x=1")
    finally:
        lock.release()
    assert "is being worked in by another process: this run is not recorded" in text
    assert {path: path.read_bytes() for path in before} == before
    (aside,) = run.attempts.iterdir()
    assert str(aside) in text
    assert '"loss":0.5' in RunDir(aside).metrics.read_text()
    assert place.names() == ["x_1"]
    assert place.ledger() == {"app.py 1": 2}


# --- sweeps under Hydra's own launcher ---


def test_a_sweep_with_a_failing_job_leaves_its_files(place):
    began = time.time()
    place.run("-m", *NAMED, "fails=false,true", "x=3", expect=1)
    files = place.sweep_files()
    assert sorted(files) == ["sweep.json", "train_sweep_results.json"]
    sweep = files["sweep.json"]
    assert sweep["states"] == {"COMPLETED": 1, "FAILED": 1}
    assert sweep["runs"] == ["fails_false_x_3", "fails_true_x_3"]
    assert sweep["total"] == 2
    assert sweep["overrides"] == ["fails=false,true", "x=3"]
    assert began <= sweep["started_at"] <= sweep["ended_at"]
    good, bad = files["train_sweep_results.json"]
    assert (good["success"], good["metrics"]) == (True, {"loss": 1.5, "score": 3})
    assert (bad["state"], bad["error"]["message"]) == ("FAILED", "not mended")
    for run in find_runs(place.outputs):
        assert run.read().sweep_id == sweep["sweep_id"]


def test_a_sweep_that_ends_well_writes_its_results_where_it_was_asked_to(place):
    place.run("-m", *NAMED, "x=1,2", "hydra.callbacks.results.results_file=mine.json")
    files = place.sweep_files()
    assert files["sweep.json"]["states"] == {"COMPLETED": 2}
    mine = json.loads((place.directory / "mine.json").read_bytes())
    assert mine == files["train_sweep_results.json"]
    assert [entry["hyperparams"] for entry in mine] == [{"x": 1}, {"x": 2}]


# --- what makes two runs the same ---


def test_two_apps_with_one_config_do_not_answer_each_other(place):
    apps = ("train_a.py", "train_b.py")
    for app in apps:
        place.add(app)
        assert "done already" not in place.run(*QUEUE, "x=1,2", app=app)
    assert place.ledger() == {f"{app} {x}": 1 for app in apps for x in (1, 2)}
    names = place.names()
    assert len(names) == 4
    assert {"x_1", "x_2"} < set(names)
    assert "2 of 2 done already" in place.run(*QUEUE, "x=1,2", app="train_b.py")
    place.run(*NAMED, "x=1", app="train_b.py")
    assert place.names() == names
    assert not RunDir(place.outputs / "x_1").read().attempts


def test_an_apps_own_keys_count_whatever_their_names(place):
    words = ("resume=first.ckpt,second.ckpt", "cluster=2,3")
    assert "done already" not in place.run(*QUEUE, *words)
    records = [run.read() for run in find_runs(place.outputs)]
    assert len({record.fingerprint for record in records}) == 4
    assert {record.hyperparams["cluster"] for record in records} == {2, 3}
    assert place.ledger() == {"app.py 0": 4}
    text = place.run(*QUEUE, "resume=first.ckpt", "cluster=3")
    assert "1 of 1 done already" in text
    # `resume=false` would set the app's own key.
    assert "run again with hydra.callbacks.results.resume=false" in text


# --- the callback itself ---


def test_a_callback_reaches_a_worker_without_the_run_of_its_launcher():
    callback = ResultsCallback(seed_key="model.seed", ignore=["cluster"])
    callback._record = object()
    callback._sweep = lambda: None  # cannot be pickled
    copy = pickle.loads(pickle.dumps(callback))
    assert copy._settings.seed_key == "model.seed"
    assert copy._settings.ignore == ["cluster"]
    assert (copy._record, copy._lock, copy._sweep) == (None, None, None)
