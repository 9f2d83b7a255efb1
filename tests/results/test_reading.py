"""Reading records from real directories, good and bad."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.processes import boot_id, hostname, own_identity, start_time
from orchestrator.record import RunState
from orchestrator.results.reading import read_runs, require_any
from orchestrator.store import RunDir


def test_runs_are_found_at_any_depth_with_directories_relative_to_the_root(tmp_path, write_run):
    for name in ("b", "a/x/y/z/deep", "a/1"):
        write_run(name)
    reading = read_runs([tmp_path])
    assert [run.directory for run in reading.runs] == ["a/1", "a/x/y/z/deep", "b"]
    assert reading.unreadable == []


def test_a_run_directory_itself_may_be_named(tmp_path, write_run):
    write_run("one")
    assert [run.directory for run in read_runs([tmp_path / "one"]).runs] == ["."]


def test_hidden_directories_and_what_is_below_a_run_are_not_entered(tmp_path, write_run):
    for name in ("run", "run/attempts/1", ".sweeps/s", ".hydra"):
        write_run(name)
    assert [run.directory for run in read_runs([tmp_path]).runs] == ["run"]


def test_link_loops_end_and_a_linked_root_is_followed(tmp_path, write_run):
    write_run("real/run")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    assert [run.directory for run in read_runs([tmp_path / "linked"]).runs] == ["run"]


def test_several_roots_name_each_run_after_its_root_and_read_no_run_twice(
    tmp_path, write_run, monkeypatch
):
    write_run("a/run")
    write_run("b/run")
    monkeypatch.chdir(tmp_path)
    assert [run.directory for run in read_runs(["a", "b"]).runs] == ["a/run", "b/run"]
    assert [run.directory for run in read_runs([".", "a"]).runs] == ["a/run", "b/run"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"model_name": "x", "sta',
        b'{"a": 1}',
        b"[1, 2]",
        b"null",
        bytes(range(256)),
        b"\xff\xfe{",
        b"[" * 100_000,
        b'{"model_name": 3, "state": "COMPLETED"}',
        b'{"model_name": "x", "state": "DONE"}',
        b'{"model_name": "x", "state": "COMPLETED", "schema_version": 999}',
        b'{"model_name": "x", "state": "COMPLETED", "metrics": {"a": 1e999}}',
    ],
)
def test_a_record_that_cannot_be_read_is_named_with_a_reason_and_stops_nothing(
    tmp_path, write_run, content
):
    write_run("good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_bytes(content)
    reading = read_runs([tmp_path])
    assert [run.directory for run in reading.runs] == ["good"]
    (bad,) = reading.unreadable
    assert bad.directory == "bad"
    assert bad.path == str(tmp_path / "bad" / "run.json")
    assert bad.reason
    assert "\n" not in bad.reason


def test_a_newer_schema_is_told_apart_from_damage(tmp_path):
    (tmp_path / "run.json").write_bytes(
        b'{"model_name": "x", "state": "COMPLETED", "schema_version": 999}'
    )
    assert "upgrade" in read_runs([tmp_path]).unreadable[0].reason


def test_a_dangling_or_looping_record_is_unreadable_rather_than_fatal(tmp_path, write_run):
    write_run("good")
    for name, target in (("dangling", "nowhere"), ("loop", "run.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").symlink_to(target)
    (tmp_path / "folder" / "run.json").mkdir(parents=True)
    reading = read_runs([tmp_path])
    assert [run.directory for run in reading.runs] == ["good"]
    assert [bad.directory for bad in reading.unreadable] == ["dangling", "folder", "loop"]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses such names")
def test_a_directory_name_that_is_not_utf8_becomes_text(tmp_path, make_record):
    directory = tmp_path / os.fsdecode(b"bad\xffname")
    RunDir(directory).write(make_record())
    (run,) = read_runs([tmp_path]).runs
    run.directory.encode("utf-8")


def test_a_missing_root_a_file_and_a_dangling_link_are_said(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name, words in (
        ("missing", "does not exist"),
        ("file", "is a file"),
        ("link", "dangling link"),
    ):
        with pytest.raises(OrchestratorError, match=words):
            read_runs([tmp_path / name])


def test_no_run_at_all_says_where_it_looked_and_for_what(tmp_path):
    with pytest.raises(OrchestratorError, match=r"run\.json") as caught:
        require_any(read_runs([tmp_path]), [tmp_path])
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "run.json").write_bytes(b"")
    with pytest.raises(OrchestratorError, match="none of the 1"):
        require_any(read_runs([tmp_path]), [tmp_path])


def _dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_running_is_what_the_machine_shows(tmp_path, write_run):
    here = {"state": RunState.RUNNING, "host": hostname(), "boot_id": boot_id()}
    pid, started = own_identity()
    write_run("alive", pid=pid, pid_started=started, **here)
    write_run("gone", pid=_dead_pid(), pid_started=1.0, **here)
    write_run("reused", pid=pid, pid_started=(started or 0) + 1, **here)
    write_run("rebooted", pid=pid, pid_started=started, **{**here, "boot_id": "other"})
    write_run("elsewhere", pid=1, pid_started=1.0, **{**here, "host": "another-host"})
    write_run("unknown", **here)
    states = {run.directory: run.state for run in read_runs([tmp_path]).runs}
    assert states == {
        "alive": RunState.RUNNING,
        "gone": RunState.LOST,
        "reused": RunState.LOST,
        "rebooted": RunState.LOST,
        "elsewhere": RunState.RUNNING,
        "unknown": RunState.RUNNING,
    }


def test_a_zombie_does_not_run(tmp_path, write_run):
    process = subprocess.Popen(["sleep", "60"])
    started = start_time(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    write_run(
        "zombie",
        state=RunState.RUNNING,
        host=hostname(),
        boot_id=boot_id(),
        pid=process.pid,
        pid_started=started,
    )
    assert read_runs([tmp_path]).runs[0].state is RunState.LOST
    process.wait()
