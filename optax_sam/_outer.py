r"""Outer products: gradients of micro-batches that are never multiplied out.

The gradient of a dense layer on micro-batch j is a product of two thin matrices, with a row for each of its K examples
or tokens: the inputs :math:`x_j`, and the gradients :math:`\delta_j` of the outputs. What SAM does with it can be done
with them:

.. math::
    \|x_j^\top \delta_j\|^2 &= \sum (x_j x_j^\top) \circ (\delta_j \delta_j^\top) \\
    h \, (W + c_j \, x_j^\top \delta_j) &= h W + c_j \, (h x_j^\top) \, \delta_j \\
    \textstyle\sum_j x_j^\top \delta_j &= [x_1; \dots; x_M]^\top [\delta_1; \dots; \delta_M]

that is, with products of K rows, and one large product for all micro-batches together. None has weights of its own, and
gradients that only serve to find ε are never formed. Where K is well below P and Q, mSAM then costs less than SAM.

This module is the arithmetic of sums of such products; ``_lazy`` finds them in a program.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._norms import power_of_two, widen

Scale = jax.typing.ArrayLike | None  # one for all micro-batches, or (M,); None is 1
MICRO_BATCH, TERM, OTHER_TERM = 51, 50, 49  # labels in an einsum, which takes 52; axes of a value are 0, 1, ...
GRAM = (MICRO_BATCH, TERM, OTHER_TERM)
RARELY = "optax_sam_rarely"
LEAST = 1e-2  # of a squared norm without cancellation: below, rounding shows in Gram matrices, and sums are formed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """scale · array, of an array that all micro-batches share."""

    array: jax.Array
    scale: Scale = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Outer:
    """scale · Σₖ leftₖ ⊗ rightₖ: (M, K, ...) arrays that have some axes of the value, and the others."""

    left: jax.Array
    right: jax.Array
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    others: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    scale: Scale = None
    precision: Any = dataclasses.field(default=None, metadata={"static": True})

    def sides(self) -> tuple[tuple[jax.Array, tuple[int, ...]], tuple[jax.Array, tuple[int, ...]]]:
        """Both factors, each with the axes of the value that it has."""
        return (self.left, self.axes), (self.right, self.others)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A sum for each micro-batch; zero without terms."""

    bases: tuple[Base, ...]
    outers: tuple[Outer, ...]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    def with_terms(self, bases: Iterable[Base], outers: Iterable[Outer]) -> "Lazy":
        return dataclasses.replace(self, bases=tuple(bases), outers=tuple(outers))


def einsum(*args: Any, dtype: Any, precision: Any = None) -> jax.Array:
    """``jnp.einsum`` of arrays and labels of axes, added up and returned in a dtype."""
    return jnp.einsum(*args, precision=precision, preferred_element_type=dtype).astype(dtype)


def times(stack: jax.Array, scale: Scale) -> jax.Array:
    """Each entry of the stack times its scalar, in the dtype of the stack."""
    if scale is None:
        return stack
    return (stack * jnp.reshape(scale, (-1,) + (1,) * (stack.ndim - 1))).astype(stack.dtype)


def scale_product(first: Scale, second: Scale) -> Scale:
    """The product of two scales."""
    if first is None or second is None:
        return second if first is None else first
    return first * second


def scaled(value: Lazy, scale: Scale) -> Lazy:
    """The sum times a scalar, or one for each micro-batch."""
    bases = [dataclasses.replace(base, scale=scale_product(base.scale, scale)) for base in value.bases]
    outers = [dataclasses.replace(outer, scale=scale_product(outer.scale, scale)) for outer in value.outers]
    return value.with_terms(bases, outers)


def selected(index: jax.Array, cases: Sequence[Lazy]) -> Lazy:
    """The case of each micro-batch, or of all, by index.

    What all cases have is selected by its scale. What some have is replaced by zeros in the others, and not only times
    0: a case that is not selected may be infinite.
    """
    bases = [
        dataclasses.replace(base, scale=jnp.where(index == case, 1.0 if base.scale is None else base.scale, 0.0))
        for case, value in enumerate(cases)
        for base in value.bases
    ]
    known = [{_key(outer): outer for outer in value.outers} for value in cases]
    outers = []
    for case, terms in enumerate(known):
        for key, outer in terms.items():
            if not all(key in others for others in known):
                left, right = _where(index == case, outer.left), _where(index == case, outer.right)
                outers.append(dataclasses.replace(outer, left=left, right=right))
            elif case == 0:
                scale = _chosen(index, [others[key].scale for others in known])
                outers.append(dataclasses.replace(outer, scale=scale))
    return cases[0].with_terms(_merged(bases), outers)


def _chosen(index: jax.Array, scales: Sequence[Scale]) -> jax.Array:
    """The scale of each micro-batch, or of all, by index."""
    result = jnp.asarray(1.0 if scales[0] is None else scales[0])
    for case, scale in enumerate(scales[1:], start=1):
        result = jnp.where(index == case, 1.0 if scale is None else scale, result)
    return result


def _where(condition: jax.Array, stack: jax.Array) -> jax.Array:
    """The stack, with zeros for the micro-batches, or for all, where a condition does not hold."""
    return jnp.where(jnp.reshape(condition, (-1,) + (1,) * (stack.ndim - 1)), stack, 0)


def total(first: Lazy, second: Lazy) -> Lazy:
    """first + second, with one term for the terms of the same arrays."""
    return first.with_terms(_merged([*first.bases, *second.bases]), _merged([*first.outers, *second.outers]))


def difference(first: Lazy, second: Lazy) -> Lazy:
    """first - second; of (w + ε) - w remains ε."""
    return total(first, scaled(second, -1.0))


def _merged(terms: Sequence[Any]) -> Iterable[Any]:
    """The terms, those of the same arrays as one, without those that cancel."""
    found = {}
    for term in terms:
        if (same := found.get(_key(term))) is not None:
            scale = (1.0 if same.scale is None else same.scale) + (1.0 if term.scale is None else term.scale)
            term = dataclasses.replace(term, scale=scale)
        found[_key(term)] = term
    return (term for term in found.values() if not isinstance(term.scale, float) or term.scale)


def _key(term: Base | Outer) -> Any:
    """What a term is but for its scale; arrays by identity, which holds as long as somebody has the term."""
    if isinstance(term, Base):
        return id(term.array)
    return id(term.left), id(term.right), term.axes, term.others


def multiplied_out(outer: Outer, dtype: Any) -> jax.Array:
    """The stack (M, ...) of an outer product."""
    (left, axes), (right, others) = outer.sides()
    both, out = (MICRO_BATCH, TERM), (MICRO_BATCH, *range(len(axes) + len(others)))
    product = einsum(left, both + axes, right, both + others, out, dtype=dtype, precision=outer.precision)
    return times(product, outer.scale)


def applied(
    outer: Outer, x: jax.Array, x_axes: tuple[int, ...], out: tuple[int, ...], dtype: Any, precision: Any
) -> jax.Array | None:
    """The product of a stack x with an outer product, contracted over all labels that are not in ``out``.

    The rows of x meet one factor, and what comes out the other: (n, P) (P, K) (K, Q). None if the axes do not allow it.
    """
    for (near, contracted), (far, free) in (outer.sides(), outer.sides()[::-1]):
        if not set(contracted) & set(out) and set(free) <= set(out):
            rows = tuple(axis for axis in x_axes if axis in out and axis != MICRO_BATCH)
            labels, unit = (MICRO_BATCH, *rows, TERM), unit_of(near)
            # Divided by the unit first: the product of two gradients of 1e-19 would be zero.
            wide = np.result_type(dtype, np.float32)  # the terms of float16 weights may exceed it
            both = MICRO_BATCH, TERM
            terms = einsum(times(x, 1 / unit), x_axes, near, both + contracted, labels, dtype=wide, precision=precision)
            terms = times(terms, unit if outer.scale is None else outer.scale * unit)
            return einsum(terms, labels, far, both + free, out, dtype=wide, precision=precision).astype(dtype)
    return None


def unit_of(stack: jax.Array) -> jax.Array:
    """Powers of two near the largest elements, (M,), but not so small that their inverses are infinite."""
    largest = widen(jnp.max(jnp.abs(stack), axis=range(1, stack.ndim), initial=0))
    return jnp.maximum(power_of_two(largest), 2.0**-100)


def mean(value: Lazy, shares: jax.Array | None, size: int) -> jax.Array:
    """The mean over M micro-batches, with shares (M,) if given; what has no share does not count, even if it is NaN."""
    dtype = np.result_type(value.dtype, np.float32)

    def counted(x):
        return x if shares is None else jax.vmap(lambda entry, share: jnp.where(share == 0, 0, entry))(x, shares)

    terms = []
    for base in value.bases:
        scale = counted(jnp.broadcast_to(_as_array(base.scale, dtype), (size,)))
        factor = jnp.mean(scale) if shares is None else jnp.sum(scale * shares)
        terms.append(base.array.astype(dtype) * factor.astype(dtype))
    for outer in value.outers:
        (left, axes), (right, others) = outer.sides()
        left, right = counted(left), counted(right)
        scale = outer.scale
        if shares is not None:
            scale = shares * counted(jnp.broadcast_to(_as_array(scale, shares.dtype), (size,)))
        left, right = (times(left, scale), right) if left.size < right.size else (left, times(right, scale))
        both, out = (MICRO_BATCH, TERM), range(len(axes) + len(others))
        term = einsum(left, both + axes, right, both + others, tuple(out), dtype=dtype, precision=outer.precision)
        terms.append(term / size if shares is None else term)
    return functools.reduce(jnp.add, terms, jnp.zeros(value.shape, dtype)).astype(value.dtype)


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
    return jnp.asarray(1.0 if scale is None else scale, dtype)


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
