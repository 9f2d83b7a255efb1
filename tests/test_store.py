"""The run directory: atomic writing, finding, owning, locking."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.naming import with_suffix
from orchestrator.processes import boot_id, hostname, own_identity
from orchestrator.record import RecordError, RunRecord, RunState
from orchestrator.store import (
    RunDir,
    RunLock,
    completed_runs,
    find_runs,
    last_metrics,
    observed_state,
    own_directory,
    planned_directory,
    read_bytes,
    tail,
    write_atomic,
)

A, B = "a" * 32, "b" * 32


def _record(**fields):
    fields.setdefault("state", RunState.COMPLETED)
    return RunRecord(model_name="m", **fields)


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


def _python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_record_reads_back_from_its_directory_which_is_made(tmp_path):
    run = RunDir(tmp_path / "x" / "y")
    run.write(_record(metrics={"a": 1.0}))
    assert run.read() == _record(metrics={"a": 1.0})
    assert _names(run.path) == ["run.json"]


def test_a_record_that_cannot_be_read_names_its_file(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(FileNotFoundError):
        run.read()
    assert run.try_read() is None
    run.record.write_bytes(b'{"a": 1}')
    with pytest.raises(RecordError, match=r"run\.json: not a run record"):
        run.read()
    assert run.try_read() is None


def test_writing_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two", durable=True)
    assert path.read_bytes() == b"two"
    assert _names(tmp_path) == ["file"]


def test_a_failed_write_keeps_the_old_content(tmp_path):
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomic(tmp_path / "directory", b"x")
    assert _names(tmp_path) == ["directory"]
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(NotADirectoryError):
        write_atomic(tmp_path / "file" / "below", b"x")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_reader_sees_one_content_or_the_other(tmp_path):
    path = tmp_path / "file"
    contents = {bytes([letter]) * 200_000 for letter in b"xyz"}
    write_atomic(path, next(iter(contents)))
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for content in contents:
                write_atomic(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(read_bytes(path) in contents for _ in range(300))
    finally:
        stop.set()
        writer.join()


def test_small_large_and_sizeless_files_are_read_whole(tmp_path):
    for size in (0, 1, 3_000_000):
        path = tmp_path / str(size)
        path.write_bytes(b"x" * size)
        assert read_bytes(path) == b"x" * size
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


def test_runs_are_found_in_order_at_any_depth_and_not_below_a_run(tmp_path):
    for name in ("b/c", "a", "a/checkpoints/x", ".hidden/x", "b/a/d/e"):
        RunDir(tmp_path / name).write(_record())
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    names = [str(run.path.relative_to(tmp_path)) for run in find_runs(tmp_path)]
    assert names == ["a", "b/a/d/e", "b/c"]
    assert list(find_runs(tmp_path / "missing")) == []
    assert list(find_runs(tmp_path / "file")) == []


def test_only_completed_runs_are_done(tmp_path):
    for state in RunState:
        RunDir(tmp_path / state.value).write(_record(state=state, fingerprint=state.value))
    RunDir(tmp_path / "none").write(_record())
    RunDir(tmp_path / "z").write(_record(fingerprint="COMPLETED"))
    RunDir(tmp_path / "bad").write(_record())
    (tmp_path / "bad" / "run.json").write_bytes(b"{")
    done = [(run.path.name, record.state) for run, record in completed_runs(tmp_path)]
    assert done == [("COMPLETED", RunState.COMPLETED), ("z", RunState.COMPLETED)]


def test_setting_aside_keeps_what_a_resumed_task_looks_for(tmp_path):
    run = RunDir(tmp_path)
    own_directory(tmp_path, A)
    for number in (1, 2):
        run.write(_record(returncode=number))
        run.stdout.write_text("out")
        (tmp_path / "checkpoint").write_text("weights")
        run.set_aside(whole=False)
        assert RunDir(run.attempts / str(number)).read().returncode == number
        assert (run.attempts / str(number) / "train_stdout.log").exists()
    assert _names(tmp_path) == [".claim", "attempts", "checkpoint"]


def test_setting_aside_whole_leaves_only_the_claim(tmp_path):
    run = RunDir(tmp_path)
    own_directory(tmp_path, A)
    run.write(_record())
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "checkpoint").write_text("weights")
    run.set_aside(whole=True)
    assert _names(tmp_path) == [".claim", "attempts"]
    assert _names(run.attempts / "1") == [".hydra", "checkpoint", "run.json"]
    run.set_aside(whole=True)
    assert _names(run.attempts) == ["1"]


def test_the_last_value_of_every_metric_is_found_in_a_curve_that_was_cut_off(tmp_path):
    run = RunDir(tmp_path)
    assert last_metrics(run) == {}
    run.metrics.write_bytes(
        b'{"step": 0, "timestamp": 1.5, "never_seen": 1}\n' * 2_000
        + b'{"step": 1, "timestamp": 2.5, "loss": 0.5, "acc": 1}\n[1]\n\xff\n'
        + b'{"step": 2, "loss": "Infinity", "note": "x"}\n{"step": 3, "lo'
    )
    found = last_metrics(run)
    assert found == {"never_seen": 1.0, "loss": math.inf, "acc": 1.0}
    assert list(map(type, found.values())) == [float] * 3


def test_the_tail_of_a_file(tmp_path):
    path = tmp_path / "file"
    assert tail(path, 3) == b""
    path.write_bytes(b"12345")
    assert tail(path, 3) == b"345"
    assert tail(path, 99) == b"12345"
    assert tail(tmp_path, 3) == b""


def test_a_directory_is_owned_by_one_fingerprint_for_good(tmp_path):
    path = tmp_path / "name"
    assert planned_directory(path, A) == path
    assert not path.exists()
    assert own_directory(path, A) == path
    assert own_directory(path, A) == path
    other = own_directory(path, B)
    assert other == tmp_path / with_suffix("name", B)
    assert own_directory(path, B) == other
    assert planned_directory(path, B) == other
    assert planned_directory(path, A) == path
    assert _names(path) == [".claim"]


def test_a_directory_with_a_record_but_no_claim_belongs_to_the_record(tmp_path):
    run = RunDir(tmp_path / "name")
    run.write(_record(fingerprint=A))
    assert own_directory(run.path, A) == run.path
    foreign = RunDir(tmp_path / "foreign")
    foreign.path.mkdir()
    foreign.record.write_bytes(b'{"a": 1}')
    assert own_directory(foreign.path, A) == tmp_path / "foreign-aaaaaaaa"
    assert not foreign.claim.exists()


def test_of_many_who_ask_at_once_one_owns_the_name(tmp_path):
    fingerprints = [f"{number:x}" * 32 for number in range(8)]
    code = (
        "import sys; from pathlib import Path; from orchestrator.store import own_directory\n"
        "sys.stdin.readline(); print(own_directory(Path(sys.argv[1]), sys.argv[2]).name)"
    )
    processes = [_python(code, tmp_path / "name", one) for one in fingerprints for _ in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    names = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert names[::2] == names[1::2]
    assert len(set(names)) == len(fingerprints)
    assert "name" in names
    for name, fingerprint in zip(names[::2], fingerprints, strict=True):
        assert (tmp_path / name / ".claim").read_text().strip() == fingerprint


def test_a_lock_is_one_holders_until_it_is_released(tmp_path):
    run = RunDir(own_directory(tmp_path / "name", A))
    first = RunLock.acquire(run)
    assert RunLock.acquire(run) is None
    first.release()
    first.release()
    second = RunLock.acquire(run)
    assert second is not None
    second.release()
    assert run.claim.read_text() == A + "\n"


def test_a_lock_ends_with_its_process_however_it_dies(tmp_path):
    run = RunDir(own_directory(tmp_path / "name", A))
    code = (
        "import sys; from pathlib import Path; from orchestrator.store import RunDir, RunLock\n"
        "lock = RunLock.acquire(RunDir(Path(sys.argv[1]))); print(lock is not None, flush=True)\n"
        "sys.stdin.readline()"
    )
    process = _python(code, run.path)
    assert process.stdout.readline() == "True\n"
    assert RunLock.acquire(run) is None
    process.kill()
    process.communicate()
    lock = RunLock.acquire(run)
    assert lock is not None
    lock.release()


def test_only_a_run_of_this_machine_whose_process_is_gone_reads_lost():
    pid, started = own_identity()
    here = {"host": hostname(), "boot_id": boot_id(), "pid": pid, "pid_started": started}
    for state in RunState:
        assert observed_state(_record(state=state, **here)) is state
    gone = {**here, "pid_started": (started or 0) - 1}
    assert observed_state(_record(state=RunState.RUNNING, **gone)) is RunState.LOST
    assert observed_state(_record(state=RunState.PENDING, **gone)) is RunState.PENDING
    away = {**gone, "host": "another"}
    assert observed_state(_record(state=RunState.RUNNING, **away)) is RunState.RUNNING


def test_an_attempt_set_aside_is_not_a_run(tmp_path):
    run = RunDir(own_directory(tmp_path / "name", A))
    run.write(_record(state=RunState.FAILED))
    run.set_aside(whole=False)
    assert list(find_runs(tmp_path)) == []


def test_a_tree_deeper_than_a_path_may_be_hides_no_other_run(tmp_path):
    RunDir(tmp_path / "z").write(_record())
    (tmp_path / "a").mkdir()
    descriptor = os.open(tmp_path / "a", os.O_RDONLY)
    for _ in range(30):
        os.mkdir("x" * 200, dir_fd=descriptor)
        below = os.open("x" * 200, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    try:
        assert [run.path.name for run in find_runs(tmp_path)] == ["z"]
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)


def test_the_planned_directory_is_the_one_that_would_be_owned(tmp_path):
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "run.json").write_bytes(b'{"a": 1}')
    planned = planned_directory(tmp_path / "name", A)
    assert planned == own_directory(tmp_path / "name", A)


def test_fingerprints_with_the_same_first_digits_each_own_a_directory(tmp_path):
    own_directory(tmp_path / "name", B)
    paths = [own_directory(tmp_path / "name", "a" * 8 + rest * 24) for rest in "cd"]
    assert all((path / ".claim").exists() for path in paths)


def test_without_hard_links_a_name_still_has_one_owner(tmp_path, monkeypatch):
    def no_links(_source, target):
        if Path(target).parent.name == "name":
            Path(target).write_text(B + "\n")  # another process was faster
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "name"
    owner = own_directory(path, A)
    assert (path / ".claim").read_text().strip() == (A if owner == path else B)
    assert owner != path


def test_threads_may_write_the_same_file_at_once(tmp_path):
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write_atomic(path, b"x" * 100_000), range(400)))


def test_what_interrupts_setting_aside_leaves_the_record_where_it_was(tmp_path, monkeypatch):
    run = RunDir(own_directory(tmp_path / "name", A))
    run.write(_record(returncode=7))
    for path in (run.stdout, run.stderr, run.metrics, run.path / "zz"):
        path.touch()
    moved, move = [], shutil.move

    def move_some(source, target):
        if Path(source) == run.record:
            raise KeyboardInterrupt
        moved.append(Path(source).name)
        return move(source, target)

    for whole in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "move", move_some)
            with pytest.raises(KeyboardInterrupt):
                run.set_aside(whole=whole)
        assert run.read().returncode == 7
    assert sorted(moved) == ["metrics.jsonl", "train_stderr.log", "train_stdout.log", "zz"]
    run.set_aside(whole=True)
    assert _names(run.path) == [".claim", "attempts"]


@pytest.mark.parametrize("state", [state for state in RunState if state is not RunState.PENDING])
def test_another_attempt_begins_and_the_last_one_is_told(tmp_path, state):
    run = RunDir(own_directory(tmp_path / "name", A))
    assert run.begin_attempt() == ()
    assert not run.attempts.exists()
    for number in range(2):
        attempts = run.begin_attempt()
        run.write(_record(state=state, returncode=number, attempts=attempts, started_at=1.0))
        (run.path / "checkpoint").touch()
    attempts = run.begin_attempt()
    expected = state if state.is_final else RunState.LOST
    assert [attempt.state for attempt in attempts] == [expected] * 2
    assert [attempt.returncode for attempt in attempts] == [0, 1]
    assert not run.record.exists()
    # A finished run that is done again begins with nothing; one that failed may go on.
    assert (run.path / "checkpoint").exists() == (state is not RunState.COMPLETED)
    assert _names(run.attempts) == ["1", "2"]


def test_a_run_that_has_only_waited_made_no_attempt(tmp_path):
    run = RunDir(own_directory(tmp_path / "name", A))
    run.write(_record(state=RunState.FAILED, started_at=1.0))
    run.write(_record(state=RunState.PENDING, attempts=run.begin_attempt()))
    attempts = run.begin_attempt()
    assert [attempt.state for attempt in attempts] == [RunState.FAILED]
    assert run.record.exists()
    assert _names(run.attempts) == ["1"]


def test_an_empty_claim_is_nobodys(tmp_path):
    path = tmp_path / "name"
    path.mkdir()
    (path / ".claim").touch()
    assert planned_directory(path, A) == path
    assert own_directory(path, A) == path
    assert (path / ".claim").read_text() == A + "\n"
    assert own_directory(path, B) != path
    # A record that lies there says whose it is.
    foreign = RunDir(tmp_path / "foreign")
    foreign.write(_record(fingerprint=B))
    foreign.claim.touch()
    assert own_directory(foreign.path, A) != foreign.path
    assert own_directory(foreign.path, B) == foreign.path


def test_only_a_directory_that_is_owned_can_be_locked(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(FileNotFoundError):
        RunLock.acquire(run)
    assert not RunLock.is_held(run)
    assert _names(tmp_path) == []


def test_whether_a_lock_is_held_is_asked_without_taking_it(tmp_path):
    run = RunDir(own_directory(tmp_path / "name", A))
    assert not RunLock.is_held(run)
    lock = RunLock.acquire(run)
    assert RunLock.is_held(run)
    assert RunLock.is_held(run)
    lock.release()
    assert not RunLock.is_held(run)
    again = RunLock.acquire(run)
    assert again is not None
    again.release()


def test_a_run_whose_directory_is_locked_is_not_lost(tmp_path):
    run = RunDir(own_directory(tmp_path / "name", A))
    pid, started = own_identity()
    here = {"host": hostname(), "boot_id": boot_id(), "pid": pid, "pid_started": started - 1}
    record = _record(state=RunState.RUNNING, **here)
    assert observed_state(record, run) is RunState.LOST
    lock = RunLock.acquire(run)
    assert observed_state(record, run) is RunState.RUNNING
    assert observed_state(record) is RunState.LOST
    before_the_restart = _record(state=RunState.RUNNING, **{**here, "boot_id": "another"})
    assert observed_state(before_the_restart, run) is RunState.LOST
    for state in RunState:
        if state is not RunState.RUNNING:
            assert observed_state(_record(state=state, **here), run) is state
    lock.release()
    assert observed_state(record, run) is RunState.LOST
