"""An app with one task per way of ending badly, chosen by ``case``."""

import atexit
import ctypes
import enum
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

from orchestrator.run import log_metrics, run_dir

ConfigStore.instance().store(
    name="config",
    node={
        "case": "fine",
        "text": "",
        "number": 0,
        "seed": 0,
        "base": int(os.environ.get("SWEEP_BASE", "0")),
    },
)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


class UnreadableError(Exception):
    def __str__(self):
        raise RuntimeError


class LockedError(Exception):
    def __init__(self):
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class TwoArgumentsError(Exception):
    # Pickles, but does not unpickle: its one argument is not enough to make it again.
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@case
def fine(cfg):
    return 1.0


# --- values ---


@case
def returns_lambda(cfg):
    return lambda: 1


@case
def returns_generator(cfg):
    return (i for i in range(3))


@case
def returns_nan(cfg):
    return float("nan")


@case
def returns_inf(cfg):
    return -float("inf")


@case
def returns_numpy_scalar(cfg):
    return np.float32(0.5)


@case
def returns_numpy_array(cfg):
    return np.arange(4)


@case
def returns_nan_in_dict(cfg):
    return {"loss": float("nan"), "best": {"inner": float("inf")}, 3: [1, None]}


@case
def returns_bool_in_dict(cfg):
    return {"converged": True, "loss": 0.25}


@case
def returns_huge_dict(cfg):
    return {f"key {i}": i / 7 for i in range(100_000)}


@case
def returns_enum(cfg):
    return Colour.RED


@case
def returns_int_enum(cfg):
    return {"level": Level.HIGH}


@case
def returns_huge_int(cfg):
    return {"count": 10**30}


@case
def returns_local_int(cfg):
    class Points(int):
        pass

    return {"points": Points(3)}


@case
def returns_int_of_main(cfg):
    return MainInt(3)


class MainInt(int):
    pass


@case
def returns_cycle(cfg):
    cycle = []
    cycle.append(cycle)
    return cycle


@case
def returns_surrogate(cfg):
    return "\udcff"


@case
def returns_50_mb(cfg):
    return "z" * 50_000_000


@case
def returns_bytes(cfg):
    return b"\xff\x00"


@case
def returns_config(cfg):
    return cfg


@case
def logs_nan(cfg):
    log_metrics(0, loss=1.0)
    log_metrics(1, loss=float("nan"), reward=-float("inf"))


@case
def logs_then_dies(cfg):
    log_metrics(7, loss=0.125)
    os._exit(9)


# --- ends ---


@case
def exits_0_at_once(cfg):
    os._exit(0)


@case
def exits_3_at_once(cfg):
    os._exit(3)


@case
def system_exit_0(cfg):
    raise SystemExit(0)


@case
def system_exit_3(cfg):
    raise SystemExit(3)


@case
def system_exit_text(cfg):
    sys.exit("the disk of the data is not there")


@case
def keyboard_interrupt(cfg):
    raise KeyboardInterrupt


@case
def generator_exit(cfg):
    raise GeneratorExit


@case
def raises_unpicklable(cfg):
    raise LockedError


@case
def raises_unreadable(cfg):
    raise UnreadableError


@case
def raises_not_unpicklable(cfg):
    raise TwoArgumentsError("one", "two")


@case
def raises_local(cfg):
    class LocalError(Exception):
        pass

    raise LocalError("of a class inside a function")


@case
def raises_group(cfg):
    try:
        raise ValueError("first")
    except ValueError as error:
        raise RuntimeError("second\nline") from error


@case
def raises_surrogate(cfg):
    raise ValueError("a file \udcff")


@case
def raises_unicode(cfg):
    raise ValueError("größer → 日本語")


@case
def raises_long(cfg):
    raise ValueError("long " * 1_000_000)


@case
def recursion(cfg):
    recursion(cfg)


@case
def out_of_memory(cfg):
    raise MemoryError


@case
def kills_itself(cfg):
    print("last words")
    os.kill(os.getpid(), 9)


@case
def terminates_itself(cfg):
    os.kill(os.getpid(), 15)
    time.sleep(60)


@case
def aborts(cfg):
    os.abort()


@case
def atexit_exits_5(cfg):
    atexit.register(os._exit, 5)
    return 4


@case
def atexit_segfault(cfg):
    atexit.register(ctypes.string_at, 0)
    return 4


@case
def atexit_raises(cfg):
    atexit.register(int, "no number")
    return 4


@case
def atexit_writes(cfg):
    atexit.register(Path(run_dir(), "goodbye").touch)


@case
def thread_ends_late(cfg):
    def late():
        time.sleep(0.3)
        Path(run_dir(), "late").touch()

    threading.Thread(target=late).start()


@case
def thread_never_ends(cfg):
    threading.Thread(target=threading.Event().wait).start()
    return 1


@case
def takes_a_second(cfg):
    time.sleep(1.2)


# --- output ---


@case
def prints_50_mb(cfg):
    line = "y" * 99_999
    for _ in range(500):
        print(line)


@case
def prints_everywhere(cfg):
    print("from print", "ünïcode", "\udcff")
    print("to stderr", file=sys.stderr)
    sys.stdout.buffer.write(b"from buffer \xff\xfe\x00\n")
    sys.stdout.flush()
    libc = ctypes.CDLL(None)
    libc.printf(b"from printf\n")
    subprocess.run(["echo", "from a child"], check=True)
    os.write(1, b"from write\n")
    os.write(2, b"error from write\n")
    logging.getLogger(__name__).warning("from logging")
    print("no newline at the end", end="")


@case
def closes_stdout(cfg):
    sys.stdout.close()
    os.close(1)


@case
def reads_stdin(cfg):
    return sys.stdin.read()


# --- processes ---


def square(value):
    return value * value


def _pool(method):
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        return sum(pool.map(square, range(5)))


@case
def pool_fork(cfg):
    return _pool("fork")


@case
def pool_spawn(cfg):
    return _pool("spawn")


@case
def pool_executor(cfg):
    with ProcessPoolExecutor(2) as pool:
        return sum(pool.map(square, range(5)))


@case
def pool_left_open(cfg):
    # Its workers are ended by multiprocessing's own exit handler.
    global _left_open
    _left_open = multiprocessing.get_context("fork").Pool(2)
    return sum(_left_open.map(square, range(5)))


@case
def process_not_joined(cfg):
    def child():
        time.sleep(0.3)
        Path(run_dir(), "child").touch()

    multiprocessing.get_context("fork").Process(target=child).start()


@case
def forks_and_returns_twice(cfg):
    # A forked copy of the job comes back from the task, too, and later.
    if os.fork():
        return "parent"
    time.sleep(0.2)
    return "child"


@case
def leaves_deaf(cfg):
    subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 300"], start_new_session=True)
    return 1


@case
def leaves_a_sleeper(cfg):
    subprocess.Popen(["sleep", "300"], start_new_session=True)
    return 1


# --- where it runs ---


@case
def tells_where(cfg):
    Path("relative.txt").write_text("x")
    hydra_cfg = HydraConfig.get()
    return {
        "cwd": os.getcwd(),
        "output_dir": hydra_cfg.runtime.output_dir,
        "variable": os.environ.get("SET_BY_HYDRA"),
        "text": cfg.text,
        "num": hydra_cfg.job.num,
    }


@case
def changes_directory(cfg):
    os.chdir("/")
    log_metrics(0, loss=1.0)
    return os.getcwd()


@case
def removes_its_directory(cfg):
    import shutil

    shutil.rmtree(run_dir())
    return 1


@case
def writes_much(cfg):
    with open(run_dir() / "big", "wb") as file:
        file.write(b"x" * 50_000_000)
    return 1


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    ledger = os.environ.get("SWEEP_STATE")
    value = CASES[cfg.case](cfg)
    if ledger:
        with open(Path(ledger, "ledger"), "a") as file:
            file.write(f"{cfg.case} {cfg.number} {cfg.seed}\n")
    return value


if __name__ == "__main__":
    main()
