"""As `noop`, with torch imported at the top and used in the task.

A launcher that pickles the task ships only what the task's own globals refer to, so the
use is what makes its workers import torch, as a training would.
"""

from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    product = torch.ones(64, 64) @ torch.ones(64, 64)
    assert product[0, 0].item() == 64
    Path(HydraConfig.get().runtime.output_dir, "done").write_text(str(cfg.seed))
    return cfg.seed


if __name__ == "__main__":
    main()
