"""NVML in a process of its own: whatever it does, the launcher's side goes on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from orchestrator.queue import nvml_process
from orchestrator.queue.link import socket_pair
from orchestrator.queue.nvml_process import reap
from orchestrator.queue.watcher import GpuWatcher, _Hung, make_watcher

GB = 10**9
A, B, C = "GPU-aaaa-1", "GPU-bbbb-2", "GPU-cccc-3"
# For what comes in milliseconds on an idle machine.
ENOUGH_S = 60.0


@pytest.fixture
def stub(nvml, monkeypatch):
    nvml.load(monkeypatch)
    nvml.gpus([nvml.gpu(A, used=GB), B, nvml.gpu(C, used=3 * GB)])
    return nvml


@pytest.fixture
def make():
    """Makes watchers; none may leave a process behind."""
    watchers = []

    def make_one(method="fork", patience_s=ENOUGH_S, retry_s=60.0):
        make = GpuWatcher.fork if method == "fork" else GpuWatcher.spawn
        watchers.append(make(patience_s, retry_s))
        return watchers[-1]

    yield make_one
    for watcher in watchers:
        watcher.close()
    assert reap()


@pytest.fixture
def watcher(make):
    return make()


def read(watcher):
    return watcher.first(ENOUGH_S)


def told(reading):
    """UUID to memory in use, or to what is wrong."""
    return {
        s.gpu.uuid: f"lost: {s.error}" if s.lost else s.error or s.used // GB
        for s in reading.snapshots
    }


def process_of(watcher):
    return psutil.Process(watcher._held[0].pid)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reading_has_every_gpu_and_is_as_old_as_it_says(stub, make, method):
    watcher = make(method)
    for used in (0, 2):
        stub.use("x", B, 0, used * GB)
        before = time.monotonic()
        reading = read(watcher)
        assert before <= reading.time <= min(s.time for s in reading.snapshots)
        assert told(reading) == {A: 1, B: used, C: 3}
        assert [gpu.label for gpu in reading.devices] == ["0", "1", "2"]
        assert reading.error == ""
    assert not watcher.outstanding
    assert watcher.deadline() is None


def test_an_event_loop_asks_and_is_woken_up(stub, watcher):
    selector = selectors.DefaultSelector()
    selector.register(watcher, selectors.EVENT_READ)
    for _ in range(3):
        assert watcher.receive() is None
        watcher.ask()
        watcher.ask()  # is answered once
        assert watcher.outstanding
        while (reading := watcher.receive()) is None:
            assert selector.select(ENOUGH_S)
        assert told(reading) == {A: 1, B: 0, C: 3}
        assert not watcher.outstanding
        assert not selector.select(0.05)
    selector.close()


def test_a_gpu_that_hangs_is_left_alone_and_the_others_are_read(stub, make):
    watcher = make(patience_s=0.5)
    read(watcher)
    first = process_of(watcher)
    stub.state(B, "hang")
    began = time.monotonic()
    reading = read(watcher)
    assert time.monotonic() - began >= 0.5
    hung = "NVML did not answer in 0.5 s"
    assert told(reading) == {A: 1, B: hung, C: 3}
    assert len(reading.devices) == 3
    assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
    second = process_of(watcher)
    for _ in range(3):  # it is not even asked
        assert told(read(watcher)) == {A: 1, B: hung, C: 3}
    assert process_of(watcher) == second
    stub.state(B, "ok")
    assert told(read(watcher))[B] == hung
    watcher._hung[B] = replace(watcher._hung[B], until=time.monotonic())
    assert told(read(watcher)) == {A: 1, B: 0, C: 3}
    assert process_of(watcher) == second


def test_a_gpu_that_hung_before_is_waited_for_less(stub, watcher):
    read(watcher)
    stub.state(B, "hang")
    watcher._hung[B] = _Hung(time.monotonic(), "NVML did not answer in 10 s")
    assert told(read(watcher)) == {A: 1, B: "NVML did not answer in 2 s", C: 3}


def test_all_instances_of_a_gpu_that_hangs_cost_one_wait(stub, make):
    instances = [(f"MIG-{n}", 10 * GB) for n in range(7)]
    stub.gpus([stub.gpu(A, mig=instances), B])
    watcher = make(patience_s=0.5)
    assert len(read(watcher).devices) == 8
    stub.state(A, "hang")
    started = []
    watcher._start = lambda: started.append(None) or nvml_process.forked()
    reading = read(watcher)
    assert len(started) == 1
    assert [s.error for s in reading.snapshots] == ["NVML did not answer in 0.5 s"] * 7 + [""]


def test_when_every_gpu_hangs_each_says_so(stub, make):
    stub.gpus([stub.gpu(A, state="hang"), stub.gpu(B, state="hang")])
    watcher = make(patience_s=0.3)
    hung = dict.fromkeys([A, B], "NVML did not answer in 0.3 s")
    assert told(read(watcher)) == hung
    assert told(read(watcher)) == hung


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_init_that_hangs_is_an_error_and_is_tried_again(stub, make, method):
    stub.init("hang")
    watcher = make(method, patience_s=0.5)
    reading = read(watcher)
    assert reading.error == "NVML did not answer in 1.5 s when it was opened"
    assert reading.devices == reading.snapshots == ()
    stub.init(None)
    watcher = make(method)
    assert told(read(watcher)) == {A: 1, B: 0, C: 3}


def test_the_first_reading_is_waited_for_no_longer_than_said(stub, watcher):
    stub.init("hang")
    began = time.monotonic()
    assert watcher.first(0.4).error == "NVML did not answer in 0.4 s"
    assert time.monotonic() - began < 5
    stub.init(None)
    stub.state(C, "hang")
    reading = watcher.first(3.0)
    assert told(reading) == {A: 1, B: 0, C: "NVML did not answer in 3 s"}


def test_a_gpu_that_is_lost_or_fails_or_is_gone_is_told(stub, watcher):
    read(watcher)
    for uuid, state in ((A, "lost"), (B, "fail"), (C, "gone")):
        stub.state(uuid, state)
    reading = read(watcher)
    assert told(reading) == {A: "lost: GPU is lost", B: "Unknown Error", C: "lost: Not Found"}
    assert [gpu.uuid for gpu in reading.devices] == [B]
    for uuid in (A, B, C):
        stub.state(uuid, "ok")
    assert told(read(watcher)) == {A: 1, B: 0, C: 3}


def test_for_the_only_gpu_that_is_lost_nvml_is_opened_again_now_and_then(stub, watcher):
    stub.gpus([A])
    read(watcher)
    stub.count_calls()
    stub.state(A, "lost")
    for opened in (0, 1):
        for _ in range(5):
            assert told(read(watcher)) == {A: "lost: GPU is lost"}
        assert stub.calls().count("nvmlInit") == opened
        watcher._listed_at -= 60
    stub.state(A, "ok")
    assert told(read(watcher)) == {A: 0}


def test_a_driver_that_is_loaded_again_is_opened_again(stub, watcher):
    read(watcher)
    stub.count_calls()
    for how, error in (("fail", "Driver Not Loaded"), ("mismatch", "mismatch")):
        stub.init(how)
        for _ in range(2):
            reading = read(watcher)
            assert error in reading.error
            assert reading.snapshots == ()
        stub.gpus([B, C, A])
        stub.init(None)
        reading = read(watcher)
        assert told(reading) == {A: 0, B: 0, C: 0}
        assert {gpu.uuid: gpu.index for gpu in reading.devices} == {B: 0, C: 1, A: 2}
    assert "nvmlInit" in stub.calls()


def test_a_machine_without_gpus_has_none(stub, watcher):
    stub.gpus([])
    reading = read(watcher)
    assert (reading.devices, reading.snapshots, reading.error) == ((), (), "")
    stub.gpus([A])
    assert told(read(watcher)) == {A: 0}


def test_a_process_that_is_killed_is_replaced(stub, watcher):
    read(watcher)
    for _ in range(3):
        process_of(watcher).kill()
        assert told(read(watcher)) == {A: 1, B: 0, C: 3}
    process = process_of(watcher)
    process.kill()
    while watcher._held:  # while nobody asks, its end wakes the loop up once
        assert watcher.receive() is None
        time.sleep(0.01)
    process_gone(process)
    assert told(read(watcher)) == {A: 1, B: 0, C: 3}


def test_a_process_that_is_killed_in_the_middle_is_replaced_once(stub, make):
    watcher = make()
    read(watcher)
    stub.state(B, "hang")
    for _ in range(2):
        watcher.ask()
        deaths = 0
        while (reading := watcher.receive()) is None:
            if deaths < 2 and watcher._opened and watcher._left and watcher._left[0].uuid == B:
                process_of(watcher).kill()
                deaths += 1
                while watcher._opened and not watcher._deaths >= deaths:
                    watcher.receive()
            time.sleep(0.01)
        assert told(reading) == {A: 1, B: "the process that reads NVML dies of it", C: 3}


def test_a_process_that_does_not_start_is_an_error(make, monkeypatch):
    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    watcher = make()
    monkeypatch.setattr(watcher, "_start", refuse)
    reading = watcher.first(1.0)
    assert "does not start: [Errno 11]" in reading.error
    assert not watcher.outstanding


def test_a_pynvml_of_somebody_else_is_an_error(make, tmp_path, monkeypatch):
    (tmp_path / "pynvml.py").write_text("def nvmlInit(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "has no attribute" in read(make("spawn")).error


def process_gone(process, patience_s=ENOUGH_S):
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        reap()
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
                continue
        return
    pytest.fail(f"{process} still runs")


LAUNCHER = """
import sys, time
from orchestrator.queue.watcher import make_watcher
watcher = make_watcher(sys.argv[1])
watcher.first(60)
if len(sys.argv) > 2:
    text = open(sys.argv[2]).read()
    open(sys.argv[2], "w").write(text.replace("|ok|", "|hang|"))
    watcher.ask()
    time.sleep(1)
    watcher.receive()
    assert len(watcher._left) == 3, "nothing hangs"
print(watcher._held[0].pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_killed_launcher_leaves_no_process_behind(stub, method, hangs):
    words = [sys.executable, "-c", LAUNCHER, method]
    words += [str(stub.directory / "gpus")] if hangs else []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as launcher:
        process = psutil.Process(int(launcher.stdout.readline()))
        assert process.is_running()
        launcher.kill()
        process_gone(process)


def test_signals_of_the_terminal_do_not_reach_it(stub, watcher):
    read(watcher)
    process = process_of(watcher)
    for number in (signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    assert os.getsid(process.pid) == process.pid
    assert told(read(watcher)) == {A: 1, B: 0, C: 3}
    assert process_of(watcher) == process


def test_it_holds_nothing_of_the_launcher_s(stub, watcher, tmp_path):
    ours, theirs = socket_pair()
    lock = (tmp_path / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    read(watcher)
    theirs.close()
    ours.settimeout(ENOUGH_S)
    assert ours.recv(1) == b""  # its end is closed nowhere else
    lock.close()
    with (tmp_path / "lock").open("w") as again:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ours.close()
    files = {os.readlink(f"/proc/{process_of(watcher).pid}/fd/{n}") for n in range(3)}
    assert files == {os.devnull}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_descriptors_and_processes_do_not_grow_in_number(stub, make, method):
    rounds = 200 if method == "fork" else 20
    watcher = make(method)
    read(watcher)
    me = psutil.Process()
    before, children = me.num_fds(), len(me.children())
    inside = process_of(watcher).num_fds()
    for n in range(rounds):
        if n % 10 == 5:
            process_of(watcher).kill()
        assert told(read(watcher)) == {A: 1, B: 0, C: 3}
    assert me.num_fds() == before
    assert process_of(watcher).num_fds() == inside
    reap()
    assert len(me.children()) <= children + 1


def test_close_ends_the_process_and_frees_all(stub):
    before = psutil.Process().num_fds()
    for _ in range(3):
        watcher = make_watcher("fork")
        watcher.first(ENOUGH_S)
        process = process_of(watcher)
        watcher.close()
        watcher.close()
        process_gone(process)
    assert psutil.Process().num_fds() == before


def test_a_process_that_cannot_be_collected_is_not_waited_for(stub, make, monkeypatch):
    # As in the driver's uninterruptible sleep: the kill has no effect, and the wait no end.
    watcher = make(patience_s=0.3)
    read(watcher)
    stubborn = process_of(watcher)
    flags = []

    def waitpid(pid, how):
        flags.append(how)
        return (0, 0) if pid == stubborn.pid else os_waitpid(pid, how)

    os_waitpid = os.waitpid
    monkeypatch.setattr(nvml_process.os, "waitpid", waitpid)
    stub.state(A, "hang")
    assert told(read(watcher)) == {A: "NVML did not answer in 0.3 s", B: 0, C: 3}
    began = time.monotonic()
    watcher.close()
    assert time.monotonic() - began < 5
    assert set(flags) == {os.WNOHANG}
    monkeypatch.undo()
    process_gone(stubborn)


def test_a_fork_that_drops_its_copy_harms_nothing(stub, watcher):
    read(watcher)
    pid = os.fork()
    if pid == 0:
        watcher._finish_off()
        os._exit(0)
    os.waitpid(pid, 0)
    process = process_of(watcher)
    assert told(read(watcher)) == {A: 1, B: 0, C: 3}
    assert process_of(watcher) == process


def test_while_not_asked_it_does_nothing(stub, watcher):
    read(watcher)
    process = process_of(watcher)
    stub.count_calls()
    before = process.num_ctx_switches().voluntary
    time.sleep(0.5)
    # The one is its going to sleep, if it had not yet.
    assert process.num_ctx_switches().voluntary <= before + 1
    assert stub.calls() == []


def test_a_reading_of_eight_gpus_takes_milliseconds(stub, watcher):
    stub.gpus([f"GPU-{n}" for n in range(8)])
    read(watcher)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        assert len(read(watcher).snapshots) == 8
        took.append(time.perf_counter() - began)
    print(f"median {sorted(took)[10] * 1e3:.1f} ms, least {min(took) * 1e3:.1f} ms")
    assert min(took) < 0.1


def test_threads_of_the_app_do_not_matter(stub, watcher):
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=ours.recv, args=(1,))
    thread.start()
    assert told(read(watcher)) == {A: 1, B: 0, C: 3}
    theirs.close()
    thread.join()
    ours.close()
