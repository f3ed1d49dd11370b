"""The edge of stability: the largest eigenvalue of the Hessian while training, beside 2/η and the edge of SAM.

python -m benchmarks.edge

Gradient descent on the squared error of digits, all images in every step, as in Long and Bartlett (2023): plain, with
SAM, and with SAM in the second half. The eigenvalue is tracked, eight products each time, and at some steps compared
with that of Lanczos until it converges.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tqdm

import optax_sam
from benchmarks import timing
from examples.training import datasets, models, style

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

STEPS, EVERY, CHECKED, PRODUCTS = 4_000, 20, 500, 8
LEARNING_RATE, RHO = 0.25, 0.1
LINKS = {
    "gradient descent": optax.identity(),
    "SAM": optax_sam.sam(RHO),
    "late SAM": optax_sam.late(optax_sam.sam(RHO), STEPS // 2),
}
COLORS = {"gradient descent": style.PLAIN, "SAM": style.SAM, "late SAM": style.LATE}
NETWORK = models.MLP(width=64)
RESULTS = pathlib.Path(__file__).parent / "results"


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Half the squared distance to the one-hot labels."""
    outputs: Any = NETWORK.apply({"params": params}, batch[0])
    return jnp.mean(jnp.sum((outputs - jax.nn.one_hot(batch[1], 10)) ** 2, axis=1)) / 2


def followed(link: optax.GradientTransformation, batch: Any, bar: tqdm.tqdm) -> dict[str, list[float]]:
    """Loss, ‖g‖ and the largest eigenvalue every so many steps, and of some of these the eigenvalue by Lanczos."""
    estimator, tx = optax_sam.gradient_estimator(loss_fn, link), optax.sgd(LEARNING_RATE)

    @jax.jit
    def steps(state):
        def step(state, _):
            params, link_state, optimizer_state = state
            _, grads, link_state = estimator.value_and_grad(params, link_state, batch)
            updates, optimizer_state = tx.update(grads, optimizer_state, params)
            return (optax.apply_updates(params, updates), link_state, optimizer_state), None

        return jax.lax.scan(step, state, length=EVERY)[0]

    params = NETWORK.init(jax.random.key(0), batch[0][:1])["params"]
    state, tracked = (params, estimator.init(params), tx.init(params)), None
    history: dict[str, list[float]] = {name: [] for name in ("step", "loss", "gradient_norm", "eigenvalue", "lanczos")}
    for step in range(0, STEPS + 1, EVERY):
        loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(state[0], batch)
        tracked = optax_sam.track_eigenvalue(loss_fn, state[0], [batch], tracked, num_products=PRODUCTS)
        values = step, loss, optax_sam.norm(gradient), tracked.value
        for name, value in zip(history, values, strict=False):
            history[name].append(float(value))
        if step % CHECKED == 0:
            history["lanczos"].append(float(optax_sam.hessian_eigenvalues(loss_fn, state[0], [batch]).values[0]))
        state = steps(state)
        bar.update(EVERY)
    return history


def of_edge(name: str, run: Mapping[str, list[float]]) -> tuple[float, float, float]:
    """The largest eigenvalue relative to its edge in the last quarter: median, 5 and 95 per cent."""
    last, rho = 3 * len(run["step"]) // 4, RHO if "SAM" in name else 0.0
    edge = np.array(optax_sam.sam_edge(np.array(run["gradient_norm"]), LEARNING_RATE, rho))
    low, median, high = np.percentile((np.array(run["eigenvalue"]) / edge)[last:], (5, 50, 95)).tolist()
    return median, low, high


def tracking_error(run: Mapping[str, list[float]]) -> float:
    """The largest relative difference between the tracked eigenvalue and that of Lanczos."""
    tracked = np.array(run["eigenvalue"][:: CHECKED // EVERY])
    return float(np.max(np.abs(tracked / run["lanczos"] - 1)))


def draw(runs: Mapping[str, Mapping[str, list[float]]]) -> Figure:
    """The eigenvalues with their edges, the loss, and the norm of the gradient."""
    figure = plt.figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplot_mosaic([["eigenvalue", "loss"], ["eigenvalue", "norm"]], width_ratios=[1.7, 1])
    for name, run in runs.items():
        color, step = COLORS[name], np.array(run["step"])
        width = 1.5 if "SAM" in name else 3.5  # so that it shows under late SAM before the switch
        axes["eigenvalue"].plot(step, run["eigenvalue"], color=color, lw=width, label=name)
        if name == "SAM":
            edge = optax_sam.sam_edge(np.array(run["gradient_norm"]), LEARNING_RATE, RHO)
            axes["eigenvalue"].plot(step, edge, color=color, ls=":", lw=1.2, label="edge of SAM")
        axes["loss"].semilogy(step, run["loss"], color=color, lw=width)
        axes["norm"].semilogy(step, run["gradient_norm"], color=color, lw=width)
    axes["eigenvalue"].axhline(2 / LEARNING_RATE, color=COLORS["gradient descent"], ls=":", lw=1.2, label="2/η")
    axes["eigenvalue"].legend(frameon=False, fontsize=9)
    titles = {"eigenvalue": "largest eigenvalue of the Hessian", "loss": "training loss", "norm": "‖g‖"}
    for key, title in titles.items():
        axes[key].set_title(title, fontsize=10)
    for key in ("eigenvalue", "norm"):
        axes[key].set_xlabel("step")
    style.tidy(*axes.values())
    axes["eigenvalue"].set_ylim(0, 1.35 * 2 / LEARNING_RATE)
    return figure


def main() -> None:
    data = datasets.load("digits", pathlib.Path())
    batch = data.train_images, data.train_labels
    with tqdm.tqdm(total=len(LINKS) * (STEPS + EVERY), unit=" steps") as bar:
        runs = {name: followed(link, batch, bar) for name, link in LINKS.items()}
    for name, run in runs.items():
        median, low, high = of_edge(name, run)
        error = 100 * tracking_error(run)
        print(f"{name:<18} λ / edge in the end {median:.2f} ({low:.2f} to {high:.2f}), tracked within {error:.2f} %")
    short = {
        name: {key: [float(f"{x:.5g}") for x in values] for key, values in run.items()} for name, run in runs.items()
    }
    results = {"command": "python -m benchmarks.edge", **timing.environment(), "steps": STEPS, "runs": short}
    results |= {"learning_rate": LEARNING_RATE, "rho": RHO}
    (RESULTS / "edge.json").write_text(json.dumps(results) + "\n")
    draw(runs).savefig(RESULTS / "edge.png", dpi=130)


if __name__ == "__main__":
    main()
