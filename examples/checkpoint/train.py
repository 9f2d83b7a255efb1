"""A training that goes on from its checkpoint after a time limit or a preemption.

    python train.py -m hydra/launcher=slurm hydra/sweeper=grid hydra/callbacks=results \
        hydra/output=named hydra.launcher.timeout_min=30 hydra.launcher.max_num_timeout=3 lr=0.1,0.3

Everything that belongs here is in `main`: it loads what an earlier attempt has saved, looks after
each epoch whether its time is nearly up, and then saves and says so. Its curve goes on, too.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import hydra
import numpy as np

import orchestrator

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg: DictConfig) -> float:
    """Fit a logistic regression to made-up data; returns its last loss."""
    checkpoint = orchestrator.run_dir() / "checkpoint.npz"
    random = np.random.default_rng(cfg.seed)
    inputs = random.normal(size=(500, 20))
    labels = (inputs @ random.normal(size=20) > 0).astype(float)
    weights, epoch = np.zeros(20), 0
    if checkpoint.exists():
        with np.load(checkpoint) as saved:
            weights, epoch = saved["weights"], int(saved["epoch"])
        print(f"Attempt {orchestrator.attempt()} goes on from epoch {epoch}.", flush=True)
    loss = np.inf
    while epoch < cfg.epochs:
        outputs = 1 / (1 + np.exp(-inputs @ weights))
        weights -= cfg.lr * inputs.T @ (outputs - labels) / len(labels)
        loss = float(-np.mean(np.log(np.where(labels == 1, outputs, 1 - outputs))))
        epoch += 1
        orchestrator.log_metrics(epoch, loss=loss)
        time.sleep(cfg.seconds_per_epoch)
        if orchestrator.is_preempted() and epoch < cfg.epochs:
            save(checkpoint, weights, epoch)
            raise orchestrator.Preempted(f"saved after epoch {epoch}")
    return loss


def save(path: Path, weights: np.ndarray, epoch: int) -> None:
    """Write the checkpoint whole or not at all."""
    part = path.with_name("checkpoint.part.npz")
    np.savez(part, weights=weights, epoch=epoch)
    part.replace(path)


if __name__ == "__main__":
    main()
