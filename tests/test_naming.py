"""Readable names that every file system takes."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.naming import run_name, safe_file_name, value_text, with_suffix
from orchestrator.settings import NamingSettings

FINGERPRINT = "0123456789abcdef" * 2
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def _name(hyperparams, **settings):
    return run_name(hyperparams, NamingSettings(**settings), FINGERPRINT)


@pytest.mark.parametrize(
    ("hyperparams", "name"),
    [
        ({}, "default"),
        ({"training.lr": 0.1}, "lr_0.1"),
        ({"b": 1, "a": 2}, "b_1_a_2"),
        ({"model": "mlp", "seed": 0}, "model_mlp_seed_0"),
        ({"a.lr": 1, "b.lr": 2}, "a.lr_1_b.lr_2"),
        ({"db/user": "x", "app/user": "y"}, "db.user_x_app.user_y"),
        ({"flag": True, "other": None}, "flag_true_other_null"),
        ({"lr": 5e-6, "x": 1.0}, "lr_5e-06_x_1"),
        ({"x": 0.123456789}, "x_0.123456789"),
        ({"sizes": [1, 2.5, "a"]}, "sizes_1-2.5-a"),
        ({"d": {"a": 1}}, "d_a-1"),
        ({"path": "a/b c\\d"}, "path_a-b-c-d"),
        ({"html": "<b>&"}, "html_-b"),
        ({"~key": None}, "key_null"),
    ],
)
def test_the_default_table(hyperparams, name):
    assert _name(hyperparams) == name


def test_the_table_gives_order_labels_formats_and_words():
    keys = {
        "model.dino": {"true": "", "false": "no_dino"},
        "lr": {"label": "rate", "format": ".1e"},
        "env": "",
        "width": "w",
    }
    values = {"epochs": 3, "env": "maze", "lr": 0.001, "model.dino": False, "width": 8}
    assert _name(values, keys=keys) == "no_dino_rate_1.0e-03_maze_w_8_epochs_3"
    assert _name({**values, "model.dino": True}, keys=keys) == "rate_1.0e-03_maze_w_8_epochs_3"
    assert _name(values, keys=keys, drop=["epochs", "lr"]) == "no_dino_maze_w_8"
    assert _name({"a": 1, "b": 2}, separator="-") == "a-1-b-2"


def test_words_for_booleans_may_be_yaml_booleans():
    keys = {"flag": {True: "on", False: "off"}}
    assert _name({"flag": True}, keys=keys) == "on"
    assert _name({"flag": False}, keys=keys) == "off"


def test_a_name_too_long_is_cut_and_told_apart_by_the_fingerprint():
    first = run_name({"x": "a" * 300}, NamingSettings(), "1" * 32)
    second = run_name({"x": "a" * 300}, NamingSettings(), "2" * 32)
    assert len(first) == 200
    assert first.endswith("-11111111")
    assert first != second
    assert len(_name({"x": "a" * 198})) == 200
    assert _name({"x": "a" * 198}).endswith("a")


@given(
    st.dictionaries(st.text(min_size=1), _VALUES, max_size=6),
    st.integers(30, 200),
)
def test_any_name_is_safe_and_short_enough(hyperparams, limit):
    name = _name(hyperparams, max_bytes=limit)
    assert 0 < len(name.encode()) <= limit
    assert re.fullmatch(r"[A-Za-z0-9._+=,@-]+", name)
    assert not name.startswith(".")
    assert not name.endswith(".")


@given(st.text())
def test_a_safe_name_stays_as_it_is(text):
    name = safe_file_name(text)
    assert safe_file_name(name) == name


@pytest.mark.parametrize("word", ["con", "NUL", "com1", "aux.txt", "LPT9"])
def test_names_that_windows_reserves_are_changed(word):
    assert safe_file_name(word) == f"{word}_"


@pytest.mark.parametrize("text", ["", ".", "..", "-", "///", "日本", " . "])
def test_nothing_left_is_the_default(text):
    assert safe_file_name(text) == "default"


@given(st.floats(allow_nan=False))
def test_a_float_keeps_every_digit(value):
    assert float(value_text(value)) == value


@given(st.integers() | st.booleans() | st.none())
def test_plain_values_read_as_yaml(value):
    expected = {True: "true", False: "false", None: "null"}
    assert value_text(value) == (str(value) if type(value) is int else expected[value])


def test_a_suffix_is_eight_digits():
    assert with_suffix("a", FINGERPRINT) == "a-01234567"


def test_an_accent_is_dropped_from_its_letter():
    assert safe_file_name("café_au") == "cafe_au"


def test_a_cut_name_starts_with_neither_dash_nor_nothing():
    assert not _name({"_" * 300: 1}).startswith("-")


TRAIN_SWEEP = """
{
  "env": "point_maze",
  "frameskip": 5,
  "num_hist": 3,
  "training.epochs": 50,
  "bisim_latent_dim": 512,
  "bisim_hidden_dim": 1024,
  "model.bypass_dinov2": true,
  "training.bisim_lr": 5e-6,
  "var_loss_coef": 1.0,
  "num_pcs": 10,
  "VC_target": 1,
  "PCA1_loss_target": 0.01,
  "PCAloss_epoch": 50
}
"""

TRAIN_SWEEP_NAMES = NamingSettings(
    keys={
        "bisim_latent_dim": "bisim",
        "bisim_hidden_dim": "hidden",
        "model.bypass_dinov2": {"true": "no_dino", "false": ""},
        "training.bisim_lr": "lr",
        "var_loss_coef": "varloss_coef",
        "num_pcs": "numpcs",
        "VC_target": "vctarget",
        "PCA1_loss_target": "pca1target",
        "PCAloss_epoch": "pcaepoch",
        "env": "",
        "frameskip": "fs",
        "num_hist": "hist",
        "training.epochs": "epochs",
    }
)


def test_a_table_gives_the_names_of_train_sweep_letter_for_letter():
    """The first example name in that tool's README, from the example config there."""
    name = run_name(json.loads(TRAIN_SWEEP), TRAIN_SWEEP_NAMES, "0" * 32)
    assert name == (
        "bisim_512_hidden_1024_no_dino_lr_5e-06_varloss_coef_1_numpcs_10_vctarget_1_"
        "pca1target_0.01_pcaepoch_50_point_maze_fs_5_hist_3_epochs_50"
    )


def test_of_a_dotted_value_only_the_last_parts_may_be_shown():
    keys = {"task._target_": {"label": "", "parts": 1}, "lr": {"label": "lr", "parts": 1}}
    values = {"lr": 0.1, "task._target_": "my_project.train.train", "seed": 1}
    assert _name(values, keys=keys) == "train_lr_0.1_seed_1"
    keys["task._target_"] = {"label": "of", "parts": 2}
    assert _name(values, keys=keys) == "of_train.train_lr_0.1_seed_1"
