r"""Sharding: links for params that are sharded over a mapped axis, as in hand-written tensor parallelism or FSDP.

Under ``jax.jit`` arrays are global however they are sharded, and so are their norms: nothing is needed there.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, PartitionSpec

from optax_sam._axes import AxisNames, Shards, as_axes
from optax_sam._checks import as_link, check_mask


def sharded(
    inner: optax.GradientTransformation, axis_name: AxisNames, *, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""``inner`` for params whose leaves are sharded over a mapped axis: its norms are those of all shards together.

    .. math::
        \|g\|_2^2 = \sum_{\text{replicated leaves}} \|g_i\|_2^2
            + \sum_{\text{members}} \sum_{\text{sharded leaves}} \|g_i\|_2^2

    For ``shard_map`` with params that differ between the members of an axis. Each norm costs two scalar reductions over
    it. Norms that other transformations take (``optax.clip_by_global_norm``, ``optax.tree.norm``, a ``projection``)
    remain those of the shard; a link of your own gets the keyword ``shards``, for :func:`optax_sam.norm` and
    :func:`optax_sam.vdot`. Stands around the link alone, ``optax.chain(sharded(sam(rho), "model"), optax.adam(1e-3))``;
    for two axes with a mask each, around itself.

    Where ``shard_map`` does not track what varies (``check_vma=False``, ``pmap``) it needs the ``mask``, and a loss
    that does not communicate: JAX's own gradients through ``psum`` are too large there by the size of the axis.

    Args:
        inner: link with ascents and renormalizations of this package; in ``micro_batched`` it stands inside,
            ``micro_batched(sharded(link, "model"), "data")``.
        axis_name: the mapped axis over whose members params are sharded, or several.
        mask: which leaves are sharded, a tree of booleans with the structure of the params (or a prefix of it), or a
            function from such a tree to one. None: those that vary over the axis, which is known under ``shard_map``
            with ``check_vma=True``. False: none, as for a network of its own on each member.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with the state of ``inner``.

    Raises:
        TypeError: inner is not a transformation, axis_name is not made of strings, or mask is not made of booleans.
        ValueError: at ``update``: mask is None and the axis does not belong to a ``shard_map`` with
            ``check_vma=True``.

    Example:
        >>> import jax, jax.numpy as jnp, optax_sam
        >>> link = sharded(optax_sam.sam(rho=0.5), "model", mask=True)
        >>> def update(w):  # two members with one weight each
        ...     grad_fn = jax.grad(lambda w: 0.5 * w**2)
        ...     return link.update(grad_fn(w), link.init(w), w, grad_fn=grad_fn)[0]
        >>> print(jax.vmap(update, axis_name="model")(jnp.array([3.0, 4.0])))
        [3.3 4.4]
    """
    inner = as_link("inner", inner)
    check_mask(mask)
    shards = Shards(as_axes(axis_name), mask)

    def update(updates, state, params=None, **extra_args):
        declared = (*extra_args.pop("shards", ()), shards)
        return inner.update(updates, state, params, shards=declared, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def mesh_axes_of_examples(batch: Any, others: Any) -> tuple[AbstractMesh, tuple[str, ...]]:
    """The mesh, and its axes over which the leading axis of all leaves of batch is sharded, and nothing else is.

    Known for the Explicit axes of a mesh only; none for a batch on one device or on an Auto mesh.
    """
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(batch)]
    examples = {(sharding.mesh, axes_in(sharding.spec[:1])) for sharding in shardings}
    rest = [sharding.spec[1:] for sharding in shardings]
    rest += [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(others) if isinstance(leaf, jax.Array)]
    if len(examples) != 1:
        return jax.sharding.get_abstract_mesh(), ()
    [(mesh, axes)] = examples
    return mesh, () if any(set(axes) & set(axes_in(spec)) for spec in rest) else axes


def axes_in(spec: Iterable[Any]) -> tuple[str, ...]:
    """The mesh axes in a PartitionSpec."""
    return tuple(axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part))


def num_devices(mesh: AbstractMesh, axes: Iterable[str]) -> int:
    """The number of devices along the axes of a mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)


def on_each_device(function: Callable[..., Any], mesh: AbstractMesh, axes: tuple[str, ...]) -> Callable[..., Any]:
    """``function(params, state, batch, others)`` mapped over the devices that hold the examples of the batch."""

    def mapped(params, state, batch, others):
        leaves, structure = jax.tree.flatten(others)
        arrays = [x if isinstance(x, jax.Array) else None for x in leaves]

        def member(params, state, batch, arrays):
            merged = [own if array is None else array for own, array in zip(leaves, arrays, strict=True)]
            return function(params, state, batch, jax.tree.unflatten(structure, merged))

        everywhere, examples = PartitionSpec(), PartitionSpec(axes)
        specs = everywhere, everywhere, examples, everywhere
        on_devices = jax.shard_map(member, mesh=mesh, in_specs=specs, out_specs=everywhere, axis_names=set(axes))
        try:
            return on_devices(params, state, batch, arrays)
        except Exception as error:
            error.add_note(
                f"The batch is sharded over {axes} of an Explicit mesh, so each device takes whole micro-batches, in a "
                f"jax.shard_map over {axes}: loss_fn must not name {axes} in out_sharding there, and arrays on the "
                "mesh must be passed to it as arguments instead of being closed over."
            )
            raise

    return mapped
