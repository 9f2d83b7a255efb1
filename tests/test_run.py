"""What a task may ask and tell while it runs."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import orchestrator
from orchestrator import run
from orchestrator.errors import OrchestratorError


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_package_offers_the_calls_lazily():
    assert orchestrator.log_metrics is run.log_metrics
    assert set(dir(orchestrator)) >= {"log_metrics", "save_arrays", "run_dir", "run_in"}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = orchestrator.nonsense
    code = "import sys, orchestrator; print(len([m for m in sys.modules if m.startswith('orch')]))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "1"


@pytest.mark.parametrize(
    "call",
    [run.run_dir, run.attempt, lambda: run.log_metrics(1, a=1), lambda: run.save_arrays(a=[1])],
)
def test_outside_a_run_the_error_says_what_to_do(call):
    with pytest.raises(OrchestratorError, match="run_in"):
        call()


def test_the_directory_is_absolute_and_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run.run_in("a/b") as active:
        assert run.run_dir() == tmp_path / "a" / "b"
        assert run.run_dir().is_dir()
        assert run.active() is active
    assert run.active() is None


def test_a_run_ends_also_by_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), run.run_in(tmp_path):
        raise KeyboardInterrupt
    assert run.active() is None


def test_each_step_is_a_line_and_the_last_values_are_kept(tmp_path):
    with run.run_in(tmp_path) as active:
        run.log_metrics(1, loss=1.0, acc=np.float32(0.5))
        run.log_metrics(np.int64(2), loss=math.nan)
        assert active.metrics["acc"] == 0.5
        assert math.isnan(active.metrics["loss"])
    first, second = _lines(tmp_path / "metrics.jsonl")
    assert {"step": 1, "loss": 1.0, "acc": 0.5}.items() <= first.items()
    assert first["timestamp"] > 1e9
    assert {"step": 2, "loss": "NaN"}.items() <= second.items()


def test_a_later_run_in_the_same_directory_continues_the_curve(tmp_path):
    for step in range(2):
        with run.run_in(tmp_path):
            run.log_metrics(step, a=step)
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == [0, 1]


@pytest.mark.parametrize("value", [None, "text", [1.0], np.zeros(2), 1j, object(), {}])
def test_a_value_that_is_no_number_is_named_and_writes_nothing(tmp_path, value):
    with run.run_in(tmp_path), pytest.raises(OrchestratorError, match=r"log_metrics\(speed="):
        run.log_metrics(1, good=1.0, speed=value)
    assert not (tmp_path / "metrics.jsonl").exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.floats(), max_size=4))
def test_any_numbers_give_strict_json(tmp_path, values):
    values.pop("step", None)

    def refuse(word):
        pytest.fail(f"{word} is not JSON")

    with run.run_in(tmp_path):
        run.log_metrics(1, **values)
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    line = json.loads(last, parse_constant=refuse)
    assert line.keys() == {"step", "timestamp", *values}
    assert all(
        float(line[name]) == value or math.isnan(value)
        for name, value in values.items()
        if name != "timestamp"
    )


def test_a_killed_process_keeps_every_step_it_logged(tmp_path):
    code = (
        "import os, signal, sys, orchestrator\n"
        "with orchestrator.run_in(sys.argv[1]):\n"
        "    for step in range(50): orchestrator.log_metrics(step, a=step)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == list(range(50))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with run.run_in(tmp_path), pytest.raises(OSError, match="No space left"):
        run.log_metrics(1, a=1.0)


def test_arrays_are_added_and_replaced_by_name(tmp_path):
    with run.run_in(tmp_path):
        run.save_arrays(a=[1, 2], b=np.eye(2), name="text")
        run.save_arrays(a=3.0, c=[])
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["a", "b", "c", "name"]
        assert arrays["a"] == 3.0
        assert arrays["b"].tolist() == [[1, 0], [0, 1]]
        assert arrays["c"].shape == (0,)
        assert arrays["name"] == "text"


def test_objects_are_refused_and_the_arrays_before_are_intact(tmp_path):
    with run.run_in(tmp_path):
        run.save_arrays(a=[1])
        with pytest.raises(OrchestratorError, match=r"save_arrays\(bad="):
            run.save_arrays(a=[2], bad=[object()])
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as arrays:
        assert arrays["a"].tolist() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["arrays.npz"]


@pytest.mark.parametrize("name", ["file", "allow_pickle"])
def test_a_name_that_numpy_keeps_to_itself_is_a_sentence(tmp_path, name):
    with run.run_in(tmp_path), pytest.raises(OrchestratorError, match=name):
        run.save_arrays(**{name: [1]})
    assert not (tmp_path / "arrays.npz").exists()


def test_a_ragged_list_is_a_sentence(tmp_path):
    with run.run_in(tmp_path), pytest.raises(OrchestratorError, match=r"save_arrays\(a="):
        run.save_arrays(a=[[1], [1, 2]])


def test_a_number_as_text_is_not_a_number(tmp_path):
    with run.run_in(tmp_path), pytest.raises(OrchestratorError):
        run.log_metrics(1, a="1.5")


@pytest.mark.parametrize(("step", "value"), [(1, 10**400), (object(), 1.0)], ids=["value", "step"])
def test_numbers_out_of_range_and_odd_steps_are_sentences(tmp_path, step, value):
    with run.run_in(tmp_path), pytest.raises(OrchestratorError):
        run.log_metrics(step, a=value)


def test_a_metric_named_timestamp_does_not_replace_the_time(tmp_path):
    with run.run_in(tmp_path), pytest.raises(OrchestratorError, match="timestamp"):
        run.log_metrics(1, timestamp=3.0)


def test_the_outer_run_goes_on_after_an_inner_one(tmp_path):
    with run.run_in(tmp_path / "outer"):
        with run.run_in(tmp_path / "inner"):
            pass
        assert run.run_dir() == tmp_path / "outer"


# --- attempts, and states that are saved, without Slurm ---

GOES_ON = """
import hydra
import orchestrator


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    number = orchestrator.attempt()
    assert not orchestrator.is_preempted()
    saved = orchestrator.run_dir() / "saved"
    for step in range(int(saved.read_text()) if saved.exists() else 0, 5):
        orchestrator.log_metrics(step, attempt=number)
        if step == 2 and number == 1:
            saved.write_text("3")
            raise orchestrator.Preempted("saved after step 2")
    return number


if __name__ == "__main__":
    main()
"""


def _go_on(directory, *words):
    (directory / "app.py").write_text(GOES_ON)
    return subprocess.run(
        [sys.executable, "app.py", *words, "hydra/callbacks=results"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _record(run_dir):
    return json.loads((run_dir / "run.json").read_bytes())


def test_a_run_in_a_notebook_is_the_first_attempt(tmp_path, monkeypatch):
    monkeypatch.delenv(run.ATTEMPT_VARIABLE, raising=False)
    with run.run_in(tmp_path):
        assert orchestrator.attempt() == 1


def test_what_a_run_starts_is_of_the_same_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv(run.ATTEMPT_VARIABLE, "3")
    with run.run_in(tmp_path):
        assert orchestrator.attempt() == 3


def test_nobody_is_preempted_until_a_warning_comes(monkeypatch):
    assert not orchestrator.is_preempted()
    monkeypatch.setattr(run, "_warned", False)  # and back afterwards
    run.note_warning(signal.SIGUSR2, None)
    assert orchestrator.is_preempted()


@pytest.mark.parametrize("message", [(), ("saved after epoch 3",)])
def test_preempted_ends_a_task_past_all_that_catches_errors(message):
    def task():
        with contextlib.suppress(Exception):
            raise orchestrator.Preempted(*message)

    with pytest.raises(orchestrator.Preempted) as caught:
        task()
    again = pickle.loads(pickle.dumps(caught.value))
    for one in (caught.value, again):
        assert isinstance(one, SystemExit)
        assert one.code == 75
        assert "saved" in str(one)
        assert str(one) == "".join(message or [str(orchestrator.Preempted())])


@pytest.mark.parametrize("retries", [0, 1])
def test_in_the_local_queue_a_saved_run_goes_on(tmp_path, retries):
    """In the next try, or when the same command comes again."""
    words = ("-m", "hydra/launcher=gpu_queue", "hydra/output=named", "+x=1")
    words += (f"hydra.launcher.retries={retries}", "hydra.launcher.gpus=[]")
    done = _go_on(tmp_path, *words)
    directory = tmp_path / "outputs" / "x_1"
    if not retries:
        record = _record(directory)
        assert (done.returncode, record["state"], record["returncode"]) == (1, "TIMEOUT", 75)
        assert record["error"]["message"] == "saved after step 2"
        assert "TIMEOUT x_1: Preempted: saved after step 2" in done.stdout + done.stderr
        done = _go_on(tmp_path, *words)
    assert done.returncode == 0, done
    record = _record(directory)
    assert (record["state"], record["return_value"]) == ("COMPLETED", 2)
    assert [one["state"] for one in record["attempts"]] == ["TIMEOUT"]
    curve = [(line["step"], line["attempt"]) for line in _lines(directory / "metrics.jsonl")]
    assert curve == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]


def test_with_the_callback_alone_attempts_are_counted(tmp_path):
    words = ("hydra.run.dir=run",)
    done = _go_on(tmp_path, *words)
    assert done.returncode == 75, done
    assert _record(tmp_path / "run")["state"] == "FAILED"
    done = _go_on(tmp_path, *words)
    assert done.returncode == 0, done
    record = _record(tmp_path / "run")
    assert (record["state"], record["return_value"], len(record["attempts"])) == ("COMPLETED", 2, 1)
