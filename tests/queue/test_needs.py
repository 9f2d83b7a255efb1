"""What a job needs of the GPUs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from orchestrator.queue.needs import GB, Need, Needs, after_oom
from orchestrator.queue.settings import GpuQueueSettings
from orchestrator.sweep.errors import SweepError


def needs(raw=None, **settings):
    """As the launcher makes them; ``raw`` holds what is not resolved."""
    return Needs(GpuQueueSettings(**settings), {**settings, **(raw or {})})


def never():
    pytest.fail("nothing of the run's config was asked for")


def config_of(memory, per_job=1, **model):
    """A run's own config, as Hydra composes it: the launcher's interpolations are unresolved."""
    launcher = {"memory_per_job_gb": memory, "gpus_per_job": per_job}
    return OmegaConf.create({"model": model, "hydra": {"launcher": launcher}})


@pytest.mark.parametrize(
    ("settings", "need"),
    [
        ({}, Need(1, None)),
        ({"gpus_per_job": 0}, Need(0, None)),
        ({"gpus_per_job": 0, "memory_per_job_gb": 3}, Need(0, None)),
        ({"gpus_per_job": 0, "memory_per_job_gb": "auto"}, Need(0, None)),
        ({"gpus_per_job": 4}, Need(4, None)),
        ({"gpus_per_job": 2.0}, Need(2, None)),
        ({"memory_per_job_gb": 7.5}, Need(1, 7_500_000_000)),
        ({"memory_per_job_gb": 0}, Need(1, None)),
        ({"memory_per_job_gb": 0.1 + 0.2}, Need(1, 300_000_000)),
    ],
)
def test_values_for_all_runs_are_one_need_without_composing(settings, need):
    found = needs(**settings)
    assert not found.vary
    assert not found.learns
    assert found.constant == need
    assert found.of("a", never) == need


@pytest.mark.parametrize(
    "settings",
    [
        {"gpus_per_job": bad}
        for bad in (-1, 1.5, "auto", "2", None, True, math.nan, math.inf, [0], {"a": 1})
    ]
    + [
        {"memory_per_job_gb": bad}
        for bad in (-1, -0.1, "8", "Auto", "", True, math.nan, math.inf, [8])
    ]
    + [{"memory_margin": bad} for bad in (-0.1, math.nan, True, "x", None)],
)
def test_a_value_that_cannot_be_used_is_named_at_once(settings):
    ((key, value),) = settings.items()
    with pytest.raises(SweepError) as caught:
        needs(**settings)
    text = str(caught.value)
    assert f"hydra.launcher.{key} is {value!r}; expected " in text
    assert "Correct it" in text


def test_interpolations_are_looked_up_in_each_runs_own_config():
    raw = {"memory_per_job_gb": "${model.gb}", "gpus_per_job": "${model.gpus}"}
    # The settings hold what the sweep's own config gave, which is no run's.
    found = needs(raw, memory_per_job_gb=99, gpus_per_job=9)
    assert found.vary
    assert found.constant is None
    for gb, gpus in ((4, 1), (1.5, 2), (None, 3)):
        config = config_of("${model.gb}", "${model.gpus}", gb=gb, gpus=gpus)
        wanted = None if gb is None else gb * GB
        assert found.of("a", lambda config=config: config) == Need(gpus, wanted)


def test_a_key_that_is_no_interpolation_is_not_looked_up():
    found = needs({"gpus_per_job": "${model.gpus}"}, memory_per_job_gb=3)
    assert not found.learns
    config = config_of("${nowhere}", "${model.gpus}", gpus=2)
    assert found.of("a", lambda: config) == Need(2, 3 * GB)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ({}, InterpolationKeyError, "gb"),
        ({"gb": -4}, SweepError, "memory_per_job_gb is -4"),
        ({"gb": "8 GB"}, SweepError, "the key of the run's config"),
        ({"gb": "???"}, Exception, "gb"),
    ],
)
def test_what_one_run_has_wrong_is_its_own_failure(model, error, words):
    found = needs({"memory_per_job_gb": "${model.gb}"}, memory_per_job_gb=4)
    with pytest.raises(error, match=words):
        found.of("a", lambda: config_of("${model.gb}", **model))
    good = config_of("${model.gb}", gb=2)
    assert found.of("a", lambda: good) == Need(1, 2 * GB)


def test_a_run_without_gpus_needs_no_memory_but_its_value_is_checked():
    found = needs({"gpus_per_job": "${model.gpus}"}, memory_per_job_gb="auto")
    config = config_of("auto", "${model.gpus}", gpus=0)
    assert found.of("a", lambda: config) == Need(0)
    found = needs({"memory_per_job_gb": "${model.gb}"}, gpus_per_job=0)
    with pytest.raises(SweepError):
        found.of("a", lambda: config_of("${model.gb}", gb="x"))


# --- auto ---


def test_auto_runs_alone_until_a_run_of_the_same_shape_has_shown_its_peak():
    found = needs(memory_per_job_gb="auto")
    assert found.vary
    assert found.learns
    assert found.of("small", never) == Need(1, None, alone=True)
    assert found.learn("small", 2.0)
    assert found.of("small", never) == Need(1, 2_200_000_000)
    assert found.of("large", never) == Need(1, None, alone=True)
    assert found.learn("small", 3.0)
    assert not found.learn("small", 1.0)
    assert found.of("small", never) == Need(1, 3_300_000_000)


def test_a_peak_that_leaves_no_room_for_its_margin_runs_alone():
    found = needs(memory_per_job_gb="auto")
    found.learn("a", 74.0)
    assert found.of("a", never, lambda _: 80 * GB) == Need(1, None, alone=True)
    assert found.of("a", never, lambda _: 0) == Need(1, 81_400_000_000)


def test_auto_may_be_the_value_of_one_run():
    found = needs({"memory_per_job_gb": "${model.gb}"}, memory_per_job_gb=4)
    assert found.learns
    auto, fixed = config_of("${model.gb}", gb="auto"), config_of("${model.gb}", gb=2)
    assert found.of("a", lambda: auto).alone
    found.learn("a", 1.0)
    assert found.of("a", lambda: auto).memory == 1_100_000_000
    assert found.of("b", lambda: fixed) == Need(1, 2 * GB)


@pytest.mark.parametrize("peak", [None, 0.0, -1.0, math.nan, math.inf])
def test_a_peak_that_says_nothing_is_not_learned(peak):
    found = needs(memory_per_job_gb="auto")
    assert not found.learn("a", peak)
    assert found.of("a", never).alone


def test_a_run_of_no_shape_teaches_nothing():
    found = needs(memory_per_job_gb="auto")
    assert not found.learn("", 1.0)
    assert found.of("", never).alone


peaks = st.floats(1e-6, 1e4)


@given(st.lists(peaks, min_size=1), st.floats(0, 3), st.randoms())
def test_the_need_holds_every_peak_with_its_margin_whatever_the_order(seen, margin, random):
    found = needs(memory_per_job_gb="auto", memory_margin=margin)
    other = needs(memory_per_job_gb="auto", memory_margin=margin)
    for peak in seen:
        found.learn("a", peak)
    random.shuffle(seen)
    for peak in seen:
        other.learn("a", peak)
    need = found.of("a", never)
    assert need == other.of("a", never)
    assert need.memory is not None
    assert need.memory % 10**6 == 0
    exact = max(seen) * GB * (1 + margin)
    assert exact - 2 <= need.memory < exact + 10**6


# --- after running out of memory ---


def test_the_next_try_gets_half_as_much_again_then_all_there_is_then_a_gpu_alone():
    need = Need(2, 40 * GB)
    tries = [need := after_oom(need, 80 * GB) for _ in range(4)]
    assert tries[:3] == [
        Need(2, 60 * GB),
        Need(2, 76 * GB),
        Need(2, 76 * GB, alone=True),
    ]
    assert tries[3] == tries[2]


def test_without_a_declared_need_the_next_try_is_alone():
    assert after_oom(Need(), 80 * GB) == Need(alone=True)
    assert after_oom(Need(0), 80 * GB) == Need(0)
    assert after_oom(Need(1, 90 * GB), 80 * GB) == Need(1, 90 * GB, alone=True)
    assert after_oom(Need(1, 5), 0) == Need(1, 5, alone=True)


@given(st.integers(1, 10**12), st.integers(0, 10**12))
@example(1, 10**12)
def test_it_never_asks_for_less_nor_for_more_than_there_is_and_ends_alone(memory, total):
    chain = [Need(1, memory)]
    for _ in range(120):
        chain.append(after_oom(chain[-1], total))
    assert chain[-1].alone
    for before, after in pairwise(chain):
        assert after.memory >= before.memory
        assert after.memory <= max(memory, total * 95 // 100)
        assert after.alone >= before.alone
