r"""Combination: one gradient made of the clean one and of what a link returns for it."""

from collections.abc import Callable
from typing import Any

import optax

from optax_sam._axes import check_declared
from optax_sam._checks import as_link, check_alike
from optax_sam._norms import Declared
from optax_sam.averaging import check_no_average


def combined(
    inner: optax.GradientTransformation, combine: Callable[[Any, Any, Declared], Any]
) -> optax.GradientTransformationExtraArgs:
    r"""Combines the gradient g that ``inner`` receives with the gradient s that it returns.

    .. math::
        \tilde s = \mathrm{combine}(g, s), \qquad s = \mathrm{inner}(g)

    With micro-batches it belongs inside, ``micro_batched(combined(inner, combine))``: around an average g and s would
    be of different things.

    Args:
        inner: link or any other transformation from g to s.
        combine: called as ``combine(g, s, shards)``, with two trees like the params; returns a third. Its norms and
            inner products are ``optax_sam.norm(tree, shards)`` and ``optax_sam.vdot(a, b, shards)``, which count all
            shards of sharded params.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with the state of ``inner``; dtypes are those of s.

    Raises:
        TypeError: inner is not a transformation, or combine is not a function.
        ValueError: at ``update``: inner averages, combine returns a tree of another structure or of other shapes, or
            sharded params were not declared with ``sharded``.

    Example:
        >>> import jax, jax.numpy as jnp, optax_sam
        >>> half_way = combined(optax_sam.sam(rho=0.5), lambda g, s, _: jax.tree.map(lambda a, b: (a + b) / 2, g, s))
        >>> grad_fn, params = jax.grad(lambda w: w**2), jnp.float32(1.0)
        >>> updates, _ = half_way.update(grad_fn(params), half_way.init(params), params, grad_fn=grad_fn)
        >>> print(updates)
        2.5
    """
    return combination("combined", inner, combine)


def combination(
    name: str, inner: optax.GradientTransformation, combine: Callable[[Any, Any, Declared], Any]
) -> optax.GradientTransformationExtraArgs:
    """``combined``, under the name that its errors use."""
    inner = as_link("inner", inner)
    if not callable(combine):
        raise TypeError(f"combine must be a function of g, s and shards; got {combine!r}.")

    def update(updates, state, params=None, *, shards=(), **extra_args):
        check_declared(params, updates, shards)
        check_no_average(name, state)
        outputs, state = inner.update(updates, state, params, shards=shards, **extra_args)
        result = combine(updates, outputs, shards)
        check_alike("what combine returned", result, "the gradient", outputs)
        return optax.tree.cast_like(result, outputs), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
