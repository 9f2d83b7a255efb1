"""orchestrator-aggregate, as a user types it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import polars as pl
import pytest
from click.testing import CliRunner

from orchestrator.cli.aggregate import main
from orchestrator.record import ErrorInfo, RunRecord, RunState
from orchestrator.store import RunDir


def write(path, **fields):
    fields.setdefault("state", RunState.COMPLETED)
    fields.setdefault("success", fields["state"] is RunState.COMPLETED)
    RunDir(path).write(RunRecord(model_name=path.name, **fields))


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_module(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.aggregate", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def outputs(tmp_path):
    """Two learning rates with three seeds each, one failed, one still running elsewhere."""
    root = tmp_path / "outputs"
    for lr in (0.1, 0.2):
        for seed in range(3):
            write(
                root / "grid" / f"lr_{lr}_seed_{seed}",
                hyperparams={"lr": lr, "epochs": 5, "seed": seed},
                seed=seed,
                fingerprint=f"{lr}-{seed}",
                metrics={"acc": lr + seed / 100, "loss": 1 - lr},
                command=f"python app.py lr={lr} seed={seed}",
            )
    write(
        root / "bad",
        state=RunState.FAILED,
        hyperparams={"lr": 0.2, "epochs": 5, "seed": 3},
        error=ErrorInfo("ValueError", "diverged\nat step 3"),
    )
    write(
        root / "going",
        state=RunState.RUNNING,
        host="elsewhere",
        hyperparams={"lr": 0.3, "epochs": 5, "seed": 0},
    )
    return root


def test_the_table_pools_seeds_and_names_the_best_setting(outputs):
    result = invoke(outputs, "--metric", "acc")
    assert result.exit_code == 0, result.output
    assert "8 runs: 6 COMPLETED" in result.output
    assert "the same in all: epochs=5" in result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["lr", "acc", "std", "err", "n", "failed", "unfinished"] in lines
    # Standard error of x, x + 0.01, x + 0.02: 0.01 / sqrt(3).
    assert ["0.2", "0.21", "0.0058", "3", "1", "0"] in lines
    assert ["0.1", "0.11", "0.0058", "3", "0", "0"] in lines
    assert ["0.3", "-", "-", "0", "0", "1"] in lines
    assert "best (highest mean acc): lr=0.2: 0.21 ± 0.0058 (n=3)" in result.output
    assert "grid/lr_0.2_seed_0 grid/lr_0.2_seed_1 grid/lr_0.2_seed_2" in result.output
    assert "its best run again: python app.py lr=0.2 seed=2" in result.output
    assert ["bad", "FAILED", "ValueError:", "diverged"] in lines
    assert ["going", "RUNNING"] in lines


def test_the_files_hold_every_run(outputs):
    assert invoke(outputs, "--quiet").output == ""
    for name in ("csv", "parquet"):
        table = getattr(pl, f"read_{name}")(outputs / f"results.{name}")
        assert table["directory"].to_list()[:3] == ["bad", "going", "grid/lr_0.1_seed_0"]
        assert len(table) == 8
    assert len(json.loads((outputs / "results.json").read_text())) == 8
    again = invoke(outputs, "--quiet")
    assert (again.exit_code, again.output) == (0, "")


def test_the_lowest_can_be_the_best_and_the_metric_decides_the_default(outputs):
    assert "best (lowest mean acc): lr=0.1" in invoke(outputs, "--metric=acc", "--mode=min").output
    assert "best (lowest mean loss): lr=0.2" in invoke(outputs, "--metric=metrics.loss").output
    default = invoke(outputs).output
    assert "compared by acc (max); there are also loss" in default


def test_an_unknown_metric_is_an_error_with_the_nearest_names(outputs):
    result = invoke(outputs, "--metric", "los")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "Did you mean loss?" in result.stderr
    assert "acc, loss" in result.stderr
    assert not (outputs / "results.csv").exists()


def test_output_and_format_choose_where_and_what(outputs, tmp_path):
    result = invoke(outputs, "--output", tmp_path / "merged", "--format", "JSON, csv")
    assert result.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "results.csv",
        "results.json",
    ]
    assert not list(outputs.glob("results.*"))
    assert invoke(outputs, "--format", "xlsx").exit_code == 2
    assert "csv, parquet, json" in invoke(outputs, "--format", "xlsx").stderr


def test_several_directories_are_merged_into_the_current_one(outputs, tmp_path, monkeypatch):
    write(tmp_path / "more" / "grid")
    monkeypatch.chdir(tmp_path)
    assert invoke("outputs", "more", "--quiet").exit_code == 0
    directories = pl.read_csv(tmp_path / "results.csv")["directory"].to_list()
    assert directories[0] == "outputs/bad"
    assert directories[-1] == "more/grid"


def test_the_default_directory_is_outputs(outputs, monkeypatch):
    monkeypatch.chdir(outputs.parent)
    assert invoke("-q").exit_code == 0
    assert (outputs / "results.csv").exists()


def test_top_cuts_the_table_and_zero_shows_all(outputs):
    cut = invoke(outputs, "--top", 1).output
    assert "... and 2 more settings (--top 0 for all)" in cut
    assert "more setting" not in invoke(outputs, "--top", 0).output


@pytest.mark.parametrize(
    "content", [b"", b'{"model_name": "a', b'{"a": 1}', b"\x00\xff", b"[" * 9999]
)
def test_an_unreadable_record_is_named_and_skipped(outputs, content):
    (outputs / "broken").mkdir()
    (outputs / "broken" / "run.json").write_bytes(content)
    result = invoke(outputs)
    assert result.exit_code == 0
    assert f"skipped {outputs}/broken/run.json: " in result.stderr
    assert "1 of 9 records could not be read" in result.stderr
    assert "8 runs" in result.stdout


def test_no_run_and_no_directory_are_sentences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = invoke()
    assert missing.exit_code == 1
    assert "'outputs' does not exist" in missing.stderr
    (tmp_path / "outputs").mkdir()
    empty = invoke()
    assert empty.exit_code == 1
    assert "there is no run below 'outputs'" in empty.stderr
    assert "run.json" in empty.stderr
    assert not any((tmp_path / "outputs").iterdir())
    (tmp_path / "file").write_text("x")
    assert "is a file" in invoke("file").stderr
    (tmp_path / "outputs" / "run.json").write_text("{")
    assert invoke().exit_code == 1
    assert invoke("--mode", "best").exit_code == 2


def test_an_output_that_cannot_be_written_is_a_sentence(outputs, tmp_path):
    (tmp_path / "file").write_text("x")
    result = invoke(outputs, "--output", tmp_path / "file")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


def test_one_run_without_anything_is_enough(tmp_path):
    write(tmp_path / "only")
    result = invoke(tmp_path)
    assert result.exit_code == 0
    assert "1 run: 1 COMPLETED" in result.output
    assert "there is no best setting" in result.output


def test_nan_everywhere_names_no_best(tmp_path):
    write(tmp_path / "a", metrics={"loss": math.nan}, hyperparams={"lr": math.inf})
    result = invoke(tmp_path)
    assert result.exit_code == 0
    assert "no best setting: no completed run has a number as loss" in result.output


def test_odd_hyperparameters_neither_crash_nor_steer_the_terminal(tmp_path):
    values = [
        1,
        "a",
        1.5,
        True,
        None,
        [1, {"b": None}],
        "x/y",
        "<b>&",
        "[red]",
        "é" * 300,
        "\x1b[2J",
    ]
    for number, value in enumerate(values):
        write(tmp_path / str(number), hyperparams={"a/b": value, "ü[bold]": number})
    write(tmp_path / "none")
    result = invoke(tmp_path)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "\\x1b[2J" in result.output
    assert "é" * 57 + "..." in result.output
    table = pl.read_parquet(tmp_path / "results.parquet")
    assert set(table["a/b"]) >= {"1", "a", "1.5", "true", None, '[1, {"b": null}]', "é" * 300}


def test_the_best_setting_names_only_what_it_was_given(tmp_path):
    write(tmp_path / "a", hyperparams={"lr": 1}, metrics={"acc": 0.5})
    write(tmp_path / "b", hyperparams={"lr": 2, "x": 1}, metrics={"acc": 0.4})
    assert "best (highest mean acc): lr=1: 0.5 (n=1)" in invoke(tmp_path).output
    write(tmp_path / "c", metrics={"acc": 0.9})
    assert "mean acc): the config's own values: 0.9 (n=1)" in invoke(tmp_path).output


def test_copies_of_a_run_are_pointed_out(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, fingerprint="f")
    assert "1 run with another's exact config" in invoke(tmp_path).stderr


def test_a_terminal_gets_a_rich_table(outputs, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    main([str(outputs)], standalone_mode=False)
    assert "───" in capsys.readouterr().out


def test_as_a_program_with_a_plain_ascii_terminal(outputs):
    result = run_module(outputs, cwd=outputs, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "best (highest mean acc): lr=0.2" in result.stdout
    failed = run_module("nowhere", cwd=outputs)
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: 'nowhere' does not exist")
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("module", ["aggregate", "status"])
def test_help_loads_nothing_heavy(module):
    code = (
        "import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('orchestrator.cli.{module}', run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'polars', 'numpy', 'hydra', 'omegaconf', 'rich', 'msgspec', 'pandas'}\n"
        "    print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Examples:" in result.stdout
    assert result.stdout.splitlines()[-1] == "HEAVY []"


def test_the_default_metric_is_what_most_runs_have_and_those_without_are_said(tmp_path):
    for seed in range(4):
        write(tmp_path / f"a{seed}", hyperparams={"x": 1}, metrics={"zeta": 1.0}, seed=seed)
    write(tmp_path / "b", hyperparams={"x": 2}, metrics={"acc": 1.0})
    result = invoke(tmp_path)
    assert "compared by zeta (max)" in result.output
    assert "1 completed without zeta: see the last column" in result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["x", "zeta", "std", "err", "n", "failed", "unfinished", "without"] in lines
    assert ["2", "-", "-", "0", "0", "0", "1"] in lines
    assert "without" not in invoke(tmp_path / "b", "--output", tmp_path).output


def test_a_mistyped_seed_key_is_an_error_with_the_nearest(outputs):
    result = invoke(outputs, "--seed-key", "sed")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no run has 'sed'; did you mean seed?")
    assert not (outputs / "results.csv").exists()
    assert invoke(outputs, "--seed-key", "epochs").exit_code == 0


def test_a_cancelled_run_is_unfinished(tmp_path):
    write(tmp_path / "a", state=RunState.CANCELLED, metrics={"acc": 1.0})
    lines = [line.split() for line in invoke(tmp_path).stdout.splitlines()]
    assert ["all", "runs", "-", "-", "0", "0", "1"] in lines


def test_nothing_is_written_into_a_runs_own_directory(outputs, tmp_path):
    run = outputs / "grid" / "lr_0.1_seed_0"
    result = invoke(run)
    assert result.exit_code == 0
    assert "nothing written: this is a run's own directory" in result.output
    assert [path.name for path in run.iterdir()] == ["run.json"]
    assert invoke(run, "--output", tmp_path, "-q").exit_code == 0
    assert (tmp_path / "results.csv").exists()


def test_the_best_runs_command_says_where_it_was_typed(tmp_path, monkeypatch):
    place = tmp_path / "my code"
    write(place / "outputs" / "a", metrics={"acc": 1.0}, command="python app.py", cwd=str(place))
    monkeypatch.chdir(tmp_path)
    assert f"again: cd '{place}' && python app.py\n" in invoke("my code/outputs").output
    monkeypatch.chdir(place)
    assert "again: python app.py\n" in invoke().output


def test_what_was_found_out_is_a_column_of_the_files_too(tmp_path):
    for name, width in (("a", 1), ("b", 2)):
        write(tmp_path / name, hyperparams={"lr": 1}, fingerprint=name, sweep_id=name, seed=0)
        (tmp_path / name / ".hydra").mkdir()
        (tmp_path / name / ".hydra" / "config.yaml").write_text(f"lr: 1\nwidth: {width}\n")
    result = invoke(tmp_path)
    assert "note: runs that were given the same have different configs" in result.stderr
    assert pl.read_csv(tmp_path / "results.csv")["width"].to_list() == [1, 2]
