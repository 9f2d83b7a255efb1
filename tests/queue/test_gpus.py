"""Which GPUs a sweep uses: what is asked for, what is allowed, and real sweeps over stubbed ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.queue.gpus import Gpu, choose_gpus, mask_note
from orchestrator.sweep.errors import SweepError

GPUS = [Gpu("GPU-aaaa-1", 0), Gpu("GPU-aabb-2", 1), Gpu("GPU-cccc-3", 2)]
# GPU 0 is divided in two.
DIVIDED = [
    Gpu("MIG-1111", 0, "A100 MIG 1g.5gb", 0),
    Gpu("MIG-2222", 0, "A100 MIG 2g.10gb", 1),
    Gpu("GPU-cccc-3", 1, "A100"),
]
MIXED = [Gpu("GPU-aaaa-1", 0, "T4"), Gpu("GPU-aabb-2", 1, "A100")]


def indices(gpus):
    return [gpu.index for gpu in gpus]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [0, 1, 2]),
        ("0,1,2", [0, 1, 2]),
        ("2,0", [2, 0]),
        (" 2 , 0 ", [2, 0]),
        ("GPU-cc", [2]),
        ("GPU-aabb-2,GPU-aaaa-1", [1, 0]),
        ("GPU-cccc-3,0", [2, 0]),
        # None at all.
        ("", []),
        ("-1", []),
        ("void", []),
        ("none", []),
        ("NoDevFiles", []),
        # As CUDA: what follows a word that names no device is hidden.
        ("0,9,1", [0]),
        ("1,-1,0", [1]),
        ("1,,0", [1]),
        ("1,", [1]),
        (",1", []),
        ("0,void,1", [0]),
        ("0,0:1,1", [0]),
        ("0,²,1", [0]),
        ("0,GPU-dd,1", [0]),
        # One that names several, too.
        ("2,GPU-aa,0", [2]),
        ("GPU-", []),
        ("G", []),
        ("aaaa", []),
        # Once is enough.
        ("1,1,GPU-aabb,0", [1, 0]),
    ],
)
def test_a_mask_is_read_as_cuda_reads_it(mask, expected):
    assert indices(choose_gpus("auto", GPUS, mask)) == expected


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("MIG-2222", ["0:1"]),
        ("MIG-2", ["0:1"]),
        ("MIG-", []),
        ("1,MIG-1111", ["1", "0:0"]),
        ("0", ["0:0", "0:1"]),
        ("MIG-2222,0", ["0:1", "0:0"]),
    ],
)
def test_a_mask_may_name_instances(mask, expected):
    assert [gpu.label for gpu in choose_gpus("auto", DIVIDED, mask)] == expected


WORDS = st.sampled_from(
    ["0", "1", "2", "7", "-1", "", "void", "GPU-aaaa-1", "GPU-aa", "GPU-aab", "GPU-c", "x", " 2 "]
)


@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=4))
def test_a_mask_hides_all_that_follows_what_it_does_not_know(words, more):
    chosen = choose_gpus("auto", GPUS, ",".join(words))
    assert set(chosen) <= set(GPUS)
    assert len(set(chosen)) == len(chosen)
    longer = choose_gpus("auto", GPUS, ",".join([*words, *more]) if words else ",".join(more))
    assert longer[: len(chosen)] == chosen or not words
    assert choose_gpus("auto", GPUS, ",".join([*words, "void", *more])) == chosen
    by_uuid = ",".join(gpu.uuid for gpu in chosen)
    assert choose_gpus("auto", GPUS, by_uuid) == chosen
    for gpu in chosen:
        assert choose_gpus([gpu.uuid], GPUS, ",".join(words)) == [gpu]


@pytest.mark.parametrize(
    ("wanted", "mask", "expected"),
    [
        ([1, 0], None, ["1", "0"]),
        (["GPU-cccc-3"], None, ["2"]),
        (["GPU-c", "GPU-cc", 2], None, ["2"]),
        (2, None, ["2"]),
        ("2", None, ["2"]),
        ("GPU-aaa", None, ["0"]),
        ([2], "2,0", ["2"]),
        ([], None, []),
    ],
)
def test_gpus_are_chosen_by_index_or_uuid_within_the_mask(wanted, mask, expected):
    assert [gpu.label for gpu in choose_gpus(wanted, GPUS, mask)] == expected


@pytest.mark.parametrize(
    ("wanted", "mask", "expected"),
    [
        ("auto", None, ["0:0", "0:1", "1"]),
        ([0], None, ["0:0", "0:1"]),
        ([1, "0:1"], None, ["1", "0:1"]),
        (["MIG-1111"], None, ["0:0"]),
        (["MIG-2"], None, ["0:1"]),
        ([0], "MIG-2222", ["0:1"]),
        (["0:0", 0], None, ["0:0", "0:1"]),
    ],
)
def test_instances_are_chosen_one_by_one_or_with_their_gpu(wanted, mask, expected):
    assert [gpu.label for gpu in choose_gpus(wanted, DIVIDED, mask)] == expected


@pytest.mark.parametrize(
    ("wanted", "mask", "why"),
    [
        ([7], None, "GPU 7 is not on this machine"),
        (["7:1"], None, "GPU 7:1 is not on this machine"),
        ([""], None, "not on this machine"),
        ([-1], None, "not on this machine"),
        (["GPU-aa"], None, "GPU GPU-aa is ambiguous"),
        ([1], "0,2", "CUDA_VISIBLE_DEVICES=0,2 does not allow it"),
        ([1], "", "CUDA_VISIBLE_DEVICES= does not allow it"),
    ],
)
def test_a_gpu_that_is_not_to_be_had_is_named_with_those_that_are(wanted, mask, why):
    with pytest.raises(SweepError, match=why) as error:
        choose_gpus(wanted, GPUS, mask)
    assert "NVML sees: 0 (GPU-aaaa-1), 1 (GPU-aabb-2), 2 (GPU-cccc-3)." in str(error.value)


def test_instances_are_named_with_what_to_type():
    with pytest.raises(SweepError, match=r"NVML sees: 0:0 \(MIG-1111\), 0:1 \(MIG-2222\), 1 "):
        choose_gpus([5], DIVIDED)
    with pytest.raises(SweepError, match=r"NVML sees: none\."):
        choose_gpus([0], [])


@pytest.mark.parametrize(
    ("found", "mask", "order", "says"),
    [
        (MIXED, "1", None, True),
        (MIXED, "GPU-aaaa-1,0", "FASTEST_FIRST", True),
        (MIXED, "1", "PCI_BUS_ID", False),
        (MIXED, "GPU-aaaa-1", None, False),
        (MIXED, "", None, False),
        (MIXED, None, None, False),
        (GPUS, "1", None, False),  # all of one model
        (DIVIDED, "1", None, False),
        ([], "0", None, False),
    ],
)
def test_a_mask_of_indices_is_told_where_cuda_may_count_otherwise(found, mask, order, says):
    note = mask_note(found, mask, order)
    assert bool(note) == says
    assert not says or f"CUDA_VISIBLE_DEVICES={mask} was read in NVML's order" in note


def test_a_refused_gpu_is_told_with_the_doubt():
    with pytest.raises(SweepError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        choose_gpus([0], MIXED, "1")
    with pytest.raises(SweepError) as error:
        choose_gpus([0], MIXED, "1", "PCI_BUS_ID")
    assert "PCI_BUS_ID" not in str(error.value)


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
    tables = f"hydra.launcher.lease_dir={tmp_path / 'leases'}"
    inherited = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "app.py", "-m", *named, tables, *overrides, "+x=range(4)"],
        cwd=tmp_path,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    records = [
        json.loads(path.read_text()) for path in sorted((tmp_path / "outputs").glob("*/run.json"))
    ]
    return done, records


@pytest.fixture
def two(nvml):
    nvml.gpus([nvml.gpu("GPU-aaaa", "Stub A"), nvml.gpu("GPU-bbbb", "Stub B")])
    return nvml


def test_jobs_see_their_gpu_alone_and_by_uuid(two, tmp_path):
    done, records = sweep(tmp_path, two.env)
    assert "0 (Stub A GPU-aaaa" in done.stdout, done.stderr
    assert {record["return_value"] for record in records} == {"GPU-aaaa", "GPU-bbbb"}
    for record in records:
        assert record["gpu_uuids"] == [record["return_value"]]
        assert record["gpu_id"] == ["GPU-aaaa", "GPU-bbbb"].index(record["return_value"])
    overlapping = sorted((r["started_at"], r["ended_at"], r["gpu_id"]) for r in records)
    for (_, ended, gpu), (started, _, other) in pairwise(overlapping):
        assert gpu != other or started >= ended - 0.05


def test_an_inherited_mask_and_a_list_choose_gpus(two, tmp_path):
    done, records = sweep(tmp_path, {**two.env, "CUDA_VISIBLE_DEVICES": "1"})
    assert {record["return_value"] for record in records} == {"GPU-bbbb"}, done.stdout
    done, _ = sweep(tmp_path, two.env, "hydra.launcher.gpus=[5]")
    assert done.returncode == 1
    assert "GPU 5 is not on this machine. NVML sees: 0 (GPU-aaaa), 1 (GPU-bbbb)" in done.stderr


def test_a_driver_that_is_not_loaded_means_cpu_slots_and_says_so(two, tmp_path):
    two.init("fail")
    done, records = sweep(tmp_path, {**two.env, "CUDA_VISIBLE_DEVICES": "x"})
    assert "Running on CPU, for want of GPUs: NVML: Driver Not Loaded" in done.stdout
    assert [record["gpu_id"] for record in records] == [None] * 4
