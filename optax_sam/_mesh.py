"""Meshes: what arrays on an Explicit mesh need and others do not, and a function on each of its devices.

Only Explicit axes show in the types of traced arrays. On an Auto mesh XLA decides, and nothing is known here.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from optax_sam._axes import Axes, shown


def axes_in(spec: Iterable[Any]) -> Axes:
    """The mesh axes in a PartitionSpec."""
    return tuple(axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part))


def split_leading(leaf: Any, parts: int) -> jax.Array:
    """The leaf (B, ...) as (parts, B / parts, ...), its examples still sharded over what they were sharded over."""
    leaf = jnp.asarray(leaf)
    mesh, spec = jax.typeof(leaf).sharding.mesh, jax.typeof(leaf).sharding.spec
    devices = math.prod(mesh.shape[axis] for axis in axes_in(spec[:1]))
    if leaf.shape[0] % (devices * parts):
        spread = f" × {devices} devices" if devices > 1 else ""
        raise ValueError(f"batch_size={leaf.shape[0]} must be divisible by num_micro_batches={parts}{spread}.")
    sharding = NamedSharding(mesh, PartitionSpec(None, *spec)) if any(spec) else None
    return jnp.reshape(leaf, (parts, leaf.shape[0] // parts, *leaf.shape[1:]), out_sharding=sharding)


def first_entry(stack: jax.Array) -> jax.Array:
    """``stack[0]``, gathered first where the leading axis is sharded: an Explicit mesh refuses to index it."""
    mesh, spec = jax.typeof(stack).sharding.mesh, jax.typeof(stack).sharding.spec
    if spec[0]:
        stack = jax.sharding.reshard(stack, NamedSharding(mesh, PartitionSpec(None, *spec[1:])))
    return stack[0]


def mesh_of(stacks: Any) -> contextlib.AbstractContextManager[Any]:
    """The Explicit mesh of the arrays as a context, without which ``vmap`` of a branch fails on what is sharded."""
    meshes = {jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(stacks)}
    explicit = [mesh for mesh in meshes if mesh.explicit_axes]
    return jax.sharding.use_abstract_mesh(explicit[0]) if explicit else contextlib.nullcontext()


def indices_like(stacks: Any, size: int) -> jax.Array:
    """The numbers 0 to size − 1, spread over an Explicit mesh as the leading axes of the arrays are: for ``vmap``."""
    indices = jnp.arange(size)
    shardings = (jax.typeof(leaf).sharding for leaf in jax.tree.leaves(stacks))
    spread = [NamedSharding(x.mesh, PartitionSpec(x.spec[0])) for x in shardings if x.mesh.explicit_axes]
    if any(sharding.spec[0] for sharding in spread) and jax.__version_info__ < (0, 10, 2):
        raise NotImplementedError(
            f"Micro-batches that are spread over an Explicit mesh need JAX 0.10.2; this is {jax.__version__}. "
            "Use the estimator with axis_name, or axis_types=(AxisType.Auto,) for the mesh."
        )
    return jax.sharding.reshard(indices, spread[0]) if spread else indices


def mesh_of_examples(batch: Any, others: Any, axes: Axes) -> AbstractMesh:
    """The Explicit mesh over whose ``axes`` the leading axis of the batch is sharded, and nothing else."""
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(batch)]
    elsewhere = _axes_of_arrays(others).union(*(axes_in(sharding.spec[1:]) for sharding in shardings))
    if {axes_in(sharding.spec[:1]) for sharding in shardings} != {axes} or elsewhere & set(axes):
        raise ValueError(
            f"axis_name={shown(axes)} must be a mapped axis, or one of an Explicit mesh that shards the examples and "
            f"nothing else; got a batch of {[str(sharding.spec) for sharding in shardings]}. Call this under "
            "jax.shard_map, or shard the batch."
        )
    return shardings[0].mesh


def _axes_of_arrays(tree: Any) -> set[str]:
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return {axis for array in arrays for axis in axes_in(jax.typeof(array).sharding.spec)}


def on_each_device(function: Callable[..., Any], mesh: AbstractMesh, axes: Axes) -> Callable[..., Any]:
    """``function(params, state, batch, *others)`` mapped over the devices that hold the examples of the batch."""

    def on_devices(params, state, batch, *others):
        leaves, structure = jax.tree.flatten(others)
        # shard_map takes arrays alone; flags, strings and None go around it.
        arrays = [x if isinstance(x, jax.Array) else None for x in leaves]

        def on_this_device(params, state, batch, arrays):
            merged = [own if array is None else array for own, array in zip(leaves, arrays, strict=True)]
            return function(params, state, batch, *structure.unflatten(merged))

        everywhere, examples = PartitionSpec(), PartitionSpec(axes)
        specs = everywhere, everywhere, examples, everywhere
        mapped = jax.shard_map(on_this_device, mesh=mesh, in_specs=specs, out_specs=everywhere, axis_names=set(axes))
        try:
            return mapped(params, state, batch, arrays)
        except Exception as error:
            error.add_note(
                f"loss_fn runs in a jax.shard_map over {shown(axes)}: it must not name that in out_sharding, nor close "
                "over arrays on the mesh, but take them as arguments."
            )
            raise

    return on_devices
