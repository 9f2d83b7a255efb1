"""Handwritten digits: a multilayer perceptron in NumPy that trains in well under a second.

The data are the 1,797 test images of "Optical Recognition of Handwritten Digits" by
E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, licensed CC BY 4.0 (see ``data/LICENSE-digits.txt``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

import orchestrator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from omegaconf import DictConfig

DATA_FILE = Path(__file__).with_name("data") / "digits.npz"
CLASSES = 10
PIXELS = 64
BRIGHTEST = 16

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.intp]
Layer = tuple[Floats, Floats]


def train(cfg: DictConfig) -> dict[str, float]:
    """Train one network and log its learning curve, one step per epoch.

    The seed fixes the initial weights and the order of the images; the split into
    training and test images is the same for every seed, so that seeds are comparable.

    Args:
        cfg: needs ``seed``, ``training.{epochs,batch_size,lr,momentum,weight_decay}``,
            ``model.{hidden_size,hidden_layers}`` and ``task.test_fraction``.

    Returns:
        After the last epoch: ``test_accuracy`` (a fraction, 0 to 1), ``test_loss`` and
        ``train_loss`` (mean cross-entropy per image, in nats).

    Raises:
        ValueError: a setting is outside its range.
        FloatingPointError: the training diverged.
    """
    settings = Settings.from_config(cfg)
    training, test = split(*load_images(), settings.test_fraction)
    rng = np.random.default_rng(settings.seed)
    network = Network([PIXELS, *[settings.hidden_size] * settings.hidden_layers, CLASSES])
    network.initialise(rng)
    optimizer = Momentum(network, settings)

    metrics: dict[str, float] = {}
    for epoch in range(1, settings.epochs + 1):
        metrics = run_epoch(optimizer, training, test, rng)
        check_finite(metrics, epoch, settings)
        orchestrator.log_metrics(epoch, **metrics)
        if is_reported(epoch, settings.epochs):
            print(progress_line(epoch, settings.epochs, metrics), flush=True)

    orchestrator.save_arrays(**network.named_arrays(), confusion_matrix=confusion(network, test))
    return metrics


@dataclass(frozen=True)
class Settings:
    """What one training needs, checked."""

    seed: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    hidden_size: int
    hidden_layers: int
    test_fraction: float

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Settings:
        """Read the composed config; raises ValueError for a value outside its range."""
        return cls(
            seed=whole(cfg, "seed", least=0, example=0),
            epochs=whole(cfg, "training.epochs", least=1, example=20),
            batch_size=whole(cfg, "training.batch_size", least=1, example=32),
            lr=number(cfg, "training.lr", above=0, example=0.1),
            momentum=number(cfg, "training.momentum", least=0, below=1, example=0.9),
            weight_decay=number(cfg, "training.weight_decay", least=0, example=1e-4),
            hidden_size=whole(cfg, "model.hidden_size", least=1, example=64),
            hidden_layers=whole(cfg, "model.hidden_layers", least=0, example=1),
            # At 1 % each of the ten digits still has a test image, at 99 % a training image.
            test_fraction=number(cfg, "task.test_fraction", least=0.01, most=0.99, example=0.25),
        )


def whole(cfg: DictConfig, key: str, *, least: int, example: int) -> int:
    """The integer at a dotted key, or a ValueError that says what to write instead."""
    value = OmegaConf.select(cfg, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{key} is {value!r}; expected a whole number of at least {least}: try {key}={example}."
        )
    return value


def number(
    cfg: DictConfig,
    key: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    example: float,
) -> float:
    """The finite number at a dotted key, or a ValueError that says what to write instead."""
    value = OmegaConf.select(cfg, key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and above < value < below and least <= value <= most:
        return float(value)
    limits = {"above": above, "of at least": least, "below": below, "of at most": most}
    allowed = " and ".join(f"{word} {at:g}" for word, at in limits.items() if math.isfinite(at))
    raise ValueError(f"{key} is {value!r}; expected a number {allowed}: try {key}={example:g}.")


class Samples(NamedTuple):
    """Images as rows of numbers between 0 and 1, shape (n, 64), and their digits, shape (n,)."""

    pixels: Floats
    labels: Labels


def load_images() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The shipped images, shape (1797, 8, 8) with values 0 to 16, and their digits, shape (1797,)."""
    with np.load(DATA_FILE, allow_pickle=False) as archive:
        return archive["images"], archive["labels"]


def split(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], test_fraction: float
) -> tuple[Samples, Samples]:
    """Training and test samples, with the same share of each digit in both.

    Of each digit's images, in the order of the file, every (1 / test_fraction)-th is a
    test image: the file goes writer by writer, so every writer is in both parts.

    Args:
        images: shape (n, 8, 8), values 0 to 16.
        labels: shape (n,), digits 0 to 9.
        test_fraction: share of each digit's images to test with, between 0 and 1.
    """
    in_test = np.zeros(len(labels), dtype=bool)
    for digit in range(CLASSES):
        rows = np.flatnonzero(labels == digit)
        quota = np.floor(np.arange(len(rows) + 1) * test_fraction)
        in_test[rows[np.diff(quota) > 0]] = True
    pixels = images.reshape(len(images), PIXELS).astype(np.float32) / BRIGHTEST
    digits = labels.astype(np.intp)
    return Samples(pixels[~in_test], digits[~in_test]), Samples(pixels[in_test], digits[in_test])


class Network:
    """Dense layers with ReLU between them and softmax cross-entropy at the end.

    All parameters lie in one vector, and all gradients in another, so that an update is
    one operation; ``layers`` and ``gradient_layers`` are views into them, one pair of
    weights, shape (inputs, outputs), and biases, shape (outputs,), per layer.
    """

    def __init__(self, sizes: list[int], dtype: type[np.floating[Any]] = np.float32) -> None:
        count = sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))
        self.parameters: Floats = np.zeros(count, dtype=dtype)
        self.gradient: Floats = np.zeros(count, dtype=dtype)
        self.layers = layer_views(self.parameters, sizes)
        self.gradient_layers = layer_views(self.gradient, sizes)

    def initialise(self, rng: np.random.Generator) -> None:
        """Draw the weights from N(0, 2 / inputs): He et al. 2015, arXiv:1502.01852, eq. 10."""
        for weights, biases in self.layers:
            weights[:] = rng.normal(0, math.sqrt(2 / len(weights)), weights.shape)
            biases[:] = 0

    def activations(self, pixels: Floats) -> list[Floats]:
        """Each layer's input and, last, the logits; shapes (n, 64), ..., (n, 10)."""
        values = [pixels]
        for weights, biases in self.layers[:-1]:
            values.append(np.maximum(values[-1] @ weights + biases, 0))
        weights, biases = self.layers[-1]
        values.append(values[-1] @ weights + biases)
        return values

    def backpropagate(self, samples: Samples) -> None:
        """Write the gradient of the mean cross-entropy of some samples to ``gradient``."""
        *inputs, logits = self.activations(samples.pixels)
        delta = np.exp(log_softmax(logits))
        delta[np.arange(len(delta)), samples.labels] -= 1
        delta /= len(delta)
        for depth in reversed(range(len(self.layers))):
            weights, biases = self.gradient_layers[depth]
            np.matmul(inputs[depth].T, delta, out=weights)
            np.sum(delta, axis=0, out=biases)
            if depth:
                delta = (delta @ self.layers[depth][0].T) * (inputs[depth] > 0)

    def predict(self, pixels: Floats) -> Labels:
        """The most likely digit of each image, shape (n,)."""
        digits: Labels = np.argmax(self.activations(pixels)[-1], axis=1)
        return digits

    def evaluate(self, samples: Samples) -> tuple[float, float]:
        """Mean cross-entropy in nats and accuracy as a fraction."""
        logits = self.activations(samples.pixels)[-1]
        likelihood = log_softmax(logits)[np.arange(len(logits)), samples.labels]
        accuracy = np.mean(np.argmax(logits, axis=1) == samples.labels)
        return -float(np.mean(likelihood, dtype=np.float64)), float(accuracy)

    def named_arrays(self) -> dict[str, Floats]:
        """The parameters by name: ``weights_1``, ``biases_1``, ``weights_2`` and so on."""
        named: dict[str, Floats] = {}
        for depth, (weights, biases) in enumerate(self.layers, start=1):
            named |= {f"weights_{depth}": weights, f"biases_{depth}": biases}
        return named


def layer_views(vector: Floats, sizes: list[int]) -> list[Layer]:
    """Cut a vector into each layer's weights and biases, without a copy."""
    views: list[Layer] = []
    start = 0
    for inputs, outputs in pairwise(sizes):
        middle, end = start + inputs * outputs, start + (inputs + 1) * outputs
        views.append((vector[start:middle].reshape(inputs, outputs), vector[middle:end]))
        start = end
    return views


def log_softmax(logits: Floats) -> Floats:
    """Logarithm of the class probabilities, row by row; shape (n, classes)."""
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


class Momentum:
    """Stochastic gradient descent with momentum and weight decay (as in PyTorch's ``SGD``)."""

    def __init__(self, network: Network, settings: Settings) -> None:
        self.network = network
        self.settings = settings
        self.velocity = np.zeros_like(network.parameters)

    def step(self, batch: Samples) -> None:
        """Take one step on one minibatch."""
        parameters, gradient = self.network.parameters, self.network.gradient
        self.network.backpropagate(batch)
        gradient += self.settings.weight_decay * parameters
        self.velocity *= self.settings.momentum
        self.velocity += gradient
        parameters -= self.settings.lr * self.velocity


def run_epoch(
    optimizer: Momentum, training: Samples, test: Samples, rng: np.random.Generator
) -> dict[str, float]:
    """Pass once over the training images, then measure on all training and test images."""
    # A diverging run overflows on its way to nan: its loss says so, once, afterwards.
    with np.errstate(over="ignore", invalid="ignore"):
        for batch in batches(training, optimizer.settings.batch_size, rng):
            optimizer.step(batch)
        train_loss, _ = optimizer.network.evaluate(training)
        test_loss, test_accuracy = optimizer.network.evaluate(test)
    return {"train_loss": train_loss, "test_loss": test_loss, "test_accuracy": test_accuracy}


def batches(samples: Samples, size: int, rng: np.random.Generator) -> Iterator[Samples]:
    """The samples in random order, ``size`` at a time; the last batch may be smaller."""
    order = rng.permutation(len(samples.labels))
    pixels, labels = samples.pixels[order], samples.labels[order]
    for start in range(0, len(order), size):
        yield Samples(pixels[start : start + size], labels[start : start + size])


def check_finite(metrics: dict[str, float], epoch: int, settings: Settings) -> None:
    """Stop a diverged training: raises FloatingPointError with what to change."""
    for loss in (metrics["train_loss"], metrics["test_loss"]):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} at epoch {epoch}: lr={settings.lr:g} is too large; "
                f"try training.lr={settings.lr / 10:g}."
            )


def is_reported(epoch: int, epochs: int) -> bool:
    """Whether an epoch's line is printed: about ten of them, the last always."""
    return epoch == epochs or epoch % max(1, epochs // 10) == 0


def progress_line(epoch: int, epochs: int, metrics: dict[str, float]) -> str:
    """One line for the log."""
    values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    return f"epoch {epoch}/{epochs}: {values}"


def confusion(network: Network, samples: Samples) -> NDArray[np.int64]:
    """Counts of images by true digit (rows) and predicted digit (columns), shape (10, 10)."""
    cells = samples.labels * CLASSES + network.predict(samples.pixels)
    counts = np.bincount(cells, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    return counts.astype(np.int64)
