"""What jobs ask Slurm for, how it is checked, and how runs are dealt out; all of it without Slurm."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from orchestrator.slurm.cut import Asked, cut
from orchestrator.slurm.read_settings import read_settings
from orchestrator.slurm.resources import Resources, checked
from orchestrator.slurm.settings import SlurmSettings
from orchestrator.sweep.errors import SweepError

# --- values ---


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        (60, 60),
        (1.5, 2),
        ("90", 90),
        ("2:00:00", 120),
        ("1-00", 1440),
        ("1-02:30", 1590),
        ("0:30", 1),
        ("00:01:01", 2),
    ],
)
def test_a_time_limit_is_whole_minutes_however_it_is_written(limit, minutes):
    found = checked({"timeout_min": limit})["timeout_min"]
    assert (found, type(found)) == (minutes, int)


@pytest.mark.parametrize(
    "limit", [0, -5, 0.0, "0", "00:00:00", "abc", "", "-5", None, True, float("nan"), float("inf")]
)
def test_what_is_no_time_limit_is_refused_and_never_taken_for_none(limit):
    with pytest.raises(SweepError, match=r"timeout_min is .*; expected minutes, or a time"):
        checked({"timeout_min": limit})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mem_gb", 0),  # Slurm's "all of the node's"
        ("mem_gb", 0.5),
        ("mem_gb", 16),
        ("mem_gb", None),
        ("cpus_per_task", 1),
        ("gpus_per_node", 0),
        ("gpus_per_node", 2),
        ("gpus_per_node", "2"),
        ("gpus_per_node", "a100"),
        ("gpus_per_node", "a100:2"),
        ("gpus_per_node", "a100:1,v100:1"),
        ("gpus_per_task", "a100_1g.5gb:1"),
        ("additional_parameters", {"mail-user": "me@lab.org", "mail_type": "END", "nice": 5}),
    ],
)
def test_what_sbatch_takes_is_left_as_it_is(key, value):
    assert checked({key: value, "timeout_min": 5})[key] == value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("mem_gb", "4GB", "mem_per_cpu=4000M"),
        ("mem_gb", -1, "GB as a number"),
        ("mem_gb", True, "GB as a number"),
        ("mem_gb", float("inf"), "GB as a number"),
        ("mem_gb", float("nan"), "GB as a number"),
        ("cpus_per_task", 0, "1 or more"),
        ("cpus_per_task", -2, "1 or more"),
        ("cpus_per_task", 1.5, "1 or more"),
        ("cpus_per_task", True, "1 or more"),
        ("nodes", 0, "1 or more"),
        ("tasks_per_node", 0, "1 or more"),
        ("gpus_per_node", -1, "a100:2"),
        ("gpus_per_node", "a100:2,", "a100:2"),
        ("gpus_per_node", "two of them", "a100:2"),
        ("gpus_per_node", "", "a100:2"),
    ],
)
def test_a_wrong_value_is_a_sentence_with_its_key(key, value, expected):
    with pytest.raises(SweepError) as caught:
        checked({key: value})
    said = str(caught.value)
    assert said.startswith(f"hydra.launcher.{key} is {value!r}; expected ")
    assert expected in said


@pytest.mark.parametrize("memory", [4, 0])
@pytest.mark.parametrize("other", ["mem_per_cpu", "mem_per_gpu"])
def test_memory_is_said_in_one_way(other, memory):
    with pytest.raises(SweepError) as caught:
        checked({"mem_gb": memory, other: "4000M"})
    said = str(caught.value)
    assert f"hydra.launcher.mem_gb and hydra.launcher.{other} are set" in said
    assert "null" in said
    assert checked({"mem_gb": None, other: "4000M"})[other] == "4000M"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("time", "timeout_min"),
        ("t", "timeout_min"),
        ("signal", "signal_delay_s"),
        ("array", "array_parallelism"),
        ("a", "array_parallelism"),
        ("nodes", "hydra.launcher.nodes"),
        ("ntasks_per_node", "tasks_per_node"),
        ("output", "leave it out"),
        ("open_mode", "leave it out"),
        ("open-mode", "leave it out"),
        ("clusters", "leave it out"),
        ("M", "leave it out"),
        ("wait", "leave it out"),
        ("no good", "options of sbatch without their dashes"),
        ("--nice", "options of sbatch without their dashes"),
        ("nice\n", "options of sbatch without their dashes"),
        ("x; touch pwned", "options of sbatch without their dashes"),
        (7, "options of sbatch without their dashes"),
    ],
)
def test_additional_parameters_neither_contradict_the_launcher_nor_leave_their_line(key, hint):
    with pytest.raises(SweepError) as caught:
        checked({"additional_parameters": {key: "1"}})
    said = str(caught.value)
    assert said.startswith("hydra.launcher.additional_parameters has ")
    assert hint in said


@pytest.mark.parametrize("key", ["partition", "name", "gres", "nodelist", "comment", "mem_per_cpu"])
@pytest.mark.parametrize("end", ["\n", "\r", "\x0b", "\x85", "\u2028"])
def test_a_line_end_in_a_value_is_no_line_of_the_script(key, end):
    text = f"a{end}#SBATCH --wrap=pwned"
    for resources in ({key: text}, {"additional_parameters": {key: text}}):
        with pytest.raises(SweepError, match="one line"):
            checked(resources)


def resources(config=None, **changes):
    settings = SlurmSettings(**changes)
    raw = {key: value for key, value in changes.items() if "${" in str(value)}
    return Resources(settings, raw).of(OmegaConf.create(config or {}))


@pytest.mark.parametrize(
    ("limit", "wanted", "delay"),
    [(60, 120, 120), (1, 120, 30), (3, 120, 90), (4, 120, 120), (1, 20, 20), ("0:30", 120, 30)],
)
def test_a_job_is_not_warned_before_it_has_had_half_of_its_time(limit, wanted, delay):
    found = resources(timeout_min=limit, signal_delay_s=wanted)["signal_delay_s"]
    assert (found, type(found)) == (delay, int)


def test_a_wrong_value_that_all_runs_share_is_refused_before_anything_is_done():
    with pytest.raises(SweepError, match="mem_gb"):
        Resources(SlurmSettings(mem_gb="4GB"), {})


def test_values_of_each_run_are_checked_too():
    wanted = {"timeout_min": "${hours}"}

    def of(hours):
        config = {"hours": hours, "hydra": {"launcher": {"timeout_min": "${hours}"}}}
        return resources(config, **wanted)["timeout_min"]

    assert of("2:00:00") == 120
    with pytest.raises(SweepError, match="timeout_min is 'soon'"):
        of("soon")


# --- keys ---


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("partion", "'partion'. Did you mean partition?"),
        ("timeout", "Did you mean timeout_min?"),
        ("zzzz", "'zzzz'. What else sbatch takes"),
    ],
)
def test_a_key_that_is_none_gets_the_nearest_one(key, said):
    with pytest.raises(SweepError) as caught:
        read_settings({key: 1})
    assert said in str(caught.value)
    assert "additional_parameters" in str(caught.value)


APP = """
import hydra


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    open("began", "w").close()


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("+hydra.launcher.partion=x", "Did you mean partition?"),
        ("hydra.launcher.timeout_min=abc", "timeout_min is 'abc'; expected minutes"),
        ("hydra.launcher.timeout_min=0", "timeout_min is 0; expected minutes"),
        ("hydra.launcher.mem_gb=4GB", "mem_gb is '4GB'; expected GB as a number"),
    ],
)
def test_what_is_typed_wrong_is_a_sentence_and_no_traceback_also_in_a_dry_run(word, said, tmp_path):
    (tmp_path / "app.py").write_text(APP)
    words = ("app.py", "-m", "hydra/launcher=slurm", "hydra/sweeper=grid", "+x=1,2", word)
    done = subprocess.run(
        [sys.executable, *words, "hydra.launcher.dry_run=true"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert text.count(said) == 1, text
    assert "Traceback" not in text
    assert not (tmp_path / "began").exists()


# --- arrays ---


def cut_by(wanted, **options):
    """Arrays of runs that ask for these partitions, in this order."""
    asked = [Asked(None, None, b"", {"partition": name}) for name in wanted]
    return cut(asked, **{"runs_per_job": 1, "most": 1000, "at_a_time": 3, **options})


def test_arrays_that_differ_run_side_by_side_and_are_no_single_chain():
    arrays = cut_by("abcdef", at_a_time=3)
    assert [(array.at_a_time, array.after) for array in arrays] == [
        *[(1, None)] * 3,
        (1, 0),
        (1, 1),
        (1, 2),
    ]


def test_arrays_share_the_places_by_their_sizes():
    arrays = cut_by(["a", *["b"] * 999], at_a_time=10)
    assert [(len(array.packs), array.at_a_time) for array in arrays] == [(1, 1), (999, 9)]
    arrays = cut_by([*"abc", *["b"] * 9, *["c"] * 19], at_a_time=8, runs_per_job=10)
    assert [(len(array.packs), array.at_a_time) for array in arrays] == [(1, 1), (1, 1), (2, 2)]


def test_a_cluster_without_arrays_gets_jobs():
    arrays = cut_by("aaa", most=0, at_a_time=2)
    assert [(len(array.packs), array.after) for array in arrays] == [(1, None), (1, None), (1, 0)]


@given(
    st.lists(st.sampled_from("abcde"), max_size=60),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(1, 12),
)
@example(list("abcdef"), 1, 1000, 3)
def test_every_run_is_in_one_job_of_one_array_and_never_too_many_run(
    wanted, per_job, most, at_a_time
):
    arrays = cut_by(wanted, runs_per_job=per_job, most=most, at_a_time=at_a_time)
    packs = [pack for array in arrays for pack in array.packs]
    assert Counter(run.resources["partition"] for pack in packs for run in pack) == Counter(wanted)
    assert all(1 <= len(pack) <= per_job for pack in packs)
    for number, array in enumerate(arrays):
        assert 1 <= len(array.packs) <= max(most, 1)
        assert len({run.resources["partition"] for pack in array.packs for run in pack}) == 1
        assert array.after is None or array.after < number
    assert sum(array.at_a_time for array in arrays if array.after is None) <= at_a_time
