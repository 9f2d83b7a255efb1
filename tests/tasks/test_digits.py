"""The digits task: its data, its network, its training and its error sentences."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

import orchestrator
from orchestrator.tasks import digits

CONF = Path(__file__).parents[2] / "conf"


class Log:
    """What a training handed to the orchestrator."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, dict[str, float]]] = []
        self.arrays: dict[str, np.ndarray] = {}

    def log_metrics(self, step, **values):
        self.curve.append((step, values))

    def save_arrays(self, **arrays):
        self.arrays |= {name: array.copy() for name, array in arrays.items()}


@pytest.fixture
def log(monkeypatch):
    log = Log()
    monkeypatch.setattr(orchestrator, "log_metrics", log.log_metrics, raising=False)
    monkeypatch.setattr(orchestrator, "save_arrays", log.save_arrays, raising=False)
    return log


def config(*overrides: str) -> DictConfig:
    cfg = OmegaConf.create(
        {
            "seed": 0,
            "training": {
                "epochs": 20,
                "batch_size": 32,
                "lr": 0.1,
                "momentum": 0.9,
                "weight_decay": 1e-4,
            },
            "model": {"hidden_size": 64, "hidden_layers": 1},
            "task": OmegaConf.load(CONF / "task" / "digits.yaml"),
        }
    )
    OmegaConf.set_struct(cfg, True)
    cfg.merge_with_dotlist(list(overrides))
    return cfg


def test_the_config_names_the_training_function():
    assert get_method(config().task._target_) is digits.train
    assert config().task.name == "digits"


def test_the_data_are_the_uci_test_set():
    images, labels = digits.load_images()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.max() == 16
    checksum = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert checksum == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_the_data_file_is_small_and_its_licence_lies_beside_it():
    assert digits.DATA_FILE.stat().st_size < 60_000
    licence = digits.DATA_FILE.with_name("LICENSE-digits.txt").read_text(encoding="utf-8")
    assert "CC BY 4.0" in licence
    assert "10.24432/C50P49" in licence


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.99])
def test_the_split_uses_each_image_once_and_keeps_the_share_of_each_digit(fraction):
    images, labels = digits.load_images()
    training, test = digits.split(images, labels, fraction)
    both = np.concatenate([training.pixels, test.pixels])
    original = images.reshape(-1, 64) / np.float32(16)
    assert len(both) == 1797
    assert (np.sort(both @ np.arange(64.0)) == np.sort(original @ np.arange(64.0))).all()
    counts = np.bincount(labels)
    assert np.bincount(test.labels).tolist() == np.floor(counts * fraction).astype(int).tolist()
    assert np.bincount(training.labels, minlength=10).min() >= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_the_defaults_learn_to_read_digits(log, seed):
    metrics = digits.train(config(f"seed={seed}"))
    assert metrics.keys() == {"test_accuracy", "test_loss", "train_loss"}
    assert all(type(value) is float for value in metrics.values())
    assert metrics["test_accuracy"] >= 0.95
    assert metrics["train_loss"] < metrics["test_loss"] < 0.2


def test_the_curve_has_one_step_per_epoch_and_ends_at_the_returned_metrics(log):
    metrics = digits.train(config("training.epochs=7"))
    assert [step for step, _ in log.curve] == [1, 2, 3, 4, 5, 6, 7]
    assert log.curve[-1][1] == metrics
    losses = [values["train_loss"] for _, values in log.curve]
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_bits(log):
    first = digits.train(config("training.epochs=3"))
    first_arrays, log.arrays = log.arrays, {}
    assert digits.train(config("training.epochs=3")) == first
    assert log.curve[:3] == log.curve[3:]
    assert first_arrays.keys() == log.arrays.keys()
    for name, array in first_arrays.items():
        assert array.tobytes() == log.arrays[name].tobytes()


def test_another_seed_gives_another_training(log):
    first = digits.train(config("training.epochs=3"))
    assert digits.train(config("training.epochs=3", "seed=1")) != first


def test_global_random_state_is_neither_read_nor_changed(log):
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    digits.train(config("training.epochs=1"))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_weights_and_confusion_matrix_are_saved(log):
    metrics = digits.train(config("training.epochs=2", "model.hidden_layers=2"))
    shapes = {name: array.shape for name, array in log.arrays.items()}
    assert shapes == {
        "weights_1": (64, 64),
        "biases_1": (64,),
        "weights_2": (64, 64),
        "biases_2": (64,),
        "weights_3": (64, 10),
        "biases_3": (10,),
        "confusion_matrix": (10, 10),
    }
    confusion = log.arrays["confusion_matrix"]
    assert confusion.trace() / confusion.sum() == pytest.approx(metrics["test_accuracy"])
    _, test = digits.split(*digits.load_images(), 0.25)
    assert confusion.sum(axis=1).tolist() == np.bincount(test.labels).tolist()


def test_without_a_hidden_layer_it_is_softmax_regression(log):
    metrics = digits.train(config("training.epochs=5", "model.hidden_layers=0"))
    assert set(log.arrays) == {"weights_1", "biases_1", "confusion_matrix"}
    assert metrics["test_accuracy"] > 0.9


def test_a_batch_may_be_larger_than_the_training_set(log):
    digits.train(config("training.epochs=2", "training.batch_size=5000"))
    assert len(log.curve) == 2


def test_an_epoch_visits_every_image_once():
    samples = digits.Samples(np.arange(10.0).reshape(10, 1), np.arange(10))
    seen = list(digits.batches(samples, 4, np.random.default_rng(0)))
    assert [len(batch.labels) for batch in seen] == [4, 4, 2]
    assert sorted(np.concatenate([batch.labels for batch in seen])) == list(range(10))
    assert all((batch.pixels[:, 0] == batch.labels).all() for batch in seen)


@pytest.mark.parametrize("sizes", [[3, 4], [3, 5, 4], [3, 5, 6, 4]])
def test_the_gradient_equals_numerical_differences(sizes):
    rng = np.random.default_rng(0)
    network = digits.Network(sizes, dtype=np.float64)
    network.initialise(rng)
    samples = digits.Samples(rng.normal(size=(7, 3)), rng.integers(4, size=7))
    network.backpropagate(samples)
    numerical = [difference(network, samples, index) for index in range(len(network.parameters))]
    np.testing.assert_allclose(network.gradient, numerical, rtol=1e-6, atol=1e-8)


def difference(network: digits.Network, samples: digits.Samples, index: int) -> float:
    step = 1e-6
    centre = network.parameters[index]
    losses = []
    for value in (centre + step, centre - step):
        network.parameters[index] = value
        losses.append(network.evaluate(samples)[0])
    network.parameters[index] = centre
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize("lr", ["1e3", "1e30"])
def test_a_diverging_training_stops_with_what_to_change(log, lr):
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at epoch \d+: lr=.*try "):
        digits.train(config(f"training.lr={lr}"))
    assert len(log.curve) < 20
    assert all(np.isfinite(list(values.values())).all() for _, values in log.curve)
    assert not log.arrays


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.epochs=-1", "training.epochs is -1; expected a whole number of at least 1: try"),
        ("training.epochs=2.5", "training.epochs is 2.5; expected a whole number"),
        ("training.epochs=true", "training.epochs is True; expected a whole number"),
        ("training.batch_size=0", "training.batch_size is 0; expected a whole number"),
        ("training.lr=0", "training.lr is 0; expected a number above 0: try training.lr=0.1"),
        ("training.lr=fast", "training.lr is 'fast'; expected a number above 0"),
        ("training.lr=.inf", "training.lr is inf; expected a number above 0"),
        ("training.lr=.nan", "training.lr is nan; expected a number above 0"),
        (
            "training.momentum=1",
            "training.momentum is 1; expected a number of at least 0 and below 1",
        ),
        ("training.weight_decay=-0.1", "training.weight_decay is -0.1; expected a number"),
        ("model.hidden_size=0", "model.hidden_size is 0; expected a whole number of at least 1"),
        ("model.hidden_layers=-1", "model.hidden_layers is -1; expected a whole number"),
        ("seed=null", "seed is None; expected a whole number of at least 0"),
        ("task.test_fraction=1", "task.test_fraction is 1; expected a number of at least 0.01"),
    ],
)
def test_a_bad_value_is_answered_with_a_sentence(log, override, sentence):
    with pytest.raises(ValueError) as raised:
        digits.train(config(override))
    assert str(raised.value).startswith(sentence)
    assert log.curve == []


def test_about_ten_lines_are_printed(log, capsys):
    digits.train(config())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("epoch 20/20: train_loss 0.0")
