"""mSAM across devices, three ways, with the same params at the end: the map is nobody's, ``shard_map``'s or ``pmap``'s.

python examples/data_parallel.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import optax_sam

jax.config.update("jax_num_cpu_devices", 4)  # where there is no accelerator, the CPU pretends to be four devices
images, labels = load_digits(return_X_y=True)
images, test = images.astype(np.float32) / 16, slice(1344, None)
everywhere, data = PartitionSpec(), PartitionSpec("data")
optimizer = optax.sgd(0.1, momentum=0.9)


def logits_of(params, x):
    return jax.nn.relu(x @ params["hidden"]) @ params["output"]


def loss_fn(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, batch[0]), batch[1]).mean()


# Each device takes two ascents from its own part of the batch; one mean of gradients is the only communication.
own = optax_sam.value_and_grad(loss_fn, optax_sam.sam(rho=0.05), num_micro_batches=2, axis_name="data")


def step(params, state, batch):
    loss, grads = own(params, batch)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, loss


auto, explicit = (
    jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit)
)
mapped = jax.shard_map(step, mesh=auto, in_specs=(everywhere, everywhere, data), out_specs=everywhere)
ways = {  # the step, and where a batch goes
    "Explicit mesh": (jax.jit(step), NamedSharding(explicit, data)),
    "shard_map": (jax.jit(mapped), NamedSharding(auto, data)),
    "pmap": (jax.pmap(step, "data", in_axes=(None, None, 0), out_axes=None), None),
}
for name, (run, place) in ways.items():
    first, second = jax.random.split(jax.random.key(0))
    params = {"hidden": jax.random.normal(first, (64, 128)) / 6, "output": jax.random.normal(second, (128, 10)) / 8}
    state = optimizer.init(params)
    for rows in np.split(np.random.default_rng(0).permutation(1344 * 10) % 1344, 105):
        parts = images[rows], labels[rows]
        split = jax.tree.map(lambda x: x.reshape(jax.device_count(), -1, *x.shape[1:]), parts)
        params, state, loss = run(params, state, split if place is None else jax.device_put(parts, place))
        jax.block_until_ready(loss)  # with more devices than cores, steps in a queue may wait for each other for ever
    params = jax.device_get(params)
    accuracy = 100 * np.mean(jnp.argmax(logits_of(params, images[test]), axis=-1) == labels[test])
    print(f"{name:<14} norm of params {optax.tree.norm(params):.6f}, test accuracy {accuracy:.1f} %")
