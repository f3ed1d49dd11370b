"""Andriushchenko and Flammarion 2022: the numbers of the authors' notebook, the rule for kinks, the human labels."""

import jax
import numpy as np
import pytest

from benchmarks.papers import understanding
from benchmarks.papers import understanding_toys as toys
from examples.training import datasets

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("name", ["n-SAM", "1-SAM", "figure n-SAM", "figure 1-SAM"])
def test_diagonal_network_ends_where_the_authors_does(name):
    ours, theirs = toys.table(name), toys.PUBLISHED[name]
    assert ours.keys() == theirs.keys()
    for row, loss in theirs.items():
        assert ours[row] == (None if loss is None else pytest.approx(loss, rel=1e-6)), row


def test_switched_runs_end_where_the_authors_do():
    ours = toys.switches()
    for name, loss in toys.PUBLISHED["switch"].items():
        assert ours["test_loss"][name] == pytest.approx(loss, rel=1e-6), name
    first_half = [step <= toys.STEPS for step in ours["steps"]]
    late, plain = (np.array(ours["curves"][name]) for name in ("ERM → 1-SAM", "ERM"))
    np.testing.assert_allclose(late[first_half], plain[first_half], rtol=1e-10)


def network_of(knots, changes):
    """ReLUs that switch at the knots, half of them to the left, with these changes of slope."""
    signs = np.where(np.arange(len(knots)) % 2, -1.0, 1.0)
    return {"weight": 2 * signs, "bias": -2 * signs * np.array(knots), "output": np.array(changes) / 2}


def test_kinks_are_merged_and_compared_with_the_largest():
    outside, near, opposite, small = (-9.0, 9.0), (0.1, 0.105, 0.11), (0.5, 0.503), 0.7
    network = network_of([small, *near, *opposite, *outside, 1.0], [0.1, 1.0, 1.0, 1.0, 5.0, -5.0, 50.0, 50.0, -2.0])
    np.testing.assert_allclose(toys.kinks(network), [0.105, 1.0])
    np.testing.assert_allclose(toys.kinks(network, share=0.01), [0.105, 0.7, 1.0])
    np.testing.assert_allclose(toys.kinks(network, gap=0.001), [0.1, 0.105, 0.11, 0.5, 0.503, 1.0])
    assert toys.kinks(network_of([9.0], [1.0])).size == 0


def test_slope_changes_at_the_kinks_only():
    network = network_of([-0.5, 0.2, 0.8], [1.0, -2.0, 3.0])
    x = np.linspace(-1.2, 1.4, 2_601)
    second = np.diff(np.asarray(toys.curve(network, x)), 2)
    change = [second[np.abs(x[1:-1] - knot) < 0.003].sum() / (x[1] - x[0]) for knot in (-0.5, 0.2, 0.8)]
    np.testing.assert_allclose(change, [1.0, -2.0, 3.0], rtol=1e-2)
    away = np.abs(x[1:-1, None] - toys.kinks(network)).min(axis=1) > 0.003
    np.testing.assert_allclose(second[away], 0, atol=1e-5)


def test_initial_networks_are_those_of_the_paper():
    network = jax.device_get(toys.initial_curve(3))
    assert set(np.abs(network["weight"])) == {2.5}
    assert [network[name].std() for name in ("bias", "output")] == pytest.approx([2.5, 4.0], rel=0.3)


def test_human_labels(tmp_path):
    true_labels, noisy = np.array([3, 1, 4]), np.array([3, 5, 4, 2], np.uint8)
    with pytest.raises(datasets.DatasetError, match=r"cifar-10n-labels.npz is not in .*CIFAR-10_human.pt"):
        understanding.human_labels(tmp_path, true_labels)
    path = tmp_path / "cifar-10n-labels.npz"
    np.savez(path, clean_label=[3, 1, 4, 1], worse_label=noisy)
    np.testing.assert_array_equal(understanding.human_labels(tmp_path, true_labels), [3, 5, 4])
    np.savez(path, clean_label=[3, 1, 5, 1], worse_label=noisy)
    with pytest.raises(datasets.DatasetError, match="clean_label is not the labels"):
        understanding.human_labels(tmp_path, true_labels)
    np.savez(path, clean_label=[3, 1, 4, 1])
    with pytest.raises(datasets.DatasetError, match="has no worse_label; it has clean_label"):
        understanding.human_labels(tmp_path, true_labels)


def test_flipped_labels_are_wrong_where_they_differ():
    true_labels = np.arange(1_000) % 10
    noisy = understanding.flipped_labels(true_labels)
    assert (noisy != true_labels).mean() == understanding.SMOKE_NOISE
    assert set(noisy) == set(range(10))
