"""What came out: a table for the terminal, the same for a page, and the picture."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from benchmarks.papers.reproduction import interval, spread
from benchmarks.where_sam_pays.methods import CONTROLS, METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

TEST = "held out"
SHORT = {
    "look_alike": "similar classes, 30 %",
    "symmetric": "any class, 40 %",
    "cifar_10n": "CIFAR-10N, 40 %",
    "clean": "clean",
    "look_alike_adamw": "similar classes, AdamW",
    "clean_adamw": "clean, AdamW",
    "look_alike_16": "similar classes, batch 16",
    "look_alike_256": "batch 256",
}
TUNED_SGD, CONTROL, METHOD = "#555555", "#999999", "#0072b2"


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


def row(record: Mapping[str, Any], name: str, test: str = TEST) -> Row:
    """Of a method in the record of a setting."""
    tuned, untuned = (100 * np.array(record["methods"][name][key]["test"][test]) for key in ("tuned", "default"))
    tuned_sgd, untuned_sgd = (
        100 * np.array(record["methods"]["sgd"][key]["test"][test]) for key in ("tuned", "default")
    )
    comparisons = len(record["methods"]) - 1
    signs = [_sign(interval(tuned - tuned_sgd, number)) for number in (1, comparisons)]
    return Row(
        tuned,
        (float(np.mean(tuned - tuned_sgd)), *interval(tuned - tuned_sgd)),
        "".join(signs),
        untuned,
        (float(np.mean(untuned - untuned_sgd)), *interval(untuned - untuned_sgd)),
    )


def _sign(limits: tuple[float, float]) -> str:
    return "+" if limits[0] > 0 else "−" if limits[1] < 0 else ""


def luck(record: Mapping[str, Any]) -> tuple[float, float]:
    """How much better the chosen hyperparameters test than the two next best: mean over methods, standard deviation."""
    differences = [
        np.mean(result["tuned"]["test"][TEST]) - np.mean(other["test"][TEST])
        for result in record["methods"].values()
        for other in result["runners_up"]
    ]
    return 100 * float(np.mean(differences)), 100 * float(np.std(differences, ddof=1))


def table(record: Mapping[str, Any]) -> str:
    """For a terminal of 110 columns."""
    lines = [
        f"{record['title']} ({record['optimizer']}, {record['num_seeds']} fresh seeds)",
        f"{'':<34}{'gradients':>9}{'rate':>8}{'decay':>9}{'rho':>7}{'test %':>13}{'− SGD':>7} {'95 %':<17} untuned",
    ]
    for name, result in record["methods"].items():
        found, tuned = row(record, name), result["tuned"]
        rho = f"{tuned['rho']:.3g}" if METHODS[name].has_rho else ""
        difference = f"{found.gain[0]:+.2f}" if name != "sgd" else ""
        limits = f"[{found.gain[1]:+.2f}, {found.gain[2]:+.2f}]{found.decided}" if name != "sgd" else ""
        edges = f"  edge of the grid: {', '.join(tuned['edges'])}" if tuned["edges"] else ""
        lines.append(
            f"{METHODS[name].title:<34}{tuned['gradients']:>9.2f}{tuned['learning_rate']:>8.3g}"
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


def _page(records: Mapping[str, Mapping[str, Any]], cell: Callable[[Mapping[str, Any], str], str]) -> str:
    """Methods down, settings across."""
    titles = " | ".join(SHORT[name] for name in records)
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
    paths = {name: results / f"where_sam_pays_{name}.json" for name in SHORT}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def draw(record: Mapping[str, Any]) -> Figure:
    """Accuracies by gradients per step: every method tuned, and with the settings of an untuned baseline."""
    names = sorted(record["methods"], key=lambda name: record["methods"][name]["tuned"]["gradients"])
    rows = {name: row(record, name) for name in names}
    figure, axes = plt.subplots(1, 2, figsize=(9, 2 + 0.2 * len(names)), sharey=True, layout="constrained")
    tuned_sgd = float(np.mean(rows["sgd"].accuracies))
    titles = "all tuned alike", "rate and decay of an untuned baseline"
    for axis, title, which in zip(axes, titles, ("accuracies", "untuned_accuracies"), strict=True):
        baseline = getattr(rows["sgd"], which)
        for place, name in enumerate(names):
            values, color = getattr(rows[name], which), CONTROL if name in CONTROLS else METHOD
            low, high = np.mean(baseline) + np.array(interval(values - baseline) if name != "sgd" else (0, 0))
            axis.plot([low, high], [place, place], color=color, lw=2, solid_capstyle="butt")
            axis.plot(np.mean(values), place, "o", color=color, ms=5)
        axis.axvline(tuned_sgd, color=TUNED_SGD, lw=1, ls="--")
        axis.set_title(title, fontsize=10, pad=14)
        axis.set_xlabel("test accuracy, %")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    labels = [f"{METHODS[name].title}  ({record['methods'][name]['tuned']['gradients']:.3g})" for name in names]
    axes[0].set_yticks(range(len(names)), labels, fontsize=8.5)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.text(
            tuned_sgd,
            1.005,
            "tuned SGD",
            fontsize=8,
            color=TUNED_SGD,
            ha="center",
            transform=axis.get_xaxis_transform(),
        )
    axes[0].set_ylabel("method (gradients per step)", fontsize=9)
    return figure
