"""Ways to run a function on eight devices: under a map with the axis "data", or under ``jax.jit`` on a sharded batch.

A place runs ``function(*replicated, batch)`` with the batch spread over the devices, and returns what one of them does.
What one device computes by the formulas is in :func:`on_one_device`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers import references
from tests.helpers.problems import mlp_batch, mlp_loss, mlp_params, split

DEVICES = 8
RHO = 0.2
PARAMS, BATCH = mlp_params(), mlp_batch(size=32)
GRAD_FN = jax.grad(mlp_loss)


def with_pmap(function, *replicated, batch=BATCH):
    mapped = jax.pmap(function, axis_name="data", in_axes=(*[None] * len(replicated), 0))
    return jax.tree.map(lambda x: x[0], jax.device_get(mapped(*replicated, split(batch, DEVICES))))


@functools.cache
def vmapped(function, num_replicated):
    return jax.jit(jax.vmap(function, axis_name="data", in_axes=(*[None] * num_replicated, 0)))


def with_vmap(function, *replicated, batch=BATCH):
    outputs = vmapped(function, len(replicated))(*replicated, split(batch, DEVICES))
    return jax.tree.map(lambda x: x[0], jax.device_get(outputs))


@functools.cache
def shard_mapped(function, num_replicated, mesh, check_vma):
    specs = (*[PartitionSpec()] * num_replicated, PartitionSpec("data"))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma))


def with_shard_map(check_vma, axis_type=AxisType.Auto):
    def run(function, *replicated, batch=BATCH):
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
            return jax.device_get(shard_mapped(function, len(replicated), mesh, check_vma)(*replicated, batch))

    return run


def with_jit(axis_type):
    def run(function, *replicated, batch=BATCH):
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            replicated = jax.device_put(replicated, NamedSharding(mesh, PartitionSpec()))
            batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
            return jax.device_get(jax.jit(function)(*replicated, batch))

    return run


# What a link can tell apart: maps that do not track what varies, vmap, and those that do.
KINDS = {"pmap": with_pmap, "vmap": with_vmap, "shard_map": with_shard_map(check_vma=True)}
MAPS = KINDS | {
    "shard_map unchecked": with_shard_map(check_vma=False),
    "shard_map explicit": with_shard_map(check_vma=True, axis_type=AxisType.Explicit),
}
PLACES = MAPS | {"jit": with_jit(AxisType.Auto), "jit explicit": with_jit(AxisType.Explicit)}
every_map = pytest.mark.parametrize("run", MAPS.values(), ids=MAPS)
every_kind_of_map = pytest.mark.parametrize("run", KINDS.values(), ids=KINDS)


def own(params):
    """The params, marked as this member's own where shard_map would otherwise sum their gradient."""
    checked = "data" in jax.typeof(jax.lax.axis_index("data")).mat.varying
    return jax.lax.pcast(params, "data", to="varying") if checked else params


def own_gradient(link):
    """``link`` in the chain form, fed with this member's own gradient."""
    return lambda params, state, batch: link.update(
        GRAD_FN(own(params), batch), state, params, grad_fn=GRAD_FN, batch=batch
    )


@functools.cache
def compiled(loss_fn):
    return jax.jit(jax.value_and_grad(loss_fn))


def on_one_device(method, ascents, loss_fn=mlp_loss, params=PARAMS, batch=BATCH, weights=None):
    """The loss, and the gradient by a method of the references, with an ascent for each of equal parts of the batch."""
    w, tree_of = ravel_pytree(params)
    chosen = np.arange(ascents) if weights is None else np.flatnonzero(weights)
    parts = [jax.tree.map(lambda x, i=i: x[i], split(batch, ascents)) for i in chosen]
    mean = functools.partial(np.average, axis=0, weights=None if weights is None else np.asarray(weights)[chosen])

    def gradient_of(part):
        return lambda w: np.asarray(ravel_pytree(compiled(loss_fn)(tree_of(jnp.float32(w)), part)[1])[0], np.float64)

    loss = mean([compiled(loss_fn)(params, part)[0] for part in parts])
    gradient = mean([method([gradient_of(part)], np.asarray(w, np.float64), RHO) for part in parts])
    return jnp.float32(loss), tree_of(jnp.float32(gradient))


def of_each_part(link, loss_fn, parts, weights=None):
    """(params, state, batch) → loss, gradient and state of a link: the mean of what it does with each part of a batch.

    Floats are averaged, with the weights of the parts; what is not float is that of the first part.
    """
    weights = np.ones(parts) if weights is None else np.asarray(weights)
    chosen = np.flatnonzero(weights)

    def mean(x):
        is_float = jnp.issubdtype(x.dtype, jnp.inexact)
        return jnp.average(x, axis=0, weights=jnp.asarray(weights[chosen], x.dtype)) if is_float else x[0]

    def estimate(params, state, batch):
        def of_one(part):
            loss, clean = jax.value_and_grad(loss_fn)(params, part)
            return loss, *link.update(clean, state, params, grad_fn=jax.grad(loss_fn), batch=part)

        return jax.tree.map(mean, jax.vmap(of_one)(jax.tree.map(lambda x: x[chosen], split(batch, parts))))

    return estimate


def three_calls(links, estimate_of):
    """(params, batch) → by link, what ``estimate_of(link)(params, state, batch)`` returns in three calls in a row."""

    def of_one(link, params, batch):
        def call(state, _):
            results = estimate_of(link)(params, state, batch)
            return results[-1], results

        return jax.lax.scan(call, link.init(params), length=3)[1]

    return lambda params, batch: {name: of_one(link, params, batch) for name, link in links.items()}


def plain(gradients, w, rho):
    """No ascent, for :func:`on_one_device`."""
    return references.mean(gradients, w)
