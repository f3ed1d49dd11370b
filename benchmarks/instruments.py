"""The instruments: time for networks of a million parameters, and what they show of SGD and SAM on digits.

python -m benchmarks.instruments
"""

import json
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import matplotlib
import numpy as np
import optax

import optax_sam
from benchmarks import timing
from examples.training import datasets, models, style
from optax_sam.sharpness import plots

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

EXAMPLES, BATCH_SIZE, WARM_UP_EPOCHS = 2_048, 256, 3
REQUESTS = {"largest": {"k": 1}, "5 largest, 1 smallest": {"k": 5, "num_smallest": 1}}


class LeNet(nn.Module):
    """Two 3×3 convolutions with pooling, two dense layers: 1,025,866 params for 28×28 images."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for width in (32, 64):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(320)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


NETWORKS: dict[str, nn.Module] = {"MLP": models.MLP(width=670), "LeNet": LeNet()}


def loss_of(network: nn.Module) -> Any:
    def loss_fn(params, batch):
        logits: Any = network.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss_fn


def in_batches(images: np.ndarray, labels: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(images[start:][:size], labels[start:][:size]) for start in range(0, len(images) - size + 1, size)]


def train(network: nn.Module, batches: list[Any], link: optax.GradientTransformation, epochs: int) -> Any:
    """Params after SGD with momentum behind a link."""
    estimator, tx = optax_sam.gradient_estimator(loss_of(network), link), optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step(params, link_state, state, batch):
        _, grads, link_state = estimator.value_and_grad(params, link_state, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), link_state, state

    params = network.init(jax.random.key(0), batches[0][0][:1])["params"]
    link_state, state = estimator.init(params), tx.init(params)
    for _ in range(epochs):
        for batch in batches:
            params, link_state, state = step(params, link_state, state, batch)
    return params


def of_noise() -> list[Any]:
    """Ten noisy patterns, of the size of MNIST's images."""
    rng = np.random.default_rng(0)
    patterns, labels = rng.random((10, 28, 28, 1)), rng.integers(0, 10, EXAMPLES)
    images = patterns[labels] + rng.normal(scale=0.3, size=(EXAMPLES, 28, 28, 1))
    return in_batches(images.astype(np.float32), labels, BATCH_SIZE)


def eigenvalue_times() -> dict[str, dict[str, Any]]:
    """Seconds, with compilation, for the eigenvalues of networks that were trained a little; products, and values."""
    batches, rows = of_noise(), {}
    for name, network in NETWORKS.items():
        params = train(network, batches, optax.identity(), WARM_UP_EPOCHS)
        for request, options in REQUESTS.items():
            jax.clear_caches()
            jax.block_until_ready(params)
            start = time.perf_counter()
            found = optax_sam.hessian_eigenvalues(loss_of(network), params, batches, **options, progress=True)
            rows[f"{name}, {request}"] = {
                "params": sum(leaf.size for leaf in jax.tree.leaves(params)),
                "seconds": time.perf_counter() - start,
                "products": found.num_products,
                "converged": found.converged,
                "values": found.values.tolist(),
                "residuals": found.residuals.tolist(),
            }
    return rows


def draw() -> Figure:
    """On digits: density of the eigenvalues after SGD and after SAM, the line between them, the surface around SAM."""
    data = datasets.load("digits", pathlib.Path())
    network = models.MLP(width=64)
    batches = in_batches(data.train_images, data.train_labels, 128)
    links = {"SGD": optax.identity(), "SAM": optax_sam.sam(0.1)}
    ends = {name: train(network, batches, link, epochs=30) for name, link in links.items()}
    loss_fn = loss_of(network)
    figure, axes = plt.subplot_mosaic("SS\nLW", figsize=(9.5, 6.5), layout="constrained", height_ratios=(2, 3))
    for (name, params), color in zip(ends.items(), (style.PLAIN, style.SAM), strict=True):
        density = optax_sam.spectral_density(loss_fn, params, batches, num_products=60, progress=True)
        positions = np.linspace(-0.1, 1.5, 800)
        axes["S"].semilogy(positions, density.smoothed(positions, width=0.012), color=color, label=name)
    axes["S"].set(title="density of the eigenvalues", xlabel="eigenvalue", ylim=(1e-4, 1e2))
    axes["S"].legend(frameon=False)
    style.tidy(axes["S"])
    line = optax_sam.loss_along(loss_fn, ends["SAM"], ends["SGD"], batches, progress=True)
    plots.plot_line(line, axes=axes["L"]).set_title("from SAM (0) to SGD (1)")
    surface = optax_sam.loss_surface(loss_fn, ends["SAM"], batches, progress=True)
    plots.plot_surface(surface, axes=axes["W"]).set_title("around SAM, filter-normalized")
    return figure


def main() -> None:
    rows = eigenvalue_times()
    print(f"{'eigenvalues':<30}{'params':>10}{'seconds':>9}{'products':>10}  converged")
    for name, row in rows.items():
        print(f"{name:<30}{row['params']:>10,}{row['seconds']:>9.1f}{row['products']:>10}  {row['converged']}")
    results = {
        "command": "python -m benchmarks.instruments",
        **timing.environment(),
        "examples": EXAMPLES,
        "runs": rows,
    }
    folder = pathlib.Path(__file__).parent / "results"
    (folder / "instruments.json").write_text(json.dumps(results, indent=1) + "\n")
    draw().savefig(folder / "instruments.png", dpi=130)


if __name__ == "__main__":
    main()
