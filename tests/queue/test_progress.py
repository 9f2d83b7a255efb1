"""What the user sees: plain lines in a pipe, a live bar on a terminal, failures at once."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

from orchestrator.queue.progress import Progress, SettingsCount, failure_line
from orchestrator.record import ErrorInfo, RunRecord, RunState
from orchestrator.sweep.points import Points


def record(name: str = "a", state: RunState = RunState.COMPLETED, **fields) -> RunRecord:
    return RunRecord(model_name=name, state=state, duration_seconds=1.25, **fields)


def test_lines_count_runs_and_pool_seeds_into_settings():
    points = Points([("lr", ["lr=1", "lr=2"]), ("seed", ["seed=0", "seed=1"])])
    stream = io.StringIO()
    progress = Progress(4, SettingsCount(points, "seed"), stream)
    for index, point in enumerate(points):
        progress.start(index, f"run_{index}", "cpu")
        progress.end(index, point, record(f"run_{index}"), "outputs")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("Completed 1 out of 4 runs (25.00%): run_0 in 1.2s [0 of 2 settings")
    assert lines[1].startswith("Completed 2 out of 4 runs (50.00%): run_1 in 1.2s [1 of 2 settings")
    assert lines[3] == "Completed 4 out of 4 runs (100.00%): run_3 in 1.2s [2 of 2 settings]"


def test_settings_of_a_plain_list_are_counted_too():
    points = [["lr=1", "seed=0"], ["lr=2", "seed=0"], ["lr=1", "seed=1"]]
    count = SettingsCount(points, "seed")
    assert count.total == 2
    for point in points:
        count.count(point)
    assert count.complete == 2


def test_a_failure_says_why_and_where_in_one_line(tmp_path):
    error = ErrorInfo("ValueError", "bad\nsecond line", "Traceback...")
    failed = record(state=RunState.FAILED, error=error)
    assert failure_line(failed, "") == "FAILED a: ValueError: bad"
    assert failure_line(failed, str(tmp_path)) == "FAILED a: ValueError: bad"
    (tmp_path / "train_stdout.log").write_text("epoch 1")
    (tmp_path / "train_stderr.log").touch()
    assert failure_line(failed, str(tmp_path)).endswith(f" (see {tmp_path}/train_stdout.log)")
    (tmp_path / "train_stderr.log").write_text("Traceback")
    assert failure_line(failed, str(tmp_path)).endswith(f" (see {tmp_path}/train_stderr.log)")


def test_a_run_that_was_stopped_says_by_what(tmp_path):
    error = ErrorInfo("STOPPED", "the run was ended because it was stopped")
    line = failure_line(record(state=RunState.CANCELLED, error=error), str(tmp_path))
    assert line == "CANCELLED a: stopped by Ctrl+C or a signal"


def test_failed_and_cancelled_runs_are_told_from_completed_ones():
    stream = io.StringIO()
    progress = Progress(8, SettingsCount([[]] * 8, "seed"), stream)
    for state in (RunState.COMPLETED, RunState.FAILED, RunState.TIMEOUT, RunState.LOST):
        progress.end(0, [], record(state=state), "")
    assert (
        stream.getvalue()
        .splitlines()[-1]
        .startswith(
            "Completed 4 out of 8 runs (50.00%), 3 failed: a in 1.2s [0 of 1 setting; about "
        )
    )
    progress.stopping(1)
    assert "Stopping 1 running job; " in stream.getvalue()
    progress.end(0, [], record(state=RunState.CANCELLED), "")
    assert stream.getvalue().splitlines()[-1] == (
        "Completed 5 out of 8 runs (62.50%), 3 failed, 1 cancelled: a in 1.2s [0 of 1 setting]"
    )


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_reader_that_is_gone_ends_no_sweep():
    progress = Progress(1, SettingsCount([[]], "seed"), Gone())
    progress.say("nobody hears this")
    progress.end(0, [], record(), "outputs")
    assert progress.ended == 1


APP = """
import time, hydra
@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    time.sleep(0.6)
    if cfg.x == 2:
        raise ValueError("no [bold]twos[/bold]")
    return cfg.x
main()
"""


def test_on_a_terminal_a_bar_shows_counts_and_running_names(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    master, slave = pty.openpty()
    words = ["hydra/launcher=gpu_queue", "hydra/output=named", "hydra.launcher.max_processes=2"]
    process = subprocess.Popen(
        [sys.executable, "app.py", "-m", *words, "+x=1,2,3", "+seed=0,1"],
        cwd=tmp_path,
        stdout=slave,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(master)
    assert process.wait() == 1
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "running: x_1_seed_0 (cpu)" in text
    assert "6/6 runs" in text
    assert "3/3 settings" in text
    assert "2 failed" in text
    assert "elapsed" in text
    # Text of the user's is never read as markup.
    assert "FAILED x_2_seed_0: ValueError: no [bold]twos[/bold]" in text
