"""Takes memory of the (stubbed) GPUs that it was given, for a while, as its config says."""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import hydra
from omegaconf import OmegaConf

sys.path.insert(0, os.environ["NVML_STUB_TOOLS"])
import use_gpu

OmegaConf.register_new_resolver("at", lambda values, x: values[x])
STATE = Path(os.environ["SWEEP_STATE"])


def change_constants():
    """Set module constants of the launcher, which tests have no patience for."""
    for name, value in json.loads(os.environ.get("GPU_APP_CONSTANTS", "{}")).items():
        module, *path, last = name.split(".")
        target = importlib.import_module(f"orchestrator.queue.{module}")
        for word in path:
            target = getattr(target, word)
        assert hasattr(target, last), name
        setattr(target, last, tuple(value) if isinstance(value, list) else value)


def note(event, cfg):
    """Tell the test, in one write; `time.monotonic` is the same for all processes."""
    line = {
        "event": event,
        "time": time.monotonic(),
        "name": str(cfg.x),
        "sweep": os.environ.get("GPU_APP_SWEEP", ""),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gb": cfg.gb,
        "linger": cfg.linger,
        "pid": os.getpid(),
    }
    with (STATE / "events").open("a") as file:
        file.write(json.dumps(line) + "\n")


def fail(cfg):
    tries = STATE / f"tries-{cfg.x}"
    number = int(tries.read_text()) + 1 if tries.exists() else 1
    tries.write_text(str(number))
    print(f"try {number} of {cfg.x}", flush=True)
    if number > cfg.fail_times:
        return
    if cfg.fail == "oom":
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if cfg.fail == "crash":
        os._exit(7)
    if cfg.fail == "hang":
        time.sleep(600)
    raise ValueError("wrong")


def work(cfg):
    time.sleep(cfg.seconds)
    if cfg.fail_times:
        fail(cfg)
    while cfg.gate and not (STATE / "gate").exists():
        time.sleep(0.02)


@hydra.main(version_base="1.3", config_path=None, config_name="gpu_app")
def main(cfg):
    note("start", cfg)
    end = use_gpu.occupy(int(cfg.gb * 1e9), cfg.delay, cfg.linger)
    work(cfg)
    end()
    note("end", cfg)
    names = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    names += ("TF_FORCE_GPU_ALLOW_GROWTH", *(name for name in os.environ if "OF_JOB" in name))
    return {name: os.environ.get(name) for name in names}


if __name__ == "__main__":
    from hydra.core.config_store import ConfigStore

    change_constants()
    ConfigStore.instance().store(
        name="gpu_app",
        node={
            "x": 0,
            "seed": 0,
            "gb": 1.0,
            # A value for each x.
            "of": [1] * 40,
            "mine": "${at:${of},${x}}",
            "for_seconds": [1] * 40,
            "my_seconds": "${at:${for_seconds},${x}}",
            "delay": 0.0,
            "linger": 0.0,
            "seconds": 0.2,
            "fail": "none",
            "fail_times": 0,
            "gate": False,
        },
    )
    main()
