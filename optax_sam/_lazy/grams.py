"""Grams: inner products and norms of sums of outer products, from products of their rows."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._lazy.outer import (
    MICRO_BATCH,
    OTHER_TERM,
    TERM,
    Base,
    Lazy,
    Outer,
    Scale,
    einsum,
    multiplied_out,
    one_or,
    scale_product,
    times,
    unit_of,
)

GRAM = (MICRO_BATCH, TERM, OTHER_TERM)
RARELY = "optax_sam_rarely"
LEAST = 1e-2  # of a squared norm without cancellation: below, rounding shows in Gram matrices, and sums are formed


def rarely(function: Callable[[], Any]) -> Callable[[], Any]:
    """Wraps a branch that is seldom taken in a jit of this name, which estimates skip."""
    function.__name__ = RARELY
    return jax.jit(function)


def inner_product(first: Lazy, second: Lazy, size: int) -> jax.Array | None:
    """Sums of first · second over all elements, for each micro-batch, (M,) in float32 or wider.

    A Gram matrix squares the cancellation between terms. Where a sum is small among its own terms, both are formed, one
    micro-batch at a time, and multiplied. None if the axes do not allow Gram matrices.
    """
    dtype, is_square = np.result_type(first.dtype, second.dtype, np.float32), first is second
    terms = _terms(first, dtype)
    others = terms if is_square else _terms(second, dtype)
    result = _from_grams(terms, others, size, dtype)
    if result is None or jnp.issubdtype(dtype, np.complexfloating):
        return None
    checks = [_is_accurate(terms, result if is_square else None, size, dtype)]
    checks += [] if is_square else [_is_accurate(others, None, size, dtype)]
    checks = [check for check in checks if check is not None]
    if not checks:
        return result
    is_accurate = functools.reduce(jnp.logical_and, checks)

    def corrected():
        return jnp.where(is_accurate, result, _from_sums(first, second, size, dtype))

    return jax.lax.cond(jnp.all(is_accurate), lambda: result, rarely(corrected))


def _terms(value: Lazy, dtype: Any) -> list[Base | Outer]:
    """The terms in a dtype, with factors near 1: the squares of tiny ones would be zero."""
    terms: list[Base | Outer] = []
    for base in value.bases:
        array = base.array.astype(dtype)
        [unit] = unit_of(array[None])
        terms.append(Base(array / unit, scale_product(base.scale, unit)))
    for outer in value.outers:
        left, right = outer.left.astype(dtype), outer.right.astype(dtype)
        units = unit_of(left), unit_of(right)
        small, large = jnp.minimum(*units), jnp.maximum(*units)
        scale = scale_product(scale_product(outer.scale, small), large)
        left, right = (times(factor, 1 / unit) for factor, unit in zip((left, right), units, strict=True))
        terms.append(dataclasses.replace(outer, left=left, right=right, scale=scale))
    return terms


def _from_grams(
    terms: Sequence[Base | Outer], others: Sequence[Base | Outer], size: int, dtype: Any
) -> jax.Array | None:
    """The inner product by the inner products of all pairs of terms."""
    products = [_product_of(a, b, dtype) for a, b in itertools.product(terms, others)]
    known = [x for x in products if x is not None]
    return functools.reduce(jnp.add, known, jnp.zeros([size], dtype)) if len(known) == len(products) else None


def _is_accurate(terms: Sequence[Base | Outer], square: jax.Array | None, size: int, dtype: Any) -> jax.Array | None:
    """For which micro-batches terms hardly cancel in their sum; None if there is but one.

    ``square`` is the squared norm of the sum by Gram matrices if that is known already.
    """
    if sum(1 if isinstance(x, Base) else x.left.shape[1] for x in terms) <= 1:
        return None
    square = _from_grams(terms, terms, size, dtype) if square is None else square
    bound = functools.reduce(jnp.add, [_square_of_terms(x, dtype) for x in terms])
    return None if square is None else (square > LEAST * bound) | (bound == 0) | ~jnp.isfinite(bound)


def _product_of(a: Base | Outer, b: Base | Outer, dtype: Any) -> jax.Array | None:
    """The inner product of two terms; None if their axes do not allow one without multiplying out."""
    precise = {"dtype": dtype, "precision": jax.lax.Precision.HIGHEST}
    if isinstance(a, Base) and isinstance(b, Base):
        return jnp.sum(a.array * b.array) * _as_array(a.scale, dtype) * _as_array(b.scale, dtype)
    if isinstance(a, Base):
        return _product_of(b, a, dtype)
    (left, axes), (right, others) = a.sides()
    if isinstance(b, Base):
        near, far = (MICRO_BATCH, TERM, *axes), (MICRO_BATCH, TERM, *others)
        projected = einsum(left, near, b.array, tuple(range(b.array.ndim)), far, **precise)
        sums = einsum(projected, far, right, far, (MICRO_BATCH,), **precise)
    else:
        (b_left, b_axes), (b_right, b_others) = b.sides() if set(b.axes) == set(axes) else b.sides()[::-1]
        if set(b_axes) != set(axes):
            return None
        grams = [
            einsum(x, (MICRO_BATCH, TERM, *labels), y, (MICRO_BATCH, OTHER_TERM, *more), GRAM, **precise)
            for x, labels, y, more in ((left, axes, b_left, b_axes), (right, others, b_right, b_others))
        ]
        sums = jnp.sum(grams[0] * grams[1], axis=(1, 2))
    return times(times(sums, a.scale), b.scale)  # one after the other: their product can be infinite


def _square_of_terms(term: Base | Outer, dtype: Any) -> jax.Array:
    """The sum of the squared norms of what is added up."""
    if isinstance(term, Base):
        square = jnp.sum(jnp.square(term.array))
    else:
        squares = [jnp.sum(jnp.square(x), axis=range(2, x.ndim)) for x in (term.left, term.right)]
        square = jnp.sum(squares[0] * squares[1], axis=1)
    return square * _as_array(term.scale, dtype) * _as_array(term.scale, dtype)


def _as_array(scale: Scale, dtype: Any) -> jax.Array:
    return jnp.asarray(one_or(scale), dtype)


def _from_sums(first: Lazy, second: Lazy, size: int, dtype: Any) -> jax.Array:
    """The inner product of the sums themselves, of one micro-batch at a time."""

    def of_one(index):
        return jnp.sum(_formed(index, first, dtype) * _formed(index, second, dtype))

    return jax.lax.map(of_one, jnp.arange(size))


def _formed(index: jax.Array, value: Lazy, dtype: Any) -> jax.Array:
    """The array of one micro-batch."""

    def at(x):
        return x if x is None or not jnp.ndim(x) else jax.lax.dynamic_slice_in_dim(x, index, 1)

    terms = [base.array.astype(dtype) * _as_array(at(base.scale), dtype).reshape(()) for base in value.bases]
    for outer in value.outers:
        one = dataclasses.replace(outer, left=at(outer.left), right=at(outer.right), scale=at(outer.scale))
        terms.append(multiplied_out(one, dtype)[0])
    return functools.reduce(jnp.add, terms, jnp.zeros(value.shape, dtype))
