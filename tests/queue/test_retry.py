"""Why a run ended and whether it is tried again."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.queue.keeper import how_it_ended
from orchestrator.queue.retry import Cause, FailureLimit, OomKills, RetryPolicy, cause_of
from orchestrator.queue.settings import GpuQueueSettings
from orchestrator.record import ErrorInfo, RunRecord, RunState
from orchestrator.sweep.errors import SweepError


def failed(kind, message="", trace="", returncode=1, state=RunState.FAILED):
    return RunRecord(
        model_name="x",
        state=state,
        returncode=returncode,
        started_at=1.0,
        error=ErrorInfo(kind, message, trace),
    )


def died(returncode=1, message=None):
    """A run whose process ended without a word, as the keeper records it."""
    text = how_it_ended(returncode, returned=False) if message is None else message
    return failed("ProcessDied", text, returncode=returncode)


# --- causes ---


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        (RunState.COMPLETED, None),
        (RunState.CANCELLED, None),
        (RunState.RUNNING, None),
        (RunState.PENDING, None),
        (RunState.TIMEOUT, Cause.TIMEOUT),
        (RunState.LOST, Cause.CRASH),
        (RunState.FAILED, Cause.CRASH),
    ],
)
def test_states_alone(state, cause):
    assert cause_of(RunRecord(model_name="x", state=state)) is cause
    # What it printed and what the kernel did does not make a failure of one that is none.
    found = cause_of(RunRecord(model_name="x", state=state), b"CUDA out of memory", oom_killed=True)
    assert found is cause


OOM_ERRORS = [
    ("MemoryError", ""),
    ("_ArrayMemoryError", "Unable to allocate 7.28 TiB for an array with shape (1000000000000,)"),
    ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 MiB."),
    ("OutOfMemoryError", "Out of memory allocating 8,000,000,000 bytes (allocated so far: 0)."),
    ("RuntimeError", "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 8 GiB total)"),
    ("RuntimeError", "CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ("RuntimeError", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ("AcceleratorError", "CUDA error: out of memory"),
    ("XlaRuntimeError", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes."),
    ("InternalError", "cublas handle: failed to create, status ALLOC_FAILED"),
    ("ResourceExhaustedError", "failed to allocate memory [Op:AddV2]"),
    ("InternalError", "OOM when allocating tensor with shape[8,8]"),
    ("CudaAPIError", "[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY"),
    ("RuntimeError", "HIP error: hipErrorOutOfMemory"),
    ("RuntimeError", "HIP out of memory. Tried to allocate 2 GiB"),
    ("RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ("RuntimeError", "Caught it in DataLoader worker 0.\n  File x\ntorch.OutOfMemoryError: no"),
    ("OSError", "[Errno 12] Cannot allocate memory"),
    ("RuntimeException", "CUDA failure 2: out of memory ; GPU=0 ; hostname=x"),
]


@pytest.mark.parametrize(("kind", "message"), OOM_ERRORS)
def test_exceptions_for_want_of_memory(kind, message):
    assert cause_of(failed(kind, message)) is Cause.OOM


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ValueError", "unknown metric 'out of memory'"),
        ("KeyError", "'out of memory'"),
        ("RuntimeError", "the buffer is out of memory slots"),
        ("RuntimeError", "CUDA error: an illegal memory access was encountered"),
        ("RuntimeError", "CUDA error: device-side assert triggered"),
        ("_InactiveRpcError", "status = StatusCode.RESOURCE_EXHAUSTED\n\tdetails = quota"),
        ("OSError", "[Errno 28] No space left on device"),
        ("AssertionError", "no MemoryError was raised"),
        ("ConnectionError", "device lost"),
        ("NotAMemoryError", ""),
    ],
)
def test_other_exceptions_are_errors(kind, message):
    assert cause_of(failed(kind, message)) is Cause.ERROR


def test_the_log_of_a_task_that_raised_says_nothing_more():
    log = b"CUDA out of memory, so the batch is halved"
    assert cause_of(failed("ValueError", "shapes differ"), log, oom_killed=True) is Cause.ERROR


RAISED_FROM = """Traceback (most recent call last):
  File "a.py", line 1, in f
    raise torch.OutOfMemoryError("CUDA out of memory")
{first}

{how}

Traceback (most recent call last):
  File "a.py", line 2, in g
    raise TrainingError from error
TrainingError: epoch 3
"""
DIRECT = "The above exception was the direct cause of the following exception:"
DURING = "During handling of the above exception, another exception occurred:"


@pytest.mark.parametrize(
    ("first", "how", "cause"),
    [
        ("torch.OutOfMemoryError: no room", DIRECT, Cause.OOM),
        ("MemoryError", DIRECT, Cause.OOM),
        ("RuntimeError: CUDA error: uncorrectable ECC error", DIRECT, Cause.GPU_LOST),
        # It was dealt with, and that went wrong.
        ("torch.OutOfMemoryError: no room", DURING, Cause.ERROR),
        # A source line is no error.
        ("ValueError: x", DIRECT, Cause.ERROR),
        (f"MemoryError\n\n{DURING}\n\nTraceback:\nValueError: x", DIRECT, Cause.ERROR),
        (f"ValueError: x\n\n{DURING}\n\nTraceback:\nMemoryError", DIRECT, Cause.OOM),
    ],
)
def test_what_an_exception_was_raised_from_counts(first, how, cause):
    trace = RAISED_FROM.format(first=first, how=how)
    assert cause_of(failed("TrainingError", "epoch 3", trace)) is cause


def test_python_tells_of_causes_as_is_expected_here():
    try:
        try:
            raise MemoryError("no room")
        except MemoryError as error:
            raise ValueError("epoch 3") from error
    except ValueError as error:
        info = ErrorInfo.of(error)
    record = RunRecord(model_name="x", state=RunState.FAILED, error=info)
    assert cause_of(record) is Cause.OOM


LOST_TEXTS = [
    "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost. Reboot",
    "NVRM: GPU at PCI:0000:3b:00: GPU has fallen off the bus.",
    "CUDA error: uncorrectable ECC error encountered",
    "cuInit: CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA error: device lost",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
]


@pytest.mark.parametrize("text", LOST_TEXTS)
def test_a_gpu_that_is_gone(text):
    assert cause_of(failed("RuntimeError", text)) is Cause.GPU_LOST
    assert cause_of(died(134), f"{text}\nAborted".encode()) is Cause.GPU_LOST


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.LOST, RunState.CANCELLED])
def test_the_keepers_word_for_a_lost_gpu_counts_in_whatever_state(state):
    assert cause_of(failed("GPU_LOST", "gone", state=state)) is Cause.GPU_LOST


@pytest.mark.parametrize("returncode", [0, 1, 137, -6, -9, -11, -15])
def test_a_process_that_died_crashed(returncode):
    # (Our own sentence on SIGKILL speaks of memory.)
    assert cause_of(died(returncode)) is Cause.CRASH
    assert cause_of(failed("EndedBySignal", "asked to end", returncode=143)) is Cause.CRASH


@pytest.mark.parametrize(
    "text",
    [
        "terminate called after throwing an instance of 'std::bad_alloc'\n  what(): std::bad_alloc",
        "GPUassert: out of memory main.cu 12",
        'CUDA error at main.cu:10 code=2(cudaErrorMemoryAllocation) "cudaMalloc"',
        "Traceback:\n  File x\nMemoryError\n",
        "Traceback:\n  File x\ncupy.cuda.memory.OutOfMemoryError: Out of memory allocating 8",
        "CUDA Runtime Error: out of memory",
    ],
)
@pytest.mark.parametrize("kind", ["ProcessDied", "SystemExit", "CalledProcessError"])
def test_what_a_silent_process_printed_last_counts(kind, text):
    log = b"x" * 9000 + b"\xff\n" + text.encode()
    assert cause_of(failed(kind, "1"), log) is Cause.OOM
    # Long ago is not why it died.
    later = text.encode() + b"\n" + b"step 1\n" * 1000
    assert cause_of(failed(kind, "1"), later) is not Cause.OOM


def test_an_exit_by_the_task_is_an_error():
    assert cause_of(failed("SystemExit", "3")) is Cause.ERROR


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (died(-signal.SIGKILL), Cause.OOM),
        (died(-signal.SIGSEGV), Cause.CRASH),
        (died(1), Cause.CRASH),
        (failed("ValueError", "shapes"), Cause.ERROR),
        (failed("RuntimeError", "DataLoader worker (pid 5) is killed by signal: Killed."), Cause.OOM),
        (failed("BrokenProcessPool", "A process in the pool was terminated abruptly"), Cause.OOM),
        (failed("CalledProcessError", "Command 'x' died with <Signals.SIGKILL: 9>."), Cause.OOM),
        (failed("CalledProcessError", "Command 'x' returned non-zero exit status 1."), Cause.ERROR),
    ],
)  # fmt: skip
def test_the_kernels_kills_explain_sigkill_alone(record, cause):
    assert cause_of(record, oom_killed=True) is cause
    assert cause_of(record) is not Cause.OOM


@given(st.binary(max_size=6000), st.text(max_size=200), st.text(max_size=200))
def test_any_text_has_a_cause(log, message, trace):
    for kind in ("ProcessDied", "ValueError", "SystemExit", message):
        assert cause_of(failed(kind, message, trace), log) in Cause


# --- retries ---


def test_the_defaults_try_nothing_again_and_know_their_words():
    settings = GpuQueueSettings()
    policy = RetryPolicy(settings.retries, settings.retry_on)
    assert policy.causes == set(Cause) - {Cause.ERROR}
    assert not policy.again(died(), Cause.CRASH, 1)


@given(
    st.integers(0, 5),
    st.sets(st.sampled_from(list(Cause))),
    st.sampled_from([None, *Cause]),
    st.integers(1, 8),
)
def test_a_chosen_cause_is_tried_again_as_often_as_was_said(retries, causes, cause, tries):
    policy = RetryPolicy(retries, [chosen.value for chosen in causes])
    assert policy.again(died(), cause, tries) == (cause in causes and tries <= retries)


def test_what_never_started_is_an_error_each_time():
    policy = RetryPolicy(3, ["error", "gpu_lost"])
    record = RunRecord(model_name="x", state=RunState.FAILED)
    assert not policy.again(record, Cause.ERROR, 1)
    assert policy.again(record, Cause.GPU_LOST, 1)


@pytest.mark.parametrize("retries", [-1, 1.5, True, "2", None])
def test_retries_are_a_whole_number(retries):
    with pytest.raises(SweepError, match=r"retries is .*; expected a whole number"):
        RetryPolicy(retries, ["oom"])


def test_an_unknown_cause_is_named_beside_the_known():
    with pytest.raises(SweepError) as caught:
        RetryPolicy(1, ["oom", "segfault"])
    text = str(caught.value)
    assert "'segfault'; expected some of oom, crash, error, timeout, gpu_lost" in text
    assert RetryPolicy(1, "oom").causes == {Cause.OOM}


# --- the end of a sweep that fails ---


@pytest.mark.parametrize(("on_failure", "limit"), [("continue", None), ("stop", 1), (1, 1), (3, 3)])
def test_a_sweep_stops_at_its_limit(on_failure, limit):
    reached = [FailureLimit(on_failure).reached(failures) for failures in range(6)]
    assert reached == [limit is not None and failures >= limit for failures in range(6)]


def test_the_limit_is_told_in_a_sentence():
    assert FailureLimit("stop").sentence(1).startswith("1 run has failed, so nothing more")
    assert "3 runs have failed" in FailureLimit(3).sentence(3)
    assert "on_failure=3" in FailureLimit(3).sentence(3)


@pytest.mark.parametrize("on_failure", [0, -1, 1.5, True, False, None, "never", "3", [], {}])
def test_other_limits_are_refused(on_failure):
    with pytest.raises(SweepError, match="expected continue, stop, or"):
        FailureLimit(on_failure)


# --- the kernel's killer ---


class Kernel:
    """Files as the kernel shows them, and a clock."""

    def __init__(self, root, cgroup, counter):
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        self.now = 100.0
        self.write(self.proc / "self" / "cgroup", cgroup)
        self.counter = root / counter
        self.kills(0)

    @staticmethod
    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def kills(self, count):
        self.write(self.counter, f"low 0\noom 7{count}\noom_kill {count}\noom_group_kill 5\n")

    def watch(self):
        return OomKills(self.proc, self.cgroups, lambda: self.now)


V1 = "5:cpu,cpuacct:/a\n4:memory:/jobs/x\n0::/y\n"


@pytest.fixture(
    params=[
        ("0::/user.slice/x\n", "cgroup/user.slice/x/memory.events"),
        ("0::/host/path\n", "cgroup/memory.events"),
        (V1, "cgroup/memory/jobs/x/memory.oom_control"),
        (V1, "cgroup/memory/memory.oom_control"),
        ("0::/\n", "proc/vmstat"),
        ("odd\n\n", "proc/vmstat"),
    ],
    ids=["v2", "v2-container", "v1", "v1-container", "machine", "odd"],
)
def kernel(request, tmp_path):
    return Kernel(tmp_path, *request.param)


def test_kills_are_seen_once_and_for_a_moment(kernel):
    kernel.kills(3)
    watch = kernel.watch()
    assert watch.rose() is False
    kernel.kills(5)
    assert watch.rose() is True
    kernel.now += 1.9
    assert watch.rose() is True
    kernel.now += 0.2
    assert watch.rose() is False
    kernel.kills(6)
    kernel.now += 1000
    assert watch.rose() is True


def test_the_own_groups_count_comes_before_the_machines(tmp_path):
    kernel = Kernel(tmp_path, "0::/x\n", "cgroup/x/memory.events")
    kernel.write(kernel.proc / "vmstat", "oom_kill 0\n")
    watch = kernel.watch()
    kernel.write(kernel.proc / "vmstat", "oom_kill 9\n")
    assert watch.rose() is False


def test_where_nothing_can_be_read_nobody_can_tell(kernel, tmp_path):
    assert OomKills(tmp_path / "no", tmp_path / "no").rose() is None
    watch = kernel.watch()
    kernel.counter.unlink()
    assert watch.rose() is None
    # A count that comes back is no rise.
    kernel.kills(9)
    assert watch.rose() is False


def test_this_machine_has_an_answer_or_none():
    assert OomKills().rose() in (False, None)
