"""A Hydra app on disk that holds every trap for derived composition."""

import enum
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Union  # noqa: UP035

import pytest
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

CONFIGS = {
    "config.yaml": """
        defaults:
          - sweep_test_schema
          - model: mlp
          - data@dataset: digits
          - optim/sched: cos
          - optional extra: null
          - typed: plain
          - pair: ${model}_${data@dataset}
          - _self_
        seed: 0
        name: ünïcode ${model.name}
        base_lr: 0.1
        lr: ${base_lr}
        when: ${now:%Y-%m-%d_%H-%M-%S-%f}
        home: ${oc.env:SWEEP_TEST_HOME,nowhere}
        job: ${hydra:job.num}
        alias: ${model}
        hydra_alias: ${hydra.job}
        words: [a, "b c", {d: 1}]
        table: {x: 1, y: "${seed}"}
        nothing: null
        needed: ???
        small: 1e-5
        """,
    "model/base.yaml": "layers: 2\nname: base\nact: {kind: relu, slope: 0.0}",
    "model/mlp.yaml": "defaults: [base, _self_]\nname: mlp\nwidth: 8",
    "model/cnn.yaml": "defaults: [base, _self_]\nname: cnn\nkernel: [3, 3]\nwidth: ${seed}",
    "data/digits.yaml": "path: ${hydra:runtime.cwd}/digits\nsize: 8",
    "data/mnist.yaml": "path: /mnist\nsize: 28\nsplits: {train: 0.9}",
    "optim/sched/cos.yaml": "# @package optim.schedule\nkind: cos\nsteps: 10",
    "optim/sched/none.yaml": "# @package optim.schedule\nkind: null",
    "extra/ema.yaml": "# @package _global_\nema: {decay: 0.99}",
    "typed/plain.yaml": "a: 1",
    "typed/checked.yaml": "defaults: [sweep_test_typed, _self_]\nrate: 0.5",
    "pair/mlp_digits.yaml": "mark: md",
    "pair/mlp_mnist.yaml": "mark: mm",
    "pair/cnn_digits.yaml": "mark: cd",
    "pair/cnn_mnist.yaml": "mark: cm",
    "experiment/big.yaml": """
        # @package _global_
        defaults: [{override /model: cnn}, {override /hydra/job_logging: none}]
        seed: 7
        hydra: {job: {env_set: {BIG: "1"}}, sweep: {subdir: "${seed}"}}
        """,
    "experiment/own.yaml": """
        # @package _global_
        hydra: {sweeper: {params: {seed: "1,2"}}}
        """,
    "env.yaml": """
        defaults: [{model: "${oc.env:SWEEP_TEST_MODEL,mlp}"}, _self_]
        x: 1
        """,
    "paths.yaml": """
        defaults: [model: mlp, _self_]
        hydra:
          searchpath: ["file://${oc.env:SWEEP_TEST_MORE,/nowhere}"]
          job: {env_copy: ["${which}"], name: "${exp}"}
        which: SWEEP_TEST_HOME
        exp: ???
        """,
}


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


@dataclass
class Typed:
    rate: float = 0.1
    steps: int = 10
    mode: Mode = Mode.FAST
    tags: List[str] = field(default_factory=lambda: ["t"])  # noqa: UP006
    counts: Dict[str, int] = field(default_factory=dict)  # noqa: UP006
    maybe: Optional[int] = None  # noqa: UP045
    either: Union[int, str] = 1  # noqa: UP007
    where: Path = Path("here")


@dataclass(frozen=True)
class Fixed:
    value: int = 1


@dataclass
class Schema:
    # A subset of the primary config, with types; Any leaves the rest open.
    seed: int = 0
    small: float = 0.0
    train: Typed = field(default_factory=Typed)
    fixed: Fixed = field(default_factory=Fixed)
    name: Any = None


def write_configs(root):
    for name, text in CONFIGS.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        path.write_text("\n".join(line[indent:] for line in lines), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def configs_once(tmp_path_factory):
    store = ConfigStore.instance()
    store.store(name="sweep_test_schema", node={**_fields(Schema())})
    store.store(group="typed", name="sweep_test_typed", node=Typed)
    return write_configs(tmp_path_factory.mktemp("app") / "conf")


def _fields(schema):
    return {name: getattr(schema, name) for name in schema.__dataclass_fields__}


@pytest.fixture
def configs(configs_once, tmp_path):
    """A copy of the app's config folder that a test may change."""
    return Path(shutil.copytree(configs_once, tmp_path / "conf"))


def start(configs, *overrides, config_name="config"):
    """Hydra's own loader and master config for a multirun command line."""
    hydra = Hydra.create_main_hydra2("app", create_config_search_path(os.fspath(configs)))
    try:
        master = hydra.compose_config(
            config_name,
            [*overrides, "hydra.mode=MULTIRUN"],
            RunMode.MULTIRUN,
            with_log_configuration=False,
        )
        return hydra.config_loader, master
    finally:
        GlobalHydra.instance().clear()


@pytest.fixture(name="start", scope="session")
def start_fixture():
    return start
