"""Takes memory of a GPU by torch; or, where the GPUs are stubbed, as if it had."""

import os
import sys
import time

import hydra

REAL = "NVML_STUB_DIR" not in os.environ


class OutOfMemoryError(RuntimeError):
    """What torch raises, for stubbed GPUs."""


def take(gigabytes):
    """Hold so much memory of the one GPU that is visible; what frees it."""
    if REAL:
        import torch

        assert torch.cuda.device_count() == 1
        return torch.ones(int(gigabytes * 1e9), dtype=torch.uint8, device="cuda")
    sys.path.insert(0, os.environ["NVML_STUB_TOOLS"])
    import pynvml
    import use_gpu

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(os.environ["CUDA_VISIBLE_DEVICES"])
    if pynvml.nvmlDeviceGetMemoryInfo(handle).free < gigabytes * 1e9:
        msg = f"CUDA out of memory. Tried to allocate {gigabytes} GB"
        raise OutOfMemoryError(msg)
    return use_gpu.occupy(int(gigabytes * 1e9))


@hydra.main(version_base="1.3", config_path=None, config_name="app")
def main(cfg):
    time.sleep(cfg.before)
    held = take(cfg.gb)
    time.sleep(cfg.seconds)
    del held
    return os.environ["CUDA_VISIBLE_DEVICES"]


if __name__ == "__main__":
    from hydra.core.config_store import ConfigStore

    defaults = {"x": 0, "gb": 1.0, "seconds": 1.0, "before": 0.0}
    ConfigStore.instance().store(name="app", node=defaults)
    main()
