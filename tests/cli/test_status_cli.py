"""orchestrator-status, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from orchestrator.cli import status as status_cli
from orchestrator.cli.output import duration, printable
from orchestrator.cli.status import main
from orchestrator.processes import boot_id, hostname, own_identity
from orchestrator.record import ErrorInfo, RunRecord, RunState
from orchestrator.results.status import ORDER
from orchestrator.store import RunDir


def write(path, **fields):
    RunDir(path).write(RunRecord(model_name=path.name, **fields))


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def outputs(tmp_path):
    """A live run, one whose process is gone, one failed, one done, one unreadable."""
    root = tmp_path / "outputs"
    pid, started = own_identity()
    here = {"state": RunState.RUNNING, "host": hostname(), "boot_id": boot_id()}
    write(root / "live", pid=pid, pid_started=started, started_at=time.time() - 125, **here)
    (root / "live" / "metrics.jsonl").write_bytes(
        b'{"step": 1, "timestamp": 5.5, "loss": 0.123456}\n{"step": 2, "lo'
    )
    process = subprocess.Popen(["true"])
    process.wait()
    write(root / "lost", pid=process.pid, pid_started=1.0, **here)
    write(
        root / "deep" / "failed",
        state=RunState.FAILED,
        gpu_id=1,
        gpu_uuids=("GPU-5c1e2f3a-0000-0000-0000-000000000000",),
        duration_seconds=3725.0,
        error=ErrorInfo("RuntimeError", "out of memory\nmore"),
    )
    write(root / "done", state=RunState.COMPLETED, success=True, duration_seconds=1.25)
    (root / "odd").mkdir()
    (root / "odd" / "run.json").write_text('{"a": 1}')
    return root


def test_every_run_is_listed_with_what_went_wrong_first(outputs):
    result = invoke(outputs)
    assert result.exit_code == 0, result.output
    header, *rows = [line.split() for line in result.stdout.splitlines() if line]
    assert header[:2] == ["run", "state"]
    assert [row[:2] for row in rows[:-1]] == [
        ["live", "RUNNING"],
        ["lost", "LOST"],
        ["deep/failed", "FAILED"],
        ["odd", "UNREADABLE"],
        ["done", "COMPLETED"],
    ]
    assert rows[0][2:] == ["cpu", str(os.getpid()), "2m05s", "step=1", "loss=0.1235"]
    assert " ".join(rows[2]) == (
        "deep/failed FAILED 1 GPU-5c1e2f3a - 1h02m RuntimeError: out of memory"
    )
    assert "is gone and left no outcome" in " ".join(rows[1])
    assert "model_name" in " ".join(rows[3])
    assert result.stdout.splitlines()[-1] == (
        "5 runs: 1 RUNNING, 1 LOST, 1 FAILED, 1 UNREADABLE, 1 COMPLETED"
    )


def test_states_and_names_filter(outputs):
    result = invoke(outputs, "--state", "failed", "--state", "LOST")
    assert result.stdout.splitlines()[-1] == "2 of 5 runs: 1 LOST, 1 FAILED"
    assert "done" not in result.stdout
    assert invoke(outputs, "--name", "deep/*").stdout.splitlines()[-1] == "1 of 5 runs: 1 FAILED"
    assert invoke(outputs, "--name", "no").stdout == "0 of 5 runs: none match\n"
    assert invoke(outputs, "--state", "UNREADABLE").exit_code == 0
    assert invoke(outputs, "--state", "DONE").exit_code == 2


def test_json_is_strict(outputs):
    (outputs / "live" / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": "NaN"}\n')
    result = invoke(outputs, "--json")

    def refuse(word):
        pytest.fail(f"{word} is not JSON")

    content = json.loads(result.stdout, parse_constant=refuse)
    assert [run["state"] for run in content["runs"]] == [
        "RUNNING",
        "LOST",
        "FAILED",
        "UNREADABLE",
        "COMPLETED",
    ]
    assert content["runs"][0]["metrics"] == {"step": 1, "loss": "NaN"}
    assert content["counts"]["LOST"] == 1
    assert json.loads(invoke(outputs, "--json", "--name", "zzz").stdout) == {
        "runs": [],
        "counts": {},
    }


def test_nothing_is_written(outputs):
    def contents():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in sorted(outputs.rglob("*"))
        }

    before = contents()
    invoke(outputs)
    invoke(outputs, "--json")
    assert contents() == before


def test_only_unreadable_records_are_still_listed(tmp_path):
    (tmp_path / "run.json").write_text("")
    result = invoke(tmp_path)
    assert result.exit_code == 0
    assert "1 run: 1 UNREADABLE" in result.stdout


def test_no_run_and_no_directory_are_sentences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke().exit_code == 1
    assert "'outputs' does not exist" in invoke().stderr
    assert "there is no run below" in invoke(tmp_path).stderr


def test_the_states_offered_are_those_that_exist():
    assert status_cli._STATES == ORDER


def test_as_a_program(outputs):
    result = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.status", str(outputs)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "1 RUNNING" in result.stdout


def test_a_terminal_gets_a_rich_table_without_markup(tmp_path, monkeypatch, capsys):
    write(tmp_path / "[red]x", state=RunState.COMPLETED)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    main([str(tmp_path)], standalone_mode=False)
    output = capsys.readouterr().out
    assert "[red]x" in output
    assert "───" in output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0.0s"),
        (59.94, "59.9s"),
        (59.96, "1m00s"),
        (125, "2m05s"),
        (3599.7, "1h00m"),
        (3725, "1h02m"),
        (90_000, "1d01h"),
    ],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_printed_text_has_no_control_characters_and_an_end():
    assert printable("a\x1b[1m\nb\u202e\udcff") == "a\\x1b[1m\\nb\\u202e\\udcff"
    assert printable("x" * 60) == "x" * 60
    assert printable("x" * 61) == "x" * 57 + "..."
    assert printable("x" * 61, None) == "x" * 61
