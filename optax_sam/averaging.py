r"""Averaging: one link per micro-batch, then the mean (mSAM).

Averaging after the ascent is mSAM: each micro-batch has its own ε. Averaging before it is synchronized SAM, one ε for
all; that is the plain link, fed with averaged gradients and a ``grad_fn`` that returns averaged gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._axes import Axes, AxisNames, as_axes, check_unvarying, is_checked, shown, varying_axes
from optax_sam._checks import as_link, check_alike, check_state
from optax_sam._means import leading_size, mean_of_stack, mean_over_axes
from optax_sam._mesh import indices_like, mesh_of


class AveragedState(NamedTuple):
    """State of :func:`micro_batched`; its type tells other combinators that what comes out is an average.

    Attributes:
        link_state: the state of the link, one for all micro-batches.
        over: the mapped axes, as keys of a dict without leaves; none for a leading axis.
    """

    link_state: optax.OptState
    over: dict[str, tuple[()]]


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

    All micro-batches share one state of ``inner``, advanced once per step: its float leaves are averaged over them, all
    other leaves are those of the first.

    Args:
        inner: link to apply to each micro-batch.
        axis_name: the mapped axis whose members are the micro-batches, or several, or None.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with an :class:`AveragedState`.

    Raises:
        TypeError: inner is not a transformation, or axis_name is not made of strings.
        NameError: at ``update``: axis_name is not a mapped axis.
        ValueError: at ``update``: leaves without a common leading axis; a gradient function without a ``batch``; a
            gradient that was already summed over axis_name, as ``shard_map`` does for replicated params; or params that
            vary over it.

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
    axes = None if axis_name is None else as_axes(axis_name)
    over = dict.fromkeys(axes or (), ())

    def init(params):
        return AveragedState(inner.init(params), over)

    def update(updates, state, params=None, *, micro_batch=(), **extra_args):
        check_state(state, AveragedState)

        def of_one(index, gradient, **own):
            place = (*micro_batch, index)  # by which what is drawn at random differs
            return inner.update(gradient, state.link_state, params, micro_batch=place, **extra_args | own)

        if axes is None:
            batch = extra_args.pop("batch", None)
            size = _size_of_stack(updates, batch, params, extra_args)
            with mesh_of(updates):
                indices = indices_like(updates, size)
                results = jax.vmap(lambda index, g, b: of_one(index, g, batch=b))(indices, updates, batch)
            outputs, link_state = mean_of_stack(results)
        else:
            check_unvarying(params, axes)
            _check_own(updates, axes)
            outputs, link_state = mean_over_axes(of_one(jax.lax.axis_index(axes), updates), axes)
        return outputs, AveragedState(link_state, over)

    return optax.GradientTransformationExtraArgs(init, update)


def averages_in(state: Any) -> frozenset[str]:
    """What the links of a state average over: mapped axes, or a leading axis."""
    found = frozenset[str]()
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, AveragedState)):
        if isinstance(node, AveragedState):
            found = found.union(node.over or ["a leading axis"], averages_in(node.link_state))
    return found


def check_no_average(name: str, state: Any) -> None:
    """Raises for a link that averages: what it gets is of one micro-batch, and what it returns is of all."""
    if averages_in(state):
        raise ValueError(
            f"{name} compares what a link gets with what it returns, and this one averages. Average outside of it, "
            f"`micro_batched({name}(sam(rho)))`."
        )


def _check_own(updates: Any, axes: Axes) -> None:
    """Raises if the gradient is known to be a sum or an average over the axes."""
    if is_checked(axes) and not all(varying_axes(g).issuperset(axes) for g in jax.tree.leaves(updates)):
        raise ValueError(
            f"The gradient does not vary over {shown(axes)}: it is a sum or an average, not a member's own. Take it at "
            f"`jax.lax.pcast(params, {shown(axes)}, to='varying')`, or use the estimator, which does."
        )


def _size_of_stack(updates: Any, batch: Any, params: Any, keywords: Any) -> int:
    """M; raises unless updates and batch have one common leading axis, in updates in front of the params' shapes."""
    if batch is None and any(keywords.get(name) is not None for name in ("grad_fn", "value_fn")):
        raise ValueError(
            "micro_batched got no batch. In a chain pass `grad_fn=jax.grad(loss_fn), batch=batch`, with a leading axis "
            "of micro-batches; the estimator splits the batch itself, and wants sam(rho) in place of msam(rho)."
        )
    size = leading_size(updates=updates, batch=batch)
    if params is not None:
        one = jax.tree.map(lambda x: np.broadcast_to(0, jnp.shape(x)[1:]), updates)
        check_alike("updates, behind their leading axis of micro-batches,", one, "params", params)
    return size or 1
