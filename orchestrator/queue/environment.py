"""The environment variables of a job: its GPUs, its share of their memory, and the user's own."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.queue.gpus import Gpu
    from orchestrator.queue.needs import Need
    from orchestrator.queue.settings import QueueSettings

_PLACEHOLDERS = ("gpu", "uuid", "num", "name", "dir", "attempt")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_XLA_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# JAX gives up where this, its newer name, is set as well.
_XLA_SHARE_TOO = "XLA_CLIENT_MEM_FRACTION"
_TF_GROWTH = "TF_FORCE_GPU_ALLOW_GROWTH"
_AS_NEEDED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", _TF_GROWTH: "true"}
# What a CUDA context and the display may take is not to be shared out.
_MOST = 0.95
_TO_SHARE_OUT = 0.9


def job_environment(
    settings: QueueSettings,
    gpus: Sequence[Gpu],
    need: Need,
    totals: Sequence[int],
    environ: Mapping[str, str],
    *,
    num: int,
    name: str,
    directory: str,
    attempt: int,
    cpu_only: bool = False,
) -> dict[str, str | None]:
    """The variables to set for a job or, None, to remove.

    ``CUDA_DEVICE_ORDER`` stays as it is: GPUs are named by UUID. ``hydra.launcher.env`` comes
    last and so decides.

    Args:
        settings: the queue's own.
        gpus: the GPUs of the job.
        need: what it needs of them.
        totals: the memory of each, in bytes; 0 or nothing where it is not known.
        environ: the environment that the job would have otherwise.
        num: Hydra's number of the job.
        name: the run's name.
        directory: the run's directory.
        attempt: 1 for the first try.
        cpu_only: the launcher gives out no GPUs, so none are hidden from its jobs either.

    Raises:
        SweepError: a value of ``hydra.launcher.env`` is none that can be used.
    """
    variables: dict[str, str | None] = {}
    if gpus:
        variables[_VISIBLE] = ",".join(gpu.uuid for gpu in gpus)
    elif need.gpus == 0 and not cpu_only:
        variables[_VISIBLE] = ""
    if gpus and settings.share_memory and settings.max_processes_per_gpu > 1:
        if not need.alone:
            variables |= _share(settings, need, totals, environ)
        elif need.memory is None:
            # What it needs is being measured: it is to take that, not the whole GPU.
            variables |= {k: v for k, v in _AS_NEEDED.items() if k not in environ}
    facts = {
        "gpu": ",".join(gpu.label for gpu in gpus),
        "uuid": ",".join(gpu.uuid for gpu in gpus),
        "num": str(num),
        "name": name,
        "dir": directory,
        "attempt": str(attempt),
    }
    own = _filled_in(settings, facts)
    if _XLA_SHARE_TOO in own:
        variables.pop(_XLA_SHARE, None)
    return {**variables, **own}


def check_environment(settings: QueueSettings) -> None:
    """Try ``hydra.launcher.env`` before anything runs.

    Raises:
        SweepError: a name or a value in it is none that can be used.
    """
    _filled_in(settings, dict.fromkeys(_PLACEHOLDERS, ""))


def _share(
    settings: QueueSettings, need: Need, totals: Sequence[int], environ: Mapping[str, str]
) -> dict[str, str]:
    """What keeps JAX and TensorFlow from taking a whole GPU that is shared."""
    total = min(totals, default=0)
    if need.memory is not None and total > 0:
        # Thousandths, rounded down, in whole numbers: no float is to round them up.
        thousandths = min(need.memory * 1000 // total, int(_MOST * 1000))
    else:
        thousandths = int(_TO_SHARE_OUT * 1000) // settings.max_processes_per_gpu
    share = {_XLA_SHARE: f"{max(thousandths, 1) / 1000:.3f}", _TF_GROWTH: "true"}
    said = {*environ, *((_XLA_SHARE,) if _XLA_SHARE_TOO in environ else ())}
    return {name: value for name, value in share.items() if name not in said}


def _filled_in(settings: QueueSettings, facts: Mapping[str, str]) -> dict[str, str | None]:
    return {
        _checked_name(name): None if value is None else _text(name, value, facts)
        for name, value in (settings.env or {}).items()
    }


def _checked_name(name: Any) -> str:
    if isinstance(name, str) and name and "=" not in name and "\0" not in name:
        return name
    msg = (
        f"hydra.launcher.env has the name {name!r}; expected a variable's name, without '='. "
        "Write NAME: value."
    )
    raise SweepError(msg)


def _text(name: str, value: Any, facts: Mapping[str, str]) -> str:
    """A value as text.

    True and False become 1 and 0, which is what C programs (CUDA, NCCL, torch) look for; who
    needs the word writes it in quotation marks.
    """
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str) and "\0" not in value:
        return _format(name, value, facts)
    expected = "text, a number, true or false, or null to remove it"
    raise SweepError(f"hydra.launcher.env.{name} is {value!r}; expected {expected}. Correct it.")


def _format(name: str, text: str, facts: Mapping[str, str]) -> str:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError:  # a brace without its other
        raise _not_a_placeholder(name, text) from None
    result = ""
    for literal, field, spec, conversion in parts:
        result += literal
        if field is None:
            continue
        if field not in facts or spec or conversion:
            raise _not_a_placeholder(name, text)
        result += facts[field]
    return result


def _not_a_placeholder(name: str, text: str) -> SweepError:
    known = ", ".join(f"{{{word}}}" for word in _PLACEHOLDERS)
    return SweepError(
        f"hydra.launcher.env.{name} is {text!r}; expected no placeholders but {known}. "
        "Write {{ and }} for braces that are to stay."
    )
