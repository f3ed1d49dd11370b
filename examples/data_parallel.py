"""mSAM across the devices of this machine, three ways, with the same params at the end.

    python examples/data_parallel.py                                  # on a CPU: pretends that it is four devices

Each device takes its own ascents from its own part of the batch, one per micro-batch and all at the same params; one
mean of the gradients is the only communication. The three ways differ in who writes the map over devices: nobody
(``jax.jit`` on a batch that is sharded over an Explicit mesh), ``jax.shard_map``, or ``jax.pmap``.
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from examples.training import datasets, models

LINK = optax_sam.sam(rho=0.05)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
MODEL = models.MLP()
Step = Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]


def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    images, labels = batch
    logits = jnp.asarray(MODEL.apply({"params": params}, images))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_step(**options: Any) -> Step:
    """One training step; the options say where the micro-batches are."""
    gradient = optax_sam.value_and_grad(loss_fn, LINK, **options)

    def step(params, state, batch):
        loss, grads = gradient(params, batch)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def with_jit(num_devices: int, num_micro_batches: int) -> tuple[Step, Callable[[Any], Any]]:
    """No map: the estimator makes one over the axis of the mesh that the batch is sharded over."""
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Explicit,))
    step = jax.jit(make_step(num_micro_batches=num_micro_batches, axis_name="data"), donate_argnums=(0, 1))
    return step, lambda batch: jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def with_shard_map(num_devices: int, num_micro_batches: int) -> tuple[Step, Callable[[Any], Any]]:
    """The step is what one device does; params and state are replicated."""
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, data = PartitionSpec(), PartitionSpec("data")
    step = make_step(num_micro_batches=num_micro_batches, axis_name="data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(everywhere, everywhere, data), out_specs=everywhere)
    return jax.jit(mapped, donate_argnums=(0, 1)), lambda batch: jax.device_put(batch, NamedSharding(mesh, data))


def with_pmap(num_devices: int, num_micro_batches: int) -> tuple[Step, Callable[[Any], Any]]:
    """The same, with a leading axis of devices on the batch, and on what comes out."""
    step = make_step(num_micro_batches=num_micro_batches, axis_name="data")
    mapped = jax.pmap(step, axis_name="data", in_axes=(None, None, 0), out_axes=None)
    return mapped, lambda batch: jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)


WAYS = {"sharded jit": with_jit, "shard_map": with_shard_map, "pmap": with_pmap}


def train(way: str, data: datasets.Dataset, settings: argparse.Namespace) -> tuple[Any, float, float]:
    """Trains one network; returns the params, the loss of the last step and the seconds of a step."""
    step, place = WAYS[way](jax.device_count(), settings.micro_batches)
    params = MODEL.init(jax.random.key(0), jnp.asarray(data.train_images[:1]))["params"]
    state, loss = OPTIMIZER.init(params), jnp.nan
    steps_per_epoch = len(data.train_images) // settings.batch_size
    seconds = []
    with tqdm.tqdm(total=settings.epochs * steps_per_epoch, desc=way, disable=None, leave=False) as bar:
        for epoch in range(settings.epochs):
            order = np.random.default_rng(epoch).permutation(len(data.train_images))
            for rows in order[: steps_per_epoch * settings.batch_size].reshape(steps_per_epoch, -1):
                start = time.perf_counter()
                params, state, loss = step(params, state, place((data.train_images[rows], data.train_labels[rows])))
                jax.block_until_ready(loss)
                seconds.append(time.perf_counter() - start)
                bar.update()
    return params, float(loss), float(np.median(seconds))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128, help="of all devices together")
    parser.add_argument("--micro-batches", type=int, default=2, help="of each device")
    parser.add_argument("--cpu-devices", type=int, default=4, help="where there is no accelerator")
    settings = parser.parse_args(arguments)
    for name in ("epochs", "batch_size", "micro_batches", "cpu_devices"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(settings, name)}")
    jax.config.update("jax_num_cpu_devices", settings.cpu_devices)
    devices = jax.device_count()
    data = datasets.load("digits", pathlib.Path("data"))
    if settings.batch_size > len(data.train_images):
        parser.error(f"--batch-size {settings.batch_size} is more than {len(data.train_images)} images")
    if settings.batch_size % (devices * settings.micro_batches):
        parser.error(
            f"--batch-size {settings.batch_size} must be divisible by {devices} devices × {settings.micro_batches} "
            "micro-batches"
        )

    print(f"digits, {devices} × {jax.devices()[0].device_kind}, {settings.micro_batches} micro-batches on each")
    print(f"{'':<14}{'last loss':>12}{'norm of params':>18}{'largest difference':>21}{'ms a step':>11}")
    first = None
    for way in WAYS:
        params, loss, seconds = train(way, data, settings)
        vector = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))])
        first = vector if first is None else first
        difference = np.max(np.abs(vector - first))
        print(f"{way:<14}{loss:>12.7f}{np.linalg.norm(vector):>18.7f}{difference:>21.1e}{1e3 * seconds:>11.2f}")


if __name__ == "__main__":
    main()
