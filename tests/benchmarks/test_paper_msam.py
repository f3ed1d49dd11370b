"""The verdicts of ``benchmarks/papers/msam.py`` on made-up results."""

import pytest

from benchmarks.papers import msam

pytestmark = pytest.mark.heavy


def outcomes(accuracy, eigenvalue):
    """Three seeds that are alike but for a little."""
    return {
        "test_accuracy": [accuracy + 0.001 * seed for seed in range(3)],
        "eigenvalue": [eigenvalue * (1 + 0.01 * seed) for seed in range(3)],
        "train_loss": [0.5] * 3,
    }


def times(**ratios):
    return {name: {"milliseconds": 1.0, "ratio_to_sam": ratio} for name, ratio in ratios.items()}


CHEAP, DEAR, UNSURE = (1.0, 0.9, 1.1), (1.5, 1.3, 1.7), (1.2, 1.1, 1.3)


def test_flatter_and_more_accurate_are_told_apart():
    runs = {"SGD": outcomes(0.5, 30.0), "SAM": outcomes(0.6, 10.0), "M = 2": outcomes(0.5, 5.0)}
    runs["M = 4"] = outcomes(0.4, 1.0)
    text = {"AdamW": outcomes(0.7, 1.0), "SAM": outcomes(0.7, 2.0), "M = 4": outcomes(0.8, 3.0)}
    found = msam.claims({"images": runs, "text": text}, times(**{"M = 2": CHEAP}))
    assert [(claim.claim, claim.verdict) for claim in found[:-1]] == [
        ("Images: SAM is flatter than SGD.", "holds"),
        ("Images: mSAM (mean over all M > 1, up to 4) is flatter than SAM.", "holds"),
        ("Images: SAM is more accurate than SGD.", "holds"),
        ("Images: mSAM (mean over all M > 1, up to 4) is more accurate than SAM.", "does not hold"),
        ("Text: SAM is flatter than AdamW.", "does not hold"),
        ("Text: mSAM (M = 4) is flatter than SAM.", "does not hold"),
        ("Text: SAM is more accurate than AdamW.", "undecided"),
        ("Text: mSAM (M = 4) is more accurate than SAM.", "holds"),
    ]


def test_diverged_runs_decide_nothing():
    runs = {"SGD": outcomes(0.5, 30.0), "SAM": outcomes(0.6, float("nan")), "M = 2": outcomes(0.5, 5.0)}
    text = {"AdamW": outcomes(0.7, 1.0), "SAM": outcomes(0.7, 2.0), "M = 4": outcomes(0.8, 3.0)}
    found = msam.claims({"images": runs, "text": text}, times(**{"M = 2": CHEAP}))
    assert [claim.verdict for claim in found[:2]] == ["undecided", "undecided"]


def test_cost_is_judged_by_quartiles_and_the_dearest_decides():
    verdict = lambda **ratios: msam.cost_claim(times(SAM=DEAR, **ratios)).verdict  # noqa: E731
    assert verdict(**{"M = 2": CHEAP, "M = 4": CHEAP}) == "holds"
    assert verdict(**{"M = 2": CHEAP, "M = 4": UNSURE}) == "undecided"
    assert verdict(**{"M = 2": CHEAP, "M = 4": UNSURE, "M = 8": DEAR}) == "does not hold"
