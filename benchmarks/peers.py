"""The environments of the peers: one each, so that no launcher pays for another's plugins."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_PACKAGES = {
    "plain": (),
    "joblib": ("hydra-joblib-launcher",),
    "submitit": ("hydra-submitit-launcher",),
}
_TOLD = ("hydra-core", "omegaconf", "joblib", "submitit", "cloudpickle", "numpy", "torch")
# Names of ours that must not be found in a peer's environment.
_OURS = ("orchestrator", "hydra_plugins.hydra_orchestrator")


@dataclass(frozen=True)
class Peers:
    """Interpreters by environment, and a folder with torch for those runs that want it."""

    root: Path

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(_PACKAGES)

    def python(self, name: str) -> str:
        return str(self.root / name / "bin" / "python")

    @property
    def torch(self) -> Path:
        return self.root / f"torch-{version('torch')}"


def make(root: Path, *, torch: bool) -> Peers:
    """Make what is missing; what is there is used again.

    Raises:
        SystemExit: an environment holds another Hydra than this interpreter's, or ours.
    """
    peers = Peers(root.absolute())
    for name, packages in _PACKAGES.items():
        if not (peers.root / name / "made").exists():
            _make_environment(peers, name, packages)
        _check(peers, name)
    if torch and not (peers.torch / "made").exists():
        _say(f"Installing torch {version('torch')} for the peers")
        # Without the build's own part (+cpu, +cu130), which an index may not spell out.
        pinned = {p: version(p).partition("+")[0] for p in ("torch", "numpy") if _present(p)}
        wanted = [f"{package}=={number}" for package, number in pinned.items()]
        _pip(peers, "plain", "--target", str(peers.torch), *wanted)
        (peers.torch / "made").touch()
    return peers


def _make_environment(peers: Peers, name: str, packages: tuple[str, ...]) -> None:
    folder = peers.root / name
    _say(f"Making the environment {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pinned = [f"{p}=={version(p)}" for p in ("hydra-core", "omegaconf")]
    wanted = [f"{p}=={version(p)}" if _present(p) else p for p in packages]
    _pip(peers, name, *pinned, *wanted)
    (folder / "made").touch()


def _pip(peers: Peers, name: str, *words: str) -> None:
    command = [peers.python(name), "-m", "pip", "install", "--quiet", *words]
    subprocess.run(command, check=True, env=clean_environment())


def _check(peers: Peers, name: str) -> None:
    found = versions(peers, name)
    if found["hydra-core"] != version("hydra-core"):
        sys.exit(
            f"{peers.root / name} holds hydra-core {found['hydra-core']}, this interpreter "
            f"{version('hydra-core')}: delete that folder to have it made anew."
        )
    code = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, sys.argv[1:])))"
    tops = {word.partition(".")[0] for word in _OURS} - {"hydra_plugins"}
    done = subprocess.run(
        [peers.python(name), "-c", code, *tops], check=False, env=clean_environment(), cwd="/"
    )
    if done.returncode:
        sys.exit(f"The peers' environment {peers.root / name} can import {_OURS[0]}: it must not.")


def versions(peers: Peers | None, name: str = "") -> dict[str, str]:
    """Versions of the packages that matter, in a peer's environment or in this one."""
    if peers is None:
        return {package: version(package) for package in _TOLD if _present(package)}
    code = (
        "import json, sys, importlib.metadata as m;"
        "there = {d.metadata['Name'].lower(): d.version for d in m.distributions()};"
        "print(json.dumps({n: there[n] for n in sys.argv[1:] if n in there}))"
    )
    words = [peers.python(name), "-c", code, *_TOLD]
    done = subprocess.run(words, check=True, capture_output=True, env=clean_environment(), cwd="/")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def have_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def clean_environment() -> dict[str, str]:
    """This process's variables less those that lead one environment into another."""
    leading = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in leading}


def _present(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
