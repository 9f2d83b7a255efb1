"""What makes two runs the same run."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from orchestrator.identity import (
    fingerprint,
    identify,
    memory_shape,
    name_in_config,
    plain_task,
    read_settings,
    results_settings,
)
from orchestrator.settings import ResultsSettings

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_CONFIGS = st.dictionaries(st.text(), _JSON, max_size=5)


class Colour(Enum):
    RED = 1
    BLUE = 2


class Shade(Enum):
    RED = 1


@given(_CONFIGS)
def test_a_fingerprint_is_32_digits_and_does_not_depend_on_the_order(config):
    digest = fingerprint(copy.deepcopy(config))
    assert len(digest) == 32
    assert int(digest, 16) >= 0
    assert fingerprint(dict(reversed(config.items()))) == digest


@given(_CONFIGS, _CONFIGS)
def test_different_configs_have_different_fingerprints(left, right):
    same = repr(sorted(left.items())) == repr(sorted(right.items()))
    if same or left != right:
        assert (fingerprint(copy.deepcopy(left)) == fingerprint(copy.deepcopy(right))) is same


@pytest.mark.parametrize(
    "values",
    [
        [1, 1.0, True, "1", None, "null", [1], {"a": 1}],
        [Colour.RED, Colour.BLUE, Shade.RED],
        [Path("a"), "a", b"a"],
        [{1: "x"}, {"1": "x"}, {True: "x"}],
        ["${now:%S}", "${oc.env:HOME}"],
        [[], {}, "", False, 0],
    ],
)
def test_values_that_differ_in_type_only_are_different_runs(values):
    assert len({fingerprint({"key": value}) for value in values}) == len(values)


def test_the_digest_never_changes_between_versions():
    assert (
        fingerprint({"b": [1, 2.5, None], "a": {"x": True}}) == "59a7afd2b4d1a7fc819b6c5484812220"
    )


def test_ignored_keys_do_not_count_and_the_others_do():
    config = {"cluster": {"a": 1}, "x": {"y": 1, "z": 2}, "w": 3}
    without = fingerprint({"x": {"z": 2}, "w": 3})
    assert fingerprint(copy.deepcopy(config), ["cluster", "x.y"]) == without
    assert fingerprint(copy.deepcopy(config), ["w.deeper", "missing.key"]) == fingerprint(
        copy.deepcopy(config)
    )


def test_interpolations_are_not_resolved_and_hydra_does_not_count():
    config = OmegaConf.create(
        {
            "time": "${now:%H}",
            "home": "${oc.env:DOES_NOT_EXIST}",
            "missing": "???",
            "copy": "${sub}",
            "sub": {"x": "${time}", "l": [1, "${time}"]},
            "hydra": {"job": {"num": 3}},
        }
    )
    assert plain_task(config) == {
        "time": "${now:%H}",
        "home": "${oc.env:DOES_NOT_EXIST}",
        "missing": "???",
        "copy": "${sub}",
        "sub": {"x": "${time}", "l": [1, "${time}"]},
    }


@dataclass
class Inner:
    width: int = 3
    colour: Colour = Colour.RED


@dataclass
class Schema:
    path: Path = Path("data")
    inner: Inner = field(default_factory=Inner)


def test_a_structured_config_has_an_identity_and_is_left_as_it_was():
    config = OmegaConf.structured(Schema)
    before = copy.deepcopy(config)
    who = identify(config, ["inner.width=3"], ResultsSettings(ignore=["inner.width"]))
    assert config == before
    assert len(who.fingerprint) == 32
    assert who.hyperparams == {}


def test_who_a_run_is():
    config = OmegaConf.create({"lr": 0.1, "seed": 4, "cluster": {"x": 1}, "hydra": {"a": 1}})
    settings = ResultsSettings(ignore=["cluster"])
    who = identify(config, ["lr=0.1", "seed=4", "+cluster=cedar", "hydra.x=1"], settings)
    assert who.name == "lr_0.1_seed_4"
    assert who.hyperparams == {"lr": 0.1, "seed": 4}
    assert who.seed == 4
    assert who.fingerprint == fingerprint({"lr": 0.1, "seed": 4})
    assert identify(config, [], settings, "other_app").fingerprint != who.fingerprint


def test_a_leaf_of_a_union_type_counts_by_its_value():
    @dataclass
    class Config:
        x: int | str = 1

    prints = {fingerprint(plain_task(OmegaConf.structured(Config(x)))) for x in (1, 2, "1")}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("config", "key", "seed"),
    [
        ({"seed": 0}, "seed", 0),
        ({"training": {"seed": 3}}, "training.seed", 3),
        ({"training": {"seed": 3}}, "seed", None),
        ({"seed": None}, "seed", None),
        ({"seed": True}, "seed", None),
        ({"seed": "1"}, "seed", None),
        ({"seed": "???"}, "seed", None),
        ({"seed": "${missing}"}, "seed", None),
        ({"seed": "${other}", "other": 5}, "seed", 5),
        ({"seed": 1}, "seed.below", None),
    ],
)
def test_the_seed_is_an_integer_of_the_config_or_none(config, key, seed):
    who = identify(OmegaConf.create(config), [], ResultsSettings(seed_key=key))
    assert who.seed == seed


def test_settings_keep_their_defaults_and_pass_over_what_they_do_not_know():
    settings = read_settings({"seed_key": "s", "unknown": 1, "naming": {"separator": "-"}})
    assert settings.seed_key == "s"
    assert settings.naming.separator == "-"
    assert settings.naming.max_bytes == 200
    assert settings.ignore == ResultsSettings().ignore
    assert read_settings({"naming": None}).naming.separator == "_"
    from_schema, plain = read_settings(OmegaConf.structured(ResultsSettings)), ResultsSettings()
    assert vars(from_schema.naming) == vars(plain.naming)
    assert {**vars(from_schema), "naming": 0} == {**vars(plain), "naming": 0}


def _hydra(**callbacks):
    return OmegaConf.create(
        {"callbacks": callbacks, "runtime": {"choices": {"hydra/output": "named"}}}
    )


def test_resume_is_on_where_directories_are_named_unless_it_is_said():
    assert results_settings(_hydra()).resume is True
    assert results_settings(_hydra(results={"resume": False})).resume is False
    unnamed = OmegaConf.create({"callbacks": {}, "runtime": {"choices": {}}})
    assert results_settings(unnamed).resume is False


def test_the_resolver_owns_a_directory_only_while_a_job_is_set_up(tmp_path):
    config = OmegaConf.create(
        {
            "lr": 1,
            "hydra": {
                **_hydra(),
                "overrides": {"task": ["lr=1"]},
                "job": {"num": "???", "name": "app"},
                "sweep": {"dir": str(tmp_path)},
            },
        }
    )
    assert name_in_config("sweep.dir", _root_=config) == "lr_1"
    assert list(tmp_path.iterdir()) == []
    config.hydra.job.num = 0
    assert name_in_config("sweep.dir", _root_=config) == "lr_1"
    config.other = 2
    assert name_in_config("sweep.dir", _root_=config).startswith("lr_1-")
    assert len(list(tmp_path.iterdir())) == 2


def test_what_decides_on_memory_is_the_config_but_the_seed_or_the_keys_that_are_named():
    def shape(keys=None, app="app", **changed):
        content = {"seed": 0, "lr": 0.1, "model": {"width": 8, "depth": 2}, "cluster": "a"}
        config = OmegaConf.create({**content, **changed, "hydra": {"job": {"num": 1}}})
        return memory_shape(config, ResultsSettings(ignore=["cluster"]), app, keys)

    assert shape(seed=1, cluster="b") == shape()
    wide = {"width": 9, "depth": 2}
    assert len({shape(), shape(lr=0.2), shape(model=wide), shape(app="other")}) == 4
    keys = ["model.width", "missing.key"]
    assert shape(keys, lr=0.2) == shape(keys)
    assert shape(["model"], lr=0.2) == shape(["model"])
    assert len({shape(keys), shape(keys, model=wide), shape(["model"]), shape([])}) == 4
