"""What is asked of Slurm, on a real one; how odd answers are read, from texts of its tools."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Cluster, until

from orchestrator.record import RunState
from orchestrator.slurm import client as client_module
from orchestrator.slurm.client import Limits, SlurmClient, SlurmUnreachable, Usage
from orchestrator.slurm.states import Seen

PENDING, RUNNING, COMPLETED = RunState.PENDING, RunState.RUNNING, RunState.COMPLETED
FAILED, TIMEOUT, CANCELLED = RunState.FAILED, RunState.TIMEOUT, RunState.CANCELLED

# slurmctld itself ends a job as slurmstepd does when the kernel kills it for its memory, which
# needs cgroups of its own.
OUT_OF_MEMORY = """
import ctypes, glob, sys
(path, *_) = glob.glob("/usr/lib/*/slurm-wlm/libslurmfull.so")
slurm = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
slurm.slurm_init(None)
slurm.slurm_complete_job.argtypes = [ctypes.c_uint32] * 2
sys.exit(slurm.slurm_complete_job(int(sys.argv[1]), 253))
"""


class Recorder:
    """Runs tools, and keeps what was run."""

    def __init__(self):
        self.calls = []

    def __call__(self, words, environ, timeout_s):
        self.calls.append(list(words))
        return client_module._run(words, environ, timeout_s)

    def of(self, program):
        return [words for words in self.calls if words[0] == program]


# A real Slurm, for this file alone: longer arrays, and jobs that stay over several tests.


@pytest.fixture(scope="module")
def cluster():
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)
    with Cluster(nodes=2, conf={"MaxArraySize": 1001, "KillWait": 2}) as running:
        yield running


def submit(cluster, line, *words):
    script = f"#!/bin/bash\n{line}\n"
    return cluster.sbatch("--chdir=/tmp", "--output=/dev/null", *words, script=script)


@pytest.fixture(scope="module", autouse=True)
def jobs(request):
    """Jobs that end in all ways, by the way; slurmctld looks at limits of time every 30 s."""
    if slurm_cluster.why_not():
        return None
    cluster = request.getfixturevalue("cluster")
    found = {"began": time.time()}
    found["limited"] = submit(cluster, "exec sleep 300", "--time=1")
    found["good"] = submit(cluster, "exit 0")
    found["bad"] = submit(cluster, "exit 3")
    found["high"] = submit(cluster, "exit 143")
    found["killed"] = submit(cluster, "kill -9 $$")
    found["memory"] = submit(cluster, "exec sleep 300")
    found["goes on"] = submit(cluster, "exec sleep 300", "--gres=gpu:2", "--cpus-per-task=3")
    found["back"] = submit(cluster, "exec sleep 300", "--requeue", "--gres=gpu:1", "--ntasks=2")
    found["held"] = submit(cluster, "true", "--hold")
    found["cancelled"] = submit(cluster, "exec sleep 300")
    until(lambda: all(cluster.job_processes(found[way]) for way in ("limited", "memory")))
    cluster.scontrol("update", f"jobid={found['limited']}", "endtime=now+1")
    cluster.run(sys.executable, "-c", OUT_OF_MEMORY, found["memory"])
    until(lambda: cluster.job_processes(found["cancelled"]))
    return found


@pytest.fixture
def client(cluster):
    return SlurmClient(environ=cluster.env)


def states(found):
    return {job: seen.state for job, seen in found.items()}


def see(client, wanted, timeout=20.0):
    """What the queue says, once that is what is wanted; else what it said last."""
    end = time.monotonic() + timeout
    while states(found := client.poll(wanted)) != wanted and time.monotonic() < end:
        time.sleep(0.1)
    assert states(found) == wanted
    return found


def learn(client, wanted, since=0.0, timeout=20.0):
    """What accounting says, once that is what is wanted; else what it said last."""
    end = time.monotonic() + timeout
    while states(found := client.ended(wanted, since)) != wanted and time.monotonic() < end:
        time.sleep(0.1)
    assert states(found) == wanted
    return found


ENDS = {"good": COMPLETED, "bad": FAILED, "high": FAILED, "killed": FAILED, "memory": FAILED}


def test_the_queue_says_where_jobs_are_and_how_they_ended(client, jobs):
    client.cancel([jobs["cancelled"]])
    wanted = {jobs[way]: state for way, state in ENDS.items()}
    wanted |= {jobs["goes on"]: RUNNING, jobs["held"]: PENDING, jobs["cancelled"]: CANCELLED}
    found = see(client, wanted)
    nodes = {found[jobs[way]].node for way in ("good", "bad", "goes on")}
    assert nodes <= {"node1", "node2"}
    assert found[jobs["goes on"]].exit_code == ""
    held = found[jobs["held"]]
    assert (held.word, held.node, held.reason) == ("PENDING", "", "JobHeldUser")
    codes = {way: found[jobs[way]].exit_code for way in ENDS}
    assert codes == {"good": "0:0", "bad": "3:0", "high": "143:0", "killed": "0:9", "memory": ""}
    reasons = {way: found[jobs[way]].reason for way in ENDS}
    assert reasons["memory"] == "OutOfMemory"
    # Not JobLaunchFailure: it was launched well.
    assert reasons["killed"] in {"", "RaisedSignal:9(Killed)"}
    assert found[jobs["memory"]].word == "OUT_OF_MEMORY"


def test_accounting_says_how_jobs_ended(client, jobs):
    wanted = {jobs[way]: state for way, state in ENDS.items()} | {jobs["cancelled"]: CANCELLED}
    found = learn(client, wanted, jobs["began"])
    codes = {way: found[jobs[way]].exit_code for way in ENDS}
    # sacct takes 128 off what is above it.
    assert codes == {"good": "0:0", "bad": "3:0", "high": "15:0", "killed": "0:9", "memory": ""}
    assert found[jobs["memory"]].word == "OUT_OF_MEMORY"
    assert found[jobs["cancelled"]].word == "CANCELLED by 0"


def test_accounting_is_silent_of_what_has_not_ended_and_of_what_there_is_not(client, jobs):
    assert client.ended([jobs["goes on"], jobs["held"], "99999999", "99999999_3"]) == {}
    assert client.poll(["99999999", "99999999_3"]) == {}


def test_ids_come_again_so_jobs_from_before_do_not_count(client, jobs):
    assert client.ended([jobs["good"]], time.time() + 2 * 3600) == {}


def test_the_users_settings_change_nothing(cluster, jobs):
    own = {
        "SQUEUE_FORMAT": "%j",
        "SQUEUE_FORMAT2": "Name",
        "SQUEUE_STATES": "RUNNING",
        "SQUEUE_USERS": "nobody",
        "SQUEUE_PARTITION": "nonesuch",
        "SACCT_FORMAT": "User",
        "SCANCEL_STATE": "RUNNING",
        "SLURM_TIME_FORMAT": "relative",
        "SLURM_BITSTR_LEN": "4",
        "TZ": "America/Vancouver",
    }
    client = SlurmClient(environ={**cluster.env, **own})
    assert states(client.poll([jobs["good"], jobs["held"]])) == {
        jobs["good"]: COMPLETED,
        jobs["held"]: PENDING,
    }
    assert states(client.ended([jobs["good"]], jobs["began"])) == {jobs["good"]: COMPLETED}
    array = submit(cluster, "true", "--hold", "--array=0-9")
    client.cancel([f"{array}_1"])
    assert len(client.poll([f"{array}_{task}" for task in range(10)])) == 9
    client.cancel([array])


def test_an_array_of_200_is_one_question(cluster):
    recorder = Recorder()
    client = SlurmClient(environ=cluster.env, run=recorder)
    array = submit(cluster, "exec sleep 300", "--array=0-199%4")
    ids = [f"{array}_{task}" for task in range(200)]
    wanted = dict.fromkeys(ids[:4], RUNNING) | dict.fromkeys(ids[4:], PENDING)
    found = see(client, wanted)
    assert found[f"{array}_100"].reason == "JobArrayTaskLimit"
    recorder.calls.clear()
    client.poll(ids)
    assert len(recorder.calls) == 1

    cluster.scontrol("update", f"jobid={array}", "arraytaskthrottle=6")
    client.cancel([f"{array}_0", *(f"{array}_{task}" for task in range(5, 200, 2))])
    assert len(recorder.of("scancel")) == 1
    # Tasks that had not started are nowhere; 97 ranges are more than 64 characters.
    gone = set(ids[5::2])
    wanted = {job: PENDING for job in ids if job not in gone}
    wanted |= dict.fromkeys([ids[1], ids[2], ids[3], ids[4], ids[6], ids[8]], RUNNING)
    see(client, wanted | {ids[0]: CANCELLED})
    client.cancel(ids)
    see(client, dict.fromkeys(wanted, CANCELLED) | {ids[0]: CANCELLED}, 30)


def test_a_task_that_is_cancelled_before_it_starts_leaves_the_queue(cluster, client):
    array = submit(cluster, "true", "--hold", "--array=0-3")
    ids = [f"{array}_{task}" for task in range(4)]
    client.cancel([ids[1]])
    waiting = dict.fromkeys([ids[0], ids[2], ids[3]], PENDING)
    assert states(client.poll(ids)) == waiting
    # Nobody knows of it, while the others wait.
    assert client.ended([ids[1]]) == {}
    client.cancel(ids)
    for _ in range(2):
        assert states(client.poll(ids)) == dict.fromkeys(waiting, CANCELLED)
    # Who has not seen them wait asks accounting.
    assert SlurmClient(environ=cluster.env).poll(ids) == {}
    assert learn(client, dict.fromkeys(ids, CANCELLED))[ids[1]].node == ""


def test_part_of_an_array_is_cancelled_while_another_part_runs(cluster, client, jobs):
    array = submit(cluster, "test $SLURM_ARRAY_TASK_ID = 0 || exec sleep 300", "--array=0-4%2")
    ids = [f"{array}_{task}" for task in range(5)]
    see(client, dict(zip(ids, [COMPLETED, RUNNING, RUNNING, PENDING, PENDING], strict=True)))
    # One that ended, one that runs, one that waits, and one that never was.
    client.cancel([ids[0], ids[1], ids[3], f"{array}_900", jobs["good"], "99999999"])
    wanted = {ids[0]: COMPLETED, ids[1]: CANCELLED, ids[2]: RUNNING, ids[4]: RUNNING}
    see(client, wanted)
    client.cancel(ids)
    see(client, wanted | {ids[2]: CANCELLED, ids[4]: CANCELLED})
    client.cancel(ids)


def test_a_job_that_is_put_back_is_pending(cluster, client, jobs):
    see(client, {jobs["back"]: RUNNING})
    until(lambda: cluster.job(jobs["back"])["RunTime"] >= "00:00:01")
    cluster.scontrol("requeue", jobs["back"])
    found = see(client, {jobs["back"]: PENDING})
    assert found[jobs["back"]].restarts == 1
    assert client.ended([jobs["back"]]) == {}


def test_what_running_jobs_use_is_known(client, jobs):
    ids = [jobs["goes on"], jobs["held"], "99999999"]
    # Accounting lags: it may know that a job has started before it knows with what.
    until(lambda: client.usage(ids, jobs["began"])[jobs["goes on"]].cpus)
    used = client.usage(ids, jobs["began"])
    assert (used[jobs["goes on"]].cpus, used[jobs["goes on"]].gpus) == (3, 2.0)
    assert used[jobs["goes on"]].elapsed_seconds > 0
    assert used.get(jobs["held"], Usage(0.0, 0, 0.0, "")).elapsed_seconds == 0
    assert "99999999" not in used


@pytest.mark.parametrize("how", ["disabled", "down", "hangs"])
def test_without_accounting_nothing_is_known_and_it_is_left_alone_for_a_minute(cluster, jobs, how):
    recorder, now = Recorder(), [1000.0]
    client = SlurmClient(
        environ=cluster.env, run=recorder, clock=lambda: now[0], accounting_timeout_s=1.0
    )
    with cluster.without_sacct(how):
        assert client.ended([jobs["good"]]) == {}
        now[0] += 59
        assert client.ended([jobs["good"]]) == {}
        assert client.usage([jobs["good"]]) == {}
        assert len(recorder.of("sacct")) == 1
        assert states(client.poll([jobs["good"]])) == {jobs["good"]: COMPLETED}
    now[0] += 2
    learn(client, {jobs["good"]: COMPLETED})


def test_the_limits_of_the_cluster(cluster, client):
    limits = client.limits()
    version = cluster.run("squeue", "--version").stdout.split()[-1]
    assert limits == Limits(
        1001, 2.0, version, requeue=True, cluster=limits.cluster, min_job_age_s=300.0
    )
    assert limits.cluster in cluster.run("scontrol", "show", "config").stdout


def test_a_job_is_found_by_its_comment(cluster, client):
    array = submit(cluster, "exec sleep 300", "--array=0-3%1", "--comment=some words | 1a2b")
    assert client.find("some words | 1a2b") == array
    assert client.find("some words") == ""
    client.cancel([array])


def test_what_a_job_that_was_put_back_used_adds_up(cluster, client, jobs):
    # Slurm starts it when what is left of its first try is surely gone.
    assert see(client, {jobs["back"]: RUNNING})[jobs["back"]].restarts == 1
    client.cancel([jobs["back"]])
    learn(client, {jobs["back"]: CANCELLED}, jobs["began"])
    words = ("sacct", "-XDnP", "--format=ElapsedRaw", f"--jobs={jobs['back']}")
    tries = [int(line) for line in cluster.run(*words).stdout.split()]
    assert len(tries) == 2
    used = client.usage([jobs["back"]], jobs["began"])[jobs["back"]]
    assert (used.elapsed_seconds, used.cpus, used.gpus) == (sum(tries), 2, 1.0)
    assert used.node in cluster.nodes


def test_a_job_that_reaches_its_limit_of_time(client, jobs):
    wanted = {jobs["limited"]: TIMEOUT}
    found = see(client, wanted, 45)
    assert found[jobs["limited"]].reason == "TimeLimit"
    learn(client, wanted)


def test_slurmctld_that_is_down_is_said_within_the_timeout(cluster, jobs):
    client = SlurmClient(environ=cluster.env, timeout_s=0.3)
    with cluster.stopped("slurmctld"):
        began = time.monotonic()
        with pytest.raises(SlurmUnreachable, match=r"squeue did not answer within 0.3 s"):
            client.poll([jobs["good"]])
        with pytest.raises(SlurmUnreachable, match=r"scancel did not answer within 1.2 s"):
            client.cancel([jobs["good"]])
        with pytest.raises(SlurmUnreachable, match=r"scontrol did not answer"):
            client.limits()
        assert client.find("some words") == ""
        assert time.monotonic() - began < 5
    assert states(SlurmClient(environ=cluster.env).poll([jobs["good"]])) == {
        jobs["good"]: COMPLETED
    }


# How answers are read: texts of the tools.


class Canned:
    """Tools that answer with these texts, by their names; an exception is raised."""

    def __init__(self, code=0, err="", **answers):
        self.answers, self.code, self.err = answers, code, err
        self.calls = []

    def __call__(self, words, environ, timeout_s):
        self.calls.append((list(words), dict(environ), timeout_s))
        answer = self.answers.get(words[0], "")
        if isinstance(answer, Exception):
            raise answer
        text = answer(words) if callable(answer) else answer
        return subprocess.CompletedProcess(words, self.code, text, self.err)


def canned(**options):
    run = Canned(**options)
    return SlurmClient(run=run, environ={"PATH": "/nonesuch"}), run


def test_a_word_that_is_not_known_is_not_over():
    client, _ = canned(squeue="5|HIBERNATING|0|0|node1|None|\n", sacct="5|HIBERNATING|0:0|node1\n")
    assert client.poll(["5"]) == {"5": Seen(RUNNING, "HIBERNATING", "node1")}
    assert client.ended(["5"]) == {}


def test_several_clusters_have_headings():
    client, run = canned(squeue="CLUSTER: one\n5|PENDING|0|0||Priority|\n\nCLUSTER: two\n")
    assert client.poll(["5"]) == {"5": Seen(PENDING, "PENDING", reason="Priority")}
    assert client.poll(["6"]) == {}
    run.answers["squeue"] = "CLUSTER: one\n"
    assert client.poll(["5"]) == {}
    assert len(run.calls) == 3


def test_a_slurm_that_knows_no_separators_is_asked_in_the_old_way():
    def squeue(words):
        if words[-1].startswith("--Format"):
            return "5_[1-2]PENDING00Priority\n5_0FAILED7680node1NonZeroExitCode\n"
        return "5_[1-2]|PENDING||||Priority\n5_0|FAILED|||node1|NonZeroExitCode\n"

    client, run = canned(squeue=squeue)
    for calls in (2, 3):
        assert client.poll(["5_0", "5_1"]) == {
            "5_0": Seen(FAILED, "FAILED", "node1", "NonZeroExitCode"),
            "5_1": Seen(PENDING, "PENDING", reason="Priority"),
        }
        assert len(run.calls) == calls


def test_newer_slurm_says_exit_codes_in_its_own_form():
    client, _ = canned(squeue="5|FAILED|3:0|2|node1|NonZeroExitCode|\n")
    assert client.poll(["5"]) == {
        "5": Seen(FAILED, "FAILED", "node1", "NonZeroExitCode", "3:0", restarts=2)
    }


def test_a_job_that_was_not_launched_keeps_the_reason():
    client, _ = canned(squeue="5|FAILED|256|0|node1|JobLaunchFailure|\n6|FAILED|1|0||None|\n")
    found = client.poll(["5", "6"])
    assert (found["5"].reason, found["5"].exit_code) == ("", "1:0")
    client, _ = canned(squeue="5|FAILED|1|0|node1|JobLaunchFailure|\n")
    assert client.poll(["5"])["5"].reason == "JobLaunchFailure"


@pytest.mark.parametrize("turn", [1, -1])
def test_a_tasks_own_row_counts_before_that_of_its_array(turn):
    rows = ["7_[4,7-9%2]|CANCELLED by 0|0:0|None assigned", "7_4|FAILED|1:0|node2"][::turn]
    client, _ = canned(sacct="\n".join(rows))
    found = client.ended(["7_4", "7_7", "7_5", "8_5", "7"])
    # 7_5 was cancelled alone, before the rest was.
    assert states(found) == {"7_4": FAILED, "7_7": CANCELLED, "7_5": CANCELLED}
    assert found["7_4"].node == "node2"


def test_an_array_that_ended_but_for_one_task_says_nothing_of_that():
    client, _ = canned(
        sacct="7|CANCELLED by 0|0:0|node1\n7_4|COMPLETED|0:0|node1\n7_6|PENDING|0:0|"
    )
    assert states(client.ended(["7_4", "7_5", "7_6"])) == {"7_4": COMPLETED}


def test_accounting_is_asked_once_by_arrays_and_from_the_day_of_submission():
    client, run = canned()
    assert client.ended([f"7_{task}" for task in range(300)] + ["9"], 1_000_000_000.0) == {}
    ((words, environ, _),) = run.calls
    assert words[-1] == "--jobs=7,9"
    # 2001-09-09T01:46:40 UTC, and an hour for clocks that differ.
    assert "--starttime=2001-09-09T00:46:40" in words
    assert environ["TZ"] == "UTC0"


def test_nothing_is_asked_about_no_jobs():
    client, run = canned()
    assert client.poll([]) == client.ended([]) == client.usage([]) == {}
    client.cancel([])
    assert run.calls == []


def test_many_jobs_are_cancelled_in_calls_of_a_bearable_length():
    client, run = canned()
    client.cancel([str(job) for job in range(10**6, 10**6 + 12_000)])
    assert [len(words) - 1 for words, _, _ in run.calls] == [5000, 5000, 2000]
    run.calls.clear()
    client.cancel([f"7_{task}" for task in range(0, 9000, 2)])
    ((words, _, _),) = run.calls
    assert len(words) == 2
    assert len(words[1]) < 128 * 1024


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("billing=4,cpu=4,gres/gpu=2,mem=4G,node=1", 2.0),
        ("cpu=4,gres/gpu:a100=2,mem=4G", 2.0),
        ("gres/gpu:a100=2,gres/gpu=3,gres/gpu:h100=1", 3.0),
        ("cpu=4,gres/gpu:a100=2,gres/gpu:h100=1", 3.0),
        ("cpu=4,gres/gpumem=80,gres/shard=3", 0.0),
        ("", 0.0),
    ],
)
def test_gpus_are_counted_by_their_sum_or_by_their_types(tres, gpus):
    client, _ = canned(sacct=f"5|10|4|{tres}|node1\n5|7|4|{tres}|node2\n")
    assert client.usage(["5"]) == {"5": Usage(17.0, 4, gpus, "node2")}


def test_limits_that_are_not_said_are_slurms_own():
    client, _ = canned(scontrol="")
    assert client.limits() == Limits(1001, 30.0)


def test_limits_of_arrays_may_be_two():
    text = """Configuration data as of 2026-01-01T00:00:00
JobRequeue              = 0
KillWait                = 45 sec
MaxArraySize            = 4000001
MinJobAge               = 2 sec
SchedulerParameters     = bf_continue,max_array_tasks=1000,defer
SLURM_VERSION           = 23.11.10
"""
    client, _ = canned(scontrol=text)
    assert client.limits() == Limits(1000, 45.0, "23.11.10", requeue=False, min_job_age_s=2.0)


def test_what_a_tool_says_when_it_fails_is_told():
    said = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
    client, _ = canned(code=1, err=said)
    with pytest.raises(SlurmUnreachable) as caught:
        client.poll(["5"])
    text = str(caught.value)
    assert text.startswith("Slurm's squeue failed with exit code 1 (squeue --noheader ")
    assert "Unable to contact slurm controller (connect failure)." in text
    assert "scontrol ping" in text
    with pytest.raises(SlurmUnreachable, match=r"\.\.\.\)"):
        client.cancel([str(job) for job in range(100)])


def test_a_machine_without_slurm_is_told_where_to_go(tmp_path):
    client = SlurmClient(environ={"PATH": str(tmp_path)})
    assert not client.is_there()
    with pytest.raises(SlurmUnreachable, match=r"Slurm's sbatch is not on the PATH; start this"):
        client.poll(["5"])
    assert client.ended(["5"]) == {}
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert client.is_there()
    with pytest.raises(SlurmUnreachable, match=r"Slurm's squeue is not on the PATH"):
        client.poll(["5"])
    (tmp_path / "squeue").write_text("no script")
    (tmp_path / "squeue").chmod(0o755)
    with pytest.raises(SlurmUnreachable, match=r"Slurm's squeue could not be started"):
        client.poll(["5"])


def test_a_tool_gets_no_input_no_terminal_and_no_more_time_than_its_limit(tmp_path):
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\ncat > input\nps -o sid= -p $$ > session\necho $LC_ALL > language\n"
        'printf "5|\\377|0|0|node1|None|\\n"\n'
    )
    squeue.chmod(0o755)
    client = SlurmClient(environ={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        assert states(client.poll(["5"])) == {"5": RUNNING}
    finally:
        os.chdir(here)
    assert (tmp_path / "input").read_text() == ""
    assert int((tmp_path / "session").read_text()) != os.getsid(0)
    assert (tmp_path / "language").read_text() == "C\n"
    # What a wrapper has started holds its output open, and is not waited for.
    squeue.write_text("#!/bin/sh\nsleep 3\necho done\n")
    slow = SlurmClient(environ={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}, timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(SlurmUnreachable, match=r"did not answer within 0.3 s"):
        slow.poll(["5"])
    assert time.monotonic() - began < 2
