"""Cluster presets: what they choose, and that a run is the same run with and without one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins

from orchestrator.__main__ import conf_dir
from orchestrator.identity import identify, results_settings
from orchestrator.overrides import as_typed
from orchestrator.slurm.settings import SlurmSettings

PRESETS = sorted(path.stem for path in (conf_dir() / "cluster").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _slurm_is_there():
    Plugins.instance()  # stores the configs of all plugins
    store = ConfigStore.instance()
    if "slurm.yaml" not in store.list("hydra/launcher"):
        store.store("slurm", SlurmSettings, group="hydra/launcher")
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides, config_dir=None):
    with initialize_config_dir(str(config_dir or conf_dir()), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def lines_of(preset):
    content = yaml.safe_load((conf_dir() / "cluster" / f"{preset}.yaml").read_text())
    return content["hydra"]["launcher"]


@pytest.fixture
def other_app(tmp_path):
    """Somebody else's app, with our presets in its conf/."""
    (tmp_path / "config.yaml").write_text("defaults: [_self_]\nlr: 0.1\n")
    (tmp_path / "cluster").symlink_to(conf_dir() / "cluster")
    return tmp_path


def test_there_is_one_for_every_case_that_the_docs_name():
    assert PRESETS == ["cedar", "example", "experiment_manager", "gpu_small"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_only_keys_that_the_launcher_knows(preset):
    assert set(lines_of(preset)) <= {field.name for field in fields(SlurmSettings)}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_alone_chooses_the_launcher_and_sets_its_keys(preset, other_app):
    config = composed(f"+cluster={preset}", config_dir=other_app)
    assert config.hydra.runtime.choices["hydra/launcher"] == "slurm"
    for key, value in lines_of(preset).items():
        assert config.hydra.launcher[key] == value


@pytest.mark.parametrize("preset", PRESETS)
def test_in_the_shipped_app_a_preset_sets_the_keys_of_the_launcher_that_is_chosen(preset):
    config = composed("hydra/launcher=slurm", f"+cluster={preset}")
    for key, value in lines_of(preset).items():
        assert config.hydra.launcher[key] == value


def test_a_value_on_the_command_line_wins_over_the_presets(other_app):
    config = composed("+cluster=cedar", "hydra.launcher.timeout_min=5", config_dir=other_app)
    assert config.hydra.launcher.timeout_min == 5
    assert config.hydra.launcher.mem_per_cpu == "4G"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_no_part_of_a_runs_name_or_fingerprint(preset):
    def who(*overrides):
        config = composed("hydra/launcher=slurm", "training.lr=0.2", *overrides)
        return identify(config, as_typed(config.hydra), results_settings(config.hydra))

    with_preset = who(f"+cluster={preset}")
    assert "cluster" not in with_preset.hyperparams
    assert with_preset == who()


def test_the_commented_keys_of_the_example_are_valid_too(tmp_path):
    text = (conf_dir() / "cluster" / "example.yaml").read_text()
    # Key lines are commented by "# " at their place; headings and sentences are not keys.
    keys = {field.name for field in fields(SlurmSettings)}
    opened = []
    for line in text.splitlines():
        bare = line.replace("# ", "", 1) if line.startswith("    # ") else line
        word = bare.strip().partition(":")[0]
        opened.append(bare if word in keys or bare.startswith("      - ") else line)
    (tmp_path / "config.yaml").write_text("defaults: [_self_]\n")
    (tmp_path / "cluster").mkdir()
    Path(tmp_path, "cluster", "example.yaml").write_text("\n".join(opened))
    launcher = composed("+cluster=example", config_dir=tmp_path).hydra.launcher
    assert launcher.partition == "gpu"
    assert launcher.queue.max_processes == 8
    assert launcher.additional_parameters["mail-type"] == "END,FAIL"
    assert launcher.setup == ["module load python/3.11", "source $HOME/env/bin/activate"]
    assert launcher.teardown == ["rm -rf $SLURM_TMPDIR/cache"]
