"""Hydra's own Slurm launcher (hydra-submitit-launcher) with our records, on a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys

APP = """
import os
import hydra
from hydra.core.config_store import ConfigStore
from orchestrator.run import log_metrics

ConfigStore.instance().store(name="config", node={"x": 0, "fails_at": -1})

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    log_metrics(0, loss=cfg.x / 2)
    if cfg.x == cfg.fails_at:
        raise ValueError("as asked")
    return {"score": cfg.x, "gpu": int(os.environ["CUDA_VISIBLE_DEVICES"])}

if __name__ == "__main__":
    main()
"""
WORDS = (
    *("-m", "hydra/launcher=submitit_slurm", "hydra/callbacks=results", "hydra/output=named"),
    *("hydra.launcher.timeout_min=5", "hydra.launcher.gpus_per_node=1"),
)


def sweep(slurm, directory, *words):
    (directory / "app.py").write_text(APP)
    return subprocess.run(
        [sys.executable, "app.py", *WORDS, *words],
        cwd=directory,
        env=slurm.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def records(directory):
    return {
        path.parent.name: json.loads(path.read_bytes())
        for path in (directory / "outputs").glob("*/run.json")
    }


def test_a_sweep_writes_records(slurm, tmp_path):
    done = sweep(slurm, tmp_path, "x=1,2,3")
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(tmp_path)
    assert {name: record["state"] for name, record in found.items()} == dict.fromkeys(
        ("x_1", "x_2", "x_3"), "COMPLETED"
    )
    assert [found[f"x_{x}"]["return_value"]["score"] for x in (1, 2, 3)] == [1, 2, 3]
    assert found["x_2"]["metrics"]["loss"] == 1.0
    (results,) = (tmp_path / "outputs" / ".sweeps").glob("*/train_sweep_results.json")
    assert [entry["hyperparams"] for entry in json.loads(results.read_bytes())] == [
        {"x": 1},
        {"x": 2},
        {"x": 3},
    ]


def test_a_failure_is_in_its_record(slurm, tmp_path):
    done = sweep(slurm, tmp_path, "x=1,2", "fails_at=2")
    assert done.returncode != 0
    found = records(tmp_path)
    states = {record["hyperparams"]["x"]: record["state"] for record in found.values()}
    assert states == {1: "COMPLETED", 2: "FAILED"}
