"""What a run leaves behind: a table for the terminal, results.json and comparison.png."""

import json
import math
import os
import pathlib
import platform
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jaxlib
import matplotlib
import numpy as np
import numpy.typing as npt
import optax
import scipy.special

import optax_sam
from examples.training import style

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def interval(values: npt.ArrayLike, num_comparisons: int = 1) -> tuple[float, float]:
    """The 95 % t-interval of the mean; of a single value, everything.

    With several comparisons, all their intervals hold at once with 95 % (Bonferroni).
    """
    values = np.asarray(values)
    if len(values) < 2 or not np.all(np.isfinite(values)):
        return -math.inf, math.inf
    quantile = scipy.special.stdtrit(len(values) - 1, 1 - 0.025 / num_comparisons)
    half = quantile * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def values(result: dict[str, Any], name: str) -> np.ndarray:
    """(seeds,), accuracies in per cent."""
    return np.array([run[name] for run in result["seeds"]]) * (100 if name == "test_accuracy" else 1)


def tables(results: dict[str, Any], titles: Mapping[str, str]) -> str:
    """A table for each kind of labels, a line per method, fit for 80 columns."""
    found = []
    for labels, methods in results["labels"].items():
        lines = [
            f"{results['settings']['dataset']}, {titles[labels]}",
            f"{'':<13}{'test accuracy':>15}{'− sgd':>22}{'m-sharpness':>13}{'gradients':>10}{'time':>7}",
        ]
        for method, result in methods.items():
            accuracy = values(result, "test_accuracy")
            shown = f"{np.mean(accuracy):.1f}" + (f" ± {np.std(accuracy, ddof=1):.1f} %" if len(accuracy) > 1 else " %")
            gain = ""
            if "sgd" in methods and method != "sgd":
                differences = accuracy - values(methods["sgd"], "test_accuracy")
                gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(np.mean(differences), *interval(differences))
            lines.append(
                f"{method:<13}{shown:>15}{gain:>22}{np.mean(values(result, 'm_sharpness')):>13.4f}"
                f"{result['gradients_per_step']:>10.2f}{results['step_times'][method]['ratio']:>7.2f}"
            )
        found.append("\n".join(lines))
    return "\n\n".join(found)


def environment() -> dict[str, Any]:
    """The command, versions and hardware behind the numbers."""
    versions = {module.__name__: module.__version__ for module in (jax, jaxlib, optax, flax, optax_sam)}
    device = jax.devices()[0]
    return {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": {"device": device.device_kind, "devices": jax.device_count(), "cpu_cores": os.cpu_count()},
    }


def finite(tree: Any) -> Any:
    """The tree for JSON: None where a number is not finite."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def write(results: dict[str, Any], folder: pathlib.Path, titles: Mapping[str, str]) -> None:
    """Writes results.json and comparison.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")
    figure = comparison(results, titles)
    figure.savefig(folder / "comparison.png", dpi=130)
    plt.close(figure)


def comparison(results: dict[str, Any], titles: Mapping[str, str]) -> Figure:
    """Test accuracy, with the interval of the difference to SGD, and m-sharpness; a row for each method."""
    kinds = results["labels"]
    names = list(next(iter(kinds.values())))
    size = 4.5 * len(kinds) + 1, 1.6 + 0.5 * len(names)
    figure, axes = plt.subplots(2, len(kinds), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for (labels, methods), (above, below) in zip(kinds.items(), axes.T, strict=True):
        baseline = values(methods.get("sgd", methods[names[0]]), "test_accuracy")
        for place, (name, result) in enumerate(methods.items()):
            accuracy, sharpness = values(result, "test_accuracy"), values(result, "m_sharpness")
            low, high = np.mean(baseline) + np.array(interval(accuracy - baseline))
            color = style.PLAIN if name.startswith("sgd") else style.SAM
            above.plot(
                [low, high] if np.isfinite(low) else [], [place] * (2 if np.isfinite(low) else 0), color=color, lw=2
            )
            above.plot(np.mean(accuracy), place, "o", color=color, ms=5)
            below.plot(sharpness, [place] * len(sharpness), "|", color=color, ms=7, alpha=0.6)
            below.plot(np.mean(sharpness), place, "o", color=color, ms=5)
        above.axvline(np.mean(baseline), color=style.PLAIN, lw=1, ls="--")
        above.set_title(textwrap.fill(titles[labels], 45), fontsize=10)
        above.set_xlabel("test accuracy, %; bars: 95 % of the difference to sgd")
        below.set_xlabel("m-sharpness; a mark for each seed")
        below.set_xlim(left=0)
    style.tidy(*axes.flat)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    return figure
