"""A sweep's own files, the command of a run, and which code ran it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from orchestrator import sweeps
from orchestrator.record import ErrorInfo, RunRecord, RunState, Versions
from orchestrator.store import RunDir
from orchestrator.sweeps import (
    RESULTS_NAME,
    Sweep,
    code_change,
    code_directory,
    code_versions,
    program_words,
    rerun_command,
    results_entry,
)
from orchestrator.tasks import digits

# What `train_sweep.py` wrote for each run.
KEYS = {
    *("model_name", "hyperparams", "success", "returncode"),
    *("duration_seconds", "gpu_id", "stdout", "stderr"),
}
PARTIAL = f"{RESULTS_NAME}.partial"


def _record(name="lr_1", state=RunState.COMPLETED, **fields):
    return RunRecord(model_name=name, state=state, success=state is RunState.COMPLETED, **fields)


def _add(sweep, index, name, **fields):
    run = RunDir(sweep.root / name)
    run.write(_record(name, **fields))
    sweep.add_run(index, run.path)
    return run


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path / "outputs", overrides=("lr=1,2",), versions=Versions(git_commit="a"))


def _said(sweep):
    return json.loads((sweep.directory / "sweep.json").read_bytes())


def _results(path):
    return [entry["model_name"] for entry in json.loads(path.read_bytes())]


def _files(directory):
    return sorted(path.name for path in directory.iterdir())


# --- sweep.json ---


def test_what_was_asked_and_what_ran_it_is_written(sweep):
    sweep.axes, sweep.total = {"lr": ["1", "2"]}, 2
    _add(sweep, 1, "lr_2")
    _add(sweep, 0, "lr_1")
    sweep.write()
    said = _said(sweep)
    assert said["sweep_id"] == sweep.sweep_id
    assert said["overrides"] == ["lr=1,2"]
    assert said["axes"] == {"lr": ["1", "2"]}
    assert said["runs"] == ["lr_1", "lr_2"]
    assert said["total"] == 2
    assert said["versions"]["git_commit"] == "a"
    assert said["ended_at"] is None
    sweep.write(ended=True)
    assert _said(sweep)["ended_at"] >= said["started_at"]


def test_states_add_up_over_launches(sweep):
    for _ in range(2):
        sweep.states.update({"COMPLETED": 2, "FAILED": 1})
    sweep.write()
    assert _said(sweep)["states"] == {"COMPLETED": 4, "FAILED": 2}


def test_two_sweeps_that_begin_at_once_have_two_directories(sweep, tmp_path):
    assert Sweep(sweep.root, versions=sweep.versions).directory != sweep.directory


# --- the results file ---


def test_an_entry_has_all_that_the_older_script_wrote_and_more(tmp_path):
    run = RunDir(tmp_path / "lr_1")
    record = _record(
        hyperparams={"lr": 5e-6, "model.bypass": True},
        returncode=0,
        duration_seconds=1.5,
        gpu_id=3,
        metrics={"loss": float("nan")},
        return_value=0.5,
    )
    run.write(record)
    run.stdout.write_bytes(b"x" * 10_000 + b"the end \xff")
    run.stderr.write_text("a warning")
    entry = json.loads(json.dumps(results_entry(run, record), allow_nan=False))
    assert set(entry) >= KEYS
    assert entry["hyperparams"] == {"lr": 5e-6, "model.bypass": True}
    assert (entry["success"], entry["returncode"], entry["gpu_id"]) == (True, 0, 3)
    assert entry["stdout"].endswith("xthe end \ufffd")
    assert len(entry["stdout"]) == 2_000
    assert entry["stderr"] == "a warning"
    assert entry["state"] == "COMPLETED"
    assert entry["metrics"] == {"loss": "NaN"}
    assert entry["directory"] == str(run.path)


def test_results_are_partial_then_complete_then_partial_again(sweep, tmp_path):
    sweep.results_file = tmp_path / "mine" / "results.json"
    _add(sweep, 0, "lr_1")
    _add(sweep, 1, "lr_2", state=RunState.RUNNING)
    assert sweep.write_results(complete=False) == tmp_path / "mine" / "results.json.partial"
    assert _files(tmp_path / "mine") == ["results.json.partial"]
    assert _files(sweep.directory) == [PARTIAL]
    assert _results(sweep.directory / PARTIAL) == ["lr_1"]  # the other has not ended
    _add(sweep, 1, "lr_2", state=RunState.FAILED)
    assert sweep.write_results(complete=True) == sweep.results_file
    assert _files(tmp_path / "mine") == ["results.json"]
    assert _files(sweep.directory) == [RESULTS_NAME]
    assert _results(sweep.results_file) == ["lr_1", "lr_2"]
    sweep.reopen()
    sweep.reopen()
    assert _files(tmp_path / "mine") == ["results.json.partial"]
    assert _files(sweep.directory) == [PARTIAL]
    assert _results(sweep.directory / PARTIAL) == ["lr_1", "lr_2"]


def test_runs_that_never_got_a_directory_are_results_too(sweep):
    _add(sweep, 1, "lr_2")
    error = ErrorInfo("FileExistsError", "there is a file of that name")
    sweep.add_unstarted(_record("lr=1", RunState.FAILED, index=0, error=error))
    entries = json.loads(sweep.write_results(complete=True).read_bytes())
    failed = next(entry for entry in entries if not entry["success"])
    assert set(failed) >= KEYS
    assert failed["state"] == "FAILED"
    assert failed["error"]["message"] == "there is a file of that name"
    assert failed["directory"] is None
    assert len(entries) == 2


def test_partial_results_are_written_now_and_then(sweep, monkeypatch):
    sweep.write_partial_now_and_then()
    assert _results(sweep.directory / PARTIAL) == []
    _add(sweep, 0, "lr_1")
    sweep.write_partial_now_and_then()
    assert _results(sweep.directory / PARTIAL) == []
    monkeypatch.setattr(sweep, "_partial_at", 0.0)
    sweep.write_partial_now_and_then()
    assert _results(sweep.directory / PARTIAL) == ["lr_1"]


def test_partial_results_that_cannot_be_written_end_nothing(sweep):
    sweep.root.mkdir()
    (sweep.root / ".sweeps").touch()
    sweep.write_partial_now_and_then()
    with pytest.raises(OSError):
        sweep.write_results(complete=True)


# --- the command of a run ---


@pytest.fixture
def typed(monkeypatch):
    def type_(*words, program=("app.py",)):
        monkeypatch.setattr(sys, "orig_argv", [sys.executable, *program, *words])
        monkeypatch.setattr(sys, "argv", [program[-1], *words])
        sweeps._config_flags.cache_clear()

    yield type_
    monkeypatch.undo()
    sweeps._config_flags.cache_clear()


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (
            ("--config-dir", "my conf", "-cn", "other"),
            {"--config-dir": "my conf", "--config-name": "other"},
        ),
        (
            ("--config-path=../conf", "--config-name=b"),
            {"--config-path": "../conf", "--config-name": "b"},
        ),
        (("-cp", "conf", "-cd", "x"), {"--config-path": "conf", "--config-dir": "x"}),
        ((), {}),
    ],
)
def test_a_command_keeps_what_says_which_config(typed, words, kept):
    typed("-m", *words, "lr=1,2", "hydra.mode=MULTIRUN")
    command = shlex.split(rerun_command(("lr=1",), ("hydra/launcher=gpu_queue", "hydra.mode=RUN")))
    start = program_words()
    assert start[1:] == ["app.py"]
    assert command[: len(start)] == start
    assert command[-3:] == ["-m", "hydra/launcher=gpu_queue", "lr=1"]
    between = command[len(start) : -3]
    assert dict(zip(between[::2], between[1::2], strict=True)) == kept


def test_a_command_is_quoted_for_a_shell(typed):
    typed("-m")
    texts = ("text='it is $HOME'", 'name="a;b"', "list=[1,2]", "path=~", "+new='*'")
    line = f"for word in {rerun_command(texts, ())}; do printf '%s\\n' \"$word\"; done"
    done = subprocess.run(["sh", "-c", line], check=True, capture_output=True, text=True)
    assert tuple(done.stdout.splitlines()[-len(texts) :]) == texts


def test_arguments_that_are_not_hydras_leave_the_command_whole(typed):
    typed("--config-dir")  # whose value is missing
    assert shlex.split(rerun_command(("lr=1",), ()))[-2:] == ["-m", "lr=1"]
    typed("lr=1", program=("-m", "pkg.train"))
    assert program_words()[1:] == ["-m", "pkg.train"]


# --- which code ran ---


def _function_in(path, text="def task(cfg): return cfg"):
    path.write_text(text)
    names = {}
    exec(compile(text, str(path), "exec"), names)
    return names["task"]


def test_the_code_of_a_task_lies_where_its_file_is(tmp_path):
    assert code_directory(_function_in(tmp_path / "train.py")) == tmp_path
    wrapped = (
        "import functools, json\ndef inner(cfg): return cfg\n"
        "task = functools.wraps(inner)(lambda *a: json.dumps(a))"
    )
    assert code_directory(_function_in(tmp_path / "wrapped.py", wrapped)) == tmp_path


def test_a_task_that_is_no_users_code_says_nothing(tmp_path):
    assert code_directory(digits.train) is None
    assert code_directory(len) is None
    gone = _function_in(tmp_path / "typed_in.py")
    (tmp_path / "typed_in.py").unlink()
    assert code_directory(gone) is None


def test_versions_are_of_the_codes_own_directory(tmp_path, monkeypatch):
    for name in ("code", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        for words in (
            ["init", "-q"],
            ["add", "file"],
            ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", name],
        ):
            subprocess.run(
                ["git", "-c", "commit.gpgsign=false", *words], cwd=tmp_path / name, check=True
            )
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, here = code_versions(tmp_path / "code"), code_versions()
    assert len(code.git_commit) == 40
    assert code.git_commit != here.git_commit
    assert code.git_dirty is False
    (tmp_path / "code" / "file").write_text("changed")
    assert code_versions(tmp_path / "code").git_dirty is True
    assert code_versions(tmp_path).git_commit == ""


def test_a_change_of_the_code_is_named_once():
    old, new = Versions(git_commit="a" * 40, git_dirty=False), Versions(git_commit="b" * 40)
    edited = Versions(git_commit="a" * 40, git_dirty=True)
    assert code_change([old, old, new, Versions()], new) == "code changed since: aaaaaaa → bbbbbbb"
    assert code_change([edited, old], new).endswith("aaaaaaa, aaaaaaa+edits → bbbbbbb")
    assert code_change([old], edited) == "code changed since: aaaaaaa → aaaaaaa+edits"
    assert code_change([new], new) == ""
    assert code_change([old], Versions()) == ""
    assert code_change([Versions()], new) == ""


def test_an_entry_says_what_this_sweep_asked_for(sweep):
    run = _add(sweep, 0, "lr_1", hyperparams={"lr": 1})
    sweep.add_run(1, run.path, {"epochs": 20})
    _add(sweep, 2, "lr_2", hyperparams={"lr": 2})
    entries = json.loads(sweep.write_results(complete=True).read_bytes())
    assert [entry["hyperparams"] for entry in entries] == [{"lr": 1}, {"epochs": 20}, {"lr": 2}]
    assert entries[0]["directory"] == entries[1]["directory"]
