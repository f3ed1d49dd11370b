"""What a run leaves behind: a table for the terminal, results.json and comparison.png."""

import json
import math
import os
import pathlib
import platform
import sys
from typing import Any

import flax
import jax
import jaxlib
import matplotlib
import optax

import optax_sam

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

COLORS = {
    "sgd": "#555555",
    "sam": "#0072b2",
    "usam": "#56b4e9",
    "asam": "#cc79a7",
    "msam": "#d55e00",
    "stable_sam": "#009e73",
    "late_sam": "#e69f00",
    "gsam": "#0072b2",
    "wsam": "#56b4e9",
    "friendly_sam": "#cc79a7",
    "vasso": "#d55e00",
    "sam_every": "#0072b2",
    "look_sam": "#009e73",
    "ae_sam": "#e69f00",
    "momentum_sam": "#cc79a7",
    "lagged_sam": "#d55e00",
    "random_sam": "#555555",
}
MOST_CURVES = 7
STYLES = {  # late_sam hides sgd until the switch; dotted: at two gradients a step; dashed and dotted: cheaper
    "late_sam": "--",
    **dict.fromkeys(("gsam", "wsam", "friendly_sam", "vasso"), ":"),
    **dict.fromkeys(("sam_every", "look_sam", "ae_sam", "momentum_sam", "lagged_sam", "random_sam"), "-."),
}


def mean_and_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; no deviation of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def table(results: dict[str, Any]) -> str:
    """One line per method, fit for 80 columns."""
    lines = [
        f"{'method':<13}{'test accuracy':>16}{'train loss':>12}{'m-sharpness':>13}{'gradients':>11}{'step time':>11}",
        f"{'':<13}{'% (± sd)':>16}{'':>12}{'':>13}{'per step':>11}{'× SGD':>11}",
    ]
    for method, result in results["methods"].items():
        mean, sd = mean_and_sd([100 * run["test_accuracy"] for run in result["seeds"]])
        accuracy = f"{mean:.2f}" + (f" ± {sd:.2f}" if sd is not None else "")
        columns = [mean_and_sd([run[key] for run in result["seeds"]])[0] for key in ("train_loss", "m_sharpness")]
        lines.append(
            f"{method:<13}{accuracy:>16}{columns[0]:>12.4f}{columns[1]:>13.4f}"
            f"{result['gradients_per_step']:>11.2f}{result['step_time_ratio']:>11.2f}"
        )
    return "\n".join(lines)


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


def write(results: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes results.json and comparison.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")
    figure = (comparison if len(results["methods"]) <= MOST_CURVES else overview)(results)
    figure.savefig(folder / "comparison.png", dpi=150)
    plt.close(figure)


def overview(results: dict[str, Any]) -> Figure:
    """Test accuracy at the end and gradients per step, a row for each method: of many, curves hide each other."""
    methods = results["methods"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.2 + 0.28 * len(methods)), sharey=True, layout="constrained")
    for number, (method, result) in enumerate(methods.items()):
        mean, sd = mean_and_sd([100 * run["test_accuracy"] for run in result["seeds"]])
        axes[0].errorbar(mean, number, xerr=sd, color=COLORS[method], marker="o", capsize=2)
        axes[1].plot(result["gradients_per_step"], number, color=COLORS[method], marker="o")
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("test accuracy (%)")
    axes[1].set_xlabel("gradients per step")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(results, "mean of {} seeds ± sd"))
    return figure


def _title(results: dict[str, Any], of_seeds: str) -> str:
    settings = results["settings"]
    seeds = "1 seed" if settings["seeds"] == 1 else of_seeds.format(settings["seeds"])
    return f"{settings['dataset']}, {settings['model']}, {settings['base']}: {seeds}"


def comparison(results: dict[str, Any]) -> Figure:
    """Test accuracy against gradient evaluations and per epoch: means over seeds, with the deviation at the end."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    lowest, highest = [], []
    for number, (method, result) in enumerate(results["methods"].items()):
        accuracy = 100 * np.array([run["history"]["test_accuracy"] for run in result["seeds"]])
        per_step = np.mean([run["history"]["gradients_per_step"] for run in result["seeds"]], axis=0)
        gradients = np.cumsum(per_step) * results["counts"]["steps_per_epoch"]
        epochs = np.arange(1, accuracy.shape[1] + 1)
        mean = accuracy.mean(axis=0)
        end, sd = mean_and_sd(accuracy[:, -1].tolist())
        lowest.append(min(mean[len(mean) // 10], end - (sd or 0)))
        highest.append(max(mean.max(), end + (sd or 0)))
        for axis, x in zip(axes, (gradients, epochs), strict=True):
            axis.plot(x, mean, label=method, color=COLORS[method], linewidth=1.6, linestyle=STYLES.get(method, "-"))
        aside = epochs[-1] * (1 + 0.015 * (number + 1))
        axes[1].errorbar(aside, end, yerr=sd, color=COLORS[method], marker="o", markersize=4, capsize=2)
    margin = 0.05 * (max(highest) - min(lowest)) + 0.05
    axes[0].set_ylim(min(lowest) - margin, max(highest) + margin)
    axes[0].set(xlabel="gradient evaluations (batches)", ylabel="test accuracy (%)", title="at equal cost")
    axes[1].set(xlabel="epoch", title="at equal epochs")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(_title(results, "mean of {} seeds, ± sd beside the last epoch"))
    return figure
