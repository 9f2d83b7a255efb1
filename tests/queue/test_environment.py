"""The environment variables of a job."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from orchestrator.queue.environment import check_environment, job_environment
from orchestrator.queue.gpus import Gpu
from orchestrator.queue.needs import GB, Need
from orchestrator.queue.settings import GpuQueueSettings
from orchestrator.sweep.errors import SweepError

A, B = Gpu("GPU-aaaa", 0), Gpu("GPU-bbbb", 3)
MIG = Gpu("MIG-cccc", 2, mig=1)
XLA, XLA_NEW = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
TF = "TF_FORCE_GPU_ALLOW_GROWTH"


def of(gpus=(A,), need=None, totals=(80 * GB,), environ=None, cpu_only=False, **settings):
    return job_environment(
        GpuQueueSettings(**settings),
        gpus,
        need or Need(len(gpus)),
        totals,
        environ or {},
        num=7,
        name="lr_0.1",
        directory="/out/{x}/lr_0.1",
        attempt=2,
        cpu_only=cpu_only,
    )


# --- devices ---


@pytest.mark.parametrize(
    ("gpus", "visible"),
    [((A,), "GPU-aaaa"), ((B, A), "GPU-bbbb,GPU-aaaa"), ((MIG,), "MIG-cccc"), ((), "")],
)
def test_a_job_sees_its_gpus_by_uuid_and_no_others(gpus, visible):
    environ = {"CUDA_VISIBLE_DEVICES": "0,1,2", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert of(gpus, environ=environ) == {"CUDA_VISIBLE_DEVICES": visible}


def test_a_launcher_without_gpus_hides_none():
    assert of((), Need(0), cpu_only=True) == {}
    assert of((), Need(1), cpu_only=True) == {}
    assert of((), Need(1)) == {}


# --- shares ---


@pytest.mark.parametrize(
    ("need", "totals", "per_gpu", "share"),
    [
        (Need(1, 20 * GB), (80 * GB,), 2, "0.250"),
        (Need(2, 20 * GB), (80 * GB, 40 * GB), 2, "0.500"),
        (Need(1, GB), (3 * GB,), 2, "0.333"),
        (Need(1, 2 * GB), (3 * GB,), 2, "0.666"),
        (Need(1, 90 * GB), (80 * GB,), 2, "0.950"),
        (Need(1, 1), (80 * GB,), 2, "0.001"),
        (Need(1), (80 * GB,), 2, "0.450"),
        (Need(1), (80 * GB,), 7, "0.128"),
        (Need(1), (), 3, "0.300"),
        (Need(1, 20 * GB), (), 3, "0.300"),
        (Need(1, 20 * GB), (0,), 3, "0.300"),
    ],
)
def test_jobs_on_a_shared_gpu_are_told_their_share(need, totals, per_gpu, share):
    found = of((A,), need, totals, max_processes_per_gpu=per_gpu)
    assert found == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa", XLA: share, TF: "true"}


@pytest.mark.parametrize(
    ("need", "settings"),
    [
        (Need(1, GB), {"max_processes_per_gpu": 1}),
        (Need(1, GB), {"max_processes_per_gpu": 2, "share_memory": False}),
        (Need(1, GB, alone=True), {"max_processes_per_gpu": 2}),
    ],
)
def test_a_job_that_shares_nothing_is_told_nothing(need, settings):
    assert of((A,), need, **settings) == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa"}
    assert of((), Need(0), **settings) == {"CUDA_VISIBLE_DEVICES": ""}


def test_what_the_user_has_set_stays():
    shared = {"max_processes_per_gpu": 2}
    found = of(environ={XLA: "0.9", TF: ""}, **shared)
    assert found == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa"}
    found = of(environ={TF: "false"}, env={XLA: 0.7}, **shared)
    assert found == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa", XLA: "0.7"}
    assert of(env={XLA: None}, **shared)[XLA] is None


def test_jax_is_never_told_twice():
    # It gives up where both of its names for the share are set.
    shared = {"max_processes_per_gpu": 2}
    assert XLA not in of(environ={XLA_NEW: "0.5"}, **shared)
    found = of(env={XLA_NEW: 0.5}, **shared)
    assert XLA not in found
    assert found[TF] == "true"


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_a_share_is_never_more_than_the_need_but_for_the_least(memory, total):
    share = float(of((A,), Need(1, memory), (total,), max_processes_per_gpu=2)[XLA])
    assert 0.001 <= share <= 0.95
    assert share == 0.001 or share <= memory / total
    assert share == 0.95 or share > memory / total - 0.0011


# --- the user's own ---


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("port-{num}", "port-7"),
        ("{gpu}|{uuid}|{num}|{name}|{attempt}", "0,2:1|GPU-aaaa,MIG-cccc|7|lr_0.1|2"),
        # (What is filled in is not looked at again.)
        ("{dir}/tb", "/out/{x}/lr_0.1/tb"),
        ("{{gpu}} {{{num}}}", "{gpu} {7}"),
        ("", ""),
        ("a=b c", "a=b c"),
        (5, "5"),
        (0.5, "0.5"),
        (True, "1"),
        (False, "0"),
        ("true", "true"),
        (None, None),
    ],
)
def test_values_are_filled_in(value, text):
    found = of((A, MIG), env={"X": value})
    assert found["X"] == text or found["X"] is text
    check_environment(GpuQueueSettings(env={"X": value}))


def test_the_users_own_decides_over_devices_too():
    found = of((A,), env={"CUDA_VISIBLE_DEVICES": "{gpu}", "OMP_NUM_THREADS": 2})
    assert found == {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "2"}


def test_without_gpus_their_names_are_empty():
    assert of((), Need(0), env={"X": "<{gpu}{uuid}>"})["X"] == "<>"


def test_settings_as_hydra_gives_them():
    config = OmegaConf.create({"env": {"A": "{num}", "B": None, "C": "${d}"}, "d": 3})
    assert of((), cpu_only=True, env=config.env) == {"A": "7", "B": None, "C": "3"}


@pytest.mark.parametrize(
    "text",
    ["{", "}", "{}", "{0}", "{gpus}", "{gpu.__class__}", "{gpu[0]}", "{num!r}", "{num:03d}",
     "{name.x}", "{ num}", '{"a": 1}', "{gpu:{num}}", "{{{gpu", "{gpu}}"],
)  # fmt: skip
def test_what_is_no_placeholder_is_named_at_launch(text):
    settings = {"env": {"X": text}}
    for call in (lambda: check_environment(GpuQueueSettings(**settings)), lambda: of(**settings)):
        with pytest.raises(SweepError) as caught:
            call()
        message = str(caught.value)
        assert f"hydra.launcher.env.X is {text!r}; expected" in message
        assert "{gpu}, {uuid}, {num}, {name}, {dir}, {attempt}" in message


@pytest.mark.parametrize("value", [[1], {"a": 1}, b"x", "a\0b", OmegaConf.create([1])])
def test_values_that_are_no_text_are_named(value):
    with pytest.raises(SweepError, match=r"hydra\.launcher\.env\.X is .*; expected text"):
        check_environment(GpuQueueSettings(env={"X": value}))


@pytest.mark.parametrize("name", ["", "A=B", "A\0", 5, None])
def test_names_that_are_none_are_named(name):
    with pytest.raises(SweepError, match="has the name"):
        check_environment(GpuQueueSettings(env={name: "x"}))


@given(st.text(st.characters(exclude_characters="{}\0"), max_size=20))
def test_text_without_braces_stays_as_it_is(text):
    assert of(env={"X": text})["X"] == text
    assert of(env={"X": f"{{{{{text}}}}}{{num}}"})["X"] == f"{{{text}}}7"


@given(st.text("{}gpunum.![]:0r ", max_size=12))
def test_any_text_is_filled_in_or_refused_alike_by_check_and_by_job(text):
    settings = {"env": {"X": text}}
    try:
        check_environment(GpuQueueSettings(**settings))
    except SweepError:
        with pytest.raises(SweepError):
            of(**settings)
    else:
        assert isinstance(of(**settings)["X"], str)


@given(st.floats(allow_nan=False))
def test_numbers_read_back_the_same(number):
    assert float(of(env={"X": number})["X"]) == number or math.isnan(number)
