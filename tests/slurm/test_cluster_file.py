"""Files of cluster settings: ours, experiment_manager's and PyExpUtils'."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from dataclasses import asdict, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from submitit.slurm.slurm import _convert_mem, _make_sbatch_string

from orchestrator.slurm.amounts import seconds_of
from orchestrator.slurm.cluster_file import _megabytes, read_cluster_file
from orchestrator.slurm.settings import SlurmSettings
from orchestrator.sweep.errors import SweepError

# The README of experiment_manager.
EXPERIMENT_MANAGER = {
    "n_gpus": 1,
    "n_cpus": 1,
    "memory": "1000",
    "time": "10:00:00",
    "post_script": ["module load python/3.8", "module load conda"],
    "pre_script": ["conda deactivate idrl", "module unload conda", "module unload python/3.8"],
    "python_runner": "runner.py",
}
# clusters/3Hr_20Cores_3Seq_4Gb.json of policy-parameterization.
POLICY_PARAMS = {
    "account": "rrg-whitem",
    "time": "0:30:00",
    "nodes": 1,
    "cores": 20,
    "sequential": 3,
    "memPerCpu": "4Gb",
    "output": "/home/someone/scratch/slurm_trash/%x-%j.out",
    "error": "/home/someone/scratch/slurm_trash/%x-%j.out",
}


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "cedar.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_cluster_file(path)

    return read


@pytest.fixture
def refusal(read):
    def refusal(content):
        with pytest.raises(SweepError) as caught:
            read(content)
        assert "cedar.json" in str(caught.value)
        return str(caught.value)

    return refusal


# --- experiment_manager -------------------------------------------------------------------------


def test_the_example_of_experiment_manager_becomes_settings(read):
    assert read(EXPERIMENT_MANAGER) == {
        "timeout_min": 600,
        "cpus_per_task": 1,
        "gpus_per_node": 1,
        "mem_gb": 1000 / 1024,
        "setup": ["conda deactivate idrl", "module unload conda", "module unload python/3.8"],
        "teardown": ["module load python/3.8", "module load conda"],
    }


def test_no_gpu_is_none_asked_for(read):
    assert read({"n_gpus": 0}) == {"gpus_per_node": None}


@pytest.mark.parametrize("key", ["python_runner", "job_runner", "output", "error", "log_path"])
def test_what_is_not_used_is_said(read, caplog, key):
    with caplog.at_level(logging.INFO):
        assert read({key: "runner.py", "n_cpus": 2}) == {"cpus_per_task": 2}
    assert f"cedar.json: {key} is not used: " in caplog.text


def test_pre_and_post_lines_reach_the_script_as_they_are_and_in_their_order(read):
    line = "export X=\"$(hostname)\"; echo ${HOME} 'a b'"
    settings = read({"pre_script": [line, "second"], "post_script": ["third"]})
    script = script_of(settings).splitlines()
    assert script.index(line) < script.index("second") < script.index("RUN") < script.index("third")


# --- PyExpUtils ---------------------------------------------------------------------------------


def test_the_file_of_policy_params_packs_20_runs_at_a_time_and_three_times_as_many(read):
    assert read(POLICY_PARAMS) == {
        "account": "rrg-whitem",
        "timeout_min": 30,
        "nodes": 1,
        "cpus_per_task": 20,
        "mem_per_cpu": "4096M",
        "runs_per_job": 60,
        "queue": {"max_processes": 20},
    }


def test_in_the_oldest_form_nodes_are_cores_and_tasks_per_node_follow_each_other(read):
    # andnp/acceleration-v2
    old = {
        "account": "rrg-x",
        "time": "23:59:00",
        "nodes": 16,
        "memPerCpu": "2G",
        "tasksPerNode": 3,
    }
    assert read(old) == {
        "account": "rrg-x",
        "timeout_min": 1439,
        "nodes": 1,
        "cpus_per_task": 16,
        "mem_per_cpu": "2048M",
        "runs_per_job": 48,
        "queue": {"max_processes": 16},
    }


def test_the_newest_form_has_a_type_and_threads(read):
    new = {
        "type": "single_node",
        "account": "def-amw8",
        "time": "2:59:00",
        "cores": 8,
        "mem_per_core": "2000M",
        "sequential": 4,
        "threads_per_task": 2,
    }
    assert read(new) == {
        "account": "def-amw8",
        "timeout_min": 179,
        "nodes": 1,
        "cpus_per_task": 8,
        "mem_per_cpu": "2000M",
        "runs_per_job": 16,
        "queue": {"max_processes": 4},
    }


def test_one_core_and_one_run_is_a_job_for_each_run(read):
    settings = read({"cores": 1, "sequential": 1, "mem_per_core": "24000M"})
    assert settings == {
        "nodes": 1,
        "cpus_per_task": 1,
        "runs_per_job": 1,
        "mem_per_cpu": "24000M",
    }


@pytest.mark.parametrize(
    ("cores", "per_job"),
    [
        ({"cores": 40, "nodes": 2}, 20),
        ({"cores": 41, "nodes": 2}, 21),
        ({"cores": 64, "coresPerNode": 32}, 32),
        ({"nodes": 3, "coresPerNode": 16}, 16),
    ],
)
def test_what_is_spread_over_nodes_becomes_jobs_of_one_node(read, cores, per_job):
    settings = read({**cores, "sequential": 2})
    assert settings["nodes"] == 1
    assert settings["cpus_per_task"] == settings["queue"]["max_processes"] == per_job
    assert settings["runs_per_job"] == 2 * per_job


def test_emails_become_options_of_sbatch(read):
    settings = read({"cores": 1, "email": "me@lab.org", "emailType": "END,FAIL"})
    mail = {"mail-user": "me@lab.org", "mail-type": "END,FAIL"}
    assert settings["additional_parameters"] == mail
    assert "#SBATCH --mail-user=me@lab.org" in script_of(settings)


@pytest.mark.parametrize(
    ("asked", "gpus", "queue"),
    [
        ({"gpus": 1, "cores": 16}, 1, {"max_processes": 16, "max_processes_per_gpu": 16}),
        (
            {"gpus": "l40s.4:2", "cores": 3},
            "l40s.4:2",
            {"max_processes": 3, "max_processes_per_gpu": 2},
        ),
        ({"gpus": "2", "cores": 2}, 2, {"max_processes": 2}),
        ({"gpus": 4, "cores": 2}, 4, {"max_processes": 2, "gpus_per_job": 2}),
        ({"gpus": 0, "cores": 2}, None, {"max_processes": 2}),
    ],
)
def test_the_runs_of_a_job_share_its_gpus_evenly(read, asked, gpus, queue):
    settings = read(asked)
    assert settings["gpus_per_node"] == gpus
    assert settings["queue"] == queue


def test_several_tasks_on_a_core_run_at_a_time(read):
    settings = read({"gpus": 1, "cores": 2, "tasks_per_core": 5, "tasks_per_vmap": 1})
    assert settings["runs_per_job"] == 10
    assert settings["queue"] == {"max_processes": 10, "max_processes_per_gpu": 10}


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("type", {"type": "both", "cores": 1}),
        ("tasks_per_vmap", {"tasks_per_vmap": 256, "cores": 1}),
        ("tasksPerNode", {"cores": 4, "tasksPerNode": 2}),
        ("tasksPerNode", {"nodes": 4, "tasksPerNode": 2, "sequential": 2}),
    ],
)
def test_what_could_mean_two_things_or_nothing_here_is_refused(refusal, key, content):
    assert f"cedar.json: {key} is {content[key]!r}; expected " in refusal(content)


def test_a_bare_number_of_memory_is_what_each_tool_takes_it_for(read):
    assert read({"memPerCpu": 2000})["mem_per_cpu"] == "2000M"
    assert read({"memPerCpu": "2000"})["mem_per_cpu"] == "2000M"
    assert read({"mem_per_core": 2.5})["mem_per_cpu"] == "2560M"
    assert read({"memory": 1000})["mem_gb"] * 1024 == 1000


# --- Our own keys -------------------------------------------------------------------------------


def test_our_own_keys_are_taken_as_they_are(read):
    own = {
        "timeout_min": 30.5,
        "partition": None,
        "nodes": 2,
        "gres": "gpu:1",
        "additional_parameters": {"mail-user": "me@lab.org"},
        "setup": ["source ${HOME}/env/bin/activate", "echo ${array[0]}"],
        "queue": {"max_processes": 2, "env": {"A": "b"}},
        "wait": False,
    }
    assert read(own) == own


def test_our_keys_complete_a_file_of_another_tool(read):
    settings = read({"n_cpus": 4, "partition": "cpu", "additional_parameters": {"x": 1}})
    assert settings == {"cpus_per_task": 4, "partition": "cpu", "additional_parameters": {"x": 1}}
    settings = read({"cores": 4, "queue": {"retries": 1}, "sequential": 1})
    assert settings["queue"] == {"max_processes": 4, "retries": 1}


def test_two_keys_that_decide_on_the_same_are_refused(refusal):
    assert "time and timeout_min both decide on timeout_min" in refusal(
        {"time": "1:00", "timeout_min": 2}
    )
    assert "nodes" in refusal({"nodes": 4, "memPerCpu": "1G", "cpus_per_task": 2})
    assert "cores" in refusal({"cores": 4, "n_cpus": 2})


def test_every_setting_can_be_in_a_file_but_for_two(read, refusal):
    defaults = {**asdict(SlurmSettings()), "name": "sweep"}
    for field in fields(SlurmSettings):
        value = defaults[field.name]
        if field.name in ("_target_", "cluster_file"):
            assert field.name in refusal({field.name: "x"})
        else:
            assert read({field.name: value}) == ({} if value == {} else {field.name: value})


# --- Mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("memPerCPU", "memPerCpu"),
        ("core", "cores"),
        ("n_gpu", "n_gpus"),
        ("cpu_per_task", "cpus_per_task"),
        ("acount", "account"),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(refusal, key, near):
    text = refusal({key: 1})
    assert f"unknown key {key}." in text
    assert f"Did you mean {near}?" in text


def test_unknown_keys_of_the_queue_get_the_nearest_too(refusal):
    assert "Did you mean queue.max_processes?" in refusal({"queue": {"max_proceses": 1}})
    assert "queue._target_" in refusal({"queue": {"_target_": "os.system"}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_cpus", 0),
        ("n_cpus", "two"),
        ("n_cpus", True),
        ("n_gpus", -1),
        ("cores", 1.5),
        ("time", ""),
        ("time", "0:00:00"),
        ("time", "1h"),
        ("time", "1-"),
        ("time", "-5"),
        ("time", True),
        ("time", ["1:00"]),
        ("memory", "4 apples"),
        ("memory", "1.5G"),
        ("memory", "0"),
        ("memory", -1),
        ("memory", True),
        ("mem_per_core", []),
        ("pre_script", "module load python"),
        ("post_script", [1]),
        ("setup", {"a": 1}),
        ("email", ""),
        ("emailType", ["END"]),
        ("gpus", "many"),
        ("gpus", True),
        ("account", ""),
        ("account", {"a": 1}),
        ("timeout_min", "long"),
        ("timeout_min", 0),
        ("mem_gb", True),
        ("array_parallelism", "many"),
        ("queue", [1]),
        ("queue", {"max_processes": "many"}),
        ("additional_parameters", "x"),
        ("partition", "${"),
        ("timeout_min", "${model.minutes}"),
        ("queue", {"env": {"A": "${model.lr}"}}),
    ],
)
def test_a_wrong_value_is_refused_with_file_and_key(refusal, key, value):
    assert key in refusal({key: value})


def test_text_that_is_not_json_is_refused_with_its_line(refusal):
    assert ", line 2, column 14: " in refusal('{\n  "cores": 4 // of each job\n}')


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "list"),
        ("3", "int"),
        ('{"cores": 1, "cores": 2}', "cores is there twice"),
        ('{"queue": {"retries": 1, "retries": 2}}', "retries is there twice"),
        ('{"memory": NaN}', "memory is nan"),
        ('{"cores": ' + "1" * 5000 + "}", "cannot be read"),
    ],
)
def test_json_that_is_no_object_of_settings_is_refused(refusal, text, says):
    assert says in refusal(text)


def test_a_file_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(SweepError, match=r"no cluster file .*hydra\.launcher\.cluster_file"):
        read_cluster_file(tmp_path / "none.json")
    with pytest.raises(SweepError, match="cannot be read"):
        read_cluster_file(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"account": "\xe9"}')
    with pytest.raises(SweepError, match="cannot be read"):
        read_cluster_file(tmp_path / "latin.json")


# --- What reaches Slurm -------------------------------------------------------------------------


def script_of(settings):
    taken = {**settings}
    for key in ("queue", "runs_per_job"):
        taken.pop(key, None)
    if "mem_gb" in taken:
        taken["mem"] = _convert_mem(taken.pop("mem_gb"))
    if "timeout_min" in taken:
        taken["time"] = taken.pop("timeout_min")
    return _make_sbatch_string("RUN", "/tmp/logs", use_srun=False, **taken)


EVIL = "x'; touch pwned; $(touch pwned) `touch pwned` \"\\"


@pytest.mark.parametrize("key", ["account", "partition", "email", "emailType", "comment"])
def test_no_value_reaches_a_shell(read, tmp_path, key):
    script = script_of(read({"cores": 1, key: EVIL}))
    (tmp_path / "job.sh").write_text(script.replace("\nRUN\n", "\ntrue\n"))
    subprocess.run(["bash", "job.sh"], cwd=tmp_path, check=True)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x00", "\u2028"])
@pytest.mark.parametrize(
    "content",
    [
        {"account": "a%sb"},
        {"email": "a%sb", "cores": 1},
        {"additional_parameters": {"x": "a%sb"}},
        {"additional_parameters": {"a%sb": 1}},
        {"srun_args": ["a%sb"]},
        {"queue": {"env": {"A": "a%sb"}}},
        {"gpus": "a%sb:1"},
        {"memory": "1%sG "},
    ],
)
def test_a_line_break_in_a_value_is_refused(read, refusal, content, character):
    text = json.dumps(content).replace("%s", json.dumps(character)[1:-1])
    if "memory" in content and character.isspace():
        assert read(text) == {"mem_gb": 1}  # what is made of it is a number
    else:
        refusal(text)


@given(st.integers(min_value=1, max_value=10**8))
def test_slurm_is_asked_for_exactly_the_memory_of_the_file(megabytes):
    amount, unit = re.fullmatch(r"(\d+)(MB|GB)", _convert_mem(megabytes / 1024)).groups()
    assert int(amount) * {"MB": 1, "GB": 1024}[unit] == megabytes


@given(st.integers(min_value=1, max_value=10**9), st.sampled_from(["K", "M", "G", "T", ""]))
def test_memory_is_never_rounded_down(amount, unit):
    bytes_asked = amount * {"K": 1, "": 1024, "M": 1024, "G": 1024**2, "T": 1024**3}[unit]
    for suffix in ("", "B", "b", "iB") if unit else ("",):
        megabytes = _megabytes(f"{amount}{unit.lower()}{suffix}", "M")
        assert 0 <= megabytes * 1024 - bytes_asked < 1024


@given(st.integers(0, 100), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_times_are_read_as_slurm_reads_them(days, hours, minutes, seconds):
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert seconds_of(f"{days}-{hours:02d}:{minutes:02d}:{seconds:02d}") == total
    assert seconds_of(f"{days}-{hours}:{minutes}") == total - seconds
    assert seconds_of(f"{days}-{hours}") == (days * 24 + hours) * 3600
    assert seconds_of(f"{hours}:{minutes:02d}:{seconds:02d}") == total - days * 86400
    assert seconds_of(f"{minutes}:{seconds:02d}") == minutes * 60 + seconds
    assert seconds_of(f"{minutes}") == minutes * 60


@pytest.mark.parametrize(
    ("time", "minutes"), [("0:00:01", 1), ("1:01", 2), ("90", 90), (90, 90), ("1-0", 1440)]
)
def test_a_time_limit_is_rounded_up_to_minutes(read, time, minutes):
    assert read({"time": time}) == {"timeout_min": minutes}


@given(st.text(max_size=12))
def test_text_is_read_as_a_time_and_as_memory_or_refused(text):
    assert seconds_of(text) is None or seconds_of(text) >= 0
    assert _megabytes(text, "M") is None or _megabytes(text, "M") > 0
