"""Sweeps on GPUs: which ones jobs get, how many at a time, and what they see of them."""

from __future__ import annotations

import pytest

A, B, C, D = (f"GPU-{letter * 4}-{n}" for n, letter in enumerate("abcd"))
METHODS = ("fork", "spawn")


@pytest.mark.parametrize("method", METHODS)
def test_jobs_see_their_gpus_by_uuid_one_each(gpus, method):
    gpus.nvml.gpus([gpus.nvml.gpu(uuid, utilisation=40) for uuid in (A, B, C)])
    words = ("x=range(7)", "gb=2.5", "seconds=0.7")
    text = gpus.run(*words, method=method, env={"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    assert f"0 (Stub {A}, 80 GB), 1 (Stub {B}, 80 GB), 2 (Stub {C}, 80 GB)" in text
    assert "All runs ended (7 completed)" in text
    records = gpus.sandbox.records()
    assert len(records) == 7
    for record in records.values():
        seen = record.return_value
        assert seen["CUDA_VISIBLE_DEVICES"] in {A, B, C}
        assert seen["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
        assert seen["XLA_PYTHON_CLIENT_MEM_FRACTION"] is None
        assert record.gpu_uuids == (seen["CUDA_VISIBLE_DEVICES"],)
        assert record.gpu_id == (A, B, C).index(record.gpu_uuids[0])
        assert record.gpu_seconds == record.duration_seconds
        assert record.peak_gpu_memory_gb == 2.5
        assert record.gpu_utilization == 40
    assert gpus.most_jobs() == {A: 1, B: 1, C: 1}
    # All three were used at once.
    first = gpus.spans()[:3]
    assert {span.uuids[0] for span in first} == {A, B, C}
    assert max(span.start for span in first) < min(span.end for span in first)
    assert not gpus.leases_held()
    gpus.sandbox.nobody_left()


@pytest.mark.parametrize(
    ("mask", "chosen"),
    [("2,0", [C, A]), (f"{B},GPU-dd", [B, D]), ("1,-1,0", [B])],
)
def test_an_inherited_mask_is_what_is_allowed(gpus, mask, chosen):
    gpus.nvml.gpus([A, B, C, D])
    text = gpus.run("x=range(4)", "seconds=0.3", env={"CUDA_VISIBLE_DEVICES": mask})
    assert set(gpus.most_jobs()) == set(chosen)
    assert all(uuid in text for uuid in chosen)
    assert not [uuid for uuid in {A, B, C, D} - set(chosen) if uuid in text]


@pytest.mark.parametrize("mask", ["", "-1"])
def test_a_mask_that_allows_no_gpu_means_cores(gpus, mask):
    gpus.nvml.gpus([A, B])
    text = gpus.run("x=1,2", env={"CUDA_VISIBLE_DEVICES": mask})
    assert f"Running on CPU, for want of GPUs: CUDA_VISIBLE_DEVICES={mask} allows none" in text
    for record in gpus.sandbox.records().values():
        assert record.return_value["CUDA_VISIBLE_DEVICES"] == mask
        assert record.gpu_uuids == ()
        assert record.gpu_seconds is None
    assert not gpus.leases.exists()


def test_gpus_by_number_and_what_there_is_instead_of_an_unknown_one(gpus):
    gpus.nvml.gpus([A, B, C])
    text = gpus.run("x=range(4)", "hydra.launcher.gpus=[0,1]", "seconds=0.3")
    assert f"Running on GPUs 0 (Stub {A}, 80 GB), 1 (Stub {B}, 80 GB)" in text
    assert set(gpus.most_jobs()) == {A, B}
    text = gpus.run("x=1,2", "hydra.launcher.gpus=[0,3]", expect=1)
    assert "GPU 3 is not on this machine" in text
    assert f"NVML sees: 0 ({A}), 1 ({B}), 2 ({C})" in text
    words = ("x=1,2", "hydra.launcher.gpus=[0,2]")
    text = gpus.run(*words, expect=1, env={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert "GPU 2 is on this machine, but CUDA_VISIBLE_DEVICES=0,1 does not allow it" in text


def test_two_gpus_each_and_none(gpus):
    gpus.nvml.gpus([A, B, C, D])
    gpus.run("x=range(4)", "hydra.launcher.gpus_per_job=2", "seconds=0.5")
    for record in gpus.sandbox.records().values():
        assert len(set(record.gpu_uuids)) == 2
        assert record.return_value["CUDA_VISIBLE_DEVICES"] == ",".join(record.gpu_uuids)
        assert record.gpu_seconds == round(2 * record.duration_seconds, 3)
    assert gpus.most_jobs() == dict.fromkeys((A, B, C, D), 1)
    text = gpus.run("x=range(4,8)", "hydra.launcher.gpus_per_job=0")
    assert "All runs ended (4 completed)" in text
    for x in range(4, 8):
        record = gpus.sandbox.record(f"x_{x}")
        assert not record.return_value["CUDA_VISIBLE_DEVICES"]
        assert record.gpu_uuids == ()
