r"""Sharding: links for params that are sharded over a mapped axis, as in hand-written tensor parallelism or FSDP.

Under ``jax.jit`` arrays are global however they are sharded, and so are their norms: nothing is needed there.
"""

from typing import Any

import optax

from optax_sam._axes import AxisNames, Shards, as_axes
from optax_sam._checks import as_link
from optax_sam.single_pass import same_kind


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
    shards = Shards(as_axes(axis_name), mask)

    def update(updates, state, params=None, **extra_args):
        declared = (*extra_args.pop("shards", ()), shards)
        return inner.update(updates, state, params, shards=declared, **extra_args)

    return same_kind(inner, inner.init, update)
