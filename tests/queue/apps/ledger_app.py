"""An app whose runs count themselves in a ledger, and wait at a gate while it is shut."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore

from orchestrator.run import log_metrics, save_arrays

STATE = Path(os.environ["SWEEP_STATE"])
ConfigStore.instance().store(
    name="config",
    node={
        "x": 0,
        "seed": 0,
        # Runs from this x on wait for STATE/gate.
        "hold_from": int(os.environ.get("SWEEP_HOLD_FROM", "1000")),
        # What a run that waits does besides: see `start_children`.
        "child": os.environ.get("SWEEP_CHILD", "none"),
        "fail_from": 1000,
        "base": int(os.environ.get("SWEEP_BASE", "0")),
    },
)


def append(path, text):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def start_children(kind):
    """Leave processes behind: obedient, or as hard to find and to end as can be."""
    if kind == "obedient":
        subprocess.Popen(["sleep", "300"])
    elif kind == "detached":
        # Forked twice, own session, deaf to SIGTERM, and still holding all descriptors.
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                    signal.signal(number, signal.SIG_IGN)
                time.sleep(300)
            os._exit(0)
        os.wait()
        deaf = "trap '' TERM HUP INT; setsid sh -c 'sleep 300 & sleep 301' & sleep 302"
        subprocess.Popen(["sh", "-c", deaf], start_new_session=True)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    log_metrics(0, loss=cfg.x / 2)
    save_arrays(curve=np.arange(3) + cfg.x)
    gate = STATE / "gate"
    if cfg.x >= cfg.hold_from and not gate.exists():
        if cfg.child == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        start_children(cfg.child)
        (STATE / f"held-{cfg.x}-{cfg.seed}").touch()
        while not gate.exists():
            time.sleep(0.01)
    if cfg.x >= cfg.fail_from and not gate.exists():
        msg = f"x is {cfg.x}"
        raise ValueError(msg)
    append(STATE / "ledger", f"{cfg.x} {cfg.seed}\n")
    return {"score": cfg.x * 10, "loss": cfg.x / 2}


if __name__ == "__main__":
    sys.exit(main())
