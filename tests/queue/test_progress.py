"""What the user sees: plain lines in a pipe, a live bar on a terminal, failures at once."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from orchestrator.queue.progress import Progress, SettingsCount, clock, failure_line
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
    assert lines[0].startswith(
        "Completed 1 out of 4 runs (25.00%): run_0 in 1.2 s [0 of 2 settings"
    )
    assert lines[1].startswith(
        "Completed 2 out of 4 runs (50.00%): run_1 in 1.2 s [1 of 2 settings"
    )
    assert lines[3] == "Completed 4 out of 4 runs (100.00%): run_3 in 1.2 s [2 of 2 settings]"


def test_settings_of_a_plain_list_are_counted_too():
    points = [["lr=1", "seed=0"], ["lr=2", "seed=0"], ["lr=1", "seed=1"]]
    count = SettingsCount(points, "seed")
    assert count.total == 2
    for point in points:
        count.count(point)
    assert count.complete == 2


def test_a_failure_says_why_and_where_in_one_line():
    error = ErrorInfo("ValueError", "bad\nsecond line", "Traceback...")
    line = failure_line(record(state=RunState.FAILED, error=error), "outputs/a")
    assert line == "FAILED a: ValueError: bad (see outputs/a/train_stderr.log)"


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_reader_that_is_gone_ends_no_sweep():
    progress = Progress(1, SettingsCount([[]], "seed"), Gone())
    progress.say("nobody hears this")
    progress.end(0, [], record(), "outputs")
    assert progress.ended == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (59.94, "59.9 s"), (245, "4:05"), (3723, "1:02:03")]
)
def test_times_read_as_people_read_them(seconds, text):
    assert clock(seconds) == text


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
