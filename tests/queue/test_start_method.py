"""Fork or spawn, and what a forked job has of its own: random numbers and threads."""

from __future__ import annotations

import os
import sys
import threading
import types

import pytest

from orchestrator.queue import start_method
from orchestrator.queue.launcher import cores
from orchestrator.queue.start_method import choose, why_not_fork
from orchestrator.sweep.errors import SweepError

APP = "random_app.py"
METHODS = ("fork", "spawn")


def needs_torch():
    pytest.importorskip("torch", reason="torch is not installed")


def chosen(sandbox, *words, **env):
    text = sandbox.run(APP, "x=1", *words, env=env)
    line = next(line for line in text.splitlines() if line.startswith("Jobs start by "))
    method, _, reason = line.removeprefix("Jobs start by ").partition(": ")
    return method, reason


# --- what `auto` decides, in real launchers ---


def test_an_app_that_only_imported_is_forked(sandbox):
    assert chosen(sandbox) == ("fork", "the app has only been imported.")


def test_torch_only_imported_is_forked(sandbox):
    needs_torch()
    assert chosen(sandbox, APP_IMPORTS="torch")[0] == "fork"


def test_numpy_used_is_forked(sandbox):
    assert chosen(sandbox, APP_BEFORE="numpy")[0] == "fork"


def test_torch_used_with_one_thread_is_forked(sandbox):
    needs_torch()
    assert chosen(sandbox, APP_BEFORE="torch1")[0] == "fork"


def test_torch_used_with_two_threads_is_spawned_and_its_jobs_finish(sandbox):
    needs_torch()
    # One slot: each job has all cores, so that torch uses its threads in the jobs, too.
    words = ("x=range(4)", "size=600", "hydra.launcher.max_processes=1", "hydra.launcher.threads=2")
    env = {"APP_BEFORE": "torch2", "APP_IMPORTS": "torch"}
    text = sandbox.run(APP, *words, env=env)
    assert "Jobs start by spawn: " in text
    assert "threads run in this process" in text
    assert sandbox.states() == {"COMPLETED": 4}
    for record in sandbox.records().values():
        assert record.return_value["torch_product"] == 600.0**3
        assert record.return_value["threads"]["torch"] == 2


def test_a_running_thread_is_spawned_and_named(sandbox):
    method, reason = chosen(sandbox, APP_BEFORE="thread")
    assert method == "spawn"
    assert "feeder" in reason


def test_what_is_asked_for_is_done(sandbox):
    assert chosen(sandbox, "hydra.launcher.start_method=fork", APP_BEFORE="thread")[0] == "fork"
    assert chosen(sandbox, "hydra.launcher.start_method=spawn")[0] == "spawn"


def test_an_unknown_method_is_an_error_that_names_the_known_ones(sandbox):
    text = sandbox.run(APP, "x=1", "hydra.launcher.start_method=thread", expect=1)
    assert "hydra.launcher.start_method is 'thread'; expected one of auto, fork, spawn" in text
    assert not sandbox.processes()


# --- what `auto` looks at, in this process ---


@pytest.fixture
def quiet(monkeypatch):
    """This process as if it had only imported: the test runner's own threads do not count."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(start_method, "_idle_blas_threads", lambda: 10_000)
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def fake_torch(*, initialised):
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(is_initialized=lambda: initialised)
    return torch


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
def test_cuda_that_is_initialised_is_spawned(monkeypatch, quiet):
    assert choose("auto")[0] == "fork"
    monkeypatch.setitem(sys.modules, "torch", fake_torch(initialised=False))
    assert choose("auto")[0] == "fork"
    monkeypatch.setitem(sys.modules, "torch", fake_torch(initialised=True))
    method, reason = choose("auto")
    assert method == "spawn"
    assert "CUDA" in reason


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
def test_a_cuda_context_of_another_library_is_seen(monkeypatch, quiet):
    real = os.readlink
    assert why_not_fork() == ""
    for node, spawned in (("/dev/nvidia0", False), ("/dev/nvidia-uvm", True)):
        monkeypatch.setattr(os, "readlink", lambda path, node=node: node)
        assert bool(why_not_fork()) is spawned, node
    monkeypatch.setattr(os, "readlink", real)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
def test_threads_that_python_does_not_know_count(monkeypatch, quiet):
    monkeypatch.setattr(start_method, "_idle_blas_threads", lambda: 1)
    for tasks, spawned in ((1, False), (2, False), (3, True)):
        monkeypatch.setattr(os, "listdir", lambda path, tasks=tasks: ["1"] * tasks)
        assert bool(why_not_fork()) is spawned, tasks


def test_other_systems_spawn(monkeypatch, quiet):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert choose("auto")[0] == "spawn"
    assert choose("fork")[0] == "fork"


def test_an_unknown_method_in_the_function_itself():
    with pytest.raises(SweepError, match="expected one of auto, fork, spawn"):
        choose("Fork")


# --- random numbers ---


def draws(sandbox):
    return {
        record.hyperparams["x"]: record.return_value["drawn"]
        for record in sandbox.records().values()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("imports", ["", "torch"])
def test_each_run_draws_its_own_numbers_and_the_same_again(sandbox, method, imports):
    if imports:
        needs_torch()
    words = ("x=range(4)", f"hydra.launcher.start_method={method}")
    env = {"APP_IMPORTS": imports}
    sandbox.run(APP, *words, env=env)
    first = draws(sandbox)
    assert len(first) == 4
    generators = {"random", "numpy", *imports.split()}
    for generator in generators:
        assert len({drawn[generator] for drawn in first.values()}) == 4, generator
    sandbox.run(APP, *words, "hydra.callbacks.results.resume=false", env=env)
    assert all(len(record.attempts) == 1 for record in sandbox.records().values())
    assert draws(sandbox) == first


@pytest.mark.parametrize("imports", ["", "torch"])
def test_both_methods_draw_the_same_numbers(sandbox, imports):
    if imports:
        needs_torch()
    drawn = []
    for method in METHODS:
        words = (f"hydra.launcher.start_method={method}", "hydra.callbacks.results.resume=false")
        sandbox.run(APP, "x=range(2)", *words, env={"APP_IMPORTS": imports})
        drawn.append(draws(sandbox))
    assert drawn[0] == drawn[1]


# --- threads ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("slots", [1, 2])
def test_the_cores_are_divided_among_the_slots(sandbox, method, slots):
    needs_torch()
    env = {"APP_IMPORTS": "torch"}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        sandbox.env.pop(name, None)
    words = (f"hydra.launcher.start_method={method}", f"hydra.launcher.max_processes={slots}")
    sandbox.run(APP, "x=1,2", *words, env=env)
    expected = max(1, cores() // slots)
    for record in sandbox.records().values():
        threads = record.return_value["threads"]
        assert threads["torch"] == expected
        assert threads["pools"]
        assert set(threads["pools"].values()) == {expected}
        assert threads["omp"] == str(expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_threads_can_be_set(sandbox, method):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        sandbox.env.pop(name, None)
    words = (f"hydra.launcher.start_method={method}", "hydra.launcher.threads=1")
    sandbox.run(APP, "x=1", *words)
    (record,) = sandbox.records().values()
    assert set(record.return_value["threads"]["pools"].values()) == {1}


@pytest.mark.parametrize("before", ["", "numpy"])
def test_threaded_matrix_products_in_forked_jobs_finish(sandbox, before):
    words = ("x=range(20)", "size=700", "hydra.launcher.threads=4", "hydra.launcher.timeout_s=60")
    text = sandbox.run(APP, *words, env={"APP_BEFORE": before})
    assert "Jobs start by fork" in text
    assert sandbox.states() == {"COMPLETED": 20}
    products = {record.return_value["product"] for record in sandbox.records().values()}
    assert products == {700.0**3}


def test_threaded_torch_in_forked_jobs_finishes_where_torch_was_only_imported(sandbox):
    needs_torch()
    words = ("x=range(10)", "size=700", "hydra.launcher.threads=2", "hydra.launcher.timeout_s=60")
    text = sandbox.run(APP, *words, env={"APP_IMPORTS": "torch"})
    assert "Jobs start by fork" in text
    assert sandbox.states() == {"COMPLETED": 10}
