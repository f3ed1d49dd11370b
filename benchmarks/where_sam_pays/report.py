"""What came out: a table for the terminal, tables for a page, and the picture.

python -m benchmarks.where_sam_pays.report prints those of benchmarks/README.md.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from benchmarks.papers.reproduction import RESULTS, spread
from benchmarks.where_sam_pays.methods import CONTROLS, METHODS
from examples.training import style
from examples.training.report import interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

TEST = "held out"
COLUMNS = {
    "look_alike": "30 % wrong labels, similar class",
    "symmetric": "40 % wrong labels, any class",
    "cifar_10n": "CIFAR-10N, 40 % wrong labels",
    "clean": "clean labels",
    "look_alike_adamw": "similar class, AdamW",
    "clean_adamw": "clean labels, AdamW",
    "look_alike_16": "similar class, batch size 16",
    "look_alike_256": "similar class, batch size 256",
    "cifar_10n_resnet": "CIFAR-10N, ResNet",
}
NUM_MAIN = 4  # of them; the others differ from these in one thing
TUNED_SGD, CONTROL, METHOD = style.PLAIN, "#999999", style.SAM


class Row(NamedTuple):
    """A method in a setting, in per cent.

    Attributes:
        accuracies: (seeds,) when tuned.
        gain: mean difference to tuned SGD, with its 95 % interval over seeds.
        decided: "+" or "−" where the interval excludes 0; twice where it does so for all comparisons of the table.
        untuned_accuracies: (seeds,) with the learning rate and decay of an untuned baseline, and the best rho there.
        untuned_gain: of these, to SGD with that learning rate and decay.
    """

    accuracies: np.ndarray
    gain: tuple[float, float, float]
    decided: str
    untuned_accuracies: np.ndarray
    untuned_gain: tuple[float, float, float]


def accuracies(record: Mapping[str, Any], name: str, which: str = "tuned") -> np.ndarray:
    """(seeds,) in per cent, of a method as tuned or by "default"."""
    return 100 * np.array(record["methods"][name][which]["test"][TEST])


def row(record: Mapping[str, Any], name: str) -> Row:
    """Of a method in the record of a setting."""
    tuned, default = (accuracies(record, name, which) for which in ("tuned", "default"))
    gain, default_gain = tuned - accuracies(record, "sgd"), default - accuracies(record, "sgd", "default")
    signs = [_sign(interval(gain, number)) for number in (1, len(record["methods"]) - 1)]
    return Row(
        tuned,
        (float(np.mean(gain)), *interval(gain)),
        "".join(signs),
        default,
        (float(np.mean(default_gain)), *interval(default_gain)),
    )


def _sign(limits: tuple[float, float]) -> str:
    return "+" if limits[0] > 0 else "−" if limits[1] < 0 else ""


def luck(record: Mapping[str, Any]) -> tuple[float, float]:
    """How much better the chosen hyperparameters test than the two next best: mean over methods, standard deviation."""
    differences = [
        np.mean(accuracies(record, name)) - 100 * np.mean(other["test"][TEST])
        for name, result in record["methods"].items()
        for other in result["runners_up"]
    ]
    return float(np.mean(differences)), float(np.std(differences, ddof=1))


def table(record: Mapping[str, Any]) -> str:
    """For a terminal of 110 columns."""
    lines = [
        f"{record['title']} ({record['optimizer']}, {record['num_seeds']} fresh seeds)",
        f"{'':<34}{'gradients':>9}{'rate':>9}{'decay':>9}{'rho':>7}{'test %':>13}{'− SGD':>7} {'95 %':<17} untuned",
    ]
    for name, result in record["methods"].items():
        found, tuned = row(record, name), result["tuned"]
        rho = f"{tuned['rho']:.3g}" if METHODS[name].has_rho else ""
        difference = f"{found.gain[0]:+.2f}" if name != "sgd" else ""
        limits = f"[{found.gain[1]:+.2f}, {found.gain[2]:+.2f}]{found.decided}" if name != "sgd" else ""
        edges = f"  edge of the grid: {', '.join(tuned['edges'])}" if tuned["edges"] else ""
        lines.append(
            f"{METHODS[name].title:<34}{tuned['gradients']:>9.2f}{tuned['learning_rate']:>9.3g}"
            f"{tuned['weight_decay']:>9.2g}{rho:>7}{spread(found.accuracies):>13}{difference:>7} {limits:<17}"
            f"{np.mean(found.untuned_accuracies):>8.1f}{edges}"
        )
    return "\n".join(lines)


def gains(records: Mapping[str, Mapping[str, Any]]) -> str:
    """For a page: SGD's accuracy and what every method gains on it, a column for each setting."""

    def cell(record, name):
        found = row(record, name)
        if name == "sgd":
            return f"{spread(found.accuracies, digits=1)} %"
        return "{:+.1f} [{:+.1f}, {:+.1f}] ".format(*found.gain) + found.decided

    return _page(records, cell)


def untuned(records: Mapping[str, Mapping[str, Any]]) -> str:
    """For a page: the same with the learning rate and decay of an untuned baseline, and the best rho there."""

    def cell(record, name):
        found = row(record, name)
        if name == "sgd":
            return f"{spread(found.untuned_accuracies, digits=1)} %"
        return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*found.untuned_gain)

    return _page(records, cell)


def tuned_values(records: Mapping[str, Mapping[str, Any]]) -> str:
    """For a page: learning rate, decay and rho of every method when tuned, and the largest eigenvalue in the end."""

    def cell(record, name):
        tuned = record["methods"][name]["tuned"]
        values = [tuned["learning_rate"], tuned["weight_decay"]] + [tuned["rho"]] * METHODS[name].has_rho
        edges = "".join(f" ({edge.replace('_', ' ')} at the edge)" for edge in tuned["edges"])
        return ", ".join(f"{value:.2g}" for value in values) + edges + f"; λ {np.mean(tuned['eigenvalues']):.2g}"

    return _page(records, cell)


def pages(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tables of the page: those of the main settings, and of the others."""
    found = []
    for names in (list(COLUMNS)[:NUM_MAIN], list(COLUMNS)[NUM_MAIN:]):
        some = {name: records[name] for name in names if name in records}
        found += [table(some) for table in (gains, untuned, tuned_values) if some]
    return found


def _page(records: Mapping[str, Mapping[str, Any]], cell: Callable[[Mapping[str, Any], str], str]) -> str:
    """Methods down, settings across."""
    titles = " | ".join(COLUMNS[name] for name in records)
    lines = [f"| method | gradients | {titles} |", "|---" * (2 + len(records)) + "|"]
    for name in METHODS:
        found = [record for record in records.values() if name in record["methods"]]
        if found:
            gradients = f"{found[0]['methods'][name]['tuned']['gradients']:.3g}"
            cells = [cell(record, name).strip() if name in record["methods"] else "" for record in records.values()]
            lines.append("| " + " | ".join([METHODS[name].title, gradients, *cells]) + " |")
    return "\n".join(lines)


def records(results: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Of the settings that have been studied, by name."""
    paths = {name: results / f"where_sam_pays_{name}.json" for name in COLUMNS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def draw(record: Mapping[str, Any]) -> Figure:
    """Accuracies by gradients per step: every method tuned, and with the settings of an untuned baseline."""
    names = sorted(record["methods"], key=lambda name: record["methods"][name]["tuned"]["gradients"])
    rows = {name: row(record, name) for name in names}
    figure, axes = plt.subplots(1, 2, figsize=(9, 2 + 0.2 * len(names)), sharey=True, layout="constrained")
    tuned_sgd = float(np.mean(rows["sgd"].accuracies))
    titles = "all tuned alike", "rate and decay of an untuned baseline"
    places = ("accuracies", "gain"), ("untuned_accuracies", "untuned_gain")
    for axis, title, (values, gain) in zip(axes, titles, places, strict=True):
        baseline = np.mean(getattr(rows["sgd"], values))
        for place, name in enumerate(names):
            color = CONTROL if name in CONTROLS else METHOD
            middle, low, high = baseline + np.array(getattr(rows[name], gain))
            axis.plot([low, high], [place, place], color=color, lw=2, solid_capstyle="butt")
            axis.plot(middle, place, "o", color=color, ms=5)
        axis.axvline(tuned_sgd, color=TUNED_SGD, lw=1, ls="--")
        top = axis.get_xaxis_transform()
        axis.text(tuned_sgd, 1.005, "tuned SGD", fontsize=8, color=TUNED_SGD, ha="center", transform=top)
        axis.set_title(title, fontsize=10, pad=14)
        axis.set_xlabel("test accuracy, %")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    labels = [f"{METHODS[name].title}  ({record['methods'][name]['tuned']['gradients']:.3g})" for name in names]
    axes[0].set_yticks(range(len(names)), labels, fontsize=8.5)
    axes[0].invert_yaxis()
    axes[0].set_ylabel("method (gradients per step)", fontsize=9)
    return figure


if __name__ == "__main__":
    print("\n\n".join(pages(records(RESULTS))))
