"""What came out: a table for the terminal, the same for a page, and the picture."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from benchmarks.papers.reproduction import interval, spread
from benchmarks.where_sam_pays.methods import CONTROLS, METHODS
from benchmarks.where_sam_pays.settings import SETTINGS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

TEST = "held out"
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


def markdown(record: Mapping[str, Any]) -> str:
    """For a page."""
    lines = [
        "| method | gradients | rate, decay, rho | test accuracy | − SGD [95 %] | λ_max | untuned | − untuned SGD |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in record["methods"].items():
        found, tuned = row(record, name), result["tuned"]
        values = [tuned["learning_rate"], tuned["weight_decay"]] + [tuned["rho"]] * METHODS[name].has_rho
        edges = "".join(f" ({edge} at the edge)" for edge in tuned["edges"])
        gain = _limits(found.gain) + f" {found.decided}" if name != "sgd" else "–"
        columns = [
            METHODS[name].title,
            f"{tuned['gradients']:.3g}",
            ", ".join(f"{value:.2g}" for value in values) + edges,
            spread(found.accuracies, digits=1),
            gain.strip(),
            f"{np.mean(tuned['eigenvalues']):.3g}",
            spread(found.untuned_accuracies, digits=1),
            f"{found.untuned_gain[0]:+.1f}" if name != "sgd" else "–",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def _limits(gain: tuple[float, float, float]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gain)


def records(results: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Of the settings that have been studied, by name."""
    paths = {name: results / f"where_sam_pays_{name}.json" for name in SETTINGS}
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
