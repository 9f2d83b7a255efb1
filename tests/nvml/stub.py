"""Stubbed GPUs for tests: the library, compiled once, and a directory that says what it shows."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_stub.c")
LIBRARY = "libnvidia-ml.so.1"
GB = 10**9


def build(directory):
    """Compile the stub into a directory, unless another worker has; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = directory / LIBRARY
    if not library.exists():
        directory.mkdir(parents=True, exist_ok=True)
        mine = directory / f"{LIBRARY}.{os.getpid()}"
        # The soname makes a copy that is loaded already answer for the real one.
        flags = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
        subprocess.run([compiler, *flags, "-o", mine, SOURCE], check=True)
        mine.replace(library)
    return library


def write(path, text):
    """Write so that a reader finds the old file or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def gpu(uuid, name="Stub", *, total=80 * GB, used=0, utilisation=0, state="ok", mig="-"):
    """A line of the file of GPUs; ``mig``: pairs of an instance's UUID and its memory."""
    if not isinstance(mig, str):
        mig = ",".join(f"{instance}:{memory}" for instance, memory in mig) or "-"
    return f"{uuid}|{name}|{total}|{used}|{utilisation}|{state}|{mig}"


class NvmlStub:
    """What NVML is to show. Every change holds from the next call on, in all processes."""

    gpu = staticmethod(gpu)

    def __init__(self, library, directory):
        self.library = library
        self.directory = directory
        directory.mkdir(parents=True)
        paths = [str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        self.env = {
            "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
            "NVML_STUB_DIR": str(directory),
            # Where simulated jobs find `use_gpu`.
            "NVML_STUB_TOOLS": str(Path(__file__).parent),
        }
        self._lines = []

    def gpus(self, lines):
        """The GPUs: lines (see `gpu`), or UUIDs alone."""
        self._lines = [line if "|" in line else gpu(line) for line in lines]
        write(self.directory / "gpus", "".join(f"{line}\n" for line in self._lines))

    def state(self, uuid, state):
        """Change the state of one GPU."""
        changed = [line.split("|") for line in self._lines]
        for words in changed:
            if words[0] == uuid:
                words[5] = state
        self.gpus(["|".join(words) for words in changed])

    def use(self, name, uuid, pid, size, start=0, until=float("inf"), linger=False):  # noqa: PLR0917
        """A use of a GPU; pid 0: memory without a process. Times as `time.time` gives them."""
        words = [uuid, pid, size, start, until, *(["linger"] if linger else [])]
        write(self.directory / f"use-{name}", " ".join(map(str, words)) + "\n")

    def drop(self, name):
        (self.directory / f"use-{name}").unlink(missing_ok=True)

    def init(self, how):
        """``fail``, ``mismatch`` or ``hang``; None: NVML answers."""
        self._set("init", how)

    def quirks(self, *words):
        """``no-v2``, ``no-processes``, ``no-process-memory``, ``no-memory``, ``reserved=BYTES``."""
        self._set("quirks", " ".join(words))

    def _set(self, name, text):
        if text:
            write(self.directory / name, text)
        else:
            (self.directory / name).unlink(missing_ok=True)

    def count_calls(self):
        """From now on, keep the names of the calls, of all processes."""
        (self.directory / "calls").touch()

    def calls(self):
        path = self.directory / "calls"
        return path.read_text().split() if path.exists() else []

    def load(self, monkeypatch):
        """Let this very process (and what it forks or starts) find the stub."""
        ctypes.CDLL(str(self.library))
        for name, value in self.env.items():
            monkeypatch.setenv(name, value)
