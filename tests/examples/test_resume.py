"""Runs that are killed and resumed, on other devices too, and checkpoints that are damaged."""

import concurrent.futures
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.training import checkpoints
from tests.helpers.problems import assert_close, assert_identical
from tests.helpers.resumable_run import START, STEPS, gradients_before

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parents[2]


def run(folder, *arguments, status=0):
    """A process that trains in a folder: the step from which it went on, and what it executed if it was not killed."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.helpers.resumable_run", str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == status, done.stderr
    return [int(number) for number in re.findall(r"\d+", done.stdout)]


def numbers(folder, name="end"):
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


def test_killed_run_ends_at_the_bits_of_the_unbroken_run(tmp_path):
    rng = np.random.default_rng(2)
    steps = [int(rng.integers(1, START - 1)), START - 1, START, int(rng.integers(START + 1, STEPS))]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        unbroken, starts = pool.submit(run, tmp_path / "unbroken"), []
        for step in steps:
            kill_at = int(rng.integers(gradients_before(step), gradients_before(step + 1))) + 1
            starts += run(tmp_path / "killed", "--kill-at", kill_at, status=-signal.SIGKILL)
        starts += run(tmp_path / "killed")
        assert unbroken.result() == [0, gradients_before(STEPS)]
    assert (starts[0], starts.pop()) == (0, gradients_before(STEPS))
    # The checkpoint before the step that died may not be complete, the one before that is.
    assert all(step - start in (0, 1) for step, start in zip(steps, starts[1:], strict=True)), (steps, starts)
    assert_identical(numbers(tmp_path / "killed"), numbers(tmp_path / "unbroken"))


def test_run_resumes_on_fewer_devices(tmp_path):
    """With the same bits; what follows agrees to rounding, as sums over examples are split in another way."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        unbroken = pool.submit(run, tmp_path / "unbroken", "--devices", 4)
        run(tmp_path / "stopped", "--devices", 4, "--stop", START)
        folders = {devices: tmp_path / f"{devices} devices" for devices in (2, 1)}
        for folder in folders.values():
            shutil.copytree(tmp_path / "stopped", folder)
        resumed = [pool.submit(run, folder, "--devices", devices) for devices, folder in folders.items()]
        assert unbroken.result()[0] == 0
        assert [process.result()[0] for process in resumed] == [START, START]
    for folder in folders.values():
        assert_identical(numbers(folder, "restored"), numbers(tmp_path / "stopped"))
        assert_close(numbers(folder), numbers(tmp_path / "unbroken"))


def train(folder, epochs=4):
    """The end of a tiny run with a checkpoint after every epoch: arrays in a file of their own, and among metadata."""
    grow = jax.jit(lambda state: jax.tree.map(lambda x: 3 * x + 1, state), donate_argnums=0)
    state = {"large": jax.random.normal(jax.random.key(0), (100, 100)), "step": jnp.int32(0)}
    with checkpoints.Checkpoints(folder) as saved:
        state, history = saved.restore(state, {"loss": []})
        for epoch in range(len(history["loss"]), epochs):
            state = grow(state)
            history["loss"].append(epoch / 3)
            saved.save(epoch + 1, state, history)
    return state, history


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


every_damage = pytest.mark.parametrize("damage", [truncate, pathlib.Path.unlink, flip_a_bit])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unbroken"))


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    train(folder, epochs=3)
    return folder


@pytest.fixture
def stopped(three_epochs, tmp_path):
    """A folder with the checkpoints of epochs 2 and 3, to be damaged."""
    return shutil.copytree(three_epochs, tmp_path / "run")


@every_damage
@pytest.mark.parametrize(
    "pattern",
    [
        "history/metadata",
        "history/digests.json",
        "state/digests.json",
        "state/_METADATA",
        "state/manifest.ocdbt",
        "state/d/*",
        "state/ocdbt.process_0/d/*",
    ],
)
def test_previous_checkpoint_is_used_and_the_damaged_one_kept(pattern, damage, stopped, unbroken, capsys):
    path = max((stopped / "3").glob(pattern), key=lambda path: path.stat().st_size)
    damage(path)
    damaged = contents(stopped / "3")
    assert_identical(train(stopped), unbroken)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert line.startswith(f"{stopped / '3'} is damaged ({path.relative_to(stopped / '3').parts[0]}/")
    assert line.endswith("): it is now 3.damaged-1, going on from epoch 2")
    if (path.name, damage) != ("digests.json", flip_a_bit):  # it blames the file whose digest it is
        reason = ": No such file or directory" if damage is pathlib.Path.unlink else " is not as it was saved"
        assert f"({path.relative_to(stopped / '3')}{reason})" in line
    assert contents(stopped / "3.damaged-1") == damaged
    assert sorted(path.name for path in stopped.iterdir()) == ["3", "3.damaged-1", "4"]


def test_damaged_twice_is_kept_twice(stopped, unbroken):
    for number in (1, 2):
        flip_a_bit(stopped / "3/history/metadata")
        damaged = contents(stopped / "3")
        assert_identical(train(stopped, epochs=3)[1]["loss"], unbroken[1]["loss"][:3])
        assert contents(stopped / f"3.damaged-{number}") == damaged
    assert_identical(train(stopped), unbroken)


@every_damage
def test_all_damaged_is_refused_and_nothing_changed(damage, stopped):
    damage(stopped / "2/history/metadata")
    damage(stopped / "3/state/_METADATA")
    before = contents(stopped)
    message = rf"all checkpoints in {stopped} are damaged \(2: history/metadata.*; 3: state/_METADATA.*\); put back"
    with pytest.raises(ValueError, match=message):
        train(stopped)
    assert contents(stopped) == before


@pytest.mark.parametrize("text", ["[]", "{}", "null", "3"])
def test_a_list_of_digests_that_is_none_is_damage(text, stopped, unbroken, capsys):
    (stopped / "3/state/digests.json").write_text(text)
    assert_identical(train(stopped), unbroken)
    assert "(state/digests.json is not as it was saved): it is now 3.damaged-1" in capsys.readouterr().err


def test_what_cannot_be_read_just_now_is_no_damage(stopped, monkeypatch):
    def refuse(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    before = contents(stopped)
    monkeypatch.setattr(checkpoints, "digest", refuse)
    with pytest.raises(OSError, match=r"Too many open files: .*/3/state/"):
        train(stopped)
    assert contents(stopped) == before


def test_missing_arrays_are_damage(stopped, unbroken, capsys):
    shutil.rmtree(stopped / "3/state")
    assert_identical(train(stopped), unbroken)
    assert "state/digests.json: No such file or directory): it is now 3.damaged-1" in capsys.readouterr().err


@every_damage
def test_files_without_a_digest_do_not_matter(damage, stopped, unbroken, capsys):
    lists = list((stopped / "3").rglob("digests.json"))
    listed = {path.parent / name for path in lists for name in json.loads(path.read_text())}
    others = {path for path in (stopped / "3").rglob("*") if path.is_file()} - listed - set(lists)
    assert {path.name for path in others} == {"_CHECKPOINT_METADATA", "commit_success.txt"}
    for path in others:
        damage(path)
    assert_identical(train(stopped), unbroken)
    assert "damaged" not in capsys.readouterr().err


def test_checkpoints_without_digests_are_accepted(stopped, unbroken, capsys):
    for path in stopped.rglob("digests.json"):
        path.unlink()
    assert_identical(train(stopped), unbroken)
    assert "damaged" not in capsys.readouterr().err


def test_history_is_saved_as_it_was(tmp_path):
    """It is written in the background, while the next epoch adds to it."""
    for number in range(10):
        history = {"loss": [0.5]}
        with checkpoints.Checkpoints(tmp_path / str(number)) as saved:
            saved.save(1, {"w": jnp.ones(2)}, history)
            history["loss"].append(0.25)
        with checkpoints.Checkpoints(tmp_path / str(number)) as saved:
            assert saved.restore({"w": jnp.zeros(2)}, {"loss": []})[1] == {"loss": [0.5]}
