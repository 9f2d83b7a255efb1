"""A job is called as Hydra's own run_job calls it: same files, same callbacks, same config."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

APP = """
import json, os, sys, hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

class Witness(Callback):
    def write(self, event, **facts):
        with open(os.environ["WITNESS"], "a") as file:
            file.write(json.dumps([event, facts], sort_keys=True) + chr(10))
    def on_job_start(self, config, *, task_function, **kwargs):
        self.write("start", keys=sorted(config), out=config.hydra.runtime.output_dir,
                   task=task_function.__name__, readonly=OmegaConf.is_readonly(config.hydra))
    def on_job_end(self, config, job_return, **kwargs):
        hydra_cfg = job_return.hydra_cfg
        self.write("end", cfg=OmegaConf.to_yaml(job_return.cfg), status=job_return.status.name,
                   hydra_keys=list(hydra_cfg), dir=job_return.working_dir,
                   over=job_return.overrides, name=job_return.task_name,
                   value=repr(job_return._return_value),
                   id=hydra_cfg.hydra.job.id, struct=OmegaConf.is_struct(job_return.cfg))

@hydra.main(version_base=VERSION, config_path=".", config_name="config")
def main(cfg):
    print(OmegaConf.to_yaml(cfg))
    print(cfg.where, cfg.job, os.getcwd(), os.environ.get("SET"))
    print(OmegaConf.to_yaml(HydraConfig.get(), resolve=True))
    cfg.lr = 7     # the copy that callbacks see changes, the files do not
    if cfg.fail:
        raise ValueError("as asked")
    return cfg.lr

if __name__ == "__main__":
    main()
"""

CONFIG = """
lr: 0.1
fail: false
text: "multi\\nline: 'quoted' text that is long enough to be folded by an emitter at eighty columns"
where: ${hydra:runtime.output_dir}
job: ${hydra:job.num}
nested: {a: [1, 2, {b: null}], "1": yes}
hydra:
  callbacks: {witness: {_target_: __main__.Witness}}
  job: {env_set: {SET: "by hydra"}}
"""

RUNS = ["lr=0.1,1e-5", "nested.a=[3,x]"]


def run(tmp_path: Path, name: str, version: str, *overrides: str) -> dict[str, str]:
    """Sweep in a directory of its own but of the same name; the files, log output and events."""
    home = tmp_path / name / "app"
    home.mkdir(parents=True)
    (home / "app.py").write_text(APP.replace("VERSION", version))
    (home / "config.yaml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "app.py", "-m", "hydra.sweep.dir=out", *overrides, *RUNS],
        cwd=home,
        env={**os.environ, "WITNESS": str(home / "witness")},
        capture_output=True,
        text=True,
        check=False,
    )
    found = {"code": str(done.returncode), "events": (home / "witness").read_text()}
    for path in sorted(home.glob("out/*/.hydra/*")):
        found[str(path.relative_to(home))] = path.read_text()
    found = {key: text.replace(str(home), "HOME") for key, text in found.items()}
    # Hydra says where a job worked as the config has it, relative; ours is absolute.
    found["events"] = found["events"].replace('"dir": "HOME/out', '"dir": "out')
    return found


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(
    ("version", "extra"),
    [
        ('"1.3"', []),
        ('"1.3"', ["hydra.job.chdir=true"]),
        ('"1.3"', ["hydra.output_subdir=null"]),
        ('"1.3"', ["fail=true"]),
        ('"1.1"', ["hydra.job.chdir=true"]),
    ],
)
def test_files_callbacks_and_configs_are_hydras(tmp_path, method, version, extra):
    # One job at a time, so that events come in the same order.
    queue = [
        "hydra/launcher=gpu_queue",
        "hydra.launcher.max_processes=1",
        f"hydra.launcher.start_method={method}",
        "hydra/sweeper=grid",
    ]
    theirs = run(tmp_path, "theirs", version, *extra)
    ours = run(tmp_path, "ours", version, *extra, *queue)
    if extra != ["hydra.output_subdir=null"]:
        assert len(theirs) == 8
    for path, wanted in theirs.items():
        text, mine = wanted, ours[path]
        if path.endswith("hydra.yaml"):
            text, mine = map(without_choice_of_plugins, (text, mine))
        if path == "events" and extra == ["fail=true"]:
            # Hydra's basic sweep ends with its first failure; ours goes on.
            mine = mine[: len(text)]
        assert mine == text, path
    assert list(ours) == list(theirs)


def without_choice_of_plugins(text: str) -> str:
    """hydra.yaml less the launcher and sweeper that were chosen, which must differ."""
    lines, skipping = [], False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if skipping and indent <= 2 and not line.startswith("  - "):
            skipping = False
        if line in ("  launcher:", "  sweeper:"):
            skipping = True
        words = ("hydra/launcher", "hydra/sweeper", "- hydra.launcher.", "- hydra.sweep.dir")
        if not skipping and not any(word in line for word in words):
            lines.append(line)
    return "\n".join(lines)
