"""The settings: data with wrong labels or without, a network and an optimizer. Chosen before any test result was seen.

Every seed draws its own training and validation images from a pool, and moves labels of both in the same way; accuracy
is that on clean images that no seed trains or is tuned on.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from benchmarks.papers.understanding import human_labels
from examples.training import datasets, models

SYMMETRIC = 0.4  # of the labels are replaced by any other


class Data(NamedTuple):
    """What the seeds draw from, and what they are tested on.

    Attributes:
        inputs: (N, ...) float32, of training and validation.
        labels: (N,) int32, the true ones.
        wrong_labels: (N,) int32, what people took them for; None: the setting moves labels itself.
        tests: by name, inputs and true labels.
    """

    inputs: np.ndarray
    labels: np.ndarray
    wrong_labels: np.ndarray | None
    tests: dict[str, tuple[np.ndarray, np.ndarray]]


class Sample(NamedTuple):
    """The training and validation set of a seed, labels as the setting makes them."""

    inputs: np.ndarray
    labels: np.ndarray
    validation_inputs: np.ndarray
    validation_labels: np.ndarray


class Setting(NamedTuple):
    """One world in which all methods are compared.

    Attributes:
        title: for tables.
        load: from the data folder to the data.
        noise: from (generator, labels, data) to labels; None: those of the data.
        optimizer: "sgd", with momentum 0.9 and L2, or "adamw".
        num_train: examples of a seed.
        num_validation: examples that a seed is tuned on.
        batch_size: of a step.
        epochs: of a run.
        num_seeds: fresh ones for the test.
        augments: whether every step takes other crops of the images, half of them mirrored.
        network: from inputs to logits.
    """

    title: str
    load: Callable[[pathlib.Path], Data]
    noise: Callable[[np.random.Generator, np.ndarray, Data], np.ndarray] | None = None
    optimizer: str = "sgd"
    num_train: int = 1_024
    num_validation: int = 20_000
    batch_size: int = 64
    epochs: int = 60
    num_seeds: int = 20
    augments: bool = False
    network: nn.Module = models.MLP(width=128)

    def draw(self, data: Data, seed: int) -> Sample:
        """The examples of a seed."""
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(data.labels))[: self.num_train + self.num_validation]
        labels = (data.labels if data.wrong_labels is None else data.wrong_labels)[chosen]
        if self.noise is not None:
            labels = self.noise(rng, labels, data)
        train, validation = np.split(chosen, [self.num_train])
        return Sample(data.inputs[train], labels[: self.num_train], data.inputs[validation], labels[self.num_train :])

    def steps(self, epochs: int = 1) -> int:
        """Of a run, or of one that many times as long."""
        return epochs * self.epochs * (self.num_train // self.batch_size)


def look_alike(rng: np.random.Generator, labels: np.ndarray, data: Data) -> np.ndarray:
    """Some labels moved to the class whose mean image is nearest."""
    return datasets.moved(rng, labels, datasets.nearest_class(data.inputs, data.labels))


def symmetric(rng: np.random.Generator, labels: np.ndarray, data: Data) -> np.ndarray:
    """Some labels replaced by any of the others."""
    del data
    others = (labels + rng.integers(1, 10, len(labels))) % 10
    return np.where(rng.random(len(labels)) < SYMMETRIC, others, labels)


@functools.cache
def fashion_mnist(data_dir: pathlib.Path) -> Data:
    """At 14×14. The last 20,000 training images are a test set, beside the official one."""
    data = datasets.load("fashion_mnist", data_dir)
    return _split(data, pooled=2, test=20_000)


@functools.cache
def cifar_10n(data_dir: pathlib.Path) -> Data:
    """CIFAR-10 at 8×8, with the worst of the labels that people gave.

    The last 10,000 training images are a test set, beside the official one.
    """
    data = datasets.load("cifar10", data_dir)
    return _split(data, pooled=4, test=10_000, wrong_labels=human_labels(data_dir, data.train_labels))


@functools.cache
def large_cifar_10n(data_dir: pathlib.Path) -> Data:
    """The same at 32×32."""
    data = datasets.load("cifar10", data_dir)
    return _split(data, pooled=1, test=10_000, wrong_labels=human_labels(data_dir, data.train_labels))


@functools.cache
def digits(data_dir: pathlib.Path) -> Data:
    """Scikit-learn's, for the smoke run."""
    return _split(datasets.load("digits", data_dir), pooled=2, test=400)


def _split(data: datasets.Dataset, pooled: int, test: int, wrong_labels: np.ndarray | None = None) -> Data:
    train, official = (_pool(images, pooled) for images in (data.train_images, data.test_images))
    return Data(
        train[:-test],
        data.train_labels[:-test],
        None if wrong_labels is None else wrong_labels[:-test],
        {"held out": (train[-test:], data.train_labels[-test:]), "official": (official, data.test_labels)},
    )


def _pool(images: np.ndarray, factor: int) -> np.ndarray:
    """Means over squares of pixels."""
    size = images.shape[1] // factor
    return images.reshape(-1, size, factor, size, factor, images.shape[-1]).mean(axis=(2, 4))


SETTINGS = {
    "look_alike": Setting("Fashion-MNIST, 30 % of the labels moved to a similar class", fashion_mnist, look_alike),
    "clean": Setting("Fashion-MNIST, clean", fashion_mnist, num_seeds=30),
    "symmetric": Setting("Fashion-MNIST, 40 % of the labels moved to any other class", fashion_mnist, symmetric),
    "cifar_10n": Setting("CIFAR-10N, 40 % of the labels wrong as people gave them", cifar_10n),
    "look_alike_adamw": Setting("as the first, AdamW", fashion_mnist, look_alike, optimizer="adamw"),
    "clean_adamw": Setting("as the second, AdamW", fashion_mnist, optimizer="adamw", num_seeds=30),
    "look_alike_16": Setting("as the first, batch size 16", fashion_mnist, look_alike, batch_size=16),
    "look_alike_256": Setting("as the first, batch size 256", fashion_mnist, look_alike, batch_size=256),
    "cifar_10n_resnet": Setting(
        "CIFAR-10N, a residual network with crops and flips",
        large_cifar_10n,
        num_train=10_000,
        batch_size=100,
        augments=True,
        network=models.ResNet(),
    ),
}
FOR_GPU = ("cifar_10n_resnet",)  # too slow to be tuned on two cores: not run

SMOKE = {
    "load": digits,
    "num_train": 128,
    "num_validation": 256,
    "epochs": 2,
    "num_seeds": 3,
    "network": models.MLP(width=16),
}
