"""How should micro-batches be run, and what do loops and branches cost? With and without rewritten convolutions.

    python benchmarks/control_flow.py [--repeats 5]

CNN: 3×3 convolutions of 32, 64 and 64 channels, 32×32×3 images, batch 128. MLP: 784-1024-1024-10, batch 512. The rows
"as traced" leave the convolutions in loops and branches as JAX traces them. Results: results/control_flow.json.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing

import optax_sam


class CNN(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = images
        for width in (32, 64, 64):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(1024)(x))
        return nn.Dense(10)(x)


NETWORKS = {"CNN": (CNN(), (128, 32, 32, 3)), "MLP": (MLP(), (512, 28, 28, 1))}


def steps(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """The compiled gradient estimates to compare, by name."""
    images = jax.random.normal(jax.random.key(0), shape)
    batch = images, jnp.arange(len(images)) % 10
    params = model.init(jax.random.key(1), images)

    def loss_fn(params, batch):
        logits = jnp.asarray(model.apply(params, batch[0]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def compiled(link, **options):
        estimator = optax_sam.gradient_estimator(loss_fn, link, **options)
        state = estimator.init(params)
        program = jax.jit(estimator.value_and_grad).lower(params, state, batch).compile()
        return lambda: program(params, state, batch)

    sam = optax_sam.sam(0.05)
    late = optax_sam.switch_by(lambda step: step >= 0, [optax.identity(), sam])
    functions = {"plain": compiled(optax.identity()), "SAM": compiled(sam), "SAM in a branch": compiled(late)}
    for num_micro_batches in (2, 8, 32):
        for strategy in ("scan", "unroll", "vmap"):
            name = f"mSAM, M = {num_micro_batches}, {strategy}"
            functions[name] = compiled(sam, num_micro_batches=num_micro_batches, strategy=strategy)
    unchanged = lambda function: function  # noqa: E731
    with (
        mock.patch("optax_sam.switching.canonicalized", unchanged),
        mock.patch("optax_sam.estimator.canonicalized", unchanged),
    ):
        functions["SAM in a branch, as traced"] = compiled(late)
        functions["mSAM, M = 8, scan, as traced"] = compiled(sam, num_micro_batches=8, strategy="scan")
    return functions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    results = {"command": " ".join(["python", *sys.argv]), **timing.environment(), "networks": {}}
    for network, (model, shape) in NETWORKS.items():
        seconds = timing.interleaved(steps(model, shape), repeats)
        ratios = timing.ratios(seconds, "plain")
        print(f"{network:<30}{'ms':>9}{'× plain':>10}{'quartiles':>16}")
        for name, (median, low, high) in ratios.items():
            milliseconds = 1e3 * float(np.median(seconds[name]))
            print(f"{name:<30}{milliseconds:>9.1f}{median:>10.2f}{f'{low:.2f} - {high:.2f}':>16}")
        print()
        rows = {name: {"seconds": values.tolist(), "ratio": ratios[name][0]} for name, values in seconds.items()}
        results["networks"][network] = rows
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "control_flow.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
