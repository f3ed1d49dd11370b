r"""Renormalization: the direction of the SAM gradient at the length of the clean one."""

import jax
import jax.numpy as jnp
import optax

from optax_sam._checks import check_nonnegative
from optax_sam._norms import at_length, norm
from optax_sam.combination import combination


def renormalized(
    inner: optax.GradientTransformation, *, max_scale: jax.typing.ArrayLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales what ``inner`` returns to the norm of what it got.

    .. math::
        \tilde s = s \, \min(\text{max\_scale}, \|g\|_2 / \|s\|_2)

    with one norm over all leaves. Put before weight decay and momentum, it lets SAM train at the learning rates of the
    base optimizer. Where both norms are zero the result is zero. With micro-batches it belongs inside,
    ``micro_batched(renormalized(inner))``: around an average the two norms would be of different things.

    Args:
        inner: link or any other transformation from g to s.
        max_scale: scalar ≥ 0, upper bound of the factor; 1 only ever shortens s. None: no bound.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with the state of ``inner``; dtypes of the leaves are kept.

    Raises:
        TypeError: inner is not a transformation, or max_scale is not a real scalar.
        ValueError: max_scale is a negative or non-finite number; at ``update``, inner averages, or sharded params were
            not declared with ``sharded``.

    Example:
        >>> link = renormalized(optax.stateless(lambda g, _: optax.tree.scale(10.0, g)))
        >>> updates, _ = link.update(jnp.array([3.0, 4.0]), link.init(jnp.zeros(2)))
        >>> print([f"{u:.2f}" for u in updates])
        ['3.00', '4.00']

    Reference:
        Tan et al., `Stabilizing Sharpness-Aware Minimization Through A Simple Renormalization Strategy
        <https://arxiv.org/abs/2401.07250>`_, 2024
    """
    if max_scale is not None:
        check_nonnegative("max_scale", max_scale)

    def at_clean_length(clean, outputs, shards):
        length, current = norm(clean, shards), norm(outputs, shards)
        if max_scale is not None:
            length = jnp.minimum(length, jnp.asarray(max_scale).astype(current.dtype) * current)
        return at_length(outputs, current, length)

    return combination("renormalized", inner, at_clean_length)
