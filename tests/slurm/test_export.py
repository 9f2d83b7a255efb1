"""Scripts of orchestrator-export on a real Slurm; what they say is tested in tests/cli."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
from slurm_cluster import until

from orchestrator.results.reading import read_runs

APP = """
import os
import sys
import time
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore

ConfigStore.instance().store(name="config", node={"x": 0, "text": "", "waits": False})

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    with open("began", "a") as file:
        file.write(f"{cfg.x} ")
    if cfg.waits:
        time.sleep(60)
    if Path(f"fail-{cfg.x}").exists():
        sys.exit(3)
    told = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_JOB_ID", "FROM_PRE")
    return {name: os.environ.get(name) for name in told}

if __name__ == "__main__":
    main()
"""
# A name and a value that a shell would take apart; Hydra's own quotes keep the value together.
HOSTILE = "text='$(touch pwned) \"a\"\n;b'"
WORDS = ("-m", "hydra/callbacks=results", "hydra/output=named")


class Project:
    """A directory with an app, whose name a shell would take apart, and a cluster."""

    def __init__(self, slurm, directory):
        self.slurm = slurm
        self.directory = directory
        directory.mkdir()
        (directory / "app.py").write_text(APP)

    def export(self, *words):
        """Type it, with room for a few small tasks at a time; what it said."""
        done = self.slurm.run(
            *(sys.executable, "-m", "orchestrator.cli.export", "slurm", "--option", "time=5"),
            *words,
            cwd=self.directory,
        )
        return done.stdout

    def command(self, *words):
        return ("--", sys.executable, "app.py", *WORDS, *words)

    def submit(self, *words):
        done = self.slurm.run("sbatch", "--parsable", *words, cwd=self.directory)
        return done.stdout.strip()

    def ends(self, *jobs):
        """Wait for jobs (of the script, by default): states and exit codes by task."""
        rows = self.slurm.wait(*(jobs or (self.submit("sweep.sbatch"),)))
        return {row["JobID"].partition("_")[2]: (row["State"], row["ExitCode"]) for row in rows}

    def runs(self):
        return read_runs([self.directory / "outputs"]).runs

    def records(self):
        found = {run.record.index: run.record for run in self.runs()}
        return dict(sorted(found.items()))

    def states(self):
        return {index: record.state.value for index, record in self.records().items()}

    def logs(self):
        return [path.read_text() for path in sorted((self.directory / "logs").iterdir())]

    @property
    def began(self):
        path = self.directory / "began"
        return Counter(path.read_text().split()) if path.exists() else Counter()


@pytest.fixture
def project(slurm, tmp_path):
    return Project(slurm, tmp_path / "it's 100% $(touch pwned) ü")


def test_a_script_does_what_is_missing_each_time(project):
    (project.directory / "fail-2").touch()
    lines = ("--pre", "export FROM_PRE='a b'", "--pre", "echo before", "--post", "echo after")
    said = project.export(
        *lines, "--option", "cpus-per-task=2", *project.command("x=1,2,3", HOSTILE)
    )
    assert said.splitlines()[-1] == "sbatch sweep.sbatch"
    assert project.ends() == {
        "0": ("COMPLETED", "0:0"),
        "1": ("FAILED", "3:0"),
        "2": ("COMPLETED", "0:0"),
    }
    assert project.states() == {0: "COMPLETED", 1: "FAILED", 2: "COMPLETED"}
    names = [f"x_{x}_text_-touch-pwned-a-b" for x in (1, 2, 3)]
    (listed,) = project.directory.glob("sweep-*.jsonl")
    head, *runs = map(json.loads, listed.read_text().splitlines())
    for run, name, record in zip(runs, names, project.records().values(), strict=True):
        assert run["name"] == record.model_name == name
        assert record.hyperparams["text"] == '$(touch pwned) "a"\n;b'
        assert record.sweep_id == head["sweep_id"]
    done = project.records()[0]
    assert (done.return_value["FROM_PRE"], done.return_value["OMP_NUM_THREADS"]) == ("a b", "2")
    assert done.slurm_job_id.endswith("_0")
    assert all("before" in log and log.endswith("after\n") for log in project.logs())
    assert len(project.logs()) == 3

    # Again: only what failed.
    assert {state for state, _ in project.ends().values()} == {"COMPLETED", "FAILED"}
    assert project.began == {"1": 1, "2": 2, "3": 1}
    (project.directory / "fail-2").unlink()
    assert project.export("--missing").startswith("1 of 3 runs")
    assert project.ends() == {"1": ("COMPLETED", "0:0")}
    assert project.began == {"1": 1, "2": 3, "3": 1}
    assert [attempt.state.value for attempt in project.records()[1].attempts] == ["FAILED"] * 2
    assert project.export("--missing") == "all 3 runs are COMPLETED: nothing to submit\n"
    assert not list(project.directory.parent.rglob("pwned"))


def test_a_task_that_is_cancelled_writes_its_record(project):
    project.export("--post", "echo after", *project.command("waits=true", "x=1"))
    job = project.submit("sweep.sbatch")
    until(lambda: project.began)
    project.slurm.run("scancel", job)
    (row,) = project.slurm.wait(job)
    assert row["State"].startswith("CANCELLED")
    assert project.states() == {0: "CANCELLED"}
    assert project.logs()[0].endswith("after\n")


def test_tasks_get_gpus_and_share_them_as_a_cluster_file_says(project):
    cluster = {"cores": 2, "sequential": 2, "gpus": 2, "time": "0:05:00", "memPerCpu": 100}
    (project.directory / "cluster.json").write_text(json.dumps(cluster))
    command = ("hydra/launcher=slurm", "hydra.launcher.queue.threads=3", "x=1,2,3,4,5")
    project.export("--cluster-file", "cluster.json", *project.command(*command))
    shared = project.submit("sweep.sbatch")
    project.export("--option", "gpus-per-node=2", *project.command("x=6"))
    alone = project.submit("sweep.sbatch")
    assert set(project.ends(shared, alone).values()) == {("COMPLETED", "0:0")}
    told = {run.record.hyperparams["x"]: run.record.return_value for run in project.runs()}
    # Alone in its task a run has all that there is.
    assert told.pop(6)["CUDA_VISIBLE_DEVICES"] == "0,1"
    jobs = Counter(run["SLURM_JOB_ID"] for run in told.values())
    assert sorted(jobs.values()) == [1, 4]
    assert {run["CUDA_VISIBLE_DEVICES"] for run in told.values()} == {"0", "1"}
    assert {run["OMP_NUM_THREADS"] for run in told.values()} == {"3"}


def test_arrays_larger_than_slurm_allows_are_submitted_in_parts(project):
    said = project.export("--indices", "29-31", *project.command("x=range(33)"))
    calls = said.splitlines()[-2:]
    assert calls == ["sbatch sweep.sbatch", "sbatch --array=0-1 sweep.sbatch 30"]
    first, second = (project.submit(*call.split()[1:]) for call in calls)
    assert project.ends(first) == {"29": ("COMPLETED", "0:0")}
    assert [*project.ends(second)] == ["0", "1"]
    assert project.states() == dict.fromkeys((29, 30, 31), "COMPLETED")
