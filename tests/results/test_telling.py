"""Runs that records alone would pool wrongly, or not pool."""

from __future__ import annotations

import hashlib

import pytest
import yaml

from orchestrator.results.configs import ABSENT, SavedConfig
from orchestrator.results.reading import read_runs
from orchestrator.results.settings_table import pool
from orchestrator.results.telling import told_apart

CONFIG = {"seed": 0, "training": {"lr": 0.1, "momentum": 0.9}, "model": {"width": 8}}


@pytest.fixture
def save(write_run):
    """Write a run and its saved configs."""

    def write(directory, *, sweep="s1", config=None, app="app", ignore=(), choices=None, **fields):
        hyperparams = fields.pop("hyperparams", {})
        config = {**CONFIG, **hyperparams, **(config or {})}
        fields.setdefault("fingerprint", hashlib.sha256(f"{app}{config}".encode()).hexdigest()[:32])
        run = write_run(directory, hyperparams=hyperparams, sweep_id=sweep, **fields)
        hydra = {
            "hydra": {
                "help": {"template": "name:\n  job:\n\n  callbacks: none\n"},
                "callbacks": {"results": {"ignore": list(ignore)}},
                "job": {"name": app, "env_set": {}},
                "runtime": {"choices": choices or {}},
            }
        }
        (run.path / ".hydra").mkdir()
        for name, content in (("config", config), ("hydra", hydra)):
            text = yaml.safe_dump(content, sort_keys=False)
            (run.path / ".hydra" / f"{name}.yaml").write_text(text)
        return run

    return write


@pytest.fixture
def settings(tmp_path):
    """The settings as hyperparameters and directories, and the notes."""

    def read(seed_key="seed"):
        runs, notes = told_apart(read_runs([tmp_path]).runs, seed_key)
        pooled = pool(runs, seed_key)
        return [(s.hyperparams, [r.directory for r in s.runs]) for s in pooled], notes

    return read


def test_an_edited_config_is_another_setting(save, settings):
    for seed in range(3):
        save(f"a{seed}", hyperparams={"seed": seed}, seed=seed)
        edited = {"training": {"lr": 0.1, "momentum": 0.5}}
        save(f"b{seed}", sweep="s2", config=edited, hyperparams={"seed": seed}, seed=seed)
    found, notes = settings()
    assert found == [
        ({"training.momentum": 0.9}, ["a0", "a1", "a2"]),
        ({"training.momentum": 0.5}, ["b0", "b1", "b2"]),
    ]
    assert len(notes) == 1
    assert notes[0].endswith("these columns tell them apart: training.momentum")


def test_an_edited_config_is_another_setting_though_no_seed_is_the_same(save, settings):
    save("a", hyperparams={"seed": 0})
    save("b", sweep="s2", config={"model": {"width": 16}}, hyperparams={"seed": 1})
    assert settings()[0] == [({"model.width": 8}, ["a"]), ({"model.width": 16}, ["b"])]


def test_more_seeds_of_one_config_are_one_setting(save, settings):
    for seed in range(4):
        save(f"a{seed}", sweep=f"s{seed}", hyperparams={"seed": seed}, seed=seed)
    found, notes = settings()
    assert found == [({}, ["a0", "a1", "a2", "a3"])]
    assert notes == []


def test_a_seed_deep_in_the_config_is_pooled_too(save, settings):
    for seed in range(2):
        model = {"model": {"width": 8, "seed": seed}}
        save(f"a{seed}", sweep=f"s{seed}", config=model, seed=seed)
    assert len(settings("model.seed")[0]) == 1


def test_what_is_not_part_of_the_identity_tells_nothing_apart(save, settings):
    for number, resume in enumerate((True, False)):
        save(
            f"a{number}",
            sweep=f"s{number}",
            config={"resume": resume},
            ignore=["resume"],
            seed=number,
        )
    found, notes = settings()
    assert (len(found), notes) == (1, [])


def test_two_apps_in_one_directory_are_two_settings(save, settings):
    for seed in range(2):
        for app in ("train_a", "train_b"):
            save(f"{app}{seed}", sweep=app, app=app, hyperparams={"seed": seed})
    found, notes = settings()
    assert found == [
        ({"app": "train_a"}, ["train_a0", "train_a1"]),
        ({"app": "train_b"}, ["train_b0", "train_b1"]),
    ]
    assert notes == [
        (
            "runs of several apps (train_a, train_b) were given the same; "
            "the column app tells them apart"
        )
    ]


def test_a_config_with_a_key_of_the_columns_name_keeps_it(save, settings):
    save("a", sweep="a", app="train_a", hyperparams={"app": 1})
    save("b", sweep="b", app="train_b", hyperparams={"app": 1})
    assert [h for h, _ in settings()[0]] == [
        {"app": 1, "hydra.app": "train_a"},
        {"app": 1, "hydra.app": "train_b"},
    ]


def test_configs_that_differ_in_very_much_get_one_column(save, settings):
    for name, value in (("a", 1), ("b", 2)):
        table = {f"k{number}": value for number in range(20)}
        save(name, sweep=name, config={"table": table}, hyperparams={"lr": 1})
    found, notes = settings()
    assert [set(h) for h, _ in found] == [{"lr", "config"}] * 2
    assert notes[0].endswith("these columns tell them apart: config")


def test_another_identity_that_no_config_explains_is_never_pooled(write_run, settings):
    write_run("a", hyperparams={"lr": 1, "seed": 0}, fingerprint="1" * 32, sweep_id="s")
    write_run("b", hyperparams={"lr": 1, "seed": 0}, fingerprint="2" * 32, sweep_id="s")
    write_run("c", hyperparams={"lr": 2, "seed": 0}, fingerprint="3" * 32, sweep_id="s")
    found, notes = settings()
    assert [h for h, _ in found] == [
        {"lr": 1, "fingerprint": "1" * 8},
        {"lr": 1, "fingerprint": "2" * 8},
        {"lr": 2},
    ]
    assert "2 runs were given the same" in notes[0]


def test_a_key_of_another_sweep_is_filled_from_the_saved_config(save, settings):
    save("lr", sweep="s1", config={"lr": 0.1}, hyperparams={"epochs": 20, "seed": 0})
    save("both", sweep="s2", hyperparams={"epochs": 20, "lr": 0.1, "seed": 1})
    save("neither", sweep="s3", config={"lr": 0.1, "epochs": 20, "seed": 2}, seed=2)
    save("lacks", sweep="s4", hyperparams={"lr": 0.2})
    found, notes = settings()
    assert found == [
        ({"epochs": 20, "lr": 0.1}, ["both", "lr", "neither"]),
        ({"lr": 0.2}, ["lacks"]),
    ]
    assert notes == []


def test_a_typed_configs_number_is_the_records(save, settings):
    save("a", sweep="s1", hyperparams={"lr": 1, "seed": 0}, config={"lr": 1.0})
    save("b", sweep="s2", config={"lr": 1.0}, seed=1)
    assert settings() == ([({"lr": 1}, ["a", "b"])], [])


def test_a_config_group_is_filled_with_its_choice(save, settings):
    width = {"model": {"width": 8}}
    save("a", sweep="s1", config=width, choices={"model": "mlp"}, seed=0)
    save("b", sweep="s2", config=width, choices={"model": "cnn"}, seed=0)
    save("c", sweep="s3", config=width, choices={"model": "cnn"}, hyperparams={"model": "cnn"})
    assert settings()[0] == [({"model": "mlp"}, ["a"]), ({"model": "cnn"}, ["b", "c"])]


def test_no_config_is_read_where_records_say_all(save, settings, monkeypatch):
    for seed in range(3):
        for lr in (1, 2):
            save(f"{lr}-{seed}", hyperparams={"lr": lr, "seed": seed}, seed=seed)
    monkeypatch.setattr(SavedConfig, "_read", lambda *_: pytest.fail("a config was read"))
    assert len(settings()[0]) == 2


@pytest.mark.parametrize("text", ["", "- a list", "{", "!!python/object:os.system {}", "\x00"])
def test_a_config_that_cannot_be_read_says_nothing(write_run, tmp_path, text):
    run = write_run("a")
    (run.path / ".hydra").mkdir()
    (run.path / ".hydra/config.yaml").write_text(text)
    (found,) = read_runs([tmp_path]).runs
    config = SavedConfig(found)
    assert config.value("a.b") is ABSENT
    assert (config.leaves(), config.app, config.ignored) == ({}, "", ())
