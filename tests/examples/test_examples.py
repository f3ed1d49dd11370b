"""The examples at a smoke size: real runs, a real killed process, files of the real formats."""

import gzip
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import train
from examples.training import checkpoints, datasets, models

TRAIN = pathlib.Path(__file__).parents[2] / "examples" / "train.py"
SMOKE = ["--epochs", "4", "--seeds", "1", "--switch-at", "2", "--batch-size", "256"]


def write_fashion_mnist(folder, num_train=256, num_test=64):
    rng = np.random.default_rng(0)
    for part, size in (("train", num_train), ("t10k", num_test)):
        labels = rng.integers(0, 10, size).astype(np.uint8)
        images = (rng.integers(0, 50, (size, 28, 28)) + 20 * labels[:, None, None]).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte.gz", images), (f"{part}-labels-idx1-ubyte.gz", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / name).write_bytes(gzip.compress(header + array.tobytes()))


def write_cifar10(folder, batch_size=16):
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name in [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]:
            records = rng.integers(0, 256, (batch_size, datasets.CIFAR10_RECORD)).astype(np.uint8)
            records[:, 0] %= 10
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = records.size
            archive.addfile(member, io.BytesIO(records.tobytes()))


def numbers(results):
    """What a run must reproduce: everything but times."""
    return results["labels"]


@pytest.mark.heavy
def test_all_methods_learn_and_write_their_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--method", "all", *SMOKE, "--rho", "0.05", "--learning-rate", "0.1"])
    results = json.loads((tmp_path / "runs/digits-mlp/results.json").read_text())
    assert list(results["labels"]) == ["clean", "look_alike"]
    methods = results["labels"]["clean"]
    assert list(methods) == list(results["labels"]["look_alike"]) == list(train.METHODS)
    cheaper = {"sgd": 1.0, "sgd_tuned": 1.0, "late_sam": 1.5} | dict.fromkeys(
        ("momentum_sam", "lagged_sam", "random_sam"), 1.0
    )
    found = {name: r["gradients_per_step"] for name, r in methods.items()}
    sometimes = {name: found.pop(name) for name in ("sam_every", "look_sam", "ae_sam")}  # one step an epoch is counted
    assert found == dict.fromkeys(found, 2.0) | cheaper
    assert all(1 <= number <= 2 for number in sometimes.values())
    assert all(run["test_accuracy"] > 0.8 for r in methods.values() for run in r["seeds"])
    assert (tmp_path / "runs/digits-mlp/comparison.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert all(len(line) <= 80 for line in printed.out.splitlines()[: 2 * len(train.METHODS) + 5])
    for method in train.METHODS:
        assert f"look_alike, {method}: " in printed.err  # progress where nobody watches
        assert printed.out.count(f"\n{method} ") == 2


@pytest.mark.heavy
def test_wrong_labels_are_wrong_in_training_and_validation_alone():
    settings = train.parse(["--validate"])
    right = datasets.load("digits", pathlib.Path())
    experiments = {kind: train.Experiment(settings, kind) for kind in train.LABELS}
    clean, wrong = (experiments[kind].labels(seed=3) for kind in ("clean", "look_alike"))
    for before, after, size in zip(clean, wrong, (1077, 270), strict=True):
        assert len(before) == len(after) == size
        assert 0.2 < np.mean(before != after) < 0.4
        pairs = set(zip(before[before != after].tolist(), after[before != after].tolist(), strict=True))
        assert len(pairs) == 10  # each class is taken for one other
    held_out = {image.tobytes() for image in experiments["clean"].data.test_images}
    assert held_out <= {image.tobytes() for image in right.train_images}
    assert not held_out & {image.tobytes() for image in experiments["clean"].data.train_images}
    tested = train.Experiment(train.parse([]), "look_alike")
    np.testing.assert_array_equal(tested.labels(seed=3)[1], right.test_labels)
    assert np.any(tested.labels(seed=3)[0] != tested.labels(seed=4)[0])


@pytest.mark.heavy
def test_killed_run_resumes_to_the_same_numbers(tmp_path):
    command = [sys.executable, str(TRAIN), "--method", "late_sam", "--labels", "clean", *SMOKE]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    folders = [tmp_path / "unbroken", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    subprocess.run(command, cwd=folders[0], env=environment, check=True, stdout=subprocess.DEVNULL)

    command += ["--checkpoint-dir", "checkpoints"]
    process = subprocess.Popen(command, cwd=folders[1], env=environment, stderr=subprocess.DEVNULL)
    saved = folders[1] / "checkpoints/clean-late_sam-0"
    deadline = time.monotonic() + 120
    while not any((saved / str(epoch)).exists() for epoch in (1, 2, 3)):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folders[1] / "runs").exists()
    subprocess.run(command, cwd=folders[1], env=environment, check=True, stdout=subprocess.DEVNULL)

    unbroken, resumed = (json.loads((f / "runs/digits-mlp/results.json").read_text()) for f in folders)
    assert numbers(resumed) == numbers(unbroken)


@pytest.mark.heavy
def test_three_ways_over_devices_end_at_the_same_params():
    command = [sys.executable, str(TRAIN.with_name("data_parallel.py"))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = re.findall(r"norm of params ([0-9.]+), test accuracy ([0-9.]+) %", done.stdout)
    norms, accuracies = zip(*(map(float, numbers) for numbers in found), strict=True)
    assert len(norms) == 3
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)
    assert min(accuracies) > 88


def test_checkpoints_of_other_settings_are_refused(tmp_path):
    checkpoints.claim(tmp_path, {"epochs": 4})
    checkpoints.claim(tmp_path, {"epochs": 4})
    with pytest.raises(ValueError, match=r"other settings \(epochs 4 → 5\); choose another folder"):
        checkpoints.claim(tmp_path, {"epochs": 5})


@pytest.mark.heavy
def test_results_of_a_diverged_run_are_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--method", "sgd", "--labels", "clean", *SMOKE, "--learning-rate", "1e30"])
    text = (tmp_path / "runs/digits-mlp/results.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)["labels"]["clean"]["sgd"]
    assert found["seeds"][0]["train_loss"] is None


@pytest.mark.heavy
def test_fashion_mnist_trains_a_cnn(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--dataset",
        "fashion_mnist",
        "--data-dir",
        str(tmp_path),
        "--method",
        "msam",
        "--base",
        "adamw",
        "--labels",
        "clean",
    ]
    train.main([*arguments, "--epochs", "1", "--seeds", "1", "--batch-size", "64", "--micro-batches", "2"])
    results = json.loads((tmp_path / "runs/fashion_mnist-cnn/results.json").read_text())
    assert results["labels"]["clean"]["msam"]["gradients_per_step"] == 2.0


@pytest.mark.heavy
def test_cifar10_trains_a_resnet_with_augmentation(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", "cifar10", "--data-dir", str(tmp_path), "--method", "sgd", "--labels", "look_alike"]
    train.main([*arguments, "--epochs", "1", "--seeds", "1", "--batch-size", "16"])
    results = json.loads((tmp_path / "runs/cifar10-resnet/results.json").read_text())
    assert np.isfinite(results["labels"]["look_alike"]["sgd"]["seeds"][0]["train_loss"])


def test_cifar10_images_are_read_plane_by_plane(tmp_path):
    write_cifar10(tmp_path)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz") as archive:
        file = archive.extractfile("cifar-10-batches-bin/test_batch.bin")
        assert file is not None
        raw = file.read()
    _, _, images, labels = datasets.LOADERS["cifar10"](tmp_path)
    row, column, channel = 3, 5, 2
    assert images[1, row, column, channel] == raw[datasets.CIFAR10_RECORD + 1 + 1024 * channel + 32 * row + column]
    assert labels[1] == raw[datasets.CIFAR10_RECORD]


@pytest.mark.heavy
def test_augmentation_shifts_and_mirrors():
    image = np.arange(1.0, 65.0, dtype=np.float32).reshape(8, 8, 1).repeat(3, axis=-1)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = [padded[i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
    allowed = {crop.tobytes() for crop in crops} | {np.ascontiguousarray(crop[:, ::-1]).tobytes() for crop in crops}
    images = np.asarray(datasets.crop_and_flip(jax.random.key(0), jnp.stack([image] * 64)))
    assert {one.tobytes() for one in images} <= allowed
    assert len({one.tobytes() for one in images}) > 32


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: b"not gzip", lambda data: gzip.compress(b"x")]
)
def test_damaged_idx_file_is_named(tmp_path, name, damage):
    write_fashion_mnist(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(datasets.DatasetError, match=name):
        datasets.load("fashion_mnist", tmp_path)


def test_idx_file_shorter_than_its_header_says_is_named(tmp_path):
    write_fashion_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(datasets.DatasetError, match=r"train-images.*200703 bytes of data for shape \(256, 28, 28\)"):
        datasets.load("fashion_mnist", tmp_path)


def flip_a_bit(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda data: data[:-5000], lambda data: data[:-8], flip_a_bit])
def test_damaged_cifar10_archive_is_named(tmp_path, damage):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(datasets.DatasetError, match=r"cifar-10-binary.tar.gz is damaged"):
        datasets.load("cifar10", tmp_path)


def test_without_network_one_line_says_what_to_put_where(tmp_path, monkeypatch):
    def unreachable(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--dataset", "cifar10", "--data-dir", str(tmp_path)])
    message = str(stopped.value)
    assert "\n" not in message
    assert f"cifar-10-binary.tar.gz is not in {tmp_path}" in message
    assert message.endswith("put it there")


def test_download_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"something else"))
    with pytest.raises(datasets.DatasetError, match="is not the file that was expected"):
        datasets.load("fashion_mnist", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "100", "--micro-batches", "8"], "--batch-size 100 must be divisible by --micro-batches 8"),
        (["--epochs", "0"], "--epochs must be at least 1; got 0"),
        (["--epochs", "4", "--switch-at", "5"], "--switch-at must be an epoch from 0 to 4; got 5"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.heavy
@pytest.mark.parametrize("name", models.MODELS)
def test_models_map_images_to_logits(name):
    images = np.zeros((2, 32, 32, 3), np.float32)
    logits, _ = models.MODELS[name]().init_with_output(jax.random.key(0), images)
    assert logits.shape == (2, 10)
