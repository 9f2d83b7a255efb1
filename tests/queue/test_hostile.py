"""Tasks, values, disks and directories that are as unfriendly as can be."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import msgspec
import psutil
import pytest

from orchestrator.record import RunState
from orchestrator.store import RunDir

APP = "hostile_app.py"
METHODS = ("fork", "spawn")


def failed(kind, message, returncode=1):
    return {"state": "FAILED", "type": kind, "message": message, "returncode": returncode}


def completed(value=None, **metrics):
    return {"state": "COMPLETED", "value": value, "metrics": metrics}


# Case to what its record must say. The same under both start methods.
CASES = {
    "fine": completed(1.0),
    "returns_lambda": completed(None),
    "returns_generator": completed(None),
    "returns_nan": completed(math.nan),
    "returns_inf": completed(-math.inf),
    "returns_numpy_scalar": completed(0.5),
    "returns_numpy_array": completed([0, 1, 2, 3]),
    "returns_nan_in_dict": completed(
        {"loss": math.nan, "best": {"inner": math.inf}, "3": [1, None]}, loss=math.nan
    ),
    "returns_bool_in_dict": completed({"converged": True, "loss": 0.25}, converged=True, loss=0.25),
    "returns_enum": completed("RED"),
    "returns_int_enum": completed({"level": 3}, level=3),
    "returns_huge_int": completed({"count": 10**30}, count=1e30),
    "returns_local_int": completed({"points": 3}, points=3),
    "returns_int_of_main": completed(3),
    "returns_cycle": completed(None),
    "returns_surrogate": completed("\\udcff"),
    "returns_bytes": completed(None),
    "logs_nan": completed(None, loss=math.nan, reward=-math.inf),
    "logs_then_dies": failed("ProcessDied", "exited with status 9 before its task returned", 9),
    "exits_0_at_once": failed("ProcessDied", "exited with status 0 before its task returned", 0),
    "exits_3_at_once": failed("ProcessDied", "exited with status 3 before its task returned", 3),
    "system_exit_0": completed(None),
    "system_exit_3": failed("SystemExit", "3", 3),
    "system_exit_text": failed("SystemExit", "the disk of the data is not there"),
    "keyboard_interrupt": failed("KeyboardInterrupt", ""),
    "generator_exit": failed("GeneratorExit", ""),
    "raises_unpicklable": failed("LockedError", "holds a lock"),
    "raises_unreadable": failed("UnreadableError", "could not be had"),
    "raises_not_unpicklable": failed("TwoArgumentsError", "one and two"),
    "raises_local": failed("raises_local.<locals>.LocalError", "of a class inside a function"),
    "raises_group": failed("RuntimeError", "second\nline"),
    "raises_surrogate": failed("ValueError", "a file \\udcff"),
    "recursion": failed("RecursionError", "maximum recursion depth"),
    "out_of_memory": failed("MemoryError", ""),
    "kills_itself": failed("ProcessDied", "killed by SIGKILL", -signal.SIGKILL),
    "terminates_itself": failed("EndedBySignal", "asked to end by SIGTERM", 143),
    "aborts": failed("ProcessDied", "killed by SIGABRT before its task returned", -signal.SIGABRT),
    "atexit_exits_5": failed("ProcessDied", "exited with status 5 after its task had returned", 5),
    "atexit_segfault": failed(
        "ProcessDied", "killed by SIGSEGV after its task had returned", -signal.SIGSEGV
    ),
    "atexit_raises": completed(4),
    "atexit_writes": completed(None),
    "thread_ends_late": completed(None),
    "prints_50_mb": completed(None),
    "prints_everywhere": completed(None),
    "closes_stdout": completed(None),
    "reads_stdin": completed(""),
    "pool_fork": completed(30),
    "pool_spawn": completed(30),
    "pool_executor": completed(30),
    "pool_left_open": completed(30),
    "process_not_joined": completed(None),
    "forks_and_returns_twice": completed("parent"),
    "changes_directory": completed("/", loss=1.0),
    "removes_its_directory": completed(1),
}
NOT_IN_RECORD = (
    "returns_cycle",
    "returns_bytes",
)
NOT_FOR_THE_SWEEPER = ("returns_lambda", "returns_generator")


@pytest.fixture(scope="module", params=METHODS)
def every_case(request, tmp_path_factory, make_sandbox):
    """One sweep over all cases, and what it printed."""
    place = make_sandbox(tmp_path_factory.mktemp(request.param) / "work")
    words = (f"case={','.join(CASES)}", f"hydra.launcher.start_method={request.param}")
    text = place.run(APP, *words, "hydra.launcher.timeout_s=60", expect=1)
    return place, text


def same(one, other):
    """Equal, NaN being equal to NaN."""
    return msgspec.json.encode(_plain(one)) == msgspec.json.encode(_plain(other))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in sorted(value.items())}
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return repr(float(value))
    return value


@pytest.mark.parametrize("case", CASES)
def test_every_ending_is_recorded(every_case, case):
    place, text = every_case
    expected = CASES[case]
    record = place.record(f"case_{case}")
    assert record.state.value == expected["state"], record.error
    assert record.success is (expected["state"] == "COMPLETED")
    assert record.fingerprint
    assert record.ended_at >= record.started_at
    if expected["state"] == "FAILED":
        assert record.error.type == expected["type"]
        assert expected["message"] in record.error.message
        assert record.returncode == expected["returncode"]
        assert f"FAILED case_{case}: {record.error.line}" in text
    else:
        assert record.error is None
        assert record.returncode == 0
        assert same(record.return_value, expected["value"])
        assert same(record.metrics, {k: float(v) for k, v in expected["metrics"].items()})
        assert f"FAILED case_{case}:" not in text
    if case in NOT_IN_RECORD:
        assert f"case_{case}: the return value is not in the record: " in text
    if case in NOT_FOR_THE_SWEEPER:
        assert f"case_{case}: the return value did not reach the sweeper" in text


def test_no_case_hurts_the_sweep(every_case):
    place, text = every_case
    assert len(place.records()) == len(CASES)
    assert f"Completed {len(CASES)} out of {len(CASES)} runs (100.00%)" in text
    bad = sum(case["state"] == "FAILED" for case in CASES.values())
    assert f"All runs ended ({len(CASES) - bad} completed, {bad} failed)" in text
    assert not place.processes()
    (results,) = place.outputs.glob(".sweeps/*/train_sweep_results.json")
    assert len(msgspec.json.decode(results.read_bytes())) == len(CASES)


def test_tracebacks_are_in_the_record_and_in_the_log(every_case):
    place, _ = every_case
    for name in ("raises_group", "raises_unreadable", "keyboard_interrupt", "recursion"):
        record = place.record(f"case_{name}")
        log = RunDir(place.outputs / f"case_{name}").stderr.read_text()
        assert log.count("Traceback (most recent call last)") >= 1
        assert f"in {name}" in record.error.traceback
        assert f"in {name}" in log
    text = RunDir(place.outputs / "case_raises_group").stderr.read_text()
    assert text.index("ValueError: first") < text.index("RuntimeError: second")
    assert text.count("RuntimeError: second") == 1
    log = RunDir(place.outputs / "case_system_exit_text").stderr.read_text()
    assert "the disk of the data is not there" in log


def test_what_was_printed_before_a_violent_end_is_kept(every_case):
    run = RunDir(every_case[0].outputs / "case_kills_itself")
    assert run.stdout.read_text() == "last words\n"


def test_metrics_of_a_run_that_died_are_kept(every_case):
    assert every_case[0].record("case_logs_then_dies").metrics == {"loss": 0.125}


def test_all_that_is_printed_lands_in_the_logs_once(every_case):
    run = RunDir(every_case[0].outputs / "case_prints_everywhere")
    out, err = run.stdout.read_bytes(), run.stderr.read_bytes()
    for line in (
        "from print ünïcode \\udcff".encode(),
        b"from buffer \xff\xfe\x00",
        b"from printf",
        b"from a child",
        b"from write",
    ):
        assert out.split(b"\n").count(line) == 1, line
        assert line not in err.split(b"\n")
    assert b"no newline at the end" in out
    assert (out + err).count(b"from logging") == 1
    assert err == b"to stderr\nerror from write\n"
    assert b"from print" not in every_case[1].encode()
    big = RunDir(every_case[0].outputs / "case_prints_50_mb").stdout
    assert big.stat().st_size == 500 * 100_000


def test_exit_handlers_threads_and_children_may_finish(every_case):
    outputs = every_case[0].outputs
    assert (outputs / "case_atexit_writes" / "goodbye").exists()
    assert (outputs / "case_thread_ends_late" / "late").exists()
    assert (outputs / "case_process_not_joined" / "child").exists()


def test_a_changed_directory_does_not_move_what_is_logged(every_case):
    run = RunDir(every_case[0].outputs / "case_changes_directory")
    assert run.metrics.read_text().count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_a_message_that_the_terminal_cannot_show_hides_nothing(sandbox, encoding):
    words = ("case=raises_surrogate,raises_unicode,fine,exits_3_at_once",)
    env = {"PYTHONIOENCODING": encoding}
    text = sandbox.run(APP, *words, expect=1, env=env)
    assert sandbox.states() == {"COMPLETED": 1, "FAILED": 3}
    for name in ("raises_surrogate", "raises_unicode", "exits_3_at_once"):
        assert f"FAILED case_{name}: " in text
    assert "Completed 4 out of 4" in text
    assert "All runs ended (1 completed, 3 failed)" in text
    assert sandbox.record("case_raises_unicode").error.message == "größer → 日本語"
    log = RunDir(sandbox.outputs / "case_raises_unicode").stderr.read_text(encoding="utf-8")
    assert "größer → 日本語" in log


def test_huge_values_and_messages(sandbox):
    text = sandbox.run(APP, "case=returns_huge_dict,raises_long,fine", expect=1)
    value = sandbox.record("case_returns_huge_dict").return_value
    assert len(value) == 100_000
    assert value["key 7"] == 1.0
    record = sandbox.record("case_raises_long")
    assert record.error.type == "ValueError"
    assert record.error.message.startswith("long long")
    assert "long " * 100 not in text.split("Error executing job")[0]
    assert sandbox.states() == {"COMPLETED": 2, "FAILED": 1}


@pytest.mark.parametrize("method", METHODS)
def test_a_thread_that_never_ends_meets_the_time_limit(sandbox, method):
    words = ("case=thread_never_ends,fine", "hydra.launcher.timeout_s=2")
    sandbox.run(APP, *words, f"hydra.launcher.start_method={method}", expect=1)
    record = sandbox.record("case_thread_never_ends")
    assert record.state is RunState.TIMEOUT
    assert "time limit" in record.error.message
    assert sandbox.record("case_fine").state is RunState.COMPLETED
    assert not sandbox.processes()


def test_workers_of_a_pool_left_open_obey_the_first_sigterm(sandbox):
    """However soon after their start: a job would wait for a deaf worker for ever."""
    words = ("case=pool_left_open", "number=range(40)", "hydra.launcher.timeout_s=30")
    sandbox.run(APP, *words)
    assert sandbox.states() == {"COMPLETED": 40}


# --- values and names ---

LONG = "q" * 300
TEXTS = [
    *("a/b", "a b", "a=b", "a-b", "a,b", "a:b", "a@b", "a#b", "a\tb", "a\\b"),
    *("", "ünï", "Über", "über", "日本語", "\U0001f600", "é", "e\u0301"),
    *(LONG + "1", LONG + "2", LONG.upper() + "1", "é" * 150),
    *('"quoted"', "it's", "$HOME", "../../up", "..", ".", "~", "CON", "*?", "%s", "{x}", "[1,2]"),
    *("-dash", ".dot", " lead", "trail ", "null", "true", "True", "1e-3", "NaN", "A/B", "a/B"),
]


def quoted(text):
    return "'" + text.replace("\\\\", "\\").replace("'", "\\'") + "'"


def test_any_text_as_a_value(sandbox):
    words = ("case=tells_where", "text=" + ",".join(map(quoted, TEXTS)))
    sandbox.run(APP, *words)
    records = sandbox.records()
    assert len(records) == len(TEXTS)
    assert {record.hyperparams["text"] for record in records.values()} == set(TEXTS)
    assert len({name.lower() for name in records}) >= len(TEXTS) - 4  # four differ in case only
    for name, record in records.items():
        assert record.state is RunState.COMPLETED
        assert record.model_name == name
        assert record.return_value["output_dir"] == str(sandbox.outputs / name)
        if record.hyperparams["text"] != "NaN":
            assert record.return_value["text"] == record.hyperparams["text"]
        assert len(name.encode()) <= 200
        assert name.isascii()
        assert not set(name) & set("/\\ '\"$*?:\t")
    assert sorted(os.listdir(sandbox.directory)) == [
        "log-1.txt",
        "outputs",
        "relative.txt",
        "state",
    ]
    text = sandbox.run(APP, *words)
    assert f"{len(TEXTS)} of {len(TEXTS)} done already" in text
    assert sum(sandbox.ledger().values()) == len(TEXTS)


def test_a_run_can_be_run_again_by_the_command_in_its_record(sandbox):
    sandbox.run(APP, "case=tells_where", "text=" + quoted("it's $HOME * \U0001f600"))
    (before,) = sandbox.records().values()
    subprocess.run(before.command, shell=True, check=True, env=sandbox.env, cwd=sandbox.directory)
    (after,) = sandbox.records().values()
    assert len(after.attempts) == 1
    assert after.return_value == before.return_value
    assert after.fingerprint == before.fingerprint


def test_bytes_that_are_no_utf_8(sandbox):
    text = sandbox.run(APP, b"text='a\xff'", "number=1,2")
    assert "All runs ended (2 completed)" in text
    assert sandbox.states() == {"COMPLETED": 2}


def test_values_that_are_no_numbers_and_too_large_ones(sandbox):
    sandbox.run(APP, "number=nan,inf,-inf,100000000000000000000,1e400", "seed=7")
    values = [record.hyperparams["number"] for record in sandbox.records().values()]
    assert len(values) == 4  # 1e400 is inf
    assert sandbox.states() == {"COMPLETED": 4}


@pytest.mark.parametrize("resume", [True, False])
def test_the_same_point_twice_is_run_once(sandbox, resume):
    words = (f"hydra.callbacks.results.resume={str(resume).lower()}", "number=1,1,2,1")
    text = sandbox.run(APP, "case=takes_a_second", *words)
    assert sandbox.ledger() == {f"takes_a_second {n} 0": 1 for n in (1, 2)}
    assert sandbox.states() == {"COMPLETED": 2}
    assert "another launcher" not in text
    assert len(list(sandbox.outputs.glob("*/attempts/*"))) == 0


def test_the_same_failing_point_twice_is_tried_once(sandbox):
    sandbox.run(APP, "case=exits_3_at_once", "number=1,1,2,1", expect=1)
    assert sandbox.states() == {"FAILED": 2}
    assert all(not record.attempts for record in sandbox.records().values())


def test_no_point_at_all(sandbox):
    text = sandbox.run(APP, "number=range(0)")
    assert "nothing was left to run" in text
    assert not sandbox.processes()


# --- Hydra's own settings ---


@pytest.mark.parametrize("method", METHODS)
def test_hydra_job_settings(sandbox, method):
    words = (
        "case=tells_where,fine",
        "hydra.job.chdir=true",
        "hydra.output_subdir=null",
        "+hydra.job.env_set.SET_BY_HYDRA=yes",
        f"hydra.launcher.start_method={method}",
    )
    sandbox.run(APP, *words)
    run = sandbox.outputs / "case_tells_where"
    value = sandbox.record("case_tells_where").return_value
    assert value["cwd"] == value["output_dir"] == str(run)
    assert value["variable"] == "yes"
    assert value["num"] == 0
    assert (run / "relative.txt").exists()
    assert not (run / ".hydra").exists()
    assert sandbox.states() == {"COMPLETED": 2}


def test_without_chdir_the_job_stays(sandbox):
    sandbox.run(APP, "case=tells_where")
    value = sandbox.record("case_tells_where").return_value
    assert value["cwd"] == str(sandbox.directory)
    assert value["variable"] is None
    assert (sandbox.outputs / "case_tells_where" / ".hydra" / "config.yaml").exists()


# --- what is there already ---


@pytest.mark.parametrize("content", ['{"schema_version":1,"mod', "", '{"tool":"another"}', "[]"])
def test_a_foreign_run_json_is_never_overwritten(sandbox, content):
    theirs = sandbox.outputs / "case_fine" / "run.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(content)
    sandbox.run(APP, "case=fine,system_exit_0")
    assert theirs.read_text() == content
    (mine,) = sandbox.outputs.glob("case_fine-*")
    assert RunDir(mine).read().state is RunState.COMPLETED
    assert "2 of 2 done already" in sandbox.run(APP, "case=fine,system_exit_0")


def test_a_foreign_run_json_under_the_longer_name_too(sandbox):
    sandbox.run(APP, "case=fine")
    longer = f"case_fine-{sandbox.record('case_fine').fingerprint[:8]}"
    shutil.rmtree(sandbox.outputs)
    for name in ("case_fine", longer):
        (sandbox.outputs / name).mkdir(parents=True)
        (sandbox.outputs / name / "run.json").write_text("{}")
    sandbox.run(APP, "case=fine")
    (mine,) = set(sandbox.outputs.glob("case_fine*")) - {
        sandbox.outputs / "case_fine",
        sandbox.outputs / longer,
    }
    assert RunDir(mine).read().state is RunState.COMPLETED


@pytest.mark.parametrize("content", ['{"schema_version":1,"mod', ""])
def test_a_truncated_record_of_our_own_is_run_again(sandbox, content):
    sandbox.run(APP, "case=fine,system_exit_0")
    mine = RunDir(sandbox.outputs / "case_fine")
    mine.record.write_text(content)
    text = sandbox.run(APP, "case=fine,system_exit_0")
    assert "1 of 2 done already" in text
    assert mine.read().state is RunState.COMPLETED
    assert (mine.attempts / "1" / "run.json").read_text() == content


def test_a_file_where_a_run_wants_its_directory(sandbox):
    sandbox.outputs.mkdir()
    (sandbox.outputs / "case_fine").write_text("mine")
    text = sandbox.run(APP, "case=fine,system_exit_0", expect=1)
    assert "case=fine" in text
    assert "Completed 2 out of 2" in text
    assert (sandbox.outputs / "case_fine").read_text() == "mine"
    assert sandbox.record("case_system_exit_0").state is RunState.COMPLETED


def test_another_config_under_the_same_name_gets_another_directory(sandbox):
    sandbox.run(APP, "case=fine")
    before = (sandbox.outputs / "case_fine" / "run.json").read_bytes()
    for _ in range(2):
        sandbox.run(APP, "case=fine", env={"SWEEP_BASE": "1"})
    assert (sandbox.outputs / "case_fine" / "run.json").read_bytes() == before
    assert len(sandbox.records()) == 2
    assert sandbox.ledger() == {"fine 0 0": 2}


# --- disks ---


@contextmanager
def small_disk(path, size, *, read_only=False):
    path.mkdir(parents=True, exist_ok=True)
    options = f"size={size}" + (",ro" if read_only else "")
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no disk of one's own can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_a_task_fills(sandbox):
    with small_disk(sandbox.outputs, "4m"):
        # One after the other: what ends while the disk is full cannot say so on it.
        one = "hydra.launcher.max_processes=1"
        text = sandbox.run(APP, "case=fine,writes_much,system_exit_0", one, expect=1)
        assert sandbox.record("case_fine").state is RunState.COMPLETED
        assert "No space left on device" in text
        assert not sandbox.processes()
        (sandbox.outputs / "case_writes_much" / "big").unlink(missing_ok=True)
        text = sandbox.run(APP, "case=fine,system_exit_0")
        assert sandbox.states()["COMPLETED"] >= 2
        assert sandbox.ledger()["fine 0 0"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_disk_that_is_full_while_runs_run(sandbox, method):
    words = ("x=range(6)", f"hydra.launcher.start_method={method}")
    with small_disk(sandbox.outputs, "1m"):
        sweep = hold_and_fill(sandbox, *words)
        assert sweep.wait() == 1
        text = sweep.text
        assert not sandbox.processes()
        for name in ("x_0", "x_1"):
            assert sandbox.record(name).state is RunState.COMPLETED
        for name in ("x_2", "x_3"):
            assert f"{name}/run.json could not be written" in text
            assert sandbox.record(name).state is RunState.RUNNING
        assert "status 1 before its task returned" not in text  # the reason is known
        assert "Results" in text.splitlines()[-1] or "No space left on device" in text
        (sandbox.outputs / "fill").unlink()
        sandbox.run("ledger_app.py", *words)
        assert sandbox.states() == {"COMPLETED": 6}
        assert sandbox.ledger()["0 0"] == sandbox.ledger()["1 0"] == 1


def test_a_full_disk_is_said_without_a_traceback(sandbox):
    with small_disk(sandbox.outputs, "1m"):
        sweep = hold_and_fill(sandbox, "x=range(4)")
        assert sweep.wait() == 1
        assert "Completed 4 out of 4" in sweep.text
        assert "in write_atomic" not in sweep.text


def hold_and_fill(sandbox, *words):
    """Start a sweep; when two runs have finished and two are running, fill the disk."""
    sandbox.env["SWEEP_HOLD_FROM"] = "2"
    sweep = sandbox.start("ledger_app.py", *words)
    while len(sandbox.held()) < 2 or "Completed 2 out of" not in sweep.text:
        assert sweep.process.poll() is None, sweep.text
        time.sleep(0.02)
    quiet = 0
    # Until nothing that was written meanwhile has given room back.
    while quiet < 3:
        quiet = 0 if fill(sandbox.outputs / "fill") else quiet + 1
        time.sleep(0.1)
    sandbox.open_gate()
    return sweep


def fill(path):
    """Write until nothing more fits; how many bytes that was."""
    written = 0
    with path.open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    written += file.write(b"x" * size)
            except OSError:
                continue
    return written


@pytest.mark.parametrize("kind", ["file", "below a file", "read-only"])
@pytest.mark.parametrize("sweeper", ["basic", "grid"])
def test_outputs_that_cannot_be_written(sandbox, kind, sweeper):
    obstacle = sandbox.directory / "obstacle"
    target = obstacle / "outputs" if kind == "below a file" else obstacle
    words = (f"hydra/sweeper={sweeper}", f"hydra.sweep.dir={target}", "case=fine,system_exit_0")
    if kind == "read-only":
        with small_disk(obstacle, "1m", read_only=True):
            text = sandbox.run(APP, *words, expect=1)
    else:
        obstacle.write_text("mine")
        text = sandbox.run(APP, *words, expect=1)
        assert obstacle.read_text() == "mine"
    assert str(obstacle) in text
    if sweeper == "grid":  # Hydra's own sweeper makes the directory before anybody is asked
        assert f"The outputs directory {target} cannot be written" in text
        assert "Traceback" not in text
    assert not sandbox.ledger()
    assert not sandbox.processes()


def test_outputs_that_vanish_while_runs_run(sandbox):
    sandbox.env["SWEEP_HOLD_FROM"] = "2"
    sweep = sandbox.start("ledger_app.py", "x=range(6)")
    while len(sandbox.held()) < 2 or "Completed 2 out of" not in sweep.text:
        assert sweep.process.poll() is None, sweep.text
        time.sleep(0.02)
    shutil.rmtree(sandbox.outputs)
    sandbox.open_gate()
    assert sweep.wait() in (0, 1)
    assert "Completed 6 out of 6" in sweep.text
    assert not sandbox.processes()
    for name in ("x_2", "x_3", "x_5"):
        assert sandbox.record(name).state.is_final
    # The directory of the next run was made before: it cannot be started, and that is said.
    assert "FAILED x_4: FileNotFoundError" in sweep.text or sandbox.record("x_4").state.is_final


def test_a_limit_on_open_files(sandbox):
    """Descriptors do not pile up with the number of runs."""
    sweep = sandbox.start(APP, "case=fine", "number=range(60)", "hydra.launcher.max_processes=4")
    most = 0
    while sweep.process.poll() is None:
        try:
            launcher = psutil.Process(sweep.pid)
            family = [launcher, *launcher.children(recursive=True)]
            most = max([most, *(process.num_fds() for process in family)])
        except psutil.Error:
            continue
    assert sweep.wait() == 0
    assert 0 < most < 60
