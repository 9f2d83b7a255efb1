"""orchestrator-status pause, drain and resume, as a user types them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from orchestrator.cli.status import main
from orchestrator.processes import boot_id, hostname
from orchestrator.queue.control import CONTROL_NAME, Control
from orchestrator.record import RunRecord, RunState
from orchestrator.store import RunDir
from orchestrator.sweeps import Sweep

GPUS = [
    {"uuid": "GPU-aa11", "index": 0, "mig": None, "name": "H200"},
    {"uuid": "GPU-aa22", "index": 1, "mig": None, "name": "H200"},
    {"uuid": "MIG-bb1", "index": 2, "mig": 0, "name": "H200 MIG 1g"},
    {"uuid": "MIG-bb2", "index": 2, "mig": 1, "name": "H200 MIG 1g"},
]


def make_sweep(root, name, gpus=GPUS, **changes):
    """A sweep's directory, as one of this very process."""
    content = {
        "schema_version": 1,
        "sweep_id": name,
        "host": hostname(),
        "boot_id": boot_id(),
        "pid": os.getpid(),
        "started_at": time.time(),
        "ended_at": None,
        "runs": [],
        "gpus": gpus,
        **changes,
    }
    directory = root / ".sweeps" / name
    directory.mkdir(parents=True)
    text = json.dumps({key: value for key, value in content.items() if value != "absent"})
    (directory / "sweep.json").write_text(text)
    return directory


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ordered(directory):
    control = Control(directory / CONTROL_NAME)
    control.poll()
    assert control.problem == ""
    return control.queue, control.gpus


def said(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return result.stdout.strip()


def refused(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    return result.stderr


@pytest.fixture
def outputs(tmp_path):
    return tmp_path / "outputs"


@pytest.fixture
def sweep(outputs):
    return make_sweep(outputs, "s1")


# --- the orders ---


@pytest.mark.parametrize(
    ("words", "orders", "sentence"),
    [
        (["pause"], ("pause", []),
         "Sweep s1 starts no new run until it is resumed; what runs goes on."),
        (["drain"], ("drain", []),
         "Sweep s1 ends when what runs now has ended; the same command runs what is missing."),
        (["pause", "--gpu", "0"], ("run", ["GPU-aa11"]),
         "Sweep s1 starts no new run on GPU 0 until it is resumed; what runs there goes on."),
        (["drain", "--gpu", "GPU-aa2"], ("run", ["GPU-aa22"]),
         "Sweep s1 starts no new run on GPU 1 and says when the last there has ended."),
        (["drain", "--gpu", "2:1", "--gpu", "1"], ("run", ["MIG-bb2", "GPU-aa22"]),
         "Sweep s1 starts no new run on GPU 2:1, 1 and says when the last there has ended."),
        (["pause", "--gpu", "2"], ("run", ["MIG-bb1", "MIG-bb2"]),
         "Sweep s1 starts no new run on GPU 2:0, 2:1 until it is resumed; what runs there goes on."),
        (["resume"], ("run", []), "Sweep s1 starts runs again."),
    ],
)  # fmt: skip
def test_an_order_reaches_the_sweep_and_says_what_will_happen(
    sweep, outputs, words, orders, sentence
):
    queue, gpus = orders
    assert said(words[0], outputs, *words[1:]) == sentence
    assert ordered(sweep) == (queue, dict.fromkeys(gpus, words[0]))


def test_orders_add_up_and_are_taken_back(sweep, outputs):
    said("pause", outputs, "--gpu", "0")
    said("drain", outputs, "--gpu", "1")
    assert ordered(sweep) == ("run", {"GPU-aa11": "pause", "GPU-aa22": "drain"})
    last = said("pause", outputs, "--gpu", "2")
    assert last.endswith("No GPU is left to start on.")
    assert said("resume", outputs, "--gpu", "1") == "Sweep s1 starts runs again on GPU 1."
    assert ordered(sweep)[1].keys() == {"GPU-aa11", "MIG-bb1", "MIG-bb2"}
    said("pause", outputs)
    assert said("resume", outputs, "--gpu", "0") == (
        "Sweep s1 may use GPU 0 again. All of it is paused now: resume without --gpu ends that."
    )
    assert ordered(sweep)[0] == "pause"
    assert said("resume", outputs) == "Sweep s1 starts runs again."
    assert ordered(sweep) == ("run", {})


def test_nothing_else_is_written(sweep, outputs):
    RunDir(outputs / "a").write(RunRecord(model_name="a", state=RunState.COMPLETED))

    def contents():
        paths = (path for path in outputs.rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    before = contents()
    for word in ("pause", "drain", "resume"):
        invoke(word, outputs, "--gpu", "0")
        invoke(word, outputs)
        invoke(word, outputs, "--gpu", "9")
    after = contents()
    assert after.keys() - before.keys() == {sweep / CONTROL_NAME}
    assert {path: after[path] for path in before} == before


def test_the_default_is_outputs(sweep, outputs, monkeypatch):
    monkeypatch.chdir(outputs.parent)
    said("pause")
    assert ordered(sweep) == ("pause", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_somebody_elses_sweep_is_a_sentence(sweep, outputs):
    sweep.chmod(0o555)
    try:
        assert "cannot be written" in refused("pause", outputs)
    finally:
        sweep.chmod(0o755)


def test_a_file_system_that_refuses_is_a_sentence(sweep, outputs):
    (sweep / CONTROL_NAME).mkdir()
    text = refused("pause", outputs)
    assert "control.json cannot be written" in text


# --- which sweep ---


def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    "changes",
    [
        {"ended_at": 5.0},
        {"host": "elsewhere"},
        {"boot_id": "an earlier one"},
        {"pid": "dead"},
        # The pid belongs to a process that is younger than the sweep.
        {"started_at": 1000.0},
        {"pid": -1},
        {"pid": "text"},
        {"sweep_id": "absent"},
    ],
)
def test_a_sweep_that_does_not_run_here_gets_no_orders(outputs, changes):
    if changes.get("pid") == "dead":
        changes = {"pid": dead_pid()}
    sweep = make_sweep(outputs, "s1", **changes)
    text = refused("pause", outputs)
    assert "no sweep of this machine runs below" in text
    assert ("elsewhere" in text) == (changes == {"host": "elsewhere"})
    assert not (sweep / CONTROL_NAME).exists()
    assert "no sweep of this machine" in refused("pause", outputs, "--sweep", "s1")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_a_sweep_file_that_cannot_be_read_is_passed_over(sweep, outputs, text):
    other = outputs / ".sweeps" / "odd"
    other.mkdir()
    (other / "sweep.json").write_text(text)
    (outputs / ".sweeps" / "stray").write_text("no directory")
    said("pause", outputs)
    assert ordered(sweep) == ("pause", {})


def test_of_several_one_is_named(outputs):
    first = make_sweep(outputs, "s1")
    second = make_sweep(outputs / "deep" / "er", "s2")
    make_sweep(outputs, "s0", ended_at=3.0)
    text = refused("pause", outputs)
    assert f"2 sweeps run below '{outputs}': s1 (in {outputs}), s2 (in " in text
    assert "--sweep ID" in text
    assert "s0" not in text
    assert not (first / CONTROL_NAME).exists()
    said("pause", outputs, "--sweep", "s2")
    assert ordered(second) == ("pause", {})
    assert ordered(first) == ("run", {})
    assert "sweep s3 does not run below" in refused("drain", outputs, "--sweep", "s3")
    # A directory further down holds just one.
    assert said("drain", outputs / "deep").startswith("Sweep s2 ends")


def test_runs_and_hidden_directories_are_not_searched(outputs):
    RunDir(outputs / "run").write(RunRecord(model_name="run", state=RunState.COMPLETED))
    make_sweep(outputs / "run" / "sub", "s1")
    make_sweep(outputs / ".hidden", "s2")
    assert "no sweep of this machine" in refused("pause", outputs)
    sweep = make_sweep(outputs / "run", "s3")
    said("pause", outputs)
    assert ordered(sweep) == ("pause", {})


def test_no_directory_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'outputs' does not exist" in refused("resume")


def test_a_sweep_as_it_is_really_written(outputs):
    real = Sweep(outputs)
    real.write()
    assert said("pause", outputs) == (
        f"Sweep {real.sweep_id} starts no new run until it is resumed; what runs goes on."
    )
    assert ordered(real.directory) == ("pause", {})
    real.write(ended=True)
    assert "no sweep of this machine" in refused("resume", outputs)


# --- which GPU ---


@pytest.mark.parametrize(
    ("word", "what"),
    [("7", "is none"), ("0:0", "is none"), ("2:7", "is none"), ("GPU-", "may mean several"),
     ("GPU-aa", "may mean several"), ("", "is none"), ("H200", "is none"), ("-1", "is none")],
)  # fmt: skip
def test_a_gpu_that_is_not_there_is_named_beside_those_that_are(sweep, outputs, word, what):
    text = refused("pause", outputs, "--gpu", "0", f"--gpu={word}")
    assert f"GPU {word!r} {what}" in text
    assert "0 (H200 GPU-aa11), 1 (H200 GPU-aa22), 2:0 (H200 MIG 1g MIG-bb1)" in text
    assert not (sweep / CONTROL_NAME).exists()


@pytest.mark.parametrize(
    ("gpus", "words"),
    [([], "uses no GPUs"), (None, "does not say"), ("absent", "does not say")],
)
def test_a_sweep_without_gpus_can_only_be_paused_as_a_whole(outputs, gpus, words):
    sweep = make_sweep(outputs, "s1", gpus=gpus)
    text = refused("pause", outputs, "--gpu", "0")
    assert words in text
    assert "Leave out --gpu" in text
    said("pause", outputs)
    assert ordered(sweep) == ("pause", {})


# --- commands beside the listing ---


def test_a_directory_of_a_commands_name_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write = RunRecord(model_name="a", state=RunState.COMPLETED)
    RunDir(tmp_path / "pause" / "a").write(write)
    assert "1 run: 1 COMPLETED" in invoke("./pause").stdout
    assert "1 run: 1 COMPLETED" in invoke("--state", "completed", "pause").stdout
    assert "1 run: 1 COMPLETED" in invoke("pause/").stdout
    assert "'outputs' does not exist" in refused("pause")


@pytest.mark.parametrize(
    "words",
    [
        ["."],
        [".", "--state", "completed"],
        ["--state", "completed", "."],
        ["--name", "a*", ".", "--json"],
        ["--json", "."],
        ["--", "."],
    ],
)
def test_the_listing_takes_its_words_in_any_order(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    RunDir(tmp_path / "a").write(RunRecord(model_name="a", state=RunState.COMPLETED))
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert "COMPLETED" in result.stdout


@pytest.mark.parametrize("words", [["a", "b"], [".", "pause"], ["--gpu", "0"], ["pause", "a", "b"]])
def test_too_many_words_are_refused(words):
    result = invoke(*words)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


@pytest.mark.parametrize("word", ["pause", "drain", "resume"])
def test_help_has_examples(word):
    text = invoke(word, "--help").stdout
    assert f"Usage: main {word} [OPTIONS] [DIRECTORY]" in text
    assert f"orchestrator-status {word}" in text
    assert word in invoke("-h").stdout.partition("Commands:")[2]


def test_a_shell_completes_commands_and_their_options():
    def complete(args, incomplete):
        shell = ShellComplete(main, {}, "orchestrator-status", "_COMPLETE")
        return {item.value for item in shell.get_completions(args, incomplete)}

    assert "--state" in complete([], "--")
    assert complete(["pause"], "--g") == {"--gpu"}


def test_as_a_program(sweep, outputs):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        content = json.loads((sweep / "sweep.json").read_text())
        content |= {"pid": process.pid, "started_at": time.time()}
        (sweep / "sweep.json").write_text(json.dumps(content))
        words = [sys.executable, "-m", "orchestrator.cli.status"]
        run = subprocess.run(
            [*words, "pause", str(outputs)], capture_output=True, text=True, timeout=60, check=False
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith("Sweep s1 starts no new run")
        assert ordered(sweep) == ("pause", {})
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait(30)
