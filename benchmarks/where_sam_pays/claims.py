"""Claims of papers that the study decides, each with what was measured and the verdict of a paired interval."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.papers.reproduction import FAILS, HOLDS, UNDECIDED, Claim, paired_verdict
from benchmarks.where_sam_pays.methods import METHODS
from benchmarks.where_sam_pays.report import COLUMNS, NUM_MAIN, TEST, accuracies
from examples.training.report import interval

Records = Mapping[str, Mapping[str, Any]]
AS_GOOD = 0.5  # points
WORLDS = list(COLUMNS)[:NUM_MAIN]
SAM, MSAM, LATE = "Foret et al. 2021", "Behdin et al. 2023", "Zhou et al. 2025"
# paper, method, what it is compared with, in which settings: the claim is that it is more accurate
BETTER = [
    (SAM, "sam", "sgd", WORLDS),
    (SAM, "sam", "random", ["look_alike"]),
    (MSAM, "msam_8", "sam", [*WORLDS, "look_alike_16", "look_alike_256"]),
    (LATE, "late_25", "sgd", WORLDS),
    ("Kwon et al. 2021", "asam", "sam", ["look_alike", "clean"]),
    ("Tan et al. 2024", "stable_sam", "sam", ["look_alike", "clean"]),
    ("Li et al. 2024", "friendly_sam", "sam", ["look_alike", "clean"]),
    ("Li and Giannakis 2023", "vasso", "sam", ["look_alike", "clean"]),
    ("Zhuang et al. 2022", "gsam", "sam", ["look_alike", "clean"]),
    ("Yue et al. 2023", "wsam", "sam", ["look_alike", "clean"]),
    ("Becker et al. 2024", "momentum_sam", "sgd", ["look_alike", "clean"]),
    ("Becker et al. 2024", "momentum_sam", "lagged_sam", ["look_alike"]),
]
# the claim is that the cheaper method is as accurate as SAM
AS_ACCURATE = [
    ("Liu et al. 2022", "look_sam", ["look_alike", "clean"]),
    ("Jiang et al. 2023", "ae_sam", ["look_alike", "clean"]),
    ("Becker et al. 2024", "momentum_sam", ["look_alike", "clean"]),
]
HALVINGS = ["sam", "msam_4", "msam_8", "msam_16", "msam_each"]
FLATTER = [(SAM, "sam", "sgd"), (MSAM, "msam_8", "sam")]


def claims(records: Records) -> list[Claim]:
    """Of all settings that have been studied."""
    found = []
    for paper, name, other, settings in BETTER:
        found += [_better(record, key, paper, name, other) for key, record in _with(records, settings, name, other)]
    for paper, name, settings in AS_ACCURATE:
        found += [_as_accurate(record, key, paper, name) for key, record in _with(records, settings, name, "sam")]
    for paper, name, other in FLATTER:
        found += [_flatter(record, key, paper, name, other) for key, record in _with(records, WORLDS, name, other)]
    for _, record in _with(records, ["look_alike"], "sam", *HALVINGS):
        found.append(_fewer_examples(record))
    for _, record in _with(records, ["look_alike"], "sam", "stable_sam"):
        found.append(_learning_rates(record))
    return found


def _with(records: Records, settings: Iterable[str], *names: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The settings whose records have all of these methods."""
    return [(key, records[key]) for key in settings if key in records and set(names) <= set(records[key]["methods"])]


def as_good_verdict(differences: Sequence[float] | np.ndarray) -> str:
    """Of a claim that differences are within half a point: the 95 % interval decides if it is inside, or outside."""
    low, high = interval(differences)
    if low > -AS_GOOD and high < AS_GOOD:
        return HOLDS
    return FAILS if low > AS_GOOD or high < -AS_GOOD else UNDECIDED


def _better(record, key, paper, name, other) -> Claim:
    first, second = accuracies(record, name), accuracies(record, other)
    claim = f"{_title(name)} is more accurate than {_title(other)}, each tuned ({COLUMNS[key]})."
    return Claim(claim, _difference(first, second), paired_verdict(first - second), paper)


def _as_accurate(record, key, paper, name) -> Claim:
    first, second = accuracies(record, name), accuracies(record, "sam")
    gradients = record["methods"][name]["tuned"]["gradients"]
    claim = f"{_title(name)}, with {gradients:.3g} gradients per step, is as accurate as SAM within half a point"
    return Claim(f"{claim} ({COLUMNS[key]}).", _difference(first, second), as_good_verdict(first - second), paper)


def _flatter(record, key, paper, name, other) -> Claim:
    first, second = (np.array(record["methods"][one]["tuned"]["eigenvalues"]) for one in (name, other))
    claim = f"{_title(name)} ends with a smaller largest Hessian eigenvalue than {_title(other)}, each tuned"
    measured = f"{np.mean(first):.3g} against {np.mean(second):.3g} ({len(first)} seeds)."
    return Claim(f"{claim} ({COLUMNS[key]}).", measured, paired_verdict(np.log(second / first)), paper)


def _fewer_examples(record) -> Claim:
    halvings = [np.log2(METHODS[name].micro_batches or record["batch_size"]) for name in HALVINGS]
    slopes = np.polyfit(halvings, np.stack([accuracies(record, name) for name in HALVINGS]), 1)[0]
    low, high = interval(slopes)
    return Claim(
        f"The fewer examples share an ascent of SAM, the more accurate it is, each tuned ({COLUMNS['look_alike']}).",
        f"Points gained each time their number is halved: {np.mean(slopes):+.2f} [{low:+.2f}, {high:+.2f}], from "
        f"{record['batch_size']} to 1 ({len(slopes)} seeds).",
        paired_verdict(slopes),
        "Andriushchenko and Flammarion 2022",
    )


def _learning_rates(record) -> Claim:
    """At rates above SAM's best, each method with its own tuned rho and decay."""
    stable, plain = (
        {f"{row['learning_rate']:.2g}": 100 * np.array(row["test"][TEST]) for row in record["rates"][name]}
        for name in ("stable_sam", "sam")
    )
    best = record["methods"]["sam"]["tuned"]["learning_rate"]
    shared = [rate for rate in stable if rate in plain and float(rate) > 1.1 * best]
    first, second = (np.mean([found[rate] for rate in shared], axis=0) for found in (stable, plain))
    claim = "At learning rates above SAM's best StableSAM is more accurate than SAM, each with its own rho"
    measured = f"Means over the rates {', '.join(shared)}: {_difference(first, second)}"
    return Claim(f"{claim} ({COLUMNS['look_alike']}).", measured, paired_verdict(first - second), "Tan et al. 2024")


def _difference(first: np.ndarray, second: np.ndarray) -> str:
    low, high = interval(first - second)
    means = f"{np.mean(first):.2f} against {np.mean(second):.2f} %"
    return f"{means}, {np.mean(first - second):+.2f} [{low:+.2f}, {high:+.2f}] ({len(first)} seeds)."


def _title(name: str) -> str:
    return METHODS[name].title.replace("its opposite", "Momentum-SAM's opposite")
