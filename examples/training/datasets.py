"""The data sets: scikit-learn's digits, Fashion-MNIST and CIFAR-10, from their authors' own files.

Files are looked for in a folder and downloaded from their authors where absent. What is downloaded is checked by its
checksum, what is read by its headers and lengths. Nothing is unpickled or extracted.
"""

import gzip
import hashlib
import http.client
import io
import pathlib
import tarfile
import urllib.error
import urllib.request
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
import sklearn.model_selection

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz"
CIFAR10_MD5 = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}
CIFAR10_RECORD = 1 + 3 * 32 * 32
WRONG = 0.3  # of the labels, where they are moved


class DatasetError(Exception):
    """A file of a data set is missing and cannot be downloaded, or is damaged."""


class Dataset(NamedTuple):
    """Images (N, height, width, channels) in float32, standardized by the training set; labels (N,) in int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, data_dir: pathlib.Path) -> Dataset:
    """Reads a data set: ``"digits"``, ``"fashion_mnist"`` or ``"cifar10"``.

    Raises:
        DatasetError: a file is absent and cannot be downloaded, or is not what it should be.
    """
    train_images, train_labels, test_images, test_labels = LOADERS[name](data_dir)
    train, test = train_images.astype(np.float32), test_images.astype(np.float32)
    mean, scale = train.mean(axis=(0, 1, 2)), train.std(axis=(0, 1, 2))
    return Dataset(
        (train - mean) / scale, train_labels.astype(np.int32), (test - mean) / scale, test_labels.astype(np.int32)
    )


def nearest_class(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each class, the other one whose mean image is nearest: what it is taken for."""
    means = np.stack([images[labels == label].mean(axis=0).ravel() for label in range(labels.max() + 1)])
    distances = np.linalg.norm(means[:, None] - means[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return distances.argmin(axis=1).astype(np.int32)


def moved(rng: np.random.Generator, labels: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Some of the labels replaced by the class that each looks like."""
    return np.where(rng.random(len(labels)) < WRONG, nearest[labels], labels)


def validation(data: Dataset) -> Dataset:
    """A fifth of the training set in the place of the test set."""
    held_out = np.random.default_rng(0).permutation(len(data.train_labels)) % 5 == 0
    return Dataset(
        data.train_images[~held_out],
        data.train_labels[~held_out],
        data.train_images[held_out],
        data.train_labels[held_out],
    )


def crop_and_flip(key: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
    """Each image shifted by up to ``padding`` pixels and mirrored half of the time."""

    def one(key, image):
        crop_key, flip_key = jax.random.split(key)
        corner = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        crop = jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), image.shape)
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


def _digits(data_dir: pathlib.Path) -> tuple[np.ndarray, ...]:
    del data_dir
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    images, labels = np.reshape(pixels, (-1, 8, 8, 1)), np.asarray(labels)
    train, test = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels
    )
    return images[train], labels[train], images[test], labels[test]


def _fashion_mnist(data_dir: pathlib.Path) -> tuple[np.ndarray, ...]:
    arrays = []
    for part in ("train", "t10k"):
        names = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
        images, labels = (_read_idx(_locate(data_dir, name, FASHION_MNIST_URL, FASHION_MNIST_MD5)) for name in names)
        if len(images) != len(labels) or images.ndim != 3 or labels.ndim != 1:
            raise DatasetError(f"{data_dir}: {names[0]} {images.shape} and {names[1]} {labels.shape} do not match")
        arrays += [images[..., None], labels]
    return tuple(arrays)


def _cifar10(data_dir: pathlib.Path) -> tuple[np.ndarray, ...]:
    path = _locate(data_dir, "cifar-10-binary.tar.gz", CIFAR10_URL, CIFAR10_MD5)
    names = [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]
    try:
        data = gzip.decompress(path.read_bytes())  # checks the checksum at the end, as reading tar members does not
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            batches = [_read_cifar_batch(path, archive, f"cifar-10-batches-bin/{name}.bin") for name in names]
    except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as error:
        raise DatasetError(f"{path} is damaged ({error}); delete it and start again") from error
    train = np.concatenate(batches[:-1])
    return _cifar_images(train), train[:, 0], _cifar_images(batches[-1]), batches[-1][:, 0]


LOADERS = {"digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10}


def _read_cifar_batch(path: pathlib.Path, archive: tarfile.TarFile, member: str) -> np.ndarray:
    file = archive.extractfile(member)
    data = np.frombuffer(file.read() if file else b"", np.uint8)
    if not data.size or data.size % CIFAR10_RECORD:
        raise DatasetError(f"{path}: {member} has {data.size} bytes, not a multiple of {CIFAR10_RECORD}; it is damaged")
    records = data.reshape(-1, CIFAR10_RECORD)
    if records[:, 0].max() > 9:
        raise DatasetError(f"{path}: {member} has a label above 9; it is damaged")
    return records


def _cifar_images(records: np.ndarray) -> np.ndarray:
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _read_idx(path: pathlib.Path) -> np.ndarray:
    """An array of the idx format: two zero bytes, type 8 (uint8), the rank, the big-endian sizes, the data."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} is damaged ({error}); delete it and start again") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DatasetError(f"{path} is not an idx file of bytes; delete it and start again")
    rank = data[3]
    shape = np.frombuffer(data[4 : 4 + 4 * rank], ">u4")
    size = len(data) - 4 - 4 * rank
    if len(shape) != rank or size != np.prod(shape, dtype=np.int64):
        raise DatasetError(f"{path} is damaged: {size} bytes of data for shape {tuple(shape.tolist())}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _locate(data_dir: pathlib.Path, name: str, url: str, checksums: dict[str, str]) -> pathlib.Path:
    """The path of a file, downloaded and checked by its MD5 checksum if it is not in the folder."""
    path = data_dir / name
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(f"{url}/{name}", timeout=30) as response:
            data = response.read()
    except (http.client.HTTPException, urllib.error.URLError, OSError) as error:
        raise DatasetError(
            f"{name} is not in {data_dir} and {url}/{name} cannot be read ({error}); put it there"
        ) from None
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != checksums[name]:
        raise DatasetError(f"{url}/{name} is not the file that was expected: its MD5 is not {checksums[name]}")
    data_dir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(path)
    return path
