"""An app that says what it drew and how many threads it has; it may make the launcher unsafe."""

import importlib
import os
import random
import sys
import threading

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore

ConfigStore.instance().store(name="config", node={"x": 0, "size": 200})
# What the launcher has done before Hydra starts.
BEFORE = os.environ.get("APP_BEFORE", "")
IMPORTED = [importlib.import_module(name) for name in os.environ.get("APP_IMPORTS", "").split()]


def use_torch(threads):
    import torch

    torch.set_num_threads(threads)
    torch.ones(600, 600) @ torch.ones(600, 600)


def pools():
    import threadpoolctl

    return {p["user_api"]: p["num_threads"] for p in threadpoolctl.threadpool_info()}


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    drawn = {
        "random": random.random(),
        "numpy": float(np.random.random()),  # noqa: NPY002 - the global generator is the point
    }
    square = np.ones((cfg.size, cfg.size))
    value = {"product": float((square @ square).sum()), "pid": os.getpid()}
    threads = {"pools": pools(), "omp": os.environ.get("OMP_NUM_THREADS")}
    torch = sys.modules.get("torch")
    if torch is not None:
        drawn["torch"] = float(torch.rand(()))
        ones = torch.ones(cfg.size, cfg.size)
        value["torch_product"] = float((ones @ ones).sum())
        threads["torch"] = torch.get_num_threads()
    return {**value, "drawn": drawn, "threads": threads}


if __name__ == "__main__":
    if BEFORE.startswith("torch"):
        use_torch(int(BEFORE.removeprefix("torch")))
    elif BEFORE == "thread":
        threading.Thread(target=threading.Event().wait, daemon=True, name="feeder").start()
    elif BEFORE == "numpy":
        np.ones((600, 600)) @ np.ones((600, 600))
    main()
