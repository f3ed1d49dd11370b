r"""Averaging: one link per micro-batch, then the mean (mSAM).

Averaging after the ascent is mSAM: each micro-batch has its own ε. Averaging before it is synchronized SAM, one ε for
all; that is the plain link, fed with averaged gradients and a ``grad_fn`` that returns averaged gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam.transform import as_link, is_float, varying_axes


def micro_batched(
    inner: optax.GradientTransformation, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Applies ``inner`` to each micro-batch, all at the same params, and returns the mean.

    .. math::
        \bar s = \frac1M \sum_{j=1}^{M} \mathrm{inner}(g_j)

    - Without ``axis_name``: every leaf of ``updates`` and ``batch`` carries a leading axis of M micro-batches, over
      which ``inner`` is vmapped (the shapes of ``optax.contrib.differentially_private_aggregate``).
    - With ``axis_name``: the micro-batches are the members of that axis of ``pmap``, ``shard_map`` or ``vmap``.
      ``updates`` is this member's own gradient, *not* averaged; one ``pmean`` at the end is the only communication.

    The state of ``inner`` is one state, shared and advanced once per step: its float leaves are averaged over the
    micro-batches, all other leaves are the same in each.

    Args:
        inner: link to apply to each micro-batch.
        axis_name: the mapped axis whose members are the micro-batches, or None.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with the state of ``inner``.

    Raises:
        TypeError: inner is not a transformation, or axis_name is neither a string nor None.
        ValueError: at ``update``: leaves without a common leading axis; a gradient function without a ``batch``;
            axis_name is not a mapped axis; or the gradient was already summed over it, as ``shard_map`` does for
            replicated params.

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
    check_axis_name(axis_name)

    if axis_name is not None:
        return optax.GradientTransformationExtraArgs(inner.init, _over_axis(inner, axis_name))

    def update(updates, state, params=None, *, batch=None, **extra_args):
        if batch is None and (extra_args.get("grad_fn") or extra_args.get("value_fn")):
            raise ValueError(
                "micro_batched evaluates the gradient of each micro-batch and was given no batch. Pass "
                "`grad_fn=jax.grad(loss_fn), batch=batch` with a leading axis of micro-batches on every leaf of batch."
            )
        _check_stacked(updates, batch, params)

        def update_one(gradient, micro_batch):
            return inner.update(gradient, state, params, batch=micro_batch, **extra_args)

        return mean_of_stack(jax.vmap(update_one)(updates, batch))

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _over_axis(inner: optax.GradientTransformationExtraArgs, axis_name: str) -> optax.TransformUpdateExtraArgsFn:
    """The ``update`` of ``inner``, averaged over the members of a mapped axis."""

    def update(updates, state, params=None, **extra_args):
        if axis_is_checked(axis_name) and any(axis_name not in varying_axes(g) for g in jax.tree.leaves(updates)):
            raise ValueError(
                f"The gradient does not vary over {axis_name!r}: it was already summed or averaged over that axis, but "
                "micro-batches need one gradient each. Under shard_map, jax.grad sums over the devices if params are "
                f"replicated; differentiate at `jax.lax.pcast(params, {axis_name!r}, to='varying')`, or let "
                f"`gradient_estimator(loss_fn, link, axis_name={axis_name!r})` do it."
            )
        return mean_over_axis(inner.update(updates, state, params, **extra_args), axis_name)

    return update


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
    return next(iter(places), None)


def mean_of_stack(tree: Any) -> Any:
    """Means of the float leaves over their leading axis; the first entry of all other leaves."""
    return jax.tree.map(lambda x: jnp.mean(x, axis=0) if is_float(x) else x[0], tree)


def mean_over_axis(tree: Any, axis_name: str) -> Any:
    """Means of the float leaves over the members of a mapped axis, in one ``pmean``; other leaves as they are."""
    checked = axis_is_checked(axis_name)
    leaves, structure = jax.tree.flatten(tree)
    local = [
        position
        for position, leaf in enumerate(leaves)
        if is_float(leaf) and not (checked and axis_name not in varying_axes(leaf))
    ]
    means = jax.lax.pmean([leaves[position] for position in local], axis_name)
    for position, mean in zip(local, means, strict=True):
        leaves[position] = mean
    return jax.tree.unflatten(structure, leaves)


def axis_is_checked(axis_name: str) -> bool:
    """Whether axis_name belongs to a ``shard_map`` that tracks what varies over it (``check_vma=True``)."""
    try:
        return axis_name in varying_axes(jax.lax.axis_index(axis_name))
    except NameError as error:
        raise ValueError(
            f"{axis_name=} is not a mapped axis here. Call this under jax.pmap, jax.shard_map or jax.vmap with that "
            "axis name, or leave axis_name out."
        ) from error


def check_axis_name(axis_name: Any) -> None:
    """Raises unless axis_name is a string or None."""
    if axis_name is not None and not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be the name of a mapped axis, or None; got {axis_name!r}.")
