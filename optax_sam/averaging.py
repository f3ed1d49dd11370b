r"""Averaging: one link per micro-batch, then the mean (mSAM).

Averaging after the ascent is mSAM: each micro-batch has its own ε. Averaging before it is synchronized SAM, one ε for
all; that is the plain link, fed with averaged gradients and a ``grad_fn`` that returns averaged gradients.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_sam._axes import AxisNames, as_axes, is_checked, note_average, vary, varying_axes
from optax_sam._checks import as_link, is_float
from optax_sam._norms import widen


def micro_batched(
    inner: optax.GradientTransformation, axis_name: AxisNames | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Applies ``inner`` to each micro-batch, all at the same params, and returns the mean.

    .. math::
        \bar s = \frac1M \sum_{j=1}^{M} \mathrm{inner}(g_j)

    - Without ``axis_name``: every leaf of ``updates`` and ``batch`` carries a leading axis of M micro-batches, over
      which ``inner`` is vmapped (the shapes of ``optax.contrib.differentially_private_aggregate``).
    - With ``axis_name``: the micro-batches are the members of that axis of ``pmap``, ``shard_map`` or ``vmap``.
      ``updates`` is this member's own gradient, *not* averaged; one ``pmean`` at the end is the only communication.
      With several micro-batches on each member: ``micro_batched(micro_batched(inner), axis_name)``.

    The state of ``inner`` is one state, shared and advanced once per step: its float leaves are averaged over the
    micro-batches, all other leaves are those of the first.

    Args:
        inner: link to apply to each micro-batch.
        axis_name: the mapped axis whose members are the micro-batches, or several, or None.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with the state of ``inner``.

    Raises:
        TypeError: inner is not a transformation, or axis_name is not made of strings.
        ValueError: at ``update``: leaves without a common leading axis; a gradient function without a ``batch``;
            axis_name is not a mapped axis; the gradient was already summed over it, as ``shard_map`` does for
            replicated params; or the params vary over it.

    Example:
        >>> import optax_sam
        >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
        >>> params, batch = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 3.0]])
        >>> grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)
        >>> link = micro_batched(optax_sam.sam(rho=0.1))
        >>> mean, _ = link.update(grads, link.init(params), params, grad_fn=jax.grad(loss_fn), batch=batch)
        >>> print([f"{g:.2f}" for g in mean])
        ['-0.55', '-1.55']

    Reference:
        Behdin et al., `mSAM: Micro-Batch-Averaged Sharpness-Aware Minimization
        <https://arxiv.org/abs/2302.09693>`_, 2023
    """
    inner = as_link("inner", inner)
    if axis_name is not None:
        return optax.GradientTransformationExtraArgs(inner.init, _over_axes(inner, as_axes(axis_name)))

    def update(updates, state, params=None, *, batch=None, **extra_args):
        if batch is None and (extra_args.get("grad_fn") or extra_args.get("value_fn")):
            cure = "Pass `grad_fn=jax.grad(loss_fn), batch=batch` with a leading axis of micro-batches on every leaf."
            if "value_and_grad_fn" in extra_args:
                cure = (
                    "The estimator splits the batch itself: give it what is inside of micro_batched, sam(rho) for msam."
                )
            raise ValueError(f"micro_batched evaluates the gradient of each micro-batch and was given no batch. {cure}")
        _check_stacked(updates, batch, params)

        def update_one(gradient, micro_batch):
            return inner.update(gradient, state, params, batch=micro_batch, **extra_args)

        note_average("a leading axis of micro-batches")
        with _mesh_of(updates):
            return mean_of_stack(jax.vmap(update_one)(updates, batch))

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _mesh_of(stacks: Any) -> contextlib.AbstractContextManager[Any]:
    """An Explicit mesh of the arrays, as context: without it ``vmap`` cannot branch where they are sharded."""
    meshes = {jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(stacks)}
    explicit = [mesh for mesh in meshes if mesh.explicit_axes]
    return jax.sharding.use_abstract_mesh(explicit[0]) if explicit else contextlib.nullcontext()


def _over_axes(inner: optax.GradientTransformationExtraArgs, axes: tuple[str, ...]) -> optax.TransformUpdateExtraArgsFn:
    """The ``update`` of ``inner``, averaged over the members of mapped axes."""

    def update(updates, state, params=None, **extra_args):
        check_replicated(params, axes)
        if is_checked(axes) and not all(varying_axes(g).issuperset(axes) for g in jax.tree.leaves(updates)):
            axis = axes[0] if len(axes) == 1 else axes
            raise ValueError(
                f"The gradient does not vary over {axis!r}: it was already summed or averaged over that axis, but "
                "micro-batches need one gradient each. Under shard_map, jax.grad sums over the devices if params are "
                f"replicated; differentiate at `jax.lax.pcast(params, {axis!r}, to='varying')`, or let "
                f"`gradient_estimator(loss_fn, link, axis_name={axis!r})` do it."
            )
        note_average(f"the mapped axis {' and '.join(map(repr, axes))}")
        return mean_over_axes(inner.update(updates, state, params, **extra_args), axes)

    return update


def check_replicated(params: Any, axes: Sequence[str]) -> None:
    """Raises if params are known to differ between the members that are to hold the micro-batches."""
    for axis in sorted(varying_axes(params) & set(axes)):
        raise ValueError(
            f"The params vary over {axis!r}, the mapped axis whose members hold micro-batches. If they were marked by "
            "jax.lax.pcast, pass the unmarked params. If they are sharded over it, all shards need one gradient: "
            f"average the loss in loss_fn, `jax.lax.pmean(loss, {axis!r})`, and use `sharded(link, {axis!r})` instead."
        )


def _check_stacked(updates: Any, batch: Any, params: Any) -> None:
    """Raises unless updates and batch have one common leading axis, in updates in front of the shapes of the params."""
    leading_size(updates=updates, batch=batch)
    if params is None or jax.tree.structure(updates) != jax.tree.structure(params):
        return
    for (path, leaf), param in zip(jax.tree.leaves_with_path(updates), jax.tree.leaves(params), strict=True):
        if jnp.shape(leaf)[1:] != jnp.shape(param):
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} must have a leading axis of micro-batches in front of the shape "
                f"{jnp.shape(param)} of the param; got {jnp.shape(leaf)}. For a batch that is not split yet use "
                "`gradient_estimator(loss_fn, sam(rho), num_micro_batches=M)`."
            )


def leading_size(**trees: Any) -> int | None:
    """The size of the leading axis, common to all leaves of the trees; None if there are no leaves."""
    places = {}
    for name, tree in trees.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            place = name + jax.tree_util.keystr(path)
            if not jnp.ndim(leaf):
                raise ValueError(f"{place} must have a leading axis to split or map over; it is a scalar.")
            places.setdefault(jnp.shape(leaf)[0], place)
    if len(places) > 1:
        found = ", ".join(f"{size} in {place}" for size, place in places.items())
        raise ValueError(f"The leaves of {' and '.join(trees)} must agree in their leading axis; got {found}.")
    if 0 in places:
        raise ValueError(f"{places[0]} must hold at least one example; its leading axis is of size 0.")
    return next(iter(places), None)


def shares_of(weights: jax.Array, total: jax.Array) -> jax.Array:
    """The weights, divided by their total; zeros if that is zero."""
    return jnp.where(total == 0, 0, weights / jnp.where(total == 0, 1, total))


def weighted(x: jax.Array, share: jax.Array) -> jax.Array:
    """share · x where x is float; what has no share does not count, even if it is not finite."""
    if not is_float(x):
        return x
    product = x * share.astype(jnp.finfo(jnp.result_type(x)).dtype)
    return jnp.where(share == 0, 0, product)


def mean_of_stack(tree: Any, shares: jax.Array | None = None) -> Any:
    """Means of the float leaves over their leading axis, with shares (M,) if given; of all others the first entry."""

    def mean(x):
        if not is_float(x):
            return _first_entry(x)
        if shares is None:
            return jnp.mean(x, axis=0)
        return jnp.sum(jax.vmap(weighted)(widen(x), shares), axis=0).astype(x.dtype)

    return jax.tree.map(mean, tree)


def _first_entry(stack: jax.Array) -> jax.Array:
    mesh, spec = jax.typeof(stack).sharding.mesh, jax.typeof(stack).sharding.spec
    if spec[0]:  # an Explicit mesh refuses to index along an axis that is sharded
        stack = jax.sharding.reshard(stack, NamedSharding(mesh, PartitionSpec(None, *spec[1:])))
    return stack[0]


def mean_over_axes(tree: Any, axes: tuple[str, ...], weight: jax.Array | None = None) -> Any:
    """Means of the float leaves over the members of mapped axes, weighted if given; other leaves are the first's."""
    checked = is_checked(axes)
    share = None if weight is None else shares_of(weight, jax.lax.psum(vary(weight, axes), axes))

    def mean(leaf):
        if share is not None:
            return jax.lax.psum(weighted(widen(leaf), share), axes).astype(leaf.dtype)
        wide = widen(leaf) if leaf.dtype == jnp.float16 else leaf  # sums would overflow
        return jax.lax.pmean(wide, axes).astype(leaf.dtype)

    def reduced(leaf):
        leaf = jnp.asarray(leaf)
        if checked and not varying_axes(leaf) & set(axes):
            return leaf
        leaf = vary(leaf, axes)
        return mean(leaf) if is_float(leaf) else _of_first_member(leaf, axes)

    return jax.tree.map(reduced, tree)


def _of_first_member(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _of_first_member(jax.random.key_data(leaf), axes)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    first = jax.lax.axis_index(axes) == 0
    return jax.lax.psum(jnp.where(first, leaf, 0), axes).astype(leaf.dtype)
