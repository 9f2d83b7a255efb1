"""Takes memory of the (stubbed) GPUs that it was given, for a while, as its config says."""

import os
import sys
import time
from pathlib import Path

import hydra

sys.path.insert(0, os.environ["NVML_STUB_TOOLS"])
import use_gpu  # noqa: E402


@hydra.main(version_base="1.3", config_path=None, config_name="gpu_app")
def main(cfg):
    state = Path(os.environ["SWEEP_STATE"])
    name = f"{cfg.x}-{cfg.seed}"
    with (state / "starts").open("a") as file:
        file.write(f"{time.monotonic()} {name} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    end = use_gpu.occupy(int(cfg.gb * 1e9), cfg.delay, cfg.linger)
    tries = state / f"tries-{name}"
    number = int(tries.read_text()) + 1 if tries.exists() else 1
    tries.write_text(str(number))
    time.sleep(cfg.seconds)
    if number <= cfg.fail_times:
        if cfg.fail == "oom":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if cfg.fail == "crash":
            os._exit(7)
        if cfg.fail == "timeout":
            time.sleep(60)
        raise ValueError("wrong")
    while cfg.gate and not (state / "gate").exists():
        time.sleep(0.02)
    end()
    with (state / "ends").open("a") as file:
        file.write(f"{time.monotonic()} {name}\n")
    return {"visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "env": dict(os.environ)}


if __name__ == "__main__":
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(
        name="gpu_app",
        node={
            "x": 0,
            "seed": 0,
            "gb": 1.0,
            "gpus": 1,
            "delay": 0.0,
            "linger": 0.0,
            "seconds": 0.2,
            "fail": "none",
            "fail_times": 0,
            "gate": False,
        },
    )
    main()
