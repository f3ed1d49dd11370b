"""Ways to run a function on eight devices: under a map with the axis "data", or under ``jax.jit`` on a sharded batch.

A place runs ``function(*replicated, batch)`` with the batch spread over the devices, and returns what one of them does.
"""

import functools

import jax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_sam._jaxpr import varying_axes_of
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
MAPS = {"pmap": with_pmap, "vmap": with_vmap, "shard_map": with_shard_map(check_vma=True)}
PLACES = MAPS | {
    "shard_map unchecked": with_shard_map(check_vma=False),
    "shard_map explicit": with_shard_map(check_vma=True, axis_type=AxisType.Explicit),
    "jit": with_jit(AxisType.Auto),
    "jit explicit": with_jit(AxisType.Explicit),
}
SINCE_JAX_0_10_2 = pytest.mark.xfail(jax.__version_info__ < (0, 10, 2), raises=NotImplementedError, reason="refused")
every_map = pytest.mark.parametrize("run", MAPS.values(), ids=MAPS)


def on_mesh(function, in_specs, out_specs, check_vma=True, **axes):
    """The function under ``shard_map`` on a mesh with these axes, compiled."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma))


def together(functions):
    """One program for several functions of the same arguments, by name."""
    return lambda *args: {name: function(*args) for name, function in functions.items()}


def own(params):
    """The params, marked as this member's own where shard_map would otherwise sum their gradient."""
    checked = "data" in varying_axes_of(jax.typeof(jax.lax.axis_index("data")))
    return jax.lax.pcast(params, "data", to="varying") if checked else params


def own_gradient(link):
    """``link`` in the chain form, fed with this member's own gradient."""
    return lambda params, state, batch: link.update(
        GRAD_FN(own(params), batch), state, params, grad_fn=GRAD_FN, batch=batch
    )
