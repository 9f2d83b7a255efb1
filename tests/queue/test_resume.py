"""The same command again, a little different each time; two at once; other launchers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
from hydra.core.utils import JobStatus

from orchestrator.record import RunState
from orchestrator.store import RunDir, find_runs

APP = "ledger_app.py"
APPS = Path(__file__).parent / "apps"
METHODS = ("fork", "spawn")


def once(xs, seeds=(0,)):
    return {f"{x} {seed}": 1 for x in xs for seed in seeds}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_again_runs_nothing(sandbox, method):
    words = ("x=range(4)", "seed=range(3)", f"hydra.launcher.start_method={method}")
    first = sandbox.run(APP, *words)
    assert "done already" not in first
    before = {n: (sandbox.outputs / n / "run.json").read_bytes() for n in sandbox.records()}
    assert len(before) == 12
    text = sandbox.run(APP, *words)
    assert "12 of 12 done" in text
    assert "run again with hydra.callbacks.results.resume=false" in text
    assert "code changed" not in text
    assert sandbox.ledger() == once(range(4), range(3))
    for name, content in before.items():
        assert (sandbox.outputs / name / "run.json").read_bytes() == content


def test_the_order_and_the_spelling_of_overrides_do_not_matter(sandbox):
    sandbox.run(APP, "x=1,2", "seed=0,1")
    text = sandbox.run(APP, "seed=1,0", "++x=2,1")
    assert "4 of 4 done" in text
    assert sandbox.ledger() == once((1, 2), (0, 1))


def test_a_default_spelled_out_is_the_same_run(sandbox):
    sandbox.run(APP, "x=1,2")
    assert "2 of 2 done" in sandbox.run(APP, "x=1,2", "seed=0")
    assert sandbox.ledger() == once((1, 2))


def git(directory, *words):
    keys = ("user.name=t", "user.email=t@example.org", "commit.gpgsign=false")
    who = [word for key in keys for word in ("-c", key)]
    done = subprocess.run(
        ["git", *who, *words], cwd=directory, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(directory, content):
    (directory / "code.py").write_text(content)
    git(directory, "add", "code.py")
    git(directory, "commit", "-qm", content)
    return git(directory, "rev-parse", "HEAD")


def test_a_change_of_the_code_is_said(sandbox):
    git(sandbox.directory, "init", "-q")
    app = shutil.copy(APPS / APP, sandbox.directory)
    git(sandbox.directory, "add", app)
    old = commit(sandbox.directory, "first")
    assert "code changed" not in sandbox.run(app, "x=1,2")
    assert sandbox.record("x_1").versions.git_commit == old
    assert sandbox.record("x_1").versions.git_dirty is False
    new = commit(sandbox.directory, "second")
    text = sandbox.run(app, "x=1,2")
    assert f"2 of 2 done already; code changed since: {old[:7]} → {new[:7]}; run again with" in text
    (sandbox.directory / "code.py").write_text("third")
    text = sandbox.run(app, "x=1,2,3")
    assert "2 of 3 done already" in text
    assert f"code changed since: {old[:7]} → {new[:7]}+edits" in text
    assert sandbox.record("x_3").versions.git_dirty is True
    assert sandbox.ledger() == once((1, 2, 3))


def test_what_failed_is_run_again(sandbox):
    sandbox.run(APP, "x=range(4)", "fail_from=2", expect=1)
    assert sandbox.states() == {"COMPLETED": 2, "FAILED": 2}
    sandbox.run(APP, "x=range(4)", "fail_from=2", expect=1)
    assert len(sandbox.record("x_2_fail_from_2").attempts) == 1
    sandbox.open_gate()
    assert "2 of 4 done" in sandbox.run(APP, "x=range(4)", "fail_from=2")
    assert sandbox.ledger() == once(range(4))
    run = RunDir(sandbox.outputs / "x_2_fail_from_2")
    record = run.read()
    assert record.state is RunState.COMPLETED
    assert [attempt.state for attempt in record.attempts] == [RunState.FAILED] * 2
    assert record.attempts[0].error.message == "x is 2"
    for number in ("1", "2"):
        old = RunDir(run.attempts / number)
        assert old.read().state is RunState.FAILED
        assert "ValueError: x is 2" in old.stderr.read_text()
        assert not old.arrays.exists()  # a task that goes on from a checkpoint finds it
    assert "ValueError" not in run.stderr.read_text()
    assert run.metrics.read_text().count("\n") == 1
    assert len(list(find_runs(sandbox.outputs))) == 4  # old attempts are no runs


def test_resume_off_does_it_again_and_keeps_the_old(sandbox):
    sandbox.run(APP, "x=1,2")
    old = (sandbox.outputs / "x_1" / "run.json").read_bytes()
    text = sandbox.run(APP, "x=1,2", "hydra.callbacks.results.resume=false")
    assert "done already" not in text
    assert sandbox.ledger() == {"1 0": 2, "2 0": 2}
    run = RunDir(sandbox.outputs / "x_1")
    assert [attempt.state for attempt in run.read().attempts] == [RunState.COMPLETED]
    aside = RunDir(run.attempts / "1")
    assert aside.record.read_bytes() == old
    for part in (aside, run):
        assert part.stdout.exists()
        assert part.metrics.read_text().count("\n") == 1
        assert (part.path / ".hydra" / "config.yaml").exists()
        with np.load(part.arrays) as arrays:
            assert arrays["curve"].tolist() == [1, 2, 3]
    assert len(sandbox.records()) == 2
    assert "2 of 2 done" in sandbox.run(APP, "x=1,2")


def test_a_changed_base_config_gets_another_directory(sandbox):
    sandbox.run(APP, "x=1,2")
    before = {name: record.fingerprint for name, record in sandbox.records().items()}
    for _ in range(2):
        sandbox.run(APP, "x=1,2", env={"SWEEP_BASE": "5"})
    records = sandbox.records()
    assert {name: records[name].fingerprint for name in before} == before
    names = {
        f"{name}-{r.fingerprint[:8]}"
        for name, r in zip(("x_1", "x_2"), _new(records, before), strict=True)
    }
    assert set(records) == {"x_1", "x_2"} | names
    assert sandbox.ledger() == {"1 0": 2, "2 0": 2}


def _new(records, before):
    new = [record for name, record in records.items() if name not in before]
    return sorted(new, key=lambda record: record.index)


def test_a_wider_grid_runs_only_what_is_new(sandbox):
    sandbox.run(APP, "x=1,2")
    text = sandbox.run(APP, "x=0,1,2,3", "seed=0,1")
    assert "2 of 8 done" in text
    assert sandbox.ledger() == once(range(4), (0, 1))
    # Whether a default is in the name depends on the command; the run is the same.
    assert sandbox.states() == {"COMPLETED": 8}
    assert "2 of 2 done" in sandbox.run(APP, "x=1,2")


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_the_basic_sweeper(sandbox, method):
    words = (
        "x=range(5)",
        "hydra/sweeper=basic",
        "hydra.sweeper.max_batch_size=2",
        f"hydra.launcher.start_method={method}",
    )
    sandbox.run(APP, *words)
    assert {r.index: r.hyperparams["x"] for r in sandbox.records().values()} == dict(
        enumerate(range(5))
    )
    text = sandbox.run(APP, *words)
    assert text.count("2 of 2 done") == 2
    assert text.count("1 of 1 done") == 1
    assert sandbox.ledger() == once(range(5))
    assert not sandbox.processes()


def test_the_grid_sweeper_resumes_too(sandbox):
    sandbox.run(APP, "hydra/sweeper=grid", "x=range(3)")
    text = sandbox.run(APP, "hydra/sweeper=grid", "x=range(5)")
    assert "3 of 5 done" in text
    assert "2 of 2 done" in sandbox.run(APP, "hydra/sweeper=basic", "x=0,4")
    assert sandbox.ledger() == once(range(5))


def test_a_run_that_was_moved_is_not_done(sandbox):
    sandbox.run(APP, "x=1,2")
    (sandbox.outputs / "x_1").rename(sandbox.directory / "x_1")
    assert "1 of 2 done" in sandbox.run(APP, "x=1,2")
    assert sandbox.ledger() == {"1 0": 2, "2 0": 1}


# --- return values, as a sweeper sees them ---


@pytest.mark.parametrize("method", METHODS)
def test_recorded_values_answer_the_sweeper(
    hydra_restore_singletons, hydra_sweep_runner, tmp_path, method
):
    ledger = tmp_path / "ledger"

    def task(cfg):
        with ledger.open("a") as file:
            file.write(f"{cfg.x}\n")
        return {"loss": cfg.x / 4, "bad": float("nan")}

    def sweep(x, task_function=task):
        return hydra_sweep_runner(
            calling_file=None,
            calling_module="hydra.test_utils.a_module",
            task_function=task_function,
            config_path=None,
            config_name=None,
            overrides=[
                "hydra/launcher=gpu_queue",
                "hydra/callbacks=results",
                "hydra/output=named",
                "hydra.launcher.max_processes=2",
                f"hydra.launcher.start_method={method}",
                "hydra.sweeper.max_batch_size=2",
                f"+x={x}",
            ],
            temp_dir=tmp_path / "outputs",
        )

    with sweep("3,1") as first:
        ((a, b),) = first.returns
        assert [a.return_value["loss"], b.return_value["loss"]] == [0.75, 0.25]
        with sweep("1,2,3") as second:
            (one, two), (three,) = second.returns
            returned = [one, two, three]
            assert [r.status for r in returned] == [JobStatus.COMPLETED] * 3
            assert [r.return_value["loss"] for r in returned] == [0.25, 0.5, 0.75]
            assert all(np.isnan(r.return_value["bad"]) for r in returned)
            assert [list(r.overrides) for r in returned] == [["+x=1"], ["+x=2"], ["+x=3"]]
            assert [r.cfg.x for r in returned] == [1, 2, 3]
            assert [r.hydra_cfg.hydra.job.num for r in returned] == [0, 1, 2]
            assert one.hydra_cfg.hydra.runtime.output_dir == str(tmp_path / "outputs" / "x_1")
            assert sorted(ledger.read_text().split()) == ["1", "2", "3"]


# --- two launchers on one outputs directory ---


@pytest.mark.parametrize("method", METHODS)
def test_two_launchers_at_once_share_the_work(sandbox, method):
    sandbox.env["SWEEP_HOLD_FROM"] = "0"
    words = ("x=range(8)", f"hydra.launcher.start_method={method}")
    sweeps = [sandbox.start(APP, *words) for _ in range(2)]
    sandbox.until(
        lambda: len(sandbox.held()) == 4, lambda: "\n".join(sweep.text for sweep in sweeps)
    )
    sandbox.open_gate()
    assert [sweep.wait() for sweep in sweeps] == [0, 0], "\n".join(s.text for s in sweeps)
    assert sandbox.ledger() == once(range(8))
    assert sandbox.states() == {"COMPLETED": 8}
    assert "is being run by another launcher; waiting" in sweeps[0].text + sweeps[1].text
    for sweep in sweeps:
        assert "8 out of 8" in sweep.text or "of 8 done" in sweep.text
    results = list(sandbox.outputs.glob(".sweeps/*/train_sweep_results.json"))
    assert len(results) == 2
    assert all(result.read_bytes().count(b'"success":true') == 8 for result in results)


def test_two_launchers_in_a_race_for_short_runs(sandbox):
    sweeps = [sandbox.start(APP, "x=range(40)") for _ in range(3)]
    assert [sweep.wait(120) for sweep in sweeps] == [0, 0, 0], "\n".join(s.text for s in sweeps)
    assert sandbox.ledger() == once(range(40))
    assert sandbox.states() == {"COMPLETED": 40}


def test_a_launcher_takes_over_from_one_that_died(sandbox):
    sandbox.env["SWEEP_HOLD_FROM"] = "0"
    first = sandbox.start(APP, "x=0,1")
    sandbox.until(lambda: len(sandbox.held()) == 2, lambda: first.text)
    second = sandbox.start(APP, "x=0,1")
    sandbox.until(lambda: "another launcher" in second.text, lambda: second.text)
    for path in sandbox.state.glob("held-*"):
        path.unlink()
    first.signal(signal.SIGKILL)
    sandbox.until(lambda: len(sandbox.held()) == 2, lambda: second.text)
    sandbox.open_gate()
    assert second.wait() == 0
    assert sandbox.ledger() == once((0, 1))
    for record in sandbox.records().values():
        assert record.state is RunState.COMPLETED
        assert [attempt.state for attempt in record.attempts] == [RunState.CANCELLED]


def test_a_launcher_that_waits_for_another_can_be_interrupted(sandbox):
    sandbox.env["SWEEP_HOLD_FROM"] = "0"
    first = sandbox.start(APP, "x=0,1")
    sandbox.until(lambda: len(sandbox.held()) == 2, lambda: first.text)
    second = sandbox.start(APP, "x=0,1,2")
    sandbox.until(lambda: len(sandbox.held()) == 3, lambda: second.text)
    second.signal(signal.SIGINT)
    assert second.wait() == 130
    assert first.process.poll() is None
    sandbox.open_gate()
    assert first.wait() == 0
    assert sandbox.ledger() == once((0, 1))
    assert sandbox.record("x_2").state is RunState.CANCELLED


# --- the callback under other launchers ---

OTHERS = {
    "basic": ("hydra/launcher=basic",),
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit_local": ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
}
NAMED = ("hydra/callbacks=results", "hydra/output=named")


@pytest.mark.parametrize("launcher", OTHERS)
def test_records_under_other_launchers(sandbox, launcher):
    words = (*OTHERS[launcher], *NAMED)
    text = sandbox.run(APP, "x=range(3)", "fail_from=2", common=words, expect=1)
    assert "x is 2" in text
    records = sandbox.records()
    names = [f"x_{x}_fail_from_2" for x in range(3)]
    assert sorted(records) == names
    for x, name in enumerate(names):
        record = records[name]
        assert record.model_name == name
        assert record.hyperparams == {"x": x, "fail_from": 2}
        assert record.index == x
        assert record.seed == 0
        assert record.duration_seconds >= 0
        assert RunDir(sandbox.outputs / name).metrics.read_text().count("\n") == 1
        with np.load(sandbox.outputs / name / "arrays.npz") as arrays:
            assert arrays["curve"].tolist() == [x, x + 1, x + 2]
        if x < 2:
            assert record.state is RunState.COMPLETED
            assert record.metrics == {"loss": x / 2, "score": 10 * x}
            assert record.return_value == {"loss": x / 2, "score": 10 * x}
        else:
            assert record.state is RunState.FAILED
            assert record.metrics == {"loss": 1.0}
            assert (record.error.type, record.error.message) == ("ValueError", "x is 2")
            assert "in main" in record.error.traceback
    assert sandbox.ledger() == once(range(2))


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_what_another_launcher_finished_is_done_for_the_queue(sandbox, launcher):
    sandbox.run(APP, "x=range(3)", common=(*OTHERS[launcher], *NAMED))
    assert "3 of 4 done" in sandbox.run(APP, "x=range(4)")
    assert sandbox.ledger() == once(range(4))


def test_a_single_run_without_any_launcher(sandbox):
    sandbox.run(APP, "x=3", common=NAMED, mode="hydra.verbose=false")
    record = sandbox.record("x_3")
    assert record.state is RunState.COMPLETED
    assert record.metrics == {"loss": 1.5, "score": 30}
    assert "1 of 2 done" in sandbox.run(APP, "x=3,4")
    assert sandbox.ledger() == once((3, 4))


@pytest.mark.parametrize(
    ("case", "code", "kind"),
    [
        ("system_exit_3", 3, "SystemExit"),
        ("raises_unreadable", 1, "UnreadableError"),
        ("raises_unpicklable", 1, "LockedError"),
        ("keyboard_interrupt", None, "KeyboardInterrupt"),
    ],
)
def test_bad_ends_under_the_basic_launcher(sandbox, case, code, kind):
    sweep = sandbox.start("hostile_app.py", f"case={case}", common=("hydra/launcher=basic", *NAMED))
    status = sweep.wait()
    assert status == code if code is not None else status != 0
    record = sandbox.record(f"case_{case}")
    expected = RunState.CANCELLED if kind == "KeyboardInterrupt" else RunState.FAILED
    assert record.state is expected
    assert record.error.type == kind


def test_an_interrupt_under_the_basic_launcher(sandbox):
    sandbox.env["SWEEP_HOLD_FROM"] = "1"
    sweep = sandbox.start(APP, "x=range(3)", common=("hydra/launcher=basic", *NAMED))
    sandbox.until(sandbox.held, lambda: sweep.text)
    sweep.signal(signal.SIGINT)
    assert sweep.wait() != 0
    assert sandbox.record("x_0").state is RunState.COMPLETED
    assert sandbox.record("x_1").state is RunState.CANCELLED
    sandbox.open_gate()
    assert "1 of 3 done" in sandbox.run(APP, "x=range(3)")
    assert sandbox.ledger() == once(range(3))


def test_a_joblib_worker_that_is_killed_reads_lost(sandbox):
    from orchestrator.store import observed_state

    sandbox.env["SWEEP_HOLD_FROM"] = "0"
    sweep = sandbox.start(APP, "x=range(2)", common=(*OTHERS["joblib"], *NAMED))
    sandbox.until(lambda: len(sandbox.held()) == 2, lambda: sweep.text)
    os.kill(sandbox.record("x_0").pid, signal.SIGKILL)
    assert sweep.wait() != 0
    sandbox.until(
        lambda: not psutil.pid_exists(sandbox.record("x_1").pid) or sandbox.open_gate(),
        "the end of the other worker",
    )
    assert observed_state(sandbox.record("x_0")) is RunState.LOST
