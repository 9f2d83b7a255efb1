"""What a sweep on a cluster costs: at most, by its time limits, and by what past runs took."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.wording import duration, plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True)
class Jobs:
    """Like jobs: so many runs, each job with the same needs and the same time limit.

    Attributes:
        runs: in all of these jobs; the last job may have fewer than the others.
        runs_per_job: runs that share a job.
        runs_at_a_time: of one job; the others wait in it.
        nodes: of each job.
        cpus: CPU cores of each job, on all of its nodes.
        gpus: of each job, on all of its nodes.
        limit_minutes: the time limit of each job.
        restarts: how often a job that reaches its limit may start again.
    """

    runs: int
    runs_per_job: int = 1
    runs_at_a_time: int = 1
    nodes: int = 1
    cpus: int = 1
    gpus: int = 0
    limit_minutes: float = 60
    restarts: int = 0

    @property
    def jobs(self) -> int:
        return math.ceil(self.runs / self.runs_per_job)

    @property
    def most_seconds(self) -> float:
        """The longest that one of the jobs can take."""
        return self.limit_minutes * 60 * (1 + self.restarts)

    def expected_seconds(self, run_seconds: float) -> Iterator[float]:
        """How long each job takes if each run takes so many seconds; Slurm ends it at its limit."""
        full, rest = divmod(self.runs, self.runs_per_job)
        for runs in [self.runs_per_job] * full + [rest] * (rest > 0):
            in_a_row = math.ceil(runs / self.runs_at_a_time)
            yield min(in_a_row * run_seconds, self.most_seconds)


@dataclass(frozen=True)
class Submission:
    """What is about to be given to Slurm.

    Attributes:
        groups: its jobs; those that ask for the same together.
        arrays: the job arrays that they come in.
        jobs_at_a_time: jobs that may run at a time (``array_parallelism``).
        past_seconds: how long finished runs have taken; empty if none has.
        core_hours_per_year: what the account may use, if that is known.
    """

    groups: Sequence[Jobs]
    arrays: int = 1
    jobs_at_a_time: int = 256
    past_seconds: Sequence[float] = ()
    core_hours_per_year: float | None = None


@dataclass(frozen=True)
class Cost:
    """Hours of cores and of GPUs, and the time on the wall; waiting in Slurm's queue aside."""

    core_hours: float
    gpu_hours: float
    wall_seconds: float


@dataclass(frozen=True)
class Estimate:
    """The cost of a submission.

    Attributes:
        submission: what was estimated.
        at_most: if every job runs until its time limit.
        expected: if every run takes `mean_seconds`; None if no run has finished.
        mean_seconds: the mean of the finished runs. The mean, as it is a sum that is estimated: a
            median would leave out what few long runs cost.
    """

    submission: Submission
    at_most: Cost
    expected: Cost | None
    mean_seconds: float | None


def estimate(submission: Submission) -> Estimate:
    """What a submission costs at most, and by the mean of the finished runs.

    The time on the wall is that of jobs which start in order, each as soon as one of
    `jobs_at_a_time` places is free.
    """
    groups = submission.groups
    at_most = _cost(submission, [[group.most_seconds] * group.jobs for group in groups])
    past = submission.past_seconds
    if not past:
        return Estimate(submission, at_most, None, None)
    mean = math.fsum(past) / len(past)
    expected = _cost(submission, [list(group.expected_seconds(mean)) for group in groups])
    return Estimate(submission, at_most, expected, mean)


def _cost(submission: Submission, seconds: Sequence[Sequence[float]]) -> Cost:
    """The cost of jobs by their durations, which come group by group."""
    by_group = list(zip(submission.groups, map(math.fsum, seconds), strict=True))
    return Cost(
        core_hours=math.fsum(group.cpus * total for group, total in by_group) / 3600,
        gpu_hours=math.fsum(group.gpus * total for group, total in by_group) / 3600,
        wall_seconds=_wall((one for group in seconds for one in group), submission.jobs_at_a_time),
    )


def _wall(seconds: Iterable[float], at_a_time: int) -> float:
    ends: list[float] = []
    for one in seconds:
        if len(ends) < at_a_time:
            heapq.heappush(ends, one)
        else:
            heapq.heapreplace(ends, ends[0] + one)
    return max(ends, default=0.0)


def describe(estimate: Estimate) -> list[str]:
    """An estimate in sentences, one a line."""
    submission = estimate.submission
    groups = [group for group in submission.groups if group.runs]
    if not groups:
        return ["No runs: nothing to submit."]
    lines = _what(submission, groups)
    lines.append(_hours(estimate))
    lines.append(_wall_time(estimate))
    if submission.core_hours_per_year:
        lines.append(_share(estimate, submission.core_hours_per_year))
    return lines


def _what(submission: Submission, groups: Sequence[Jobs]) -> list[str]:
    runs, jobs = sum(group.runs for group in groups), sum(group.jobs for group in groups)
    head = (
        f"{plural(runs, 'run')} in {plural(jobs, 'job')} ({plural(submission.arrays, 'array')}), "
        f"at most {submission.jobs_at_a_time:,} at a time"
    )
    if len(groups) == 1:
        return [f"{head}; each: {_needs(groups[0])}"]
    return [f"{head}:", *(f"  {plural(group.jobs, 'job')}: {_needs(group)}" for group in groups)]


def _needs(group: Jobs) -> str:
    parts = [plural(group.nodes, "node"), plural(group.cpus, "CPU")]
    if group.gpus:
        parts.append(plural(group.gpus, "GPU"))
    if group.runs_per_job > 1:
        parts.append(f"{group.runs_per_job} runs, {group.runs_at_a_time} at a time")
    limit = f"{_time(group.limit_minutes * 60)} limit"
    if group.restarts:
        limit += f", {plural(group.restarts, 'restart')}"
    return ", ".join([*parts, limit])


def _hours(estimate: Estimate) -> str:
    at_most, expected = estimate.at_most, estimate.expected
    has_gpus = at_most.gpu_hours > 0
    text = f"At most {_count(at_most.core_hours, 'core hour')}"
    if has_gpus:
        text += f" and {_count(at_most.gpu_hours, 'GPU hour')}"
    if expected is None:
        return f"{text}; no run has finished yet from which to expect less."
    text += f"; {_by_mean(estimate)} {_figure(expected.core_hours)}"
    return f"{text} and {_figure(expected.gpu_hours)}." if has_gpus else f"{text}."


def _by_mean(estimate: Estimate) -> str:
    count = len(estimate.submission.past_seconds)
    runs = "the one finished run" if count == 1 else f"the mean of {count:,} finished runs"
    return f"by {runs} ({_time(estimate.mean_seconds or 0)})"


def _wall_time(estimate: Estimate) -> str:
    text = f"Once they start: {_time(estimate.at_most.wall_seconds)} at most"
    if estimate.expected is None:
        return f"{text}."
    return f"{text}, {_time(estimate.expected.wall_seconds)} by the mean."


def _share(estimate: Estimate, per_year: float) -> str:
    share = f"{_figure(100 * estimate.at_most.core_hours / per_year)} %"
    if estimate.expected is not None:
        share += (
            f" at most, {_figure(100 * estimate.expected.core_hours / per_year)} % by the mean,"
        )
    return f"That is {share} of {per_year:,.0f} core hours a year."


def _time(seconds: float) -> str:
    """As everywhere, but whole minutes and hours without zeros: ``4h``, ``31m``."""
    return duration(seconds).replace("h00m", "h").replace("m00s", "m").replace("d00h", "d")


def _count(value: float, noun: str) -> str:
    figure = _figure(value)
    return plural(1, noun) if figure == "1" else f"{figure} {noun}s"


def _figure(value: float) -> str:
    """A number with as many digits as an estimate is good for."""
    if 0 < value < 0.01:  # noqa: PLR2004 - what rounds to 0.00
        return "less than 0.01"
    digits = 2 if value < 1 else 1 if value < 100 else 0  # noqa: PLR2004 - hundreds need no tenths
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else text
