"""Two pictures for the guide in examples/: what a step does, and which examples share one ε.

    python -m benchmarks.explain

The first is computed, on the valley ½u²v² of the papers' toy problems; the second is the contract of the estimator.
"""

import pathlib
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import optax_sam
from benchmarks.papers.descent import descend
from benchmarks.papers.late_phase_toys import valley
from examples.training import style

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
START, RATE, RHO, STEPS = (2.0, 0.25), 0.1, 0.25, 120
DEVICES, MICRO_BATCHES, EXAMPLES = 2, 2, 4


def draw_step() -> Figure:
    """One step from w, and where steps lead."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, (u, v) in zip(axes, (((1.55, 2.12), (-0.12, 0.58)), ((0, 2.2), (-0.5, 0.5))), strict=True):
        grid = np.meshgrid(np.linspace(*u, 200), np.linspace(*v, 200))
        axis.contour(*grid, np.sqrt(0.5) * np.abs(grid[0] * grid[1]), levels=14, colors="0.8", linewidths=0.8)
        axis.axhline(0, color="0.6", lw=1)
        axis.set(xlabel="u: along the valley", ylabel="v: across")
        axis.spines[["top", "right"]].set_visible(False)
    _draw_arrows(axes[0])
    for name, link in (("plain", optax.identity()), ("SAM", optax_sam.sam(RHO))):
        path = np.asarray(descend(valley, START, link, optax.sgd(RATE), STEPS))
        color = style.PLAIN if name == "plain" else style.SAM
        axes[1].plot(*path.T, ".-", color=color, ms=3, lw=0.8, label=f"{STEPS} steps, {name}")
    axes[1].set_title("the valley ½u²v²: flatter to the left", fontsize=10)
    axes[1].legend(fontsize=9, loc="upper left", framealpha=1, edgecolor="none")
    return figure


def _draw_arrows(axis: Axes) -> None:
    """g at w, ε along it, s at w + ε, and the two steps from w."""
    w = np.array(START)
    g = np.asarray(jax.grad(valley)(w))
    epsilon = RHO * g / np.linalg.norm(g)
    s = np.asarray(jax.grad(valley)(w + epsilon))
    arrows = {
        "ε: up, along g": (w, epsilon, style.MSAM),
        "−ηg: the plain step": (w, -RATE * g, style.PLAIN),
        "−ηs: the step of SAM, from w": (w, -RATE * s, style.SAM),
    }
    for label, (start, vector, color) in arrows.items():
        arrow: Any = {"arrowstyle": "-|>", "color": color, "lw": 2, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", tuple(start + vector), tuple(start), arrowprops=arrow)
        axis.plot([], [], color=color, lw=2, label=label)
    axis.plot(*w, "o", color="black", ms=5)
    axis.annotate("w", tuple(w), (6, -2), textcoords="offset points")
    axis.plot(*(w + epsilon), "o", color=style.MSAM, ms=5)
    where: Any = {"textcoords": "offset points", "ha": "right", "backgroundcolor": "white"}
    axis.annotate("w + ε: s is the gradient here", tuple(w + epsilon), (-8, 0), **where)
    axis.set_title("one step", fontsize=10)
    axis.legend(fontsize=9, loc="lower left", framealpha=1, edgecolor="none")


def draw_shared() -> Figure:
    """A row for each setting: examples of one color share one ε."""
    per_device = MICRO_BATCHES * EXAMPLES
    place = np.arange(DEVICES * per_device)
    rows = {
        'ascent_per="batch"\nsynchronized SAM': 0 * place,
        'ascent_per="device"\nSAM on each device': place // per_device,
        'ascent_per="micro_batch", M = 2\nmSAM, the default': place // EXAMPLES,
        'ascent_per="micro_batch", M = 8\none ascent for each example': place,
    }
    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    colors = plt.get_cmap("tab20")
    for row, groups in enumerate(rows.values()):
        for x, group in zip(place, groups, strict=True):
            gap = 0.8 * (x // per_device)
            axis.add_patch(Rectangle((x + gap, row + 0.15), 0.9, 0.7, color=colors(int(group) % 20)))
    axis.set_yticks(np.arange(len(rows)) + 0.5, list(rows), fontsize=9)
    middles = [device * (per_device + 0.8) + per_device / 2 for device in range(DEVICES)]
    axis.set_xticks(middles, [f"{per_device} examples on device {device}" for device in range(DEVICES)], fontsize=9)
    axis.set(xlim=(-0.3, place[-1] + 2), ylim=(len(rows), 0))
    axis.set_title("examples of one color share one ε", fontsize=10)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return figure


def main() -> None:
    draw_step().savefig(FOLDER / "step.png", dpi=130)
    draw_shared().savefig(FOLDER / "shared.png", dpi=130)


if __name__ == "__main__":
    main()
