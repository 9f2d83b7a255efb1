"""Why a run ended, whether it is tried again, and when a sweep has failed often enough."""

from __future__ import annotations

import enum
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record import RunState
from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from orchestrator.record import ErrorInfo, RunRecord


class Cause(str, enum.Enum):
    """Why a run failed, in the words of ``hydra.launcher.retry_on``."""

    OOM = "oom"
    CRASH = "crash"
    ERROR = "error"
    TIMEOUT = "timeout"
    GPU_LOST = "gpu_lost"


_BY_STATE = {RunState.TIMEOUT: Cause.TIMEOUT, RunState.LOST: Cause.CRASH}
# A run that died, and one that was asked to end by somebody else: no task raised these.
_CRASHES = ("ProcessDied", "EndedBySignal")
# What says only that a process failed. Why, it may have printed.
_SILENT = (*_CRASHES, "SystemExit", "CalledProcessError")
_TAIL_BYTES = 4_096
# How long after the kernel has killed one process others are put down to the same.
_STORM_S = 2.0

_OOM_TYPES = ("MemoryError", "_ArrayMemoryError", "OutOfMemoryError", "ResourceExhaustedError")
# Never just "out of memory": a metric, a file or a sentence of ours may be called so.
_OOM = re.compile(
    r"""
      \b(?:CUDA|HIP|XPU|MPS\ backend)\ out\ of\ memory
    | \b(?:CUDA|HIP)\b[^\n]{0,40}\b(?:error|failure)\b[^\n]{0,40}\bout\ of\ memory
    | \bGPUassert:\ out\ of\ memory
    | \bCUDA_ERROR_OUT_OF_MEMORY\b | \bcudaErrorMemoryAllocation\b | \bhipErrorOutOfMemory\b
    | \bcublas[^\n]{0,80}ALLOC_FAILED | \b(?:CUDNN|CUSOLVER|CUSPARSE|CUFFT)_\w*ALLOC_FAILED\b
    | (?<!StatusCode\.)\bRESOURCE_EXHAUSTED\b
    | \bOOM\ when\ allocating\b
    | \bDefaultCPUAllocator:\ (?:can't\ allocate|not\ enough)\ memory
    | \bstd::bad_alloc\b
    | \btorch\.(?:cuda\.)?OutOfMemoryError\b | \bcupy[\w.]*\.OutOfMemoryError\b
    | ^(?:[\w.]+\.)?(?:MemoryError|_ArrayMemoryError|OutOfMemoryError)(?::|$)
    | \[Errno\ 12\]\ Cannot\ allocate\ memory
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_LOST = re.compile(
    r"""
      \bGPU[ _]is[ _]lost\b | \bfallen\ off\ the\ bus\b
    | \bCUDA_ERROR_DEVICE_UNAVAILABLE\b | \bcudaErrorDevicesUnavailable\b
    | \bCUDA-capable\ device\(s\)\ is/are\ busy\ or\ unavailable
    | \b(?:CUDA|HIP|VK)[^\n]{0,40}\bdevice[ ]lost\b | \bVK_ERROR_DEVICE_LOST\b
    | \buncorrectable\ (?:ECC|NVLink)\ error | \bcudaErrorECCUncorrectable\b
    | \bCUDA_ERROR_ECC_UNCORRECTABLE\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
_KILLED = re.compile(r"\bSIGKILL\b|killed by signal: Killed|terminated abruptly|exit status 137\b")
_DIRECT = "The above exception was the direct cause of the following exception:"
_DURING = "During handling of the above exception, another exception occurred:"


def cause_of(record: RunRecord, log_tail: bytes = b"", *, oom_killed: bool = False) -> Cause | None:
    """Why a run failed; None for one that did not: COMPLETED, CANCELLED, or not at its end.

    Args:
        record: its final record.
        log_tail: the end of what it printed. The last 4 KB are looked at, and only where the
            error says no more than that a process failed.
        oom_killed: what `OomKills.rose` says. It explains a SIGKILL, and nothing else.
    """
    # (The keeper's word for a run that it ended because its GPU was gone.)
    if record.error is not None and record.error.type == Cause.GPU_LOST.name:
        return Cause.GPU_LOST
    if record.state is not RunState.FAILED:
        return _BY_STATE.get(record.state)
    if record.error is None:
        return Cause.CRASH
    return _cause(record.error, log_tail, killed=oom_killed and _was_killed(record))


def _cause(error: ErrorInfo, log_tail: bytes, *, killed: bool) -> Cause:
    name = error.type.rpartition(".")[2]
    texts = [error.message, *_direct_causes(error.traceback)]
    if name in _SILENT:
        texts.append(log_tail[-_TAIL_BYTES:].decode("utf-8", "replace"))
    if any(map(_LOST.search, texts)):
        return Cause.GPU_LOST
    if killed or name in _OOM_TYPES or any(map(_OOM.search, texts)):
        return Cause.OOM
    return Cause.CRASH if name in _CRASHES else Cause.ERROR


def _direct_causes(traceback: str) -> Iterator[str]:
    """The text of exceptions that others were raised from; source lines are indented."""
    for part in traceback.split(_DIRECT)[:-1]:
        lines = part.rpartition(_DURING)[2].splitlines()
        yield "\n".join(line for line in lines if not line.startswith(" "))


def _was_killed(record: RunRecord) -> bool:
    if record.returncode == -signal.SIGKILL:
        return True
    return record.error is not None and _KILLED.search(record.error.message) is not None


class RetryPolicy:
    """Which failures are tried again.

    Args:
        retries: how often one run is, at most.
        retry_on: after which causes.

    Raises:
        SweepError: a number or a word that means nothing here.
    """

    def __init__(self, retries: int, retry_on: Sequence[str]) -> None:
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            expected = "a whole number of further tries. Set 0 for none."
            raise SweepError(f"hydra.launcher.retries is {retries!r}; expected {expected}")
        self.retries = retries
        words = [retry_on] if isinstance(retry_on, str) else retry_on
        self.causes = frozenset(map(_known_cause, words))

    def again(self, record: RunRecord, cause: Cause | None, tries_so_far: int) -> bool:
        """Whether a run is tried again.

        Args:
            record: how its last try ended.
            cause: why, as `cause_of` says.
            tries_so_far: its tries in this launch, the last one included.
        """
        if cause not in self.causes or tries_so_far > self.retries:
            return False
        # What never started (it cannot be composed, its directory made) does not next time.
        return record.started_at is not None or cause is not Cause.ERROR


def _known_cause(word: str) -> Cause:
    try:
        return Cause(word)
    except ValueError:
        expected = f"some of {', '.join(cause.value for cause in Cause)}. Correct the word."
        raise SweepError(f"hydra.launcher.retry_on has {word!r}; expected {expected}") from None


class FailureLimit:
    """``hydra.callbacks.results.on_failure``: after how many failed runs nothing more starts.

    Args:
        on_failure: ``continue``, ``stop`` (after the first) or a number.

    Raises:
        SweepError: it is something else.
    """

    def __init__(self, on_failure: Any) -> None:
        limits = {"continue": None, "stop": 1}
        is_number = isinstance(on_failure, int) and not isinstance(on_failure, bool)
        if isinstance(on_failure, str) and on_failure in limits:
            self.limit = limits[on_failure]
        elif is_number and on_failure >= 1:
            self.limit = on_failure
        else:
            got = f"hydra.callbacks.results.on_failure is {on_failure!r}"
            expected = "continue, stop, or after how many failed runs to stop. Set one of these."
            raise SweepError(f"{got}; expected {expected}")

    def reached(self, failures: int) -> bool:
        return self.limit is not None and failures >= self.limit

    def sentence(self, failures: int) -> str:
        """What to tell when the limit is reached."""
        runs = "1 run has failed" if failures == 1 else f"{failures} runs have failed"
        return f"{runs}, so nothing more is started (on_failure={self.limit}); what runs goes on."


class OomKills:
    """Whether the kernel has ended processes for want of memory.

    It counts in this process's cgroup, which the jobs share, or else on the whole machine.
    """

    def __init__(
        self,
        proc: Path = Path("/proc"),
        cgroups: Path = Path("/sys/fs/cgroup"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        readable = (path for path in _counters(proc, cgroups) if _oom_kills(path) is not None)
        self._path = next(readable, None)
        self._clock = clock
        self._count = _oom_kills(self._path)
        self._rose_at: float | None = None

    def rose(self) -> bool | None:
        """Whether it rose since this was last asked, or in the 2 seconds before.

        The kernel may end several jobs at once, and each of them is asked about. None where
        nobody can tell.
        """
        before, self._count = self._count, _oom_kills(self._path)
        if self._count is None:
            return None
        now = self._clock()
        if before is not None and self._count > before:
            self._rose_at = now
        return self._rose_at is not None and now - self._rose_at <= _STORM_S


def _counters(proc: Path, cgroups: Path) -> Iterable[Path]:
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # (In a container the path may be the host's, while its own group is mounted at the top.)
        if "memory" in controllers.split(","):
            top = cgroups / "memory"
            yield from (top / path.lstrip("/") / "memory.oom_control", top / "memory.oom_control")
        elif not controllers:
            yield from (cgroups / path.lstrip("/") / "memory.events", cgroups / "memory.events")
    yield proc / "vmstat"


def _oom_kills(path: Path | None) -> int | None:
    if path is None:
        return None
    try:
        found = re.search(rb"^oom_kill (\d+)$", path.read_bytes(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(found[1]) if found else None
