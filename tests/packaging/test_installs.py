"""The plugins are found and work however the project got onto the path."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Environment:
    """A virtual environment of its own that borrows this one's dependencies, not the project."""

    def __init__(self, path: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
        self.bin = path / "bin"
        site = next((path / "lib").glob("python*/site-packages"))
        # A path line in a .pth is not searched for further .pth files, so this environment's
        # editable install of the project does not come along.
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip_install(self, *words: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"]
        subprocess.run([*command, *options, *words], check=True, env=clean_env())

    def run(self, *words: str, cwd: Path) -> str:
        done = subprocess.run(
            [self.bin / words[0], *words[1:]],
            cwd=cwd,
            env=clean_env(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def clean_env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


def sweep_and_aggregate(environment: Environment, cwd: Path, outputs: Path, origin: Path) -> None:
    sweep = ["-m", "orchestrator", "-m", "training.epochs=1", "seed=0,1"]
    output = environment.run("python", *sweep, f"hydra.sweep.dir={outputs}", cwd=cwd)
    assert "Completed 2 out of 2 runs (100.00%)" in output
    environment.run("python", "-m", "orchestrator.cli.aggregate", str(outputs), cwd=cwd)
    assert (outputs / "results.csv").read_text().count("COMPLETED") == 2
    where = environment.run("python", "-c", "import orchestrator as o; print(o.__file__)", cwd=cwd)
    assert Path(where.strip()).is_relative_to(origin)


def test_a_checkout_works_from_its_own_directory(environment, tmp_path):
    sweep_and_aggregate(environment, ROOT, tmp_path / "outputs", ROOT)


def test_an_editable_install_works_anywhere(environment, tmp_path):
    environment.pip_install("--editable", str(ROOT))
    sweep_and_aggregate(environment, tmp_path, tmp_path / "outputs", ROOT)
    environment.run("orchestrator-aggregate", "--help", cwd=tmp_path)
    environment.run("orchestrator-status", "--help", cwd=tmp_path)
    environment.run("orchestrator-export", "--help", cwd=tmp_path)


def test_a_wheel_works_anywhere(environment, tmp_path):
    environment.pip_install(str(ROOT))
    sweep_and_aggregate(environment, tmp_path, tmp_path / "outputs", tmp_path / "venv")
    environment.run("orchestrator", "--cfg", "job", cwd=tmp_path)


def test_the_plugins_are_found_beside_other_peoples(environment, tmp_path):
    environment.pip_install(str(ROOT))
    app = tmp_path / "app.py"
    app.write_text(
        "import hydra\n"
        "@hydra.main(version_base=None, config_path=None)\n"
        "def main(cfg): return cfg.lr\n"
        "main()\n"
    )
    words = ["hydra/launcher=gpu_queue", "hydra/callbacks=results", "hydra/output=named"]
    output = environment.run("python", str(app), "-m", *words, "+lr=0.1,0.2", cwd=tmp_path)
    assert "Completed 2 out of 2 runs" in output
    assert (tmp_path / "outputs" / "lr_0.1" / "run.json").exists()
    # The official launchers are still there: one __init__.py too many would hide them.
    info = environment.run("python", str(app), "--info", "plugins", cwd=tmp_path)
    for name in ("GpuQueueLauncher", "GridSweeper", "JoblibLauncher", "SlurmLauncher"):
        assert name in info
