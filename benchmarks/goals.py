"""The ratios to reach, and whether a run of the benchmark reached them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """A figure that must not be exceeded."""

    what: str
    value: float
    required: float
    aimed: float | None = None
    unit: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.required

    @property
    def verdict(self) -> str:
        if not self.passed:
            return "MISS"
        return "PASS" if self.aimed is None or self.value <= self.aimed else "PASS (not the aim)"


@dataclass(frozen=True)
class Limit:
    """What ``ours`` may cost per job as a share of what ``theirs`` costs."""

    measure: str
    ours: str
    theirs: str
    required: float
    aimed: float | None = None

    def goal(self, per_job: dict[str, dict[str, float]], suffix: str = "") -> Goal:
        """Judge it by contenders' figures per job (``cpu`` and ``wall``, in seconds)."""
        ours, theirs = per_job[self.ours][self.measure], per_job[self.theirs][self.measure]
        kind = "CPU" if self.measure == "cpu" else "wall"
        what = f"{kind} per job{suffix}: {self.ours} / {self.theirs}"
        return Goal(what, ours / theirs, self.required, self.aimed)


NOOP_LIMITS = (
    Limit("cpu", "fork", "basic", 0.45, 0.3),
    Limit("cpu", "fork", "submitit_local", 0.13, 0.09),
    Limit("wall", "fork", "joblib", 0.35, 0.28),
    Limit("cpu", "spawn", "xargs", 0.75),
)
TORCH_LIMITS = (
    Limit("cpu", "fork", "submitit_local", 0.03),
    Limit("cpu", "fork", "joblib", 0.25),
)
FIRST_JOB_DELAY_S = 1.5
KB_PER_FINISHED_JOB = 20.0
