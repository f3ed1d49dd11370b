r"""Means: of stacks of results, and of the results of the members of a mapped axis.

Float leaves are averaged, in float32 or wider, with weights if there are some. Other leaves (counters, keys, booleans)
have no mean: they are those of the first micro-batch or member.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_sam._axes import Axes, is_checked, vary, varying_axes
from optax_sam._checks import is_float
from optax_sam._mesh import first_entry
from optax_sam._norms import widen


def shares_of(weights: jax.Array, total: jax.Array) -> jax.Array:
    """The weights, divided by their total; zeros if that is zero."""
    return jnp.where(total == 0, 0, weights / jnp.where(total == 0, 1, total))


def weighted(x: jax.Array, share: jax.Array) -> jax.Array:
    """share · x where x is float; what has no share does not count, even if it is not finite."""
    if not is_float(x):
        return x
    product = x * share.astype(jnp.finfo(jnp.result_type(x)).dtype)
    return jnp.where(share == 0, 0, product)  # 0 · nan would be nan: the loss of padding alone is often 0/0


def mean_of_stack(tree: Any, shares: jax.Array | None = None) -> Any:
    """Means over the leading axis, with shares (M,) if given."""

    def mean(x):
        if not is_float(x):
            return first_entry(x)
        if shares is None:
            return jnp.mean(x, axis=0)
        return jnp.sum(jax.vmap(weighted)(widen(x), shares), axis=0).astype(x.dtype)

    return jax.tree.map(mean, tree)


def mean_over_axes(tree: Any, axes: Axes, weight: jax.Array | None = None) -> Any:
    """Means over the members of mapped axes, with this member's weight if given."""
    if not axes:
        return tree
    checked = is_checked(axes)
    share = None if weight is None else shares_of(weight, jax.lax.psum(vary(weight, axes), axes))

    def mean(leaf):
        if share is not None:
            return jax.lax.psum(weighted(widen(leaf), share), axes).astype(leaf.dtype)
        wide = widen(leaf) if leaf.dtype == jnp.float16 else leaf  # its sums would overflow; bfloat16's do not
        return jax.lax.pmean(wide, axes).astype(leaf.dtype)

    def reduced(leaf):
        leaf = jnp.asarray(leaf)
        if checked and not varying_axes(leaf) & set(axes):
            return leaf  # all members hold the same, and JAX knows it: nothing to send
        leaf = vary(leaf, axes)
        return mean(leaf) if is_float(leaf) else _of_first_member(leaf, axes)

    return jax.tree.map(reduced, tree)


def _of_first_member(leaf: jax.Array, axes: Axes) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _of_first_member(jax.random.key_data(leaf), axes)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # A sum with zeros, for JAX then knows that all members hold the same.
    first = jax.lax.axis_index(axes) == 0
    return jax.lax.psum(jnp.where(first, leaf, 0), axes).astype(leaf.dtype)


def leading_size(**trees: Any) -> int | None:
    """The size of the leading axis, common to all leaves of the trees; None if there are no leaves."""
    places = {}
    for name, tree in trees.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            place = name + jax.tree_util.keystr(path)
            if not jnp.ndim(leaf) or not jnp.shape(leaf)[0]:
                raise ValueError(
                    f"{place} must have a leading axis of at least 1; its shape is {jnp.shape(leaf)}. Pass what "
                    "is not one for each example, such as a PRNG key, as an argument of its own behind the batch."
                )
            places.setdefault(jnp.shape(leaf)[0], place)
    if len(places) > 1:
        found = ", ".join(f"{size} in {place}" for size, place in places.items())
        raise ValueError(f"The leaves of {' and '.join(trees)} must agree in their leading axis; got {found}.")
    return next(iter(places), None)
