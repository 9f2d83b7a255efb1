"""The GPU queue with CUDA jobs, on a real GPU where there is one, on a stubbed one everywhere."""

from __future__ import annotations

from itertools import combinations


def overlap(a, b):
    return min(a["ended_at"], b["ended_at"]) > max(a["started_at"], b["started_at"])


def test_four_processes_on_one_gpu(box):
    box.run("x=range(4)", "seconds=4", "hydra.launcher.max_processes_per_gpu=4")
    records = box.records()
    assert [record["state"] for record in records] == ["COMPLETED"] * 4
    assert {record["return_value"] for record in records} == {box.uuid}
    assert all(overlap(a, b) for a, b in combinations(records, 2))
    for record in records:
        assert 0.9 < record["peak_gpu_memory_gb"] < 3
        assert record["gpu_seconds"] == record["duration_seconds"]


def test_memory_is_learned_from_the_first_and_the_others_are_packed(box):
    gb = round(box.total * 0.33, 1)
    box.run(
        *("x=range(4)", f"gb={gb}", "seconds=4"),
        *("hydra.launcher.memory_per_job_gb=auto", "hydra.launcher.memory_keys=[gb]"),
        "hydra.launcher.max_processes_per_gpu=4",
    )
    records = sorted(box.records(), key=lambda record: record["started_at"])
    assert [record["state"] for record in records] == ["COMPLETED"] * 4
    assert all(record["peak_gpu_memory_gb"] >= gb * 0.99 for record in records)
    first, *others = records
    assert not any(overlap(first, other) for other in others)
    # Two of 36 % (with the margin) fit; a third does not.
    assert any(overlap(a, b) for a, b in combinations(others, 2))
    assert not all(overlap(a, b) for a, b in combinations(others, 2))


def test_a_run_that_is_out_of_memory_is_tried_again_alone(box):
    gb = round(box.total * 0.6, 1)
    text = box.run(
        # The second starts to take memory when the first has it.
        *("x=0,1", f"gb={gb}", "seconds=6", "before=${x}"),
        *("hydra.launcher.max_processes_per_gpu=2", "hydra.launcher.retries=1"),
    )
    assert "trying again (oom; 1 of 1; alone on its GPU)" in text
    first, second = box.records()
    assert (first["state"], second["state"]) == ("COMPLETED", "COMPLETED")
    assert (len(first["attempts"]), len(second["attempts"])) == (0, 1)
    assert "out of memory" in second["attempts"][0]["error"]["message"]
    assert not overlap(first, second)


def test_a_run_out_of_time_gives_its_memory_back(box):
    before = box.used()
    box.run("seconds=600", "hydra.launcher.timeout_s=15", "hydra.launcher.kill_grace_s=2", expect=1)
    (record,) = box.records()
    assert record["state"] == "TIMEOUT"
    assert record["peak_gpu_memory_gb"] > 0.9
    box.until(lambda: box.used() < before + 0.3)


def test_ctrl_c_gives_all_memory_back(box):
    before = box.used()
    sweep = box.start("x=range(3)", "seconds=600", "hydra.launcher.max_processes_per_gpu=3")
    box.until(lambda: box.used() > before + 2.9)
    text = box.stop(sweep)
    assert sweep.returncode == 130, text
    assert {record["state"] for record in box.records()} == {"CANCELLED"}
    box.until(lambda: box.used() < before + 0.3)
