"""A plain Hydra app whose task does nothing but leave a file that proves it ran."""

import atexit
import os
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig


def _write_peak(path):
    status = Path("/proc/self/status").read_text()
    Path(path).write_text(status.split("VmHWM:")[1].split()[0])


# The launcher's own process, not its jobs, tells its peak memory when it ends.
if __name__ == "__main__" and "BENCH_PEAK_FILE" in os.environ:
    atexit.register(_write_peak, os.environ.pop("BENCH_PEAK_FILE"))


def tell_first(path):
    """Write when the first job of a sweep started; later ones find the file there."""
    now = time.time()
    try:
        with Path(path).open("x") as file:
            file.write(repr(now))
    except FileExistsError:
        pass


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    if "BENCH_FIRST_FILE" in os.environ:
        tell_first(os.environ["BENCH_FIRST_FILE"])
    Path(HydraConfig.get().runtime.output_dir, "done").write_text(str(cfg.seed))
    return cfg.seed


if __name__ == "__main__":
    main()
