"""The settings that several parts need; they live in the node ``hydra.callbacks.results``."""

# No `from __future__ import annotations`: OmegaConf reads the annotations themselves, and
# does so at every start of every Hydra app.
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035 - OmegaConf reads these at run time


@dataclass(repr=False, eq=False)
class NamingSettings:
    """How a run's overrides become its name. See docs/naming.md."""

    # Between the parts of a name, and between a label and its value.
    separator: str = "_"
    # Dotted key: label, or {label, true, false, format, parts}. Keys named here come first, in this
    # order; a key that is not named follows as LASTPART_VALUE. An empty label writes the value alone.
    # parts: of a dotted value only the last so many parts.
    keys: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    # Keys that are left out of the name (they still count in the fingerprint).
    drop: List[str] = field(default_factory=list)  # noqa: UP006
    # How floats read, as in Python's format(); "g" where it loses no digit, else all digits.
    float_format: str = "g"
    # Longest directory name in bytes; a longer one is cut and gets the fingerprint's first 8.
    max_bytes: int = 200


@dataclass(repr=False, eq=False)
class ResultsSettings:
    """Records, names and resume, for whichever launcher runs the jobs."""

    _target_: str = "orchestrator.callback.ResultsCallback"
    # Do not run again what is COMPLETED under the same config. null: where directories are
    # named after the run (hydra/output=named), since a time stamp is never found again.
    resume: Optional[bool] = None  # noqa: UP045
    # Dotted keys (with all below them) that are part of neither name nor identity.
    ignore: List[str] = field(default_factory=list)  # noqa: UP006
    # The key that tells repetitions of one setting apart; progress and tables pool over it.
    seed_key: str = "seed"
    # After a failed run (all its retries included): continue, stop (nothing more is started,
    # what runs ends by itself), or the number of failures after which to stop.
    on_failure: Any = "continue"
    # Also write the sweep's results (train_sweep_results.json) here.
    results_file: Optional[str] = None  # noqa: UP045
    naming: NamingSettings = field(default_factory=NamingSettings)
