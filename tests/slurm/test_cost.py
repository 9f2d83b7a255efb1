"""What a sweep on a cluster costs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.slurm.cost import Jobs, Submission, describe, estimate

JOBS = st.builds(
    Jobs,
    runs=st.integers(0, 60),
    runs_per_job=st.integers(1, 9),
    runs_at_a_time=st.integers(1, 9),
    nodes=st.integers(1, 4),
    cpus=st.integers(1, 64),
    gpus=st.integers(0, 8),
    limit_minutes=st.floats(1, 10_000),
    restarts=st.integers(0, 3),
)
SUBMISSIONS = st.builds(
    Submission,
    groups=st.lists(JOBS, max_size=3),
    arrays=st.integers(1, 4),
    jobs_at_a_time=st.integers(1, 20),
    past_seconds=st.lists(st.floats(0, 1e6), max_size=5),
    core_hours_per_year=st.none() | st.floats(1, 1e8),
)


def lines(*groups, **settings):
    return describe(estimate(Submission(groups, **settings)))


def test_a_sweep_is_described_in_four_lines():
    jobs = Jobs(runs=12, cpus=4, gpus=1, limit_minutes=240)
    assert lines(jobs, past_seconds=[1860.0] * 6, core_hours_per_year=1_000_000) == [
        "12 runs in 12 jobs (1 array), at most 256 at a time; each: 1 node, 4 CPUs, 1 GPU, 4h limit",
        "At most 192 core hours and 48 GPU hours; by the mean of 6 finished runs (31m) 24.8 and 6.2.",
        "Once they start: 4h at most, 31m by the mean.",
        "That is 0.02 % at most, less than 0.01 % by the mean, of 1,000,000 core hours a year.",
    ]


def test_without_finished_runs_only_the_limits_are_known():
    assert lines(Jobs(runs=1), core_hours_per_year=200) == [
        "1 run in 1 job (1 array), at most 256 at a time; each: 1 node, 1 CPU, 1h limit",
        "At most 1 core hour; no run has finished yet from which to expect less.",
        "Once they start: 1h at most.",
        "That is 0.5 % of 200 core hours a year.",
    ]


def test_runs_that_share_jobs_and_jobs_that_start_again_are_said():
    jobs = Jobs(
        runs=130, runs_per_job=60, runs_at_a_time=20, cpus=20, limit_minutes=180, restarts=1
    )
    first, hours, wall = lines(jobs, past_seconds=[3600.0])
    assert first.startswith("130 runs in 3 jobs (1 array)")
    assert first.endswith("each: 1 node, 20 CPUs, 60 runs, 20 at a time, 3h limit, 1 restart")
    # Two jobs of three hours, and one of ten runs at a time.
    assert hours == "At most 360 core hours; by the one finished run (1h) 140."
    assert wall == "Once they start: 6h at most, 3h by the mean."


def test_jobs_that_ask_for_different_things_get_a_line_each():
    found = lines(Jobs(runs=3, gpus=2), Jobs(runs=0), Jobs(runs=1, nodes=2, cpus=8), arrays=2)
    assert found[:3] == [
        "4 runs in 4 jobs (2 arrays), at most 256 at a time:",
        "  3 jobs: 1 node, 1 CPU, 2 GPUs, 1h limit",
        "  1 job: 2 nodes, 8 CPUs, 1h limit",
    ]


def test_nothing_to_run_costs_nothing():
    assert lines(Jobs(runs=0)) == lines() == ["No runs: nothing to submit."]


@pytest.mark.parametrize(
    ("runs", "at_a_time", "hours"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (9, 4, 3), (9, 1, 9)]
)
def test_the_time_on_the_wall_counts_how_many_jobs_run_at_a_time(runs, at_a_time, hours):
    cost = estimate(Submission([Jobs(runs=runs)], jobs_at_a_time=at_a_time)).at_most
    assert cost.wall_seconds == hours * 3600


def test_a_long_job_beside_short_ones_is_what_is_waited_for():
    groups = [Jobs(runs=1, limit_minutes=600), Jobs(runs=6, limit_minutes=60)]
    cost = estimate(Submission(groups, jobs_at_a_time=2)).at_most
    assert cost.wall_seconds == 600 * 60


def test_a_run_that_would_take_longer_than_the_limit_costs_the_limit():
    found = estimate(Submission([Jobs(runs=2, limit_minutes=10)], past_seconds=[1e6]))
    assert found.expected == found.at_most


@given(SUBMISSIONS)
def test_what_is_expected_is_never_more_than_what_it_costs_at_most(submission):
    found = estimate(submission)
    assert (found.expected is None) == (not submission.past_seconds)
    if found.expected is not None:
        slack = 1 + 1e-9
        assert found.expected.core_hours <= found.at_most.core_hours * slack
        assert found.expected.gpu_hours <= found.at_most.gpu_hours * slack
        assert found.expected.wall_seconds <= found.at_most.wall_seconds * slack


@given(SUBMISSIONS)
def test_the_most_is_every_job_at_its_limit(submission):
    found = estimate(submission).at_most
    hours = [group.jobs * group.most_seconds / 3600 for group in submission.groups]
    cores = math.fsum(g.cpus * h for g, h in zip(submission.groups, hours, strict=True))
    gpus = math.fsum(g.gpus * h for g, h in zip(submission.groups, hours, strict=True))
    assert found.core_hours == pytest.approx(cores)
    assert found.gpu_hours == pytest.approx(gpus)
    longest = max((g.most_seconds for g in submission.groups if g.runs), default=0)
    assert longest <= found.wall_seconds * (1 + 1e-9)
    assert math.fsum(hours) * 3600 <= found.wall_seconds * submission.jobs_at_a_time * (1 + 1e-9)
    assert found.wall_seconds <= math.fsum(hours) * 3600 * (1 + 1e-9)


@given(JOBS, st.floats(0, 1e5))
def test_every_run_is_in_one_of_the_jobs(group, seconds):
    durations = list(group.expected_seconds(seconds))
    assert len(durations) == group.jobs
    if group.runs_at_a_time == 1 and group.runs * seconds < group.most_seconds:
        assert math.fsum(durations) == pytest.approx(group.runs * seconds)


@given(SUBMISSIONS)
def test_every_estimate_can_be_described(submission):
    text = describe(estimate(submission))
    assert text
    assert all(line == line.rstrip() and "nan" not in line and "e+" not in line for line in text)
