"""orchestrator-export, as a user types it; on a real Slurm in tests/slurm/test_export.py."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import aggregate
from orchestrator.cli.export import main
from orchestrator.overrides import parse_override
from orchestrator.record import RunRecord, RunState
from orchestrator.results.reading import read_runs
from orchestrator.slurm.export.array_task import quoted, read_task
from orchestrator.slurm.export.script import Job, array_calls, ranges
from orchestrator.store import RunDir

APP = """
import os
import sys

import hydra
from hydra.core.config_store import ConfigStore

ConfigStore.instance().store(name="config", node={"x": 0, "text": "", "seed": 0, "minutes": 5})

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    open(f"ran-{cfg.x}", "a").write("!")
    if os.path.exists(f"fail-{cfg.x}"):
        sys.exit(3)
    print("text:", cfg.text)
    return {"score": cfg.x, "text": cfg.text, "threads": os.environ.get("OMP_NUM_THREADS")}

if __name__ == "__main__":
    main()
"""
TEXT = "text='it\\'s\n$(touch pwned) \"ü\"'"
SEARCHING = """
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore

class Searches(BasicSweeper):
    pass

node = {"_target_": "hydra_plugins.searches.Searches", "max_batch_size": None}
ConfigStore.instance().store(group="hydra/sweeper", name="searches", node=node)
"""
WORDS = ("-m", "hydra/sweeper=grid", "hydra/callbacks=results", "hydra/output=named")


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def export(*arguments):
    result = invoke("slurm", *arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with an app in it, whose name a shell would take apart."""
    directory = tmp_path / "it's a $(touch pwned) project"
    directory.mkdir()
    (directory / "app.py").write_text(APP)
    monkeypatch.chdir(directory)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    return directory


def command(*words):
    return ("--", sys.executable, "app.py", *WORDS, *words)


def run_list(directory):
    (path,) = directory.glob("sweep-*.jsonl")
    head, *runs = map(json.loads, path.read_text().splitlines())
    return head, runs


def directives(directory, name="sweep.sbatch"):
    lines = (directory / name).read_text().splitlines()
    return [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]


def task(directory, number, *words, name="sweep.sbatch"):
    """Run one task's script, without Slurm."""
    return subprocess.run(
        ["bash", name, *words],
        cwd=directory,
        env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def records(directory):
    return {run.record.model_name: run.record for run in read_runs([directory]).runs}


def test_a_command_is_listed_and_nothing_runs(project):
    batches = "hydra.sweeper.max_batch_size=4"
    output = export(*command(batches, "x=1,2,3", "seed=0,1"))
    head, runs = run_list(project)
    assert [run["name"] for run in runs] == [f"x_{x}_seed_{s}" for x in (1, 2, 3) for s in (0, 1)]
    assert runs[3]["words"] == [sys.executable, "app.py", *WORDS, "x=2", "seed=1"]
    assert (runs[3]["task"], runs[3]["index"]) == (3, 3)
    assert head["cwd"] == str(project)
    assert directives(project)[0] == f"output={shlex.quote(f'{project}/logs/%A_%a.out')}"
    assert "array=0-5" in directives(project)
    assert "job-name=app" in directives(project)
    assert output.startswith(f"6 runs of sweep {head['sweep_id']}: 6 not begun\n")
    assert output.endswith("\nsbatch sweep.sbatch\n")
    # All that is new: the script, its list, where logs will go, and the sweep's own file.
    found = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    (listed,) = (path.name for path in project.glob("*.jsonl"))
    sweep = f"outputs/.sweeps/{head['sweep_id']}/sweep.json"
    assert found == {"app.py", "sweep.sbatch", listed, sweep}
    written = json.loads((project / sweep).read_bytes())
    assert shlex.split(written["command"])[1:] == ["app.py", *WORDS, batches, "x=1,2,3", "seed=0,1"]
    assert written["axes"] == {"x": ["1", "2", "3"], "seed": ["0", "1"]}
    assert written["total"] == 6


def test_a_command_without_m_is_a_sweep_of_one_and_does_not_run(project):
    export("--", sys.executable, "app.py", "x=1")
    (run,) = run_list(project)[1]
    assert "-m" in run["words"]
    # Where the app writes to a time stamp, all tasks get the same one.
    (fixed,) = (word for word in run["words"] if word.startswith("hydra.sweep.dir="))
    assert run["directory"] == str(project / fixed.partition("=")[2].strip("'") / "0")
    assert not (project / "ran-1").exists()


def test_tasks_leave_ordinary_records_and_what_is_done_is_not_done_again(project):
    lines = (
        "--pre",
        "echo before",
        "--post",
        "echo after",
        "--post",
        "exit 0",
        "--post",
        "echo no",
    )
    (project / "fail-2").touch()
    export(*lines, *command("x=1,2,3", TEXT))
    done, failed = task(project, 0), task(project, 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.index("before") < done.stdout.index("Completed 1") < done.stdout.index("after")
    )
    # The run's own status, whatever the lines after it do.
    assert (failed.returncode, "after" in failed.stdout) == (3, True)
    found = {record.hyperparams["x"]: record for record in records(project / "outputs").values()}
    assert {x: record.state for x, record in found.items()} == {
        1: RunState.COMPLETED,
        2: RunState.FAILED,
    }
    head, runs = run_list(project)
    for x, record in found.items():
        run = runs[x - 1]
        assert (record.sweep_id, record.index) == (head["sweep_id"], x - 1)
        assert (record.model_name, record.cwd) == (run["name"], str(project))
        assert [*record.overrides] == run["overrides"]
        # To be typed again it is the user's own, and does the run again.
        again = "hydra.callbacks.results.resume=false"
        assert [word for word in shlex.split(record.command)[1:] if word != again] == run["words"][
            1:
        ]
    assert found[1].return_value["text"] == 'it\'s\n$(touch pwned) "ü"'
    assert not list(project.parent.rglob("pwned"))

    again = task(project, 0)
    assert (again.returncode, "1 of 1 done already" in again.stdout) == (0, True)
    assert (project / "ran-1").read_text() == "!"
    before = (project / "sweep.sbatch").read_bytes()
    output = export("--missing", "--output", "rest.sbatch")
    assert output.startswith(f"2 of 3 runs of sweep {head['sweep_id']}: 1 FAILED, 1 not begun\n")
    assert "array=1-2" in directives(project, "rest.sbatch")
    assert (project / "sweep.sbatch").read_bytes() == before
    (project / "fail-2").unlink()
    assert [task(project, n, name="rest.sbatch").returncode for n in (1, 2)] == [0, 0]
    assert len(records(project / "outputs")[runs[1]["name"]].attempts) == 1
    assert export("--missing") == "all 3 runs are COMPLETED: nothing to submit\n"
    # One sweep, however many tasks, and no results of a task in place of the sweep's.
    (sweep,) = (project / "outputs" / ".sweeps").iterdir()
    assert [path.name for path in sweep.iterdir()] == ["sweep.json"]
    assert not (project / "outputs" / "multirun.yaml").exists()


def test_a_sweep_that_was_started_is_exported_by_its_directory(project):
    (project / "fail-2").touch()
    words = (*WORDS, "hydra/launcher=gpu_queue", "hydra.launcher.gpus=[]", "x=1,2", "seed=1")
    sweep = [sys.executable, "app.py", *words, "hydra.callbacks.results.resume=false"]
    subprocess.run(sweep, capture_output=True, timeout=60, check=False)
    multirun = (project / "outputs" / "multirun.yaml").read_bytes()
    output = export("--missing")
    assert ": 1 FAILED\n" in output
    head, (run,) = run_list(project)
    assert (run["index"], run["name"]) == (1, "x_2_seed_1")
    assert run["words"][-2:] == ["x=2", "seed=1"]
    assert "resume" not in str(run["words"])
    assert [path.name for path in (project / "outputs" / ".sweeps").iterdir()] == [head["sweep_id"]]
    assert (project / "outputs" / "multirun.yaml").read_bytes() == multirun
    (project / "fail-2").unlink()
    assert task(project, 1).returncode == 0
    record = records(project / "outputs")["x_2_seed_1"]
    assert (record.state, len(record.attempts)) == (RunState.COMPLETED, 1)
    # The last of several sweeps, or the one that is named.
    export("--output", "second.sbatch", *command("x=7"))
    assert export().startswith("1 run of sweep")
    assert export("--sweep", head["sweep_id"]).startswith("2 runs of sweep")
    wrong = invoke("slurm", "--sweep", "2020")
    assert f"there is no sweep 2020 in 'outputs'. There are: {head['sweep_id']}, " in wrong.stderr


def test_runs_that_wait_keep_their_list_when_a_sweep_is_exported_again(project):
    export(*command("x=1,2"))
    head, runs = run_list(project)
    (path,) = project.glob("*.jsonl")
    export("--indices", "1")
    assert len(list(project.glob("*.jsonl"))) == 2
    assert read_task(path, 0) == (head, runs[:1])


def test_what_the_command_and_a_cluster_file_ask_for_becomes_options(project):
    cluster = {"account": "lab", "time": "3:00:00", "partition": "long", "setup": ["module load a"]}
    (project / "cluster.json").write_text(json.dumps(cluster))
    slurm = ("hydra/launcher=slurm", "hydra.launcher.partition=short", "hydra.launcher.qos=low")
    more = ("+hydra.launcher.additional_parameters.mail-type=END", "hydra.launcher.mem_gb=1.5")
    given = ("--option", "qos=high", "--option", "exclusive", "--parallel", "4", "--pre", "ls")
    export("--cluster-file", "cluster.json", *given, *command(*slurm, *more, "x=1,2"))
    assert directives(project)[1:] == [
        *("job-name=app", "partition=long", "qos=high", "mem=1536M", "mail-type=END"),
        *("account=lab", "time=180", "exclusive", "array=0-1%4"),
    ]
    text = (project / "sweep.sbatch").read_text()
    assert text.index("module load a\nls\n") < text.index("array_task")
    # The launcher's own words stay in the run's line, and do no harm in a task.
    assert [word for word in run_list(project)[1][0]["words"] if word in slurm] == [*slurm]
    (project / "sweep.sbatch").write_text(text.replace("module load a", ""))
    assert task(project, 0).returncode == 0


def test_resources_that_differ_among_runs_are_refused(project):
    words = ("hydra/launcher=slurm", "hydra.launcher.timeout_min=${minutes}", "minutes=1,2")
    result = invoke("slurm", *command(*words))
    assert result.exit_code == 1
    assert "hydra.launcher.timeout_min differs from run to run" in result.stderr
    # Nothing stays of a sweep that was not exported.
    assert not (project / "outputs").exists()
    export(*command(*words[:2], "minutes=7", "x=1,2"))
    assert "time=7" in directives(project)


def test_runs_share_a_task(project):
    (project / "fail-2").touch()
    export("--runs-per-task", "2", *command("x=1,2,3"))
    assert "array=0-1" in directives(project)
    assert [run["task"] for run in run_list(project)[1]] == [0, 0, 1]
    assert task(project, 0).returncode == 1
    found = {r.hyperparams["x"]: (r.index, r.state.value) for r in records("outputs").values()}
    assert found == {1: (0, "COMPLETED"), 2: (1, "FAILED")}


def test_a_script_runs_in_other_hands(project, tmp_path):
    """--python names what a pre line has put there, and the run takes that interpreter."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "mine").write_text(f'#!/bin/sh\necho mine; exec {shlex.quote(sys.executable)} "$@"')
    (binaries / "mine").chmod(0o755)
    path = shlex.quote(str(binaries))
    export("--python", "mine", "--pre", f"PATH={path}:$PATH", "--pre", "cd /", *command("x=1"))
    done = task(tmp_path, 0, name=project / "sweep.sbatch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine\nRuns: x_1\n" in done.stdout
    # Where the directory in which the sweep was typed is not to be had, nothing runs.
    project.rename(project.with_name("moved"))
    gone = task(tmp_path, 0, name=tmp_path / "moved" / "sweep.sbatch")
    assert (gone.returncode, "No such file or directory" in gone.stderr) == (1, True)


def test_arrays_larger_than_the_cluster_allows_take_an_offset(project):
    calls = export("--array-size", "3", *command("x=range(8)")).splitlines()[-3:]
    assert calls == [
        "sbatch sweep.sbatch",
        "sbatch --array=0-2 sweep.sbatch 3",
        "sbatch --array=0-1 sweep.sbatch 6",
    ]
    assert "#   sbatch --array=0-1 sweep.sbatch 6\n" in (project / "sweep.sbatch").read_text()
    assert task(project, 1, "6").returncode == 0
    assert [*records("outputs")] == ["x_7"]
    missing = task(project, 2, "6")
    assert (missing.returncode, "has no run for task 8" in missing.stderr) == (1, True)


@pytest.mark.parametrize(
    ("tasks", "size", "calls"),
    [
        ([0], 1001, [(0, "0")]),
        ([*range(2500)], 1001, [(0, "0-999"), (1000, "0-999"), (2000, "0-499")]),
        ([1, 2, 5, 1500, 1502], 1001, [(0, "1-2,5"), (1000, "500,502")]),
        ([29, 30], 30, [(0, "29"), (30, "0")]),
        ([0, 1], 1, [(0, "0"), (1, "0")]),
    ],
)
def test_arrays_are_cut_to_what_slurm_takes(tasks, size, calls):
    assert array_calls(tasks, size) == calls


def test_numbers_in_order_become_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert array_calls([3, 4], 9, parallel=2) == [(0, "3-4%2")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--indices", "0-2", *command("x=1,2")), "--indices has 2, and the sweep has 2 runs"),
        (("--indices", "2-1", *command("x=1,2")), "--indices has '2-1'; expected numbers"),
        (("--", "true"), "true ended without listing its runs"),
        (("--", "no-such-program"), "'no-such-program' cannot be started: No such file"),
        (("--",), "there is no command after --"),
        (("outputs", *command("x=1")), "'outputs' and a command were given"),
        (("--sweep", "1", *command("x=1")), "--sweep is for a sweep that was started"),
        ((), "there is no sweep in 'outputs'"),
        (command("y=1"), "Could not override 'y'"),
        (("--option", "ar ray=1", *command("x=1")), "'ar ray' is no option of sbatch"),
        (("--option", "array=1", *command("x=1")), "array is not yours to set"),
        (("--option", "comment=a\nb", *command("x=1")), "expected one line of plain text"),
        (("--output", "a\nb", *command("x=1")), "expected a path without backslashes"),
    ],
)
def test_mistakes_are_said_in_a_sentence(project, words, says):
    result = invoke("slurm", *words)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in project.iterdir()] == ["app.py"]


def test_a_sweeper_that_needs_results_cannot_be_listed(project):
    (project / "hydra_plugins").mkdir()
    (project / "hydra_plugins" / "searches.py").write_text(SEARCHING)
    result = invoke(
        "slurm", "--", sys.executable, "app.py", "-m", "hydra/sweeper=searches", "x=1,2"
    )
    assert "Searches needs the results of its first runs" in result.stderr


def test_a_sweep_typed_elsewhere_says_what_to_do(project):
    folder = project / "outputs" / ".sweeps" / "s1"
    folder.mkdir(parents=True)
    told = {"sweep_id": "s1", "command": "python app.py", "cwd": "/gone", "started_at": 1.0}
    (folder / "sweep.json").write_text(json.dumps(told))
    result = invoke("slurm")
    assert "was typed in '/gone', which is not here" in result.stderr
    assert "orchestrator-export slurm -- python app.py" in result.stderr


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_a_value_of_an_override(text):
    from omegaconf import OmegaConf

    value = parse_override(f"key={quoted(text)}").value()
    if "\\${" not in text:  # which no file name on a cluster has
        assert OmegaConf.create({"key": str(value)}).key == text


def test_options_take_the_place_of_earlier_ones():
    job = Job()
    job.take({"gpus_per_node": 2, "nodes": None, "tasks_per_node": 1, "timeout_min": 1.5})
    job.take({"setup": ["a"], "runs_per_job": 3, "queue": {"max_processes": 2}, "python": "py"})
    job.option("gpus-per-node", "a100:1")
    assert job.options == {"gpus-per-node": "a100:1", "ntasks-per-node": "1", "time": "2"}
    assert (job.pre, job.runs_per_task, job.python) == (["a"], 3, "py")
    assert job.queue == {"max_processes": 2}


# rsync.


def fetch(*arguments):
    result = invoke("rsync", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_rsync_line_is_printed_for_the_shell():
    assert fetch("cluster:proj/outputs") == "rsync -zLurtP -- cluster:proj/outputs/ outputs/\n"
    words = shlex.split(fetch("me@host:a b/$(x)", "my outputs", "--without", "*.bin"))
    assert words[1:] == [
        *("-zLurtP", "--protect-args", "--exclude=*.bin", "--", "me@host:a b/$(x)/", "my outputs/")
    ]


@pytest.mark.parametrize("seeds", ["x", "4-3", "", "1,,2"])
def test_seeds_are_whole_numbers(seeds):
    result = invoke("rsync", "host:a", "--without-seeds", seeds)
    assert (result.exit_code, "expected seeds such as 3,4 or 10-19" in result.stderr) == (1, True)


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_a_part_of_the_results_is_fetched_and_merged(tmp_path):
    source, target = tmp_path / "there is", tmp_path / "here"
    for seed in (1, 3, 13, 30, 4):
        for name in (f"lr_0.1_seed_{seed}", f"seed_{seed}_wd_1", f"x_seed_{seed}-0123abcd"):
            run = source / name
            RunDir(run).write(
                RunRecord(
                    model_name=name,
                    state=RunState.COMPLETED,
                    success=True,
                    seed=seed,
                    hyperparams={"seed": seed},
                    metrics={"acc": 0.5},
                )
            )
            (run / "checkpoints").mkdir()
            (run / "checkpoints" / "last").touch()
            (run / "model.pt").touch()
    words = ("--without", "checkpoints", "--without-seeds", "3-4")
    fetch(source, target, *words, "--run")
    assert {path.name for path in target.iterdir()} == {
        *("lr_0.1_seed_1", "lr_0.1_seed_13", "lr_0.1_seed_30"),
        *("seed_1_wd_1", "seed_13_wd_1", "seed_30_wd_1"),
        *("x_seed_1-0123abcd", "x_seed_13-0123abcd", "x_seed_30-0123abcd"),
    }
    assert {path.name for path in target.rglob("*") if path.is_file()} == {"run.json"}
    result = CliRunner().invoke(aggregate.main, [str(target)])
    assert result.exit_code == 0, result.output
    assert "9 runs: 9 COMPLETED" in result.stdout
    # Again: what is there already stays, and what was merged here is not taken away.
    (source / "lr_0.1_seed_5").mkdir()
    shutil.copy(source / "lr_0.1_seed_1" / "run.json", source / "lr_0.1_seed_5")
    fetch(source, target, *words, "--run")
    assert (target / "results.csv").exists()
    assert (target / "lr_0.1_seed_5" / "run.json").exists()


def test_without_rsync_the_line_is_still_printed(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    result = invoke("rsync", "host:a", "--run")
    assert (result.exit_code, "rsync is not installed here" in result.stderr) == (1, True)
    assert fetch("host:a").startswith("rsync ")


def test_help_shows_examples():
    for words in ((), ("slurm",), ("rsync",)):
        result = invoke(*words, "--help")
        assert result.exit_code == 0
        assert "Examples:" in result.output
