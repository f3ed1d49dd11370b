"""What SAM does late in training, small enough to see all of it: a valley in the plane, and digits with 100 seeds."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import optax_sam
from benchmarks.papers import training
from benchmarks.papers.descent import descend
from benchmarks.papers.reproduction import rounded
from examples.training import datasets, models

VALLEY_RATE, VALLEY_RHO, VALLEY_START, VALLEY_SWITCH, VALLEY_STEPS = 0.4, 0.2, (2.0, 1e-3), 10, 60
LEARNING_RATE, MOMENTUM, BATCH_SIZE = 0.1, 0.9, 128  # on digits


def valley(point: jax.Array) -> jax.Array:
    """½u²v²: minima where v = 0, of sharpness u²."""
    return 0.5 * (point[0] * point[1]) ** 2


def descend_valley(link: optax.GradientTransformation, start: Any, steps: int) -> jax.Array:
    """The path in the valley, (steps + 1, 2), of gradient descent behind the link."""
    return descend(valley, start, link, optax.sgd(VALLEY_RATE), steps)


def usam_factor(sharpness: Any, rho: float = VALLEY_RHO) -> Any:
    """What a small v is multiplied with in a step."""
    return np.abs(1 - VALLEY_RATE * sharpness * (1 + rho * sharpness))


def largest_stable(link: optax.GradientTransformation) -> float:
    """The largest u, to 1e-4, from which a small v shrinks."""
    u = np.linspace(1.5, 2.5, 10_001)
    starts = np.stack([u, np.full_like(u, 1e-9)], axis=1)
    paths = jax.vmap(lambda start: descend_valley(link, start, 10))(starts)
    return float(u[np.abs(paths[:, -1, 1]) < np.abs(paths[:, 0, 1])].max())


def run_valley() -> dict[str, Any]:
    """Paths, factors and thresholds in float64."""
    usam = optax_sam.usam(VALLEY_RHO)
    links = {
        "GD": optax.identity(),
        "USAM": usam,
        "late USAM": optax_sam.late(usam, VALLEY_SWITCH),
        "late SAM": optax_sam.late(optax_sam.sam(VALLEY_RHO), VALLEY_SWITCH),
    }
    with jax.enable_x64(True):
        paths = {name: np.asarray(descend_valley(link, VALLEY_START, VALLEY_STEPS)) for name, link in links.items()}
        limits = {name: largest_stable(links[name]) for name in ("GD", "USAM")}
        u = np.linspace(1.76, 2.23, 200)
        ends = jax.vmap(lambda start: descend_valley(usam, start, 2_000)[-1])(
            np.stack([u, np.full_like(u, 1e-3)], axis=1)
        )
    late = paths["late USAM"]
    ratios = np.abs(late[1:, 1] / late[:-1, 1])
    line = np.linspace(late[VALLEY_SWITCH], late[-1], 101)
    losses = _losses(line)
    rho, rate = VALLEY_RHO, VALLEY_RATE
    return {
        "paths": {name: path.tolist() for name, path in paths.items()},
        "switch": VALLEY_SWITCH,
        "growth": float(ratios[VALLEY_SWITCH]),
        "exact_growth": float(usam_factor(late[VALLEY_SWITCH, 0] ** 2)),
        "decay": float(ratios[-1]),
        "exact_decay": float(usam_factor(late[-1, 0] ** 2)),
        "barrier": float(losses.max() - max(losses[0], losses[-1])),
        "limits": limits,
        "exact_limits": {
            "GD": float(np.sqrt(2 / rate)),
            "USAM": float(np.sqrt((np.sqrt(1 + 8 * rho / rate) - 1) / (2 * rho))),
        },
        "ends": {"starts": len(u), "largest": float(np.abs(ends[:, 0]).max()), "loss": float(_losses(ends).max())},
    }


def _losses(points: Any) -> np.ndarray:
    return 0.5 * np.prod(np.asarray(points), axis=-1) ** 2


class Escape(NamedTuple):
    """Sizes of the experiment with many seeds.

    Attributes:
        seeds: of params and batches.
        before: steps of SGD.
        after: steps of what comes then.
        width: of the hidden layers.
        every: steps between two measurements of the loss.
        rise: steps after the switch that count as the rise of the loss; with 30 it is at half of its peak.
    """

    seeds: int = 100
    before: int = 500
    after: int = 600
    width: int = 32
    every: int = 2
    rise: int = 30


def escape_task(sizes: Escape) -> training.Task:
    """Digits, without label smoothing, and a small network."""
    return training.Task(models.MLP(width=sizes.width), datasets.load("digits", pathlib.Path()), epochs=0)


def run_escape(task: training.Task, link: optax.GradientTransformation, sizes: Escape) -> dict[str, Any]:
    """The loss of the training set around the step of the switch, and the sharpness at the end; every seed at once."""
    images, labels = jnp.asarray(task.data.train_images), jnp.asarray(task.data.train_labels)
    tx, grad_fn = optax.chain(link, optax.sgd(LEARNING_RATE, MOMENTUM)), jax.grad(task.clean_loss_fn)

    def step(carry, chosen):
        params, state = carry
        batch = images[chosen], labels[chosen]
        updates, state = tx.update(grad_fn(params, batch), state, params, grad_fn=grad_fn, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    def steps(carry, chosen):
        carry, _ = jax.lax.scan(step, carry, chosen)
        return carry, task.clean_loss_fn(carry[0], (images, labels))

    @jax.jit
    @jax.vmap
    def train(params, chosen):
        (params, _), losses = jax.lax.scan(steps, (params, tx.init(params)), chosen)
        return params, losses

    records = (sizes.before + sizes.after) // sizes.every
    shape = sizes.seeds, records, sizes.every, BATCH_SIZE
    chosen = jax.random.randint(jax.random.key(0), shape, 0, len(images))
    starts = jax.vmap(lambda seed: task.init(seed))(jnp.arange(sizes.seeds))
    params, losses = jax.device_get(train(starts, chosen))
    batches = [(images, labels)]
    eigenvalues = [
        float(optax_sam.hessian_eigenvalues(task.clean_loss_fn, _member(params, seed), batches, rtol=1e-2).values[0])
        for seed in tqdm.trange(sizes.seeds, desc="sharpness", leave=False, disable=None)
    ]
    return escape_statistics(losses, sizes) | {"eigenvalue": eigenvalues}


def _member(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def escape_statistics(losses: np.ndarray, sizes: Escape) -> dict[str, Any]:
    """From (seeds, records) losses to curves around the switch, and to numbers for each seed."""
    switch = sizes.before // sizes.every - 1
    window = losses[:, max(switch - 25, 0) :]
    rising = losses[:, switch : switch + sizes.rise // sizes.every + 1]
    steps = sizes.every * np.arange(rising.shape[1])
    curves = {"mean": window.mean(axis=0)}
    curves |= {name: np.quantile(window, q, axis=0) for name, q in (("low", 0.05), ("high", 0.95))}
    return {
        "steps": [sizes.every * (index - min(switch, 25)) for index in range(window.shape[1])],
        "curves": {name: rounded(curve, digits=4) for name, curve in curves.items()},
        "at_switch": losses[:, switch].tolist(),
        "peak": losses[:, switch + 1 :].max(axis=1).tolist(),
        "end": losses[:, -1].tolist(),
        "fitted_steps": sizes.rise,
        "rate": np.polyfit(steps, np.log(rising).T, 1)[0].tolist(),
        "exponential_fit": straightness(steps, np.log(rising)).tolist(),
        "linear_fit": straightness(steps, rising).tolist(),
    }


def straightness(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """R² of a straight line through each of the rows."""
    slopes, offsets = np.polyfit(x, rows.T, 1)
    residuals = rows - (slopes[:, None] * x + offsets[:, None])
    return 1 - residuals.var(axis=1) / rows.var(axis=1)
