import copy
import functools
import os
import pickle
from dataclasses import dataclass, field

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, ListConfig, OmegaConf

from orchestrator.sweep import compose as compose_module
from orchestrator.sweep.compose import Composer

MASTERS = [
    (),
    ("+hydra.job.env_set.X=1", "hydra.job.chdir=true"),
    ("hydra.job.env_copy=[SWEEP_TEST_HOME]", "hydra/job_logging=none", "seed=1,2"),
    ("hydra.job.config.override_dirname.kv_sep=':'", "hydra.sweep.dir='${name}'"),
    ("hydra.job.config.override_dirname.exclude_keys=[seed]", "+hydra.job.env_set.Y='${seed}'"),
    ("hydra.job.name=mine", "hydra.run.dir=${now:%f}", "+experiment=big"),
]

GROUPS = [
    "model=mlp",
    "model=cnn",
    "data@dataset=mnist",
    "data@dataset=digits",
    "optim/sched=none",
    "extra=ema",
    "+extra=ema",
    "+data@other=mnist",
    "+model@teacher=cnn",
    "~data@dataset",
    "~extra",
    "~model=mlp",
    "~optim/sched=cos",
    "typed=checked",
    "typed=[plain,checked]",
    "+experiment=big",
    "+experiment=own",
    "model=typo",
    "nogroup/x=y",
    "++model=cnn",
]
VALUES = [
    "seed=3",
    "seed=notanint",
    "name='with, comma = and space'",
    'name="ünï \\"q\\""',
    "name=${hydra:job.num}",
    "name=${now:%f}",
    "lr=1e-5",
    "lr=null",
    "small=3e-7",
    "small=abc",
    "lr=${base_lr}",
    "+fresh=1",
    "+fresh.deep.er=[1,{a:2},'x y']",
    "++seed=5",
    "++table.z={q:1}",
    "+seed=6",
    "+lr=2",
    "~seed",
    "~seed=0",
    "~lr",
    "~lr=0.1",
    "~missing",
    "~words",
    "~table.x",
    "~nothing",
    "~nothing=null",
    "words=[]",
    "words=[1,2,3]",
    "words.2.d=4",
    "words.7=4",
    "words.a=4",
    "table={x:2}",
    "+table={w:[1]}",
    "table=5",
    "model={width:16}",
    "+model={bonus:${seed}}",
    "model.width=4",
    "model.act.slope=0.2",
    "model.kernel=[5,5]",
    "dataset.path='/a b'",
    "dataset.splits.train=0.5",
    "alias.width=3",
    "+alias.more=3",
    "hydra_alias.chdir=false",
    "+hydra_alias.env_set.Z=3",
    "~hydra_alias",
    "train.mode=SLOW",
    "train.mode=2",
    "train.mode=9",
    "train.tags=[x,y]",
    "train.counts={a:1}",
    "+train.counts.b=2",
    "+train.counts.b=x",
    "train.maybe=3",
    "train.either=word",
    "train.where=there",
    "train={rate:2,steps:3}",
    "+train.unknown=1",
    "fixed.value=2",
    "typed.rate=0.7",
    "typed.a=null",
    "needed=1",
    "needed={a:1}",
    "pair.mark=other",
    "job=3",
    "x@y=1",
    "hydra.job.num=3",
    "hydra.job.chdir=true",
    "hydra/job_logging=none",
    "+hydra={job:{env_set:{A:b}}}",
    "seed=1,2",
    "=bad",
    "name=",
    "name=\\,",
    "true=1",
]
OVERRIDES = st.lists(
    st.sampled_from(VALUES) | st.sampled_from(GROUPS), max_size=5, unique_by=lambda o: o
)
NUMBERS = st.integers().map(str) | st.floats().map(repr)
TYPED_IN = st.builds(
    "{}={}".format,
    st.sampled_from(["seed", "lr", "small", "name", "+new.key", "train.maybe", "table.x"]),
    NUMBERS | st.text("ab ,=[]{}'\"ü\\$:~+", max_size=5).map(repr),
)


@pytest.fixture(scope="module")
def app(configs_once, start):
    """Composers and what Hydra needs to compose the same, one pair for each master."""

    @functools.cache
    def get(index):
        loader, master = start(configs_once, *MASTERS[index])
        _ = master.when  # a resolved value that every point shall share
        return Composer(loader, master), loader, master

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWEEP_TEST_HOME", "/home/ü")
        setup_globals()
        yield get


@pytest.fixture
def strict(monkeypatch):
    """Composition fails here instead of asking Hydra again, so that a test sees derivation."""

    def refuse(self, overrides):
        pytest.fail(f"composed in full: {overrides}")

    monkeypatch.setattr(Composer, "_compose_in_full", refuse)


def shape(node):
    """All that makes a config node what it is, except caches."""
    meta = node._metadata
    return {
        "type": type(node),
        "flags": {k: v for k, v in (meta.flags or {}).items() if v is not None},
        "object_type": meta.object_type,
        "ref_type": meta.ref_type,
        "optional": meta.optional,
        "key": meta.key,
        "element_type": getattr(meta, "element_type", None),
        "key_type": getattr(meta, "key_type", None),
        "content": content(node),
    }


def content(node):
    held = node.__dict__.get("_content", node.__dict__.get("_val"))
    if isinstance(node, DictConfig) and isinstance(held, dict):
        assert all(child._get_parent() is node for child in held.values())
        return {key: shape(child) for key, child in held.items()}
    if isinstance(node, ListConfig) and isinstance(held, list):
        assert all(child._get_parent() is node for child in held)
        return [shape(child) for child in held]
    return shape(held) if hasattr(held, "_metadata") else (type(held), repr(held))


def outcome(call, *args):
    """What a composition gave: its YAML, shape and cache, or its error."""
    try:
        config = call(*args)
    except Exception as error:
        return type(error), str(error), type(error.__cause__), str(error.__cause__)
    cache = dict(OmegaConf.get_cache(config))
    return OmegaConf.to_yaml(config), shape(config), cache, config._get_parent()


def without_hydra(config):
    OmegaConf.clear_cache(config)
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    OmegaConf.set_readonly(config, None)
    OmegaConf.set_struct(config, True)
    return config


def assert_same(app, index, overrides):
    composer, loader, master = app(index)
    expected = outcome(loader.load_sweep_config, master, list(overrides))
    composer.prepare(overrides)
    assert outcome(composer.compose, overrides) == expected
    task = outcome(composer.task_config, overrides)
    assert outcome(composer.compose_in_place, overrides) == expected
    if isinstance(expected[0], str):
        expected = outcome(lambda: without_hydra(loader.load_sweep_config(master, [*overrides])))
    assert task == expected


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(index=st.sampled_from(range(len(MASTERS))), overrides=OVERRIDES, typed=TYPED_IN)
def test_a_derived_point_is_what_hydra_composes_or_raises(app, index, overrides, typed):
    assert_same(app, index, [*overrides, typed])


@pytest.mark.parametrize("override", [*GROUPS, *VALUES])
def test_each_trap_alone_is_what_hydra_composes_or_raises(app, override):
    assert_same(app, 2, [override])


@pytest.mark.parametrize("index", range(len(MASTERS)))
def test_a_plain_grid_is_the_same_under_every_master(app, index):
    assert_same(app, index, ["model=cnn", "seed=4", "extra=ema", "lr=0.3", "~words"])
    assert_same(app, index, [])


DERIVED = [
    ["model=cnn", "seed=3", "lr=1e-5", "name='a, b'"],
    ["data@dataset=mnist", "+fresh.deep=[1,2]", "++table.z=1", "~words"],
    ["+model@teacher=cnn", "teacher.width=3", "typed=checked", "typed.rate=0.5"],
    ["train.mode=SLOW", "train.either=x", "words=[1]", "extra=ema"],
    ["+experiment=big", "seed=9", "name=${hydra:job.num}"],
    ["~optim/sched", "~table=null"],
]


@pytest.mark.parametrize("overrides", DERIVED)
def test_plain_values_and_group_choices_are_derived(app, strict, overrides):
    composer = app(2)[0]
    for call in (composer.compose, composer.compose_in_place, composer.task_config):
        call(overrides)


def test_points_of_one_choice_of_groups_share_one_composition(app, start, configs, monkeypatch):
    composer = Composer(*start(configs))
    made = []
    original = compose_module.bases.compose_base
    monkeypatch.setattr(
        compose_module.bases, "compose_base", lambda *a: made.append(a[-1]) or original(*a)
    )
    for seed in range(5):
        for model in ("mlp", "cnn"):
            composer.compose([f"seed={seed}", f"model={model}"])
            composer.task_config([f"seed={seed}", f"model={model}"])
    assert made == [["model=mlp"], ["model=cnn"]]


def test_points_do_not_share_state(app, strict):
    composer = app(0)[0]
    first = composer.compose(["seed=1"])
    first.words.append("mine")
    first.hydra.job.id = "3"
    second = composer.compose(["seed=1"])
    assert "mine" not in second.words
    assert OmegaConf.is_missing(second.hydra.job, "id")


def test_resolved_values_of_the_sweep_are_those_of_every_point(app, strict):
    composer, _, master = app(1)
    point = composer.compose(["seed=1"])
    assert point.when == master.when
    other = composer.compose_in_place(["seed=2"])
    assert other.when == master.when


def test_a_point_resolves_hydra_values_as_usual(app):
    config = app(0)[0].compose(["seed=1"])
    config.hydra.job.num = 4
    HydraConfig.instance().set_config(config)
    assert config.job == 4
    assert config.name == "ünïcode mlp"
    assert config.home == "/home/ü"


def test_environment_copied_to_the_job_is_read_at_each_composition(app, monkeypatch):
    composer = app(2)[0]
    composer.compose(["seed=1"])
    monkeypatch.setenv("SWEEP_TEST_HOME", "moved")
    assert composer.compose(["seed=1"]).hydra.job.env_set.SWEEP_TEST_HOME == "moved"
    monkeypatch.delenv("SWEEP_TEST_HOME")
    with pytest.raises(KeyError, match="SWEEP_TEST_HOME"):
        composer.compose(["seed=1"])
    composer.task_config(["seed=1"])


def test_the_working_directory_is_read_at_each_composition(app, monkeypatch, tmp_path, strict):
    composer = app(0)[0]
    composer.compose(["seed=1"])
    monkeypatch.chdir(tmp_path)
    assert composer.compose(["seed=1"]).hydra.runtime.cwd == os.fspath(tmp_path)


def test_a_defaults_list_that_asks_the_environment_is_left_to_hydra(start, configs, monkeypatch):
    monkeypatch.setenv("SWEEP_TEST_MODEL", "mlp")
    loader, master = start(configs, config_name="env")
    composer = Composer(loader, master)
    assert composer.compose(["x=2"]).model.name == "mlp"
    monkeypatch.setenv("SWEEP_TEST_MODEL", "cnn")
    expected = outcome(loader.load_sweep_config, master, ["x=2"])
    assert outcome(composer.compose, ["x=2"]) == expected
    assert composer.task_config(["x=2"]).model.name == "cnn"


def test_search_paths_and_settings_of_hydra_that_depend_on_the_task(
    start, configs, tmp_path, monkeypatch
):
    more = tmp_path / "more"
    (more / "model").mkdir(parents=True)
    (more / "model/extra.yaml").write_text("name: from elsewhere")
    monkeypatch.setenv("SWEEP_TEST_MORE", os.fspath(more))
    monkeypatch.setenv("SWEEP_TEST_HOME", "h")
    monkeypatch.setenv("SWEEP_TEST_OTHER", "o")
    loader, master = start(configs, "exp=a,b", config_name="paths")
    composer = Composer(loader, master)
    for overrides in (
        ["model=extra", "exp=a"],
        ["which=SWEEP_TEST_OTHER", "exp=b"],
        ["model=mlp"],
        ["which=UNSET_VARIABLE", "exp=b"],
    ):
        expected = outcome(loader.load_sweep_config, master, overrides)
        assert outcome(composer.compose, overrides) == expected
        assert outcome(composer.compose_in_place, overrides) == expected
    (more / "model/extra.yaml").unlink()
    assert composer.compose(["model=extra", "exp=a"]).model.name == "from elsewhere"


def test_the_name_of_the_primary_config_is_kept(start, configs):
    loader, master = start(configs, "hydra.job.config_name=other", config_name="env")
    assert Composer(loader, master).compose([]).hydra.job.config_name == "env"


def test_configs_edited_after_construction_change_nothing(start, configs):
    loader, master = start(configs)
    composer = Composer(loader, master)
    before = outcome(composer.compose, ["model=mlp"])
    for file in configs.rglob("*.yaml"):
        file.write_text("broken: [")
    (configs / "model/late.yaml").write_text("name: late")
    again = Composer(composer.loader, master)
    for source in (composer, again):
        assert outcome(source.compose, ["model=mlp"]) == before
        point = source.compose(["model=cnn", "data@dataset=mnist"])
        assert point.pair.mark == "cm"
        assert source.compose(["model=cnn", "hydra.job.num=3"]).model.name == "cnn"
        with pytest.raises(Exception, match="Could not find 'model/late'"):
            source.compose(["model=late"])


def test_configs_deleted_after_construction_change_nothing(start, configs):
    loader, master = start(configs)
    composer = Composer(loader, master)
    for file in configs.rglob("*.yaml"):
        file.unlink()
    for folder in ("model", "pair", "extra"):
        (configs / folder).rmdir()
    assert composer.compose(["model=cnn", "extra=ema"]).pair.mark == "cd"
    assert composer.compose(["model=cnn", "hydra.job.num=1"]).pair.mark == "cd"
    with pytest.raises(Exception, match="config"):  # the loader given is not touched
        loader.load_sweep_config(master, [])


def test_configs_of_an_installed_package_are_frozen_too(start, tmp_path, monkeypatch):
    package = tmp_path / "sweep_test_package"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "config.yaml").write_text("defaults: [model: a]")
    (package / "model/a.yaml").write_text("x: 1")
    (package / "model/b.yaml").write_text("# @package other\nx: 2")
    monkeypatch.syspath_prepend(tmp_path)
    loader, master = start("pkg://sweep_test_package")
    composer = Composer(loader, master)
    expected = outcome(loader.load_sweep_config, master, ["model=b"])
    for file in package.rglob("*.yaml"):
        file.unlink()
    assert outcome(composer.compose, ["model=b"]) == expected


def test_classes_that_cannot_be_pickled_are_copied_otherwise(start, tmp_path, strict, monkeypatch):
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", dict(store.repo))  # other tests need not meet the class

    @dataclass
    class Local:
        a: int = 1
        items: list[int] = field(default_factory=lambda: [1])

    store.store(name="sweep_test_local", node=Local)
    (tmp_path / "config.yaml").write_text("defaults: [sweep_test_local, _self_]\na: 2")
    loader, master = start(tmp_path)
    with pytest.raises(Exception, match="local"):
        pickle.dumps(master)
    composer = Composer(loader, master)
    for a in (3, 4):
        expected = outcome(loader.load_sweep_config, master, [f"a={a}"])
        assert outcome(composer.compose, [f"a={a}"]) == expected
        assert outcome(composer.compose_in_place, [f"a={a}"]) == expected
        assert composer.task_config([f"a={a}"]) == {"a": a, "items": [1]}


def test_a_loader_of_another_kind_composes_itself(start, configs):
    loader, master = start(configs)

    class Wrapped:
        def load_sweep_config(self, master, overrides):
            return loader.load_sweep_config(master, overrides)

    composer = Composer(Wrapped(), master)
    assert isinstance(composer.loader, Wrapped)
    assert composer.compose(["seed=3"]).seed == 3
    assert composer.compose_in_place(["seed=3"]).seed == 3
    assert "hydra" not in composer.task_config(["seed=3"])
    composer.prepare(["seed=3"])


def test_the_master_config_is_not_changed(start, configs):
    loader, master = start(configs)
    before = shape(copy.deepcopy(master))
    composer = Composer(loader, master)
    composer.compose(["model=cnn", "seed=2"])
    composer.task_config(["model=cnn", "seed=2"])
    assert shape(master) == before


def test_only_so_many_bases_are_kept(start, configs, monkeypatch):
    monkeypatch.setattr(compose_module, "_MAX_BASES", 2)
    monkeypatch.setattr(compose_module, "_MAX_OVERRIDES", 2)
    composer = Composer(*start(configs))
    for groups in (["model=cnn"], ["extra=ema"], [], ["model=cnn", "seed=1", "lr=3"]):
        composer.compose(groups)
    assert set(composer._bases) == {(), ("model=cnn",)}
