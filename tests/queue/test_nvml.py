"""What is read of NVML: the real nvidia-ml-py over a stubbed library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from orchestrator.queue.gpus import Gpu, GpuProcess
from orchestrator.queue.nvml import Nvml, NvmlFailed, known_without_nvml

GB = 10**9
A, B, C = "GPU-aaaa-1", "GPU-bbbb-2", "GPU-cccc-3"
MIG = [("MIG-one", 20 * GB), ("MIG-two", 10 * GB)]


@pytest.fixture
def stub(nvml, monkeypatch):
    nvml.load(monkeypatch)
    nvml.gpus([nvml.gpu(A, "Stub A", used=GB, utilisation=7), B])
    return nvml


@pytest.fixture
def opened(stub):
    nvml = Nvml()
    yield nvml
    nvml.close()


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_devices_are_named_and_numbered_as_nvml_does(opened):
    assert opened.devices() == [Gpu(A, 0, "Stub A"), Gpu(B, 1, "Stub")]


def test_a_snapshot_tells_memory_processes_and_use(stub, opened, sleeper):
    stub.use("job", A, sleeper.pid, 5 * GB)
    stub.use("unseen", A, 0, 2 * GB)
    before = time.monotonic()
    snapshot = opened.read(Gpu(A, 0))
    assert before <= snapshot.time <= time.monotonic()
    assert (snapshot.total, snapshot.used, snapshot.free) == (80 * GB, 8 * GB, 72 * GB)
    assert snapshot.utilization == 7
    assert snapshot.processes == (GpuProcess(sleeper.pid, 5 * GB),)
    assert (snapshot.error, snapshot.lost) == ("", False)


def test_the_stub_s_uses_begin_end_and_die_with_their_process(stub, opened, sleeper):
    def used():
        snapshot = opened.read(Gpu(B, 1))
        return snapshot.used // GB, len(snapshot.processes)

    now = time.time()
    stub.use("later", B, sleeper.pid, GB, start=now + 600)
    stub.use("over", B, sleeper.pid, GB, until=now - 1)
    assert used() == (0, 0)
    stub.use("now", B, sleeper.pid, GB, until=now + 600)
    stub.use("more", B, sleeper.pid, GB)
    stub.use("lingers", B, sleeper.pid, GB, until=now + 600, linger=True)
    assert used() == (3, 1)
    stub.drop("now")
    assert used() == (2, 1)
    sleeper.kill()
    while sleeper.poll() is None:  # a zombie has no memory
        time.sleep(0.01)
    assert used() == (1, 0)


OCCUPY = """
import os, sys, time
sys.path.insert(0, os.environ["NVML_STUB_TOOLS"])
import use_gpu
end = use_gpu.occupy(3 * 10**9, linger=600)
print("taken", flush=True)
sys.stdin.readline()
end()
print("ended", flush=True)
sys.stdin.readline()
"""


def test_a_simulated_job_takes_memory_and_leaves_some_behind(stub, opened):
    with subprocess.Popen(
        [sys.executable, "-c", OCCUPY],
        env={**os.environ, **stub.env, "CUDA_VISIBLE_DEVICES": B},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdout.readline() == "taken\n"
        assert opened.read(Gpu(B, 1)).processes == (GpuProcess(job.pid, 3 * GB),)
        assert opened.read(Gpu(A, 0)).used == GB
        job.stdin.write("\n")
        job.stdin.flush()
        assert job.stdout.readline() == "ended\n"
        snapshot = opened.read(Gpu(B, 1))
        assert (snapshot.used, snapshot.processes) == (3 * GB, ())
        job.kill()


def test_memory_leaves_out_what_the_driver_keeps_where_nvml_can_tell(stub, opened):
    stub.quirks(f"reserved={GB}")
    snapshot = opened.read(Gpu(A, 0))
    assert (snapshot.used, snapshot.free) == (GB, 78 * GB)
    stub.quirks(f"reserved={GB}", "no-v2")
    snapshot = opened.read(Gpu(A, 0))
    assert (snapshot.used, snapshot.free) == (2 * GB, 78 * GB)
    stub.quirks("no-memory")
    snapshot = opened.read(Gpu(A, 0))
    assert (snapshot.total, snapshot.used, snapshot.free, snapshot.error) == (0, 0, 0, "")


def test_what_nvml_does_not_tell_is_none(stub, opened, sleeper):
    stub.use("job", A, sleeper.pid, GB)
    stub.gpus([stub.gpu(A, utilisation="-")])
    assert opened.read(Gpu(A, 0)).utilization is None
    stub.quirks("no-process-memory")
    assert opened.read(Gpu(A, 0)).processes == (GpuProcess(sleeper.pid, None),)
    stub.quirks("no-processes")
    assert opened.read(Gpu(A, 0)).processes is None


def test_in_containers_processes_are_hidden_or_have_other_numbers(stub, opened, sleeper):
    stub.use("job", B, sleeper.pid, GB)
    stub.state(B, "nopids")
    snapshot = opened.read(Gpu(B, 1))
    assert (snapshot.used, snapshot.processes) == (GB, ())
    stub.state(B, "hostpids")
    assert opened.read(Gpu(B, 1)).processes == (GpuProcess(sleeper.pid + 4_000_000, GB),)


def test_many_processes_are_all_listed(stub, opened):
    lines = "".join(f"{B} {os.getpid()} {n} 0 inf\n" for n in range(40))
    (stub.directory / "use-many").write_text(lines)
    assert opened.read(Gpu(B, 1)).processes == (GpuProcess(os.getpid(), sum(range(40))),)


@pytest.mark.parametrize(
    ("state", "error", "lost"),
    [("lost", "GPU is lost", True), ("gone", "Not Found", True), ("fail", "Unknown Error", False)],
)
def test_a_gpu_that_cannot_be_read_says_why(stub, opened, state, error, lost):
    stub.state(A, state)
    snapshot = opened.read(Gpu(A, 0))
    assert (snapshot.error, snapshot.lost) == (error, lost)
    assert (snapshot.total, snapshot.used, snapshot.processes) == (0, 0, None)
    stub.state(A, "ok")
    assert opened.read(Gpu(A, 0)).used == GB


def test_a_gpu_that_falls_off_the_bus_does_not_lend_its_number(stub, opened):
    stub.gpus([A, stub.gpu(B, used=GB)])
    stub.state(A, "gone")
    assert opened.devices() == [Gpu(B, 0, "Stub")]
    assert opened.read(Gpu(B, 1)).used == GB
    stub.state(A, "lost")
    assert opened.devices() == [Gpu(B, 1, "Stub")]


def test_instances_stand_for_a_divided_gpu(stub, opened, sleeper):
    stub.gpus([stub.gpu(A, "Big", mig=MIG), stub.gpu(B, "Whole")])
    one, two, whole = opened.devices()
    assert (one, two) == (Gpu("MIG-one", 0, "Big MIG 1g", 0), Gpu("MIG-two", 0, "Big MIG 1g", 1))
    assert whole == Gpu(B, 1, "Whole")
    assert (one.label, two.label, whole.label) == ("0:0", "0:1", "1")
    stub.use("job", "MIG-two", sleeper.pid, GB)
    snapshots = [opened.read(gpu) for gpu in (one, two)]
    assert [(s.total, s.used, s.utilization) for s in snapshots] == [
        (20 * GB, 0, None),
        (10 * GB, GB, None),
    ]
    assert [s.processes for s in snapshots] == [(), (GpuProcess(sleeper.pid, GB),)]
    stub.state(A, "lost")
    assert opened.read(one).lost


@pytest.mark.parametrize(
    ("how", "error"), [("fail", "Driver Not Loaded"), ("mismatch", "version mismatch")]
)
def test_no_driver_or_another_one_is_nvml_s_failure_not_a_gpu_s(stub, opened, how, error):
    stub.init(how)
    with pytest.raises(NvmlFailed, match=error):
        Nvml()
    with pytest.raises(NvmlFailed, match=error):
        opened.devices()
    with pytest.raises(NvmlFailed, match=error):
        opened.read(Gpu(A, 0))
    stub.init(None)
    assert opened.read(Gpu(A, 0)).error == ""


def test_without_the_library_nvml_says_so(tmp_path):
    code = "from orchestrator.queue.nvml import Nvml; Nvml()"
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        pytest.skip("this machine has the real library")
    assert "NvmlFailed: NVML Shared Library Not Found" in done.stderr


def information(root, bus, uuid, model="NVIDIA H200"):
    path = root / "gpus" / bus / "information"
    path.parent.mkdir(parents=True)
    path.write_text(
        f"Model: \t\t {model}\nIRQ:   \t\t 16\nGPU UUID: \t {uuid}\nBus Location: \t {bus}\n"
    )


def test_the_kernel_s_files_name_gpus_in_nvml_s_order(stub, tmp_path):
    stub.count_calls()
    root = tmp_path / "driver"
    assert known_without_nvml(root) == []
    information(root, "0000:5d:00.0", B)
    information(root, "0000:0a:00.0", A, "NVIDIA A100")
    information(root, "0001:01:00.0", C)
    information(root, "0000:60:00.0", "GPU-????????-????-????-????-????????????")
    assert known_without_nvml(root) == [
        Gpu(A, 0, "NVIDIA A100"),
        Gpu(B, 1, "NVIDIA H200"),
        Gpu(C, 3, "NVIDIA H200"),
    ]
    assert stub.calls() == []


def test_nvml_is_not_loaded_before_it_is_opened():
    code = (
        "import sys, orchestrator.queue.watcher as w; w.make_watcher('fork').close();"
        "print('pynvml' in sys.modules, 'hydra' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_the_stub_hangs_where_it_is_told_to(stub):
    stub.state(A, "hang")
    code = (
        "from orchestrator.queue.nvml import Nvml; n = Nvml(); a, b = n.devices();"
        "print(n.read(b).total, flush=True); n.read(a)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as reads:
        assert reads.stdout.readline() == f"{80 * GB}\n"
        with pytest.raises(subprocess.TimeoutExpired):
            reads.wait(0.5)
        reads.send_signal(signal.SIGKILL)
