"""The run record: one typed, frozen ``run.json`` per run directory.

JSON has no NaN or infinity. They are written as the strings ``"NaN"``, ``"Infinity"`` and
``"-Infinity"`` and read back as floats in ``metrics`` and ``return_value``.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from pathlib import PurePath
from typing import Any

import msgspec

from orchestrator.errors import OrchestratorError

SCHEMA_VERSION = 1
# The error of a run that has saved its state because its time was nearly up.
PREEMPTED = "Preempted"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunState(str, Enum):
    """Where a run is. Words of Hydra, Slurm and the OS are translated into these once."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    LOST = "LOST"

    @property
    def is_final(self) -> bool:
        return not _TRANSITIONS[self]

    def can_become(self, other: RunState) -> bool:
        return other in _TRANSITIONS[self]


_FINAL: frozenset[RunState] = frozenset()
_TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    # A run that never started may fail (it cannot be composed), or be cancelled or lost.
    RunState.PENDING: frozenset(
        {RunState.RUNNING, RunState.FAILED, RunState.CANCELLED, RunState.LOST}
    ),
    RunState.RUNNING: frozenset(
        {
            RunState.COMPLETED,
            RunState.FAILED,
            RunState.TIMEOUT,
            RunState.CANCELLED,
            RunState.LOST,
        }
    ),
    RunState.COMPLETED: _FINAL,
    RunState.FAILED: _FINAL,
    RunState.TIMEOUT: _FINAL,
    RunState.CANCELLED: _FINAL,
    RunState.LOST: _FINAL,
}


class RecordError(OrchestratorError):
    """A ``run.json`` that cannot be read as one of ours."""


class ErrorInfo(msgspec.Struct, frozen=True):
    """Why a run failed: exception type, its message, and the traceback as text."""

    type: str
    message: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException) -> ErrorInfo:
        """An exception as text, whatever its own methods do."""
        try:
            message = str(error)
        except Exception:  # noqa: BLE001
            message = "(its text could not be had)"
        try:
            text = "".join(traceback.format_exception(error))
        except Exception:  # noqa: BLE001
            text = ""
        return cls(type(error).__qualname__, message[:_MESSAGE_CHARS], text[-_TRACEBACK_CHARS:])

    @property
    def line(self) -> str:
        """The error in one line: its type, and the message as far as its first full sentence.

        A line that ends in a colon announces the next one, which then belongs to it.
        """
        words: list[str] = []
        for text in filter(None, map(str.strip, self.message.splitlines())):
            words.append(text)
            if not text.endswith(":"):
                break
        said = " ".join(words)
        return f"{self.type}: {said}"[:_LINE_CHARS] if said else self.type


class Attempt(msgspec.Struct, frozen=True):
    """One earlier try of the same run, kept when it is run again."""

    started_at: float | None
    ended_at: float | None
    state: RunState
    returncode: int | None
    gpu_uuids: tuple[str, ...] = ()
    error: ErrorInfo | None = None


class Versions(msgspec.Struct, frozen=True):
    """What ran: interpreter, this package, and the commit of the code, if it is in git."""

    python: str = ""
    orchestrator: str = ""
    git_commit: str = ""
    git_dirty: bool | None = None


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All that launchers, callback, status, aggregation and report know of a run.

    Times are seconds since the epoch, durations seconds, memory gigabytes (10^9 bytes).
    """

    schema_version: int = SCHEMA_VERSION
    model_name: str
    sweep_id: str = ""
    index: int | None = None
    overrides: tuple[str, ...] = ()
    hyperparams: dict[str, Any] = {}
    fingerprint: str = ""
    seed: int | None = None
    state: RunState
    success: bool = False
    returncode: int | None = None
    return_value: Any = None
    attempts: tuple[Attempt, ...] = ()
    error: ErrorInfo | None = None
    gpu_id: int | None = None
    gpu_uuids: tuple[str, ...] = ()
    # As squeue names it (``123`` or ``123_4``); empty where Slurm has no part in the run.
    slurm_job_id: str = ""
    host: str = ""
    boot_id: str = ""
    pid: int | None = None
    pid_started: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    duration_seconds: float | None = None
    # The highest memory on any one of its GPUs; GPUs times seconds; mean utilisation in percent.
    peak_gpu_memory_gb: float | None = None
    gpu_seconds: float | None = None
    # CPU cores times seconds, by the accounting of a cluster; None elsewhere.
    core_seconds: float | None = None
    gpu_utilization: float | None = None
    metrics: dict[str, float] = {}
    # What decides on its memory: the same for runs that take the same; empty where nobody asked.
    memory_shape: str = ""
    command: str = ""
    # Where the command was typed: what it names by a relative path is found from there.
    cwd: str = ""
    versions: Versions = Versions()

    def advance(self, state: RunState, **changes: Any) -> RunRecord:
        """The same run in a later state.

        Raises:
            ValueError: the transition is not in the table; a final state stays final.
        """
        if not self.state.can_become(state):
            msg = f"run {self.model_name} is {self.state.value} and cannot become {state.value}"
            raise ValueError(msg)
        return msgspec.structs.replace(
            self, state=state, success=state is RunState.COMPLETED, **changes
        )

    @property
    def never_began(self) -> bool:
        """Whether no process has ever worked on the run, whatever has become of it."""
        return self.started_at is None and self.state is not RunState.COMPLETED

    def with_last_attempt(self) -> tuple[Attempt, ...]:
        """All attempts so far, this one included, for a run that is about to be done again.

        Nobody works on it any more, so one that never said how it ended is LOST; one that has
        only been waiting was none.
        """
        if self.never_began:
            return self.attempts
        last = Attempt(
            started_at=self.started_at,
            ended_at=self.ended_at,
            state=self.state if self.state.is_final else RunState.LOST,
            returncode=self.returncode,
            gpu_uuids=self.gpu_uuids,
            error=self.error,
        )
        return (*self.attempts, last)


# A record is no place for arrays; a few numbers in one are all right.
_ARRAY_ITEMS = 1_000
_LINE_CHARS = 300
_MESSAGE_CHARS = 10_000
_TRACEBACK_CHARS = 100_000

_encoder = msgspec.json.Encoder()


class _WireRecord(RunRecord, frozen=True, kw_only=True):
    """The record as JSON holds it: metrics may be the strings of non-finite numbers."""

    metrics: dict[str, float | str] = {}  # type: ignore[assignment]


_decoder = msgspec.json.Decoder(_WireRecord)
_FIELDS = RunRecord.__struct_fields__


def encode(record: RunRecord) -> bytes:
    """The record as one line of JSON."""
    wire = {name: getattr(record, name) for name in _FIELDS}
    for name in ("hyperparams", "return_value"):
        wire[name] = to_plain(wire[name])
    wire["metrics"] = {
        str(to_plain(name)): _finite_or_text(_as_float(value))
        for name, value in record.metrics.items()
        if value is not None
    }
    try:
        return _encoder.encode(wire) + b"\n"
    except UnicodeEncodeError:  # a file name that is not UTF-8, in an error or an override
        return _encoder.encode(to_plain(msgspec.to_builtins(wire))) + b"\n"


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond the floats
        return math.inf if value > 0 else -math.inf


def decode(data: bytes) -> RunRecord:
    """Read a record.

    Raises:
        RecordError: the bytes are not JSON, not a record, or of a newer schema.
    """
    try:
        wire = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _refuse_newer(_schema_of(data))
        msg = f"not a run record: {error}"
        raise RecordError(msg) from error
    _refuse_newer(wire.schema_version)
    values = {name: getattr(wire, name) for name in _FIELDS}
    values["metrics"] = {
        k: v for k, v in from_plain(wire.metrics).items() if not isinstance(v, str)
    }
    values["return_value"] = from_plain(wire.return_value)
    return RunRecord(**values)


class _Schema(msgspec.Struct):
    schema_version: int = SCHEMA_VERSION


def _schema_of(data: bytes) -> int:
    try:
        return msgspec.json.decode(data, type=_Schema).schema_version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return SCHEMA_VERSION


def _refuse_newer(version: int) -> None:
    if version > SCHEMA_VERSION:
        msg = (
            f"the record has schema {version}, this version reads up to {SCHEMA_VERSION}: "
            "upgrade the orchestrator"
        )
        raise RecordError(msg)


def to_plain(value: Any) -> Any:
    """A value as JSON can hold it; numbers of numpy and torch become Python's.

    Raises:
        TypeError: the value (or one inside it) is none of: number, text, None, list,
            mapping, enum, path.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)  # a subclass, such as an IntEnum, is none of JSON's types
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float):
        return _finite_or_text(float(value))
    if isinstance(value, (str, PurePath)):
        # A lone surrogate (a file name that is not UTF-8) cannot be encoded.
        return str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {str(to_plain(key)): to_plain(item) for key, item in value.items()}
    if isinstance(value, (Sequence, AbstractSet)) and not isinstance(value, (bytes, bytearray)):
        return [to_plain(item) for item in value]
    if (number := _library_value(value)) is not None:
        return to_plain(number)
    msg = f"a {type(value).__module__}.{type(value).__qualname__} cannot be written as JSON"
    raise TypeError(msg)


def _library_value(value: Any) -> Any:
    """Python's numbers from numpy's, torch's and JAX's; None for anything else."""
    if not callable(getattr(value, "item", None)):
        return None
    size = getattr(value, "size", None)
    if isinstance(size, int) and 1 < size <= _ARRAY_ITEMS:
        return value.tolist()
    # A scalar or 0-d array; a torch tensor's size is a method, and its own error says more.
    return value.item() if size == 1 or callable(size) else None


def numbers_in(returned: Any) -> dict[str, float]:
    """The numbers of a returned mapping, which count as metrics.

    Args:
        returned: a return value as `to_plain` gives it.
    """
    values = from_plain(returned) if isinstance(returned, dict) else {}
    return {key: value for key, value in values.items() if isinstance(value, (int, float))}


def _finite_or_text(number: float) -> float | str:
    if math.isfinite(number):
        return number
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def from_plain(value: Any) -> Any:
    """The inverse of `to_plain` for numbers: the three words become floats again."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: from_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    return value
