"""Jobs of several tasks: rank 0 records its run, the others have logs of their own."""

from __future__ import annotations

import json
import time

import msgspec
import pytest
from slurm_sweeps import WORDS, until

from orchestrator.record import ErrorInfo
from orchestrator.slurm import ranks
from orchestrator.slurm.ranks import RankState, error_of_ranks, own_rank

TASKS = ("hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=2")
# From a rank's failure to the end of its run, where the other ranks would go on for ever.
NOTICED_S = 15.0

APP = """
import json
import logging
import os

import hydra
from hydra.core.hydra_config import HydraConfig

import app
import orchestrator
from beside import HOME

rank = os.environ.get("SLURM_PROCID", "")
plain = app.behave


def behave(what, cfg):
    who, _, other = what.rpartition(":")
    if who in ("", rank):
        plain(other, cfg)


app.behave = behave


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    app.note(f"rank {rank}", cfg)
    logging.getLogger("app").info("logged by %s", rank)
    app.main.__wrapped__(cfg)
    told = {
        "run_dir": str(orchestrator.run_dir()),
        "output_dir": HydraConfig.get().runtime.output_dir,
        "attempt": orchestrator.attempt(),
        "variable": os.environ.get("ORCHESTRATOR_ATTEMPT"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "env": os.environ.get("OF_THE_USER"),
    }
    app.note(f"told {rank} {json.dumps(told)}", cfg)
    return int(rank or 0)


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def ranked(sweep):
    (sweep.directory / "ranked.py").write_text(APP)
    return sweep


def ranks_of(sweep, x):
    """Starts of a run's ranks."""
    notes = sweep.notes()
    return sorted(int(note[0][5:]) for note in notes if note[0][:5] == "rank " and note[1] == x)


def told(sweep, x):
    """What the ranks of a run have said of it, by rank; the last of each counts."""
    notes = [note[0].split(maxsplit=2) for note in sweep.notes() if note[1] == x]
    return {int(words[1]): json.loads(words[2]) for words in notes if words[0] == "told"}


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_ranks_of_two_runs(slurm, ranked):
    """Each rank sees the same run; what it prints, logs and measures has a place of its own."""
    ranked.plan({"all": "gate"})
    running = ranked.start(
        *("x=1,2", *TASKS, "hydra.launcher.cpus_per_task=2"),
        "+hydra.launcher.queue.env.OF_THE_USER='{name}'",
        app="ranked.py",
    )
    # Both jobs at a time, all ranks of both.
    until(lambda: len(ranked.started()) == 8, 40, lambda: ranked)
    nodes = {(note[1], note[4]["SLURMD_NODENAME"]) for note in ranked.notes("start")}
    assert len(nodes) == 4, "two nodes for each"
    ranked.open()
    done = running.wait()
    assert done.status == 0, done
    assert ranked.states() == {1: "COMPLETED", 2: "COMPLETED"}
    for x in (1, 2):
        run = ranked.directory_of(x)
        record = ranked.records()[x]
        assert record["return_value"] == 0
        assert record["metrics"]["loss"] == x / 2
        places = dict.fromkeys(("run_dir", "output_dir"), str(run))
        same = {"attempt": 1, "variable": "1", "threads": "2", "env": f"x_{x}", **places}
        assert told(ranked, x) == dict.fromkeys(range(4), same)
        assert sorted(path.name for path in (run / "ranks").iterdir()) == ["1", "2", "3"]
        for rank in range(4):
            own = run / "ranks" / str(rank) if rank else run
            assert (own / "train_stdout.log").read_text().count(f"hello from {x}") == 1
            assert (own / "ranked.log").read_text().count("logged by") == 1
            assert f"logged by {rank}" in (own / "ranked.log").read_text()
            assert steps(own / "metrics.jsonl") == [0]
        assert len(list(run.rglob(".hydra"))) == 1
        assert len(list(run.rglob("run.json"))) == 1
    assert set(ranked.sacct().values()) == {"COMPLETED"}


ENDS = {
    1: ("1:raise, gate", "FAILED", "in rank 1: as asked"),
    2: ("1:kill, gate", "FAILED", "rank 1 was killed"),
    3: ("0:raise, gate", "FAILED", "as asked"),
    4: ("0:kill, gate", "FAILED", "SIGKILL"),
    5: ("1:sys.exit, gate", "FAILED", "in rank 1: good bye"),
    # Rank 0 ends well before the other does.
    6: ("1:gate, 1:raise", "FAILED", "in rank 1: as asked"),
    7: ("gate", "CANCELLED", "Slurm"),
    8: ("1:gate", "COMPLETED", None),
}


def test_ends_of_ranks(slurm, ranked):
    """One rank that fails is the end of its run, told with its name, soon, and of no other run."""
    ranked.plan({x: what for x, (what, _, _) in ENDS.items()})
    words = ("x=range(1,9)", "hydra.launcher.tasks_per_node=2")
    running = ranked.start(*words, app="ranked.py")
    until(lambda: ranks_of(ranked, 7) == [0, 1], 60, lambda: ranked)
    slurm.run("scancel", ranked.job(7))
    took = ranked.until_states({x: ENDS[x][1] for x in (1, 2, 3, 4, 5, 7)})
    print(f"the end of a rank was the end of its run within {took:.1f} s")
    assert took < NOTICED_S
    until(lambda: told(ranked, 6).keys() == told(ranked, 8).keys() == {0}, 30, lambda: ranked)
    ranked.open(6, 8)
    done = running.wait()
    assert done.status == 1, done
    records = ranked.records()
    assert ranked.states() == {x: state for x, (_, state, _) in ENDS.items()}, done
    for x, (_, _, said) in ENDS.items():
        error = records[x]["error"]
        assert said is error if error is None else said in error["message"], (x, error)
    for x in (1, 2, 5, 6):
        assert str(ranked.directory_of(x) / "ranks" / "1") in records[x]["error"]["message"]
    assert "Traceback" in records[1]["error"]["traceback"]
    assert [records[x]["success"] for x in (6, 8)] == [False, True]
    log = ranked.directory_of(1) / "ranks" / "1" / "train_stderr.log"
    assert "ValueError: as asked" in log.read_text()
    assert "in rank 1: as asked" in done.text
    by_job = ranked.sacct()
    states = {x: by_job[ranked.job(x)] for x in ENDS}
    assert states == {x: state for x, (_, state, _) in ENDS.items()}

    # The next attempt is one to all ranks, and has files of its own.
    ranked.plan({})
    again = ranked.run(*words, app="ranked.py")
    assert again.status == 0, again
    assert "Submitted 7 runs" in again.text
    for x in (1, 2, 6, 7):
        assert {rank: one["attempt"] for rank, one in told(ranked, x).items()} == {0: 2, 1: 2}, x
        assert {one["variable"] for one in told(ranked, x).values()} == {"2"}
        run = ranked.directory_of(x)
        for own in (run, run / "ranks" / "1"):
            assert steps(own / "metrics.jsonl") == [0], own
            assert (own / "train_stdout.log").read_text().count(f"hello from {x}") == 1, own
        assert steps(run / "attempts" / "1" / "ranks" / "1" / "metrics.jsonl") == [0]
    log = ranked.directory_of(1) / "attempts" / "1" / "ranks" / "1" / "train_stderr.log"
    assert "ValueError: as asked" in log.read_text()


def test_a_run_that_is_done_already(slurm, ranked):
    """Somebody else has done it while its job was waiting: no rank does it again."""
    ranked.plan({1: "1:gate"})
    first = ranked.run(
        *("x=1", "hydra.launcher.tasks_per_node=2", "hydra.launcher.wait=false"),
        "+hydra.launcher.additional_parameters.hold=true",
        app="ranked.py",
    )
    assert first.status == 0, first
    here = ("-m", "hydra/launcher=gpu_queue", "hydra/sweeper=grid")
    done = ranked.run("x=1", base=(*here, *WORDS[3:5]), app="ranked.py")
    assert done.status == 0, done
    slurm.scontrol("release", *ranked.jobs())
    assert set(ranked.sacct().values()) == {"COMPLETED"}
    assert ranked.started() == [1]
    (record,) = ranked.records().values()
    assert (record["state"], record["slurm_job_id"], record["attempts"]) == ("COMPLETED", "", [])


REFUSED = {
    "hydra.launcher.nodes=2": "hydra.launcher.runs_per_job is 2",
    "hydra.launcher.tasks_per_node=2": "hydra.launcher.runs_per_job is 2",
    "hydra.launcher.tasks_per_node=${n}": "hydra.launcher.runs_per_job is 2",
}


def test_packs_are_of_one_task(ranked):
    """Runs do not share a job of several tasks: that is a sentence."""
    for word in REFUSED:
        ranked.start("x=1,2", "n=1,2", "hydra.launcher.runs_per_job=2", word, app="ranked.py")
    for (word, said), running in zip(REFUSED.items(), ranked._started, strict=True):
        done = running.wait(20)
        assert done.status == 1, (word, done)
        assert said in done.text, (word, done)
        assert "Traceback" not in done.text, done
    assert "RUNNING" not in ranked.states().values()
    assert "PENDING" not in ranked.states().values()


# --- what needs no Slurm ---


@pytest.fixture
def tell(tmp_path, monkeypatch):
    """What ranks of a job of three tasks say of themselves in the run's directory."""
    for name, value in (("JOB_ID", "7"), ("NTASKS", "3"), ("STEP_ID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(ranks, "_LAST_WORDS_S", 0.1)

    def write(rank, *, start="7.0", ended=True, error=None):
        path = ranks.rank_dir(tmp_path, rank) / ranks._STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        info = error and ErrorInfo("ValueError", error)
        path.write_bytes(msgspec.json.encode(RankState(start, rank, ended=ended, error=info)))
        return path

    return write


def test_ranks_that_ended_well_say_nothing(tmp_path, tell):
    tell(1)
    tell(2)
    assert error_of_ranks(tmp_path) is None
    assert error_of_ranks(tmp_path, until=lambda: False) is None


def test_the_first_error_is_the_run_s(tmp_path, tell):
    tell(1, ended=False)
    tell(2, error="no luck")
    found = error_of_ranks(tmp_path, until=lambda: False)
    assert found.type == "ValueError"
    assert found.message.startswith("in rank 2: no luck")
    assert str(tmp_path / "ranks" / "2") in found.message


def test_an_error_counts_in_its_own_start_of_the_job_only(tmp_path, tell, monkeypatch):
    tell(1, error="no luck", start="6.0")
    tell(2, error="no luck", start="7.0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert error_of_ranks(tmp_path) is None


def test_a_rank_that_never_says_that_it_ended(tmp_path, tell):
    """It has a moment, where all have been asked to end."""
    tell(1)
    tell(2, ended=False)
    began = time.monotonic()
    found = error_of_ranks(tmp_path)
    assert 0.1 <= time.monotonic() - began < 2
    assert found.type == "RankDied"
    assert "rank 2" in found.message


def test_the_others_are_waited_for(tmp_path, tell):
    """Also those that have not said anything yet; until somebody asks all to end."""
    tell(1)
    calls = []

    def until_the_third():
        calls.append(1)
        if len(calls) == 2:
            tell(2, error="no luck")
        return len(calls) > 5

    found = error_of_ranks(tmp_path, until=until_the_third)
    assert found.message.startswith("in rank 2")
    assert len(calls) == 2


def test_files_that_are_no_states_are_passed_over(tmp_path, tell):
    tell(1).write_bytes(b"{")
    tell(2)
    assert error_of_ranks(tmp_path) is None


@pytest.mark.parametrize(("environ", "rank"), [({}, 0), ({"SLURM_PROCID": "3"}, 3)])
def test_own_rank(environ, rank):
    assert own_rank(environ) == rank
