r"""Outer products: gradients of micro-batches that are never multiplied out.

The gradient of a dense layer on micro-batch j is a product of two thin matrices, with a row for each of its K examples
or tokens: the inputs :math:`x_j`, and the gradients :math:`\delta_j` of the outputs. What SAM does with it can be done
with them:

.. math::
    \|x_j^\top \delta_j\|^2 &= \sum (x_j x_j^\top) \circ (\delta_j \delta_j^\top) \\
    h \, (W + c_j \, x_j^\top \delta_j) &= h W + c_j \, (h x_j^\top) \, \delta_j \\
    \textstyle\sum_j x_j^\top \delta_j &= [x_1; \dots; x_M]^\top [\delta_1; \dots; \delta_M]

that is, with products of K rows, and one large product for all micro-batches together. None has weights of its own, and
gradients that only serve to find ε are never formed: so mSAM costs less than SAM.

Here is the arithmetic of such sums; ``_lazy`` finds them in a program.
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
MICRO_BATCH, TERM, OTHER_TERM = 51, 50, 49  # labels of axes in an einsum; those of a value are 0, 1, ...
GRAM = (MICRO_BATCH, TERM, OTHER_TERM)
RARELY = "rarely"  # the name of functions that hardly ever run, though they are in the program
LEAST = 1e-2  # of what a sum of squares would be without cancellation: below, Gram matrices show rounding errors


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
    """Each entry of the stack times its scalar, in the dtype of the stack, or complex if the scalars are."""
    if scale is None:
        return stack
    dtype = np.result_type(stack.dtype, np.complex64) if jnp.iscomplexobj(scale) else stack.dtype
    return (stack * jnp.reshape(scale, (-1,) + (1,) * (stack.ndim - 1))).astype(dtype)


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


def kept(value: Lazy, condition: jax.Array) -> Lazy:
    """The sum where a condition, (M,) or one for all, holds, else 0."""

    def keep(term):
        return dataclasses.replace(term, scale=jnp.where(condition, 1.0 if term.scale is None else term.scale, 0))

    return value.with_terms(map(keep, value.bases), map(keep, value.outers))


def total(first: Lazy, second: Lazy) -> Lazy:
    """first + second, with one term for the terms of the same arrays."""
    bases = _merged([*first.bases, *second.bases], lambda base: id(base.array))
    outers = _merged([*first.outers, *second.outers], lambda outer: (id(outer.left), id(outer.right)))
    return first.with_terms(bases, outers)


def difference(first: Lazy, second: Lazy) -> Lazy:
    """first - second; of (w + ε) - w remains ε."""
    return total(first, scaled(second, -1.0))


def _merged(terms: Iterable[Any], key: Callable[[Any], Any]) -> Iterable[Any]:
    found = {}
    for term in terms:
        if (same := found.get(key(term))) is not None:
            scale = (1.0 if same.scale is None else same.scale) + (1.0 if term.scale is None else term.scale)
            term = dataclasses.replace(term, scale=scale)
        found[key(term)] = term
    return (term for term in found.values() if not isinstance(term.scale, float) or term.scale)


def multiplied_out(outer: Outer, dtype: Any) -> jax.Array:
    """The stack (M, ...) of an outer product."""
    (left, axes), (right, others) = outer.sides()
    both, out = (MICRO_BATCH, TERM), (MICRO_BATCH, *range(len(axes) + len(others)))
    product = einsum(left, both + axes, right, both + others, out, dtype=dtype, precision=outer.precision)
    return times(product, outer.scale)


def normalized(outer: Outer) -> Outer:
    """The same with factors near 1: products of tiny ones would be zero, and a huge scale infinite on its way."""
    (left, of_left), (right, of_right) = _unit(outer.left), _unit(outer.right)
    small, large = jnp.minimum(of_left, of_right), jnp.maximum(of_left, of_right)
    scale = scale_product(scale_product(outer.scale, small), large)
    return dataclasses.replace(outer, left=left, right=right, scale=scale)


def _unit(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The factor divided by powers of two, and these, (M,): then its largest elements are near 1."""
    units = power_of_two(widen(jnp.max(jnp.abs(factor), axis=range(1, factor.ndim), initial=0)))
    return times(factor, 1 / units), units


def applied(outer: Outer, x: jax.Array, x_axes: tuple[int, ...], out: tuple[int, ...], **options: Any) -> Any:
    """The product of a stack x with an outer product, contracted over all labels that are not in ``out``.

    The rows of x meet one factor, and what comes out the other: (n, P) (P, K) (K, Q). None if the axes do not allow it.
    """
    outer = normalized(outer)
    for (near, contracted), (far, free) in (outer.sides(), outer.sides()[::-1]):
        if not set(contracted) & set(out) and set(free) <= set(out):
            rows = tuple(axis for axis in x_axes if axis in out and axis != MICRO_BATCH)
            labels = (MICRO_BATCH, *rows, TERM)
            terms = times(einsum(x, x_axes, near, (MICRO_BATCH, TERM, *contracted), labels, **options), outer.scale)
            return einsum(terms, labels, far, (MICRO_BATCH, TERM, *free), out, **options)
    return None


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
    """Names a function so that nobody counts what it takes."""
    function.__name__ = RARELY
    return jax.jit(function)


def inner_product(first: Lazy, second: Lazy, size: int) -> jax.Array:
    """Sums of first · second over all elements, for each micro-batch, (M,) in float32 or wider.

    Gram matrices square the cancellation between terms. Where the result is small among them, what they are the terms
    of is multiplied out, one micro-batch after another.
    """
    dtype = np.result_type(first.dtype, second.dtype, np.float32)
    exact = functools.partial(_exact_inner_product, first, second, size, dtype)
    terms = _terms(first, dtype)
    others = terms if first is second else _terms(second, dtype)
    products = [x for a, b in itertools.product(terms, others) if (x := _product_of(a, b, dtype)) is not None]
    if len(products) < len(terms) * len(others) or jnp.issubdtype(dtype, np.complexfloating):
        return exact()
    result = _sum(products, size, dtype)
    if first is second and sum(map(_count, terms)) == 1:
        return result  # nothing to cancel
    bounds = [jnp.sqrt(_sum([_square_of_terms(x, dtype) for x in both], size, dtype)) for both in (terms, others)]
    bound = bounds[0] * bounds[1]
    is_accurate = (jnp.abs(result) > LEAST * bound) | (bound == 0)
    corrected = rarely(lambda: jnp.where(is_accurate, result, exact()))
    return jax.lax.cond(jnp.all(is_accurate), lambda: result, corrected)


def _count(term: Base | Outer) -> int:
    return 1 if isinstance(term, Base) else term.left.shape[1]


def _sum(terms: Sequence[jax.Array], size: int, dtype: Any) -> jax.Array:
    return functools.reduce(jnp.add, terms, jnp.zeros([size], dtype))


def _terms(value: Lazy, dtype: Any) -> list[Base | Outer]:
    """The terms in a dtype, with factors near 1."""
    terms: list[Base | Outer] = [dataclasses.replace(x, array=x.array.astype(dtype)) for x in value.bases]
    for outer in map(normalized, value.outers):
        terms.append(dataclasses.replace(outer, left=outer.left.astype(dtype), right=outer.right.astype(dtype)))
    return terms


def _product_of(a: Base | Outer, b: Base | Outer, dtype: Any) -> jax.Array | None:
    """The inner product of two terms; None if their axes do not allow one without multiplying out."""
    precise = {"dtype": dtype, "precision": jax.lax.Precision.HIGHEST}
    if isinstance(a, Base) and isinstance(b, Base):
        return jnp.sum(a.array * b.array) * _as_array(scale_product(a.scale, b.scale), dtype)
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
    return times(sums, scale_product(a.scale, b.scale))


def _square_of_terms(term: Base | Outer, dtype: Any) -> jax.Array:
    """The sum of the squared norms of what is added up."""
    if isinstance(term, Base):
        square = jnp.sum(jnp.square(term.array))
    else:
        squares = [jnp.sum(jnp.square(x), axis=range(2, x.ndim)) for x in (term.left, term.right)]
        square = jnp.sum(squares[0] * squares[1], axis=1)
    return square * _as_array(scale_product(term.scale, term.scale), dtype)


def _as_array(scale: Scale, dtype: Any) -> jax.Array:
    return jnp.asarray(1.0 if scale is None else scale, dtype)


def _exact_inner_product(first: Lazy, second: Lazy, size: int, dtype: Any) -> jax.Array:
    """The same from the sums themselves, of one micro-batch at a time."""

    def of_one(index):
        a, b = (_multiplied_out_at(index, value, dtype) for value in (first, second))
        return jnp.sum(a * b)

    return jax.lax.map(of_one, jnp.arange(size))


def _multiplied_out_at(index: jax.Array, value: Lazy, dtype: Any) -> jax.Array:
    """The array of one micro-batch."""

    def at(x):
        return x if x is None or not jnp.ndim(x) else jax.lax.dynamic_slice_in_dim(x, index, 1)

    terms = [base.array.astype(dtype) * _as_array(at(base.scale), dtype).reshape(()) for base in value.bases]
    for outer in value.outers:
        one = dataclasses.replace(outer, left=at(outer.left), right=at(outer.right), scale=at(outer.scale))
        terms.append(multiplied_out(one, dtype)[0])
    return functools.reduce(jnp.add, terms, jnp.zeros(value.shape, dtype))
