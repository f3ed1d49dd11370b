"""What do loops and branches cost a convolutional network? With and without the rewriting of their convolutions.

    python benchmarks/control_flow.py [--repeats 5] [--batch-size 128]

The network has 3×3 convolutions of 32, 64 and 64 channels on 32×32×3 images. Results: results/control_flow.json.
"""

import argparse
import json
import pathlib
import sys
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    settings = parser.parse_args()
    model = CNN()
    images = jax.random.normal(jax.random.key(0), (settings.batch_size, 32, 32, 3))
    batch = images, jnp.arange(settings.batch_size) % 10
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
    functions = {
        "plain": compiled(optax.identity()),
        "SAM": compiled(sam),
        "SAM in a branch": compiled(late),
        "mSAM, M = 8, scan": compiled(sam, num_micro_batches=8, strategy="scan"),
        "mSAM, M = 8, unroll": compiled(sam, num_micro_batches=8, strategy="unroll"),
        "mSAM, M = 8, vmap": compiled(sam, num_micro_batches=8, strategy="vmap"),
    }
    unchanged = lambda function: function  # noqa: E731
    with (
        mock.patch("optax_sam.switching.canonicalized", unchanged),
        mock.patch("optax_sam.estimator.canonicalized", unchanged),
    ):
        functions["SAM in a branch, as traced"] = compiled(late)
        functions["mSAM, M = 8, scan, as traced"] = compiled(sam, num_micro_batches=8, strategy="scan")

    seconds = timing.interleaved(functions, settings.repeats)
    ratios = timing.ratios(seconds, "plain")
    print(f"{'step':<30}{'ms':>9}{'× plain':>10}{'quartiles':>16}")
    for name, (median, low, high) in ratios.items():
        milliseconds = 1e3 * float(jnp.median(seconds[name]))
        print(f"{name:<30}{milliseconds:>9.1f}{median:>10.2f}{f'{low:.2f} - {high:.2f}':>16}")
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    rows = {name: {"seconds": values.tolist(), "ratio": ratios[name][0]} for name, values in seconds.items()}
    header = {"command": " ".join(["python", *sys.argv]), **timing.environment(), "settings": vars(settings)}
    (folder / "control_flow.json").write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
