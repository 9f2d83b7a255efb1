"""Which GPUs a sweep uses: choosing, assigning, and a real sweep over stubbed ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.queue.assign import assign
from orchestrator.queue.gpus import Gpu, choose_gpus
from orchestrator.queue.slots import Slots
from orchestrator.sweep.errors import SweepError

STUB = Path(__file__).parents[1] / "nvml" / "nvml_stub.c"
GPUS = [Gpu("GPU-aaaa-1", 0), Gpu("GPU-aabb-2", 1), Gpu("GPU-cccc-3", 2)]


@pytest.mark.parametrize(
    ("wanted", "mask", "indices"),
    [
        ("auto", None, [0, 1, 2]),
        ("auto", "2,0", [2, 0]),
        ("auto", "GPU-cc", [2]),
        ("auto", "", []),
        ("auto", "-1", []),
        ("auto", "0,9,1", [0]),  # as CUDA: what follows a device that is not there is hidden
        ([1, 0], None, [1, 0]),
        (["GPU-cccc-3"], None, [2]),
        (2, None, [2]),
    ],
)
def test_gpus_are_chosen_by_index_or_uuid_within_the_mask(wanted, mask, indices):
    assert [gpu.index for gpu in choose_gpus(wanted, GPUS, mask)] == indices


@pytest.mark.parametrize(
    ("wanted", "mask", "why"),
    [
        ([7], None, "not on this machine"),
        (["GPU-aa"], None, "ambiguous"),
        ([1], "0,2", "does not allow"),
    ],
)
def test_a_gpu_that_is_not_to_be_had_is_named_with_those_that_are(wanted, mask, why):
    with pytest.raises(SweepError, match=why) as error:
        choose_gpus(wanted, GPUS, mask)
    assert "GPU-cccc-3" in str(error.value)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 4))
def test_a_job_goes_to_the_emptiest_gpu_that_has_room(loads, limit):
    gpus = [Gpu(f"GPU-{i}", i) for i in range(len(loads))]
    running = {gpu.uuid: load for gpu, load in zip(gpus, loads, strict=True)}
    chosen = assign(gpus, running, limit)
    if min(loads) >= limit:
        assert chosen is None
    else:
        assert chosen is not None
        assert chosen.index == loads.index(min(loads))


@given(
    st.integers(0, 4), st.integers(1, 3), st.integers(1, 6), st.lists(st.booleans(), max_size=60)
)
def test_slots_never_hold_more_than_they_may(n_gpus, per_gpu, size, takes):
    slots = Slots([Gpu(f"GPU-{i}", i) for i in range(n_gpus)], per_gpu, size)
    held = []
    for take in takes:
        if take:
            slot = slots.take()
            if slot is not None:
                held.append(slot)
        elif held:
            slots.give_back(held.pop(0))
        on_gpus = [slot.gpu for slot in held if slot.gpu]
        assert len(held) <= size
        assert all(on_gpus.count(gpu) <= per_gpu for gpu in on_gpus)
        assert bool(on_gpus) == bool(held and n_gpus)


@pytest.fixture
def stub(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the NVML stub with")
    library = tmp_path / "lib" / "libnvidia-ml.so.1"
    library.parent.mkdir()
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, STUB], check=True)
    (tmp_path / "gpus").write_text("GPU-aaaa Stub A\nGPU-bbbb Stub B\n")
    return {
        "LD_LIBRARY_PATH": str(library.parent),
        "NVML_STUB": str(tmp_path / "gpus"),
        "CUDA_VISIBLE_DEVICES": "",
    }


APP = """
import os, time, hydra
@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    time.sleep(0.3)
    return os.environ["CUDA_VISIBLE_DEVICES"]
main()
"""


def sweep(tmp_path, environment, *overrides):
    (tmp_path / "app.py").write_text(APP)
    named = ["hydra/launcher=gpu_queue", "hydra/callbacks=results", "hydra/output=named"]
    inherited = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "app.py", "-m", *named, *overrides, "+x=range(4)"],
        cwd=tmp_path,
        env={**inherited, **{k: v for k, v in environment.items() if v}},
        capture_output=True,
        text=True,
        check=False,
    )
    records = [
        json.loads(path.read_text()) for path in sorted((tmp_path / "outputs").glob("*/run.json"))
    ]
    return done, records


def test_jobs_see_their_gpu_alone_and_by_uuid(stub, tmp_path):
    done, records = sweep(tmp_path, stub)
    assert "Running on GPUs 0 (Stub A GPU-aaaa), 1 (Stub B GPU-bbbb)" in done.stdout
    assert {record["return_value"] for record in records} == {"GPU-aaaa", "GPU-bbbb"}
    for record in records:
        assert record["gpu_uuids"] == [record["return_value"]]
        assert record["gpu_id"] == ["GPU-aaaa", "GPU-bbbb"].index(record["return_value"])
    overlapping = sorted((r["started_at"], r["ended_at"], r["gpu_id"]) for r in records)
    for (_, ended, gpu), (started, _, other) in pairwise(overlapping):
        assert gpu != other or started >= ended - 0.05


def test_an_inherited_mask_and_a_list_choose_gpus(stub, tmp_path):
    done, records = sweep(tmp_path, {**stub, "CUDA_VISIBLE_DEVICES": "1"})
    assert {record["return_value"] for record in records} == {"GPU-bbbb"}, done.stdout
    done, _ = sweep(tmp_path, stub, "hydra.launcher.gpus=[5]")
    assert done.returncode == 1
    assert "GPU 5 is not on this machine. NVML sees: 0 (GPU-aaaa), 1 (GPU-bbbb)" in done.stderr


def test_a_driver_that_is_not_loaded_means_cpu_slots_and_says_so(stub, tmp_path):
    done, records = sweep(
        tmp_path, {**stub, "NVML_STUB": str(tmp_path / "none"), "CUDA_VISIBLE_DEVICES": "x"}
    )
    assert "Running on CPU, for want of GPUs: NVML: Driver Not Loaded" in done.stdout
    assert [record["gpu_id"] for record in records] == [None] * 4
