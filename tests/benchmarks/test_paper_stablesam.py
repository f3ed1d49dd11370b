"""The quadratic of ``benchmarks/papers/stablesam.py`` against the limits of the paper, and its verdicts."""

import numpy as np
import pytest

from benchmarks.papers import stablesam

pytestmark = pytest.mark.heavy


def test_limits_of_the_quadratic_are_those_of_the_paper():
    found = stablesam.quadratic()
    assert found["limits"] == pytest.approx({"GD": 0.1975, "USAM": 0.0975, "renormalized USAM": 0.1975})
    rates, distances = found["learning_rates"], found["distances"]
    # For GD on each coordinate w ← (1 − ηλ)w; renormalizing leaves that of the largest curvature as it is.
    for rate, distance in zip(rates, distances["GD"], strict=True):
        powers = (1 - rate * np.array(stablesam.CURVATURES)) ** stablesam.QUADRATIC_STEPS
        assert distance == pytest.approx(np.linalg.norm(powers) / np.sqrt(2), rel=1e-6)
    assert stablesam.quadratic_claim(found).verdict == "holds"
    found["limits"]["USAM"] = 0.2
    assert stablesam.quadratic_claim(found).verdict == "does not hold"


def results(**accuracies):
    """Three seeds that differ by a point, for learning rates 0.1, 0.5 and 1."""
    return {
        name: {
            rate: {"test_accuracy": [(value + seed) / 100 for seed in range(3)]}
            for rate, value in zip(("0.1", "0.5", "1.0"), values, strict=True)
        }
        for name, values in accuracies.items()
    }


def verdicts(**accuracies):
    return [claim.verdict for claim in stablesam.range_claims(results(**accuracies))]


def test_verdicts_on_the_range_of_learning_rates():
    falls, stays = (50, 20, 10), (50, 48, 40)
    assert verdicts(sgd=stays, sam=falls, stable_sam=stays, truncated=falls) == ["holds", "holds", "undecided"]
    assert verdicts(sgd=falls, sam=stays, stable_sam=stays, truncated=falls) == [
        "does not hold", "undecided", "does not hold",
    ]  # fmt: skip
    rises = (10, 20, 50)
    assert verdicts(sgd=rises, sam=rises, stable_sam=rises, truncated=rises) == ["undecided"] * 3


def test_best_rates_are_compared():
    claim = stablesam.better_claim(results(sgd=(30, 20, 10), sam=(20, 40, 10)))
    assert claim.verdict == "holds"
    assert "SGD 31.0 ± 1.0 % at 0.1, SAM 41.0 ± 1.0 % at 0.5" in claim.measured
