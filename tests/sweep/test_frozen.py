import copy
import os

import cloudpickle
import pytest
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from orchestrator.sweep import frozen
from orchestrator.sweep.frozen import FrozenTree, freeze


@pytest.fixture
def loaders(start, configs):
    """Hydra's loader and the frozen one over the same folder."""
    loader, _ = start(configs)
    return loader, freeze(loader)


def answers(source, paths):
    """All that a source says about some paths."""
    found = {}
    for path in paths:
        found[path] = source.is_group(path), source.is_config(path)
        if source.is_group(path):
            found[path] += tuple(source.list(path, kind) for kind in [None, *ObjectType][:3])
        if source.is_config(path):
            result = source.load_config(path)
            found[path] += OmegaConf.to_yaml(result.config), result.header, result.path
    return found


def test_a_frozen_source_answers_as_hydras_own(loaders, configs):
    (configs / "model/notes.txt").write_text("no config")
    (configs / "model/notes.txt.yaml").write_text("odd: 1")
    (configs / "model/link.yaml").symlink_to(configs / "data/mnist.yaml")
    (configs / "linked").symlink_to(configs / "model")
    (configs / "model/dangling.yaml").symlink_to("nowhere")
    (configs / "model/loop").symlink_to(configs)
    (configs / ".hidden").mkdir()
    (configs / ".hidden/h.yaml").write_text("# @package a.b\nh: ü")
    (configs / "empty.yaml").write_text("")
    ours = freeze(loaders[0])
    paths = ["", "model", "model/", "model/mlp", "model/mlp.yaml", "model/notes", "model/notes.txt"]
    paths += ["model/link", "model/dangling", "linked/cnn", "linked", "model/loop/model/mlp"]
    paths += [".hidden", ".hidden/h", "empty", "nothing", "nothing/at/all", "model/mlp/x"]
    paths += ["model/../data/mnist", "../conf/config", "..", "./data", os.fspath(configs / "data")]
    for theirs, mine in zip(loaders[0].get_sources(), ours.get_sources(), strict=True):
        assert repr(theirs) == repr(mine)
        assert theirs.full_path() == mine.full_path()
        assert theirs.available() == mine.available()
        if theirs.scheme() == "file":
            assert answers(theirs, paths) == answers(mine, paths)


def test_errors_of_a_config_file_are_hydras_own(configs, loaders):
    (configs / "broken.yaml").write_text("a: [")
    (configs / "bytes.yaml").write_bytes(b"\xff")
    (configs / "scalar.yaml").write_text("3")
    (configs / "header.yaml").write_text("# @package a b c\nx: 1")
    theirs, mine = (loader.get_sources()[1] for loader in (loaders[0], freeze(loaders[0])))
    for name in ("broken", "bytes", "scalar", "header", "missing"):
        errors = []
        for source in (theirs, mine):
            with pytest.raises(Exception) as raised:
                source.load_config(name)
            errors.append((type(raised.value), str(raised.value)))
        assert errors[0] == errors[1]


def test_what_appears_later_is_not_seen(loaders, configs):
    (configs / "model/late.yaml").write_text("x: 1")
    (configs / "late").mkdir()
    source = loaders[1].get_sources()[1]
    assert not source.is_config("model/late")
    assert not source.is_group("late")
    assert "late" not in loaders[1].get_group_options("model")
    assert "late" in loaders[0].get_group_options("model")


def test_a_folder_missing_at_the_start_stays_missing(tmp_path):
    tree = FrozenTree(os.fspath(tmp_path / "conf"))
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/a.yaml").write_text("")
    assert not tree.is_folder("")
    assert not tree.is_file("a.yaml")


def test_outputs_below_a_config_folder_are_not_read(tmp_path):
    for folder in ("outputs/sweep/0/.hydra", "outputs/run/.hydra", ".git/x", "__pycache__", "db"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").write_text("a: 1")
    (tmp_path / "outputs/sweep/multirun.yaml").write_text("a: 1")
    tree = FrozenTree(os.fspath(tmp_path))
    assert set(tree._texts) == {"db/config.yaml", "outputs/sweep/multirun.yaml"}
    assert tree.text("outputs/run/.hydra/config.yaml") == "a: 1"
    assert tree.is_file("outputs/sweep/0/.hydra/config.yaml")


@pytest.mark.parametrize("limit", ["_MAX_ENTRIES", "_MAX_BYTES", "_MAX_DEPTH"])
def test_what_is_beyond_the_limits_is_frozen_when_first_read(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(frozen, limit, 0)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "first.yaml").write_text("x: 1")
    (tmp_path / "a/b/deep.yaml").write_text("x: 1")
    tree = FrozenTree(os.fspath(tmp_path))
    assert "a/b/deep.yaml" not in tree._texts
    assert tree.text("a/b/deep.yaml") == "x: 1"
    (tmp_path / "a/b/deep.yaml").write_text("x: 2")
    assert tree.text("a/b/deep.yaml") == "x: 1"


def test_an_unreadable_folder_holds_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(os, "scandir", refuse)
    tree = FrozenTree(os.fspath(tmp_path))
    assert tree.is_folder("")
    assert tree.names("") == []


def test_freezing_is_done_once_and_leaves_the_loader_alone(loaders):
    theirs, mine = loaders
    assert freeze(mine) is mine
    assert type(theirs.get_sources()[1]).__name__ == "FileConfigSource"
    assert freeze("a loader of another kind") == "a loader of another kind"


def test_a_frozen_loader_travels_to_other_processes(loaders, start, configs):
    master = start(configs)[1]
    expected = OmegaConf.to_yaml(loaders[0].load_sweep_config(master, ["model=cnn"]))
    # As launchers do: a scan of plugins in between leaves two classes of the same name.
    shipped = cloudpickle.dumps(loaders[1])
    for file in configs.rglob("*.yaml"):
        file.unlink()
    for loader in (cloudpickle.loads(shipped), copy.deepcopy(loaders[1])):
        assert OmegaConf.to_yaml(loader.load_sweep_config(master, ["model=cnn"])) == expected
