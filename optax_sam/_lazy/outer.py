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

This module is the arithmetic of sums of such products but for their norms, which are in ``grams``.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._norms import power_of_two, widen

Scale = jax.typing.ArrayLike | None  # one for all micro-batches, or (M,); None is 1
MICRO_BATCH, TERM, OTHER_TERM = 51, 50, 49  # labels in an einsum, which takes 52; axes of a value are 0, 1, ...


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

    @classmethod
    def of(cls, array: Any) -> "Lazy":
        """A shared array, or the shape of one, as a sum."""
        return cls((Base(array),), (), array.shape, array.dtype)

    @property
    def terms(self) -> "tuple[Base | Outer, ...]":
        """All terms."""
        return (*self.bases, *self.outers)

    def with_terms(self, bases: Iterable[Base], outers: Iterable[Outer]) -> "Lazy":
        """Other terms in the same shape and dtype."""
        return dataclasses.replace(self, bases=tuple(bases), outers=tuple(outers))

    def map_arrays(self, function: Callable[[jax.Array], jax.Array]) -> "Lazy":
        """The function of all shared arrays and factors, but not of scales."""
        return self.with_terms(
            [dataclasses.replace(x, array=function(x.array)) for x in self.bases],
            [dataclasses.replace(x, left=function(x.left), right=function(x.right)) for x in self.outers],
        )


def einsum(*args: Any, dtype: Any, precision: Any = None) -> jax.Array:
    """``jnp.einsum`` of arrays and labels of axes, added up and returned in a dtype."""
    return jnp.einsum(*args, precision=precision, preferred_element_type=dtype).astype(dtype)


def times(stack: jax.Array, scale: Scale) -> jax.Array:
    """Each entry of the stack times its scalar, in the dtype of the stack."""
    if scale is None:
        return stack
    return (stack * jnp.reshape(scale, (-1,) + (1,) * (stack.ndim - 1))).astype(stack.dtype)


def one_or(scale: Scale) -> jax.typing.ArrayLike:
    """The scale as a number or an array."""
    return 1.0 if scale is None else scale


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
        dataclasses.replace(base, scale=jnp.where(index == case, one_or(base.scale), 0.0))
        for case, value in enumerate(cases)
        for base in value.bases
    ]
    return cases[0].with_terms(_merged(bases), _selected_outers(index, cases))


def _selected_outers(index: jax.Array, cases: Sequence[Lazy]) -> list[Outer]:
    known = [{_key(outer): outer for outer in value.outers} for value in cases]
    common = set(known[0]).intersection(*known[1:])
    found = []
    for case, terms in enumerate(known):
        for key, outer in terms.items():
            if key not in common:
                left, right = where(index == case, outer.left), where(index == case, outer.right)
                found.append(dataclasses.replace(outer, left=left, right=right))
            elif case == 0:
                scale = _chosen(index, [others[key].scale for others in known])
                found.append(dataclasses.replace(outer, scale=scale))
    return found


def _chosen(index: jax.Array, scales: Sequence[Scale]) -> jax.Array:
    """The scale of each micro-batch, or of all, by index."""
    result = jnp.asarray(one_or(scales[0]))
    for case, scale in enumerate(scales[1:], start=1):
        result = jnp.where(index == case, one_or(scale), result)
    return result


def where(condition: jax.Array, stack: jax.Array) -> jax.Array:
    """The stack, with zeros for the micro-batches, or for all, where a condition does not hold."""
    return jnp.where(jnp.reshape(condition, (-1,) + (1,) * (stack.ndim - 1)), stack, 0)


def total(first: Lazy, second: Lazy) -> Lazy:
    """first + second, with one term for the terms of the same arrays."""
    return first.with_terms(_merged([*first.bases, *second.bases]), _merged([*first.outers, *second.outers]))


def difference(first: Lazy, second: Lazy) -> Lazy:
    """first - second; of (w + ε) - w remains ε."""
    return total(first, scaled(second, -1.0))


def _merged(terms: Sequence[Any]) -> Iterable[Any]:
    """The terms, those of the same arrays as one."""
    found = {}
    for term in terms:
        if (same := found.get(_key(term))) is not None:
            term = dataclasses.replace(term, scale=one_or(same.scale) + one_or(term.scale))
        found[_key(term)] = term
    return (term for term in found.values() if not isinstance(term.scale, float) or term.scale)  # not what cancels


def _key(term: Base | Outer) -> Any:
    """What a term is but for its scale; arrays by identity, which holds as long as somebody has the term."""
    if isinstance(term, Base):
        return id(term.array)
    return id(term.left), id(term.right), term.axes, term.others


def multiplied_out(outer: Outer, dtype: Any) -> jax.Array:
    """The stack (M, ...) of an outer product."""
    axes = range(len(outer.axes) + len(outer.others))
    return times(_product_of_factors(outer, (MICRO_BATCH, *axes), dtype), outer.scale)


def _product_of_factors(outer: Outer, out: tuple[int, ...], dtype: Any) -> jax.Array:
    """Left times right, without the scale, added up over all labels that are not in ``out``."""
    (left, axes), (right, others) = outer.sides()
    both = MICRO_BATCH, TERM
    return einsum(left, both + axes, right, both + others, out, dtype=dtype, precision=outer.precision)


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
    if shares is not None:
        value = _counted(value, shares, size)
    terms = [base.array.astype(dtype) * _sum_of_scales(base.scale, size, dtype) for base in value.bases]
    for outer in value.outers:
        if outer.left.size < outer.right.size:  # the smaller factor takes the scale
            scaled_one = dataclasses.replace(outer, left=times(outer.left, outer.scale))
        else:
            scaled_one = dataclasses.replace(outer, right=times(outer.right, outer.scale))
        terms.append(_product_of_factors(scaled_one, tuple(range(len(value.shape))), dtype))
    result = functools.reduce(jnp.add, terms, jnp.zeros(value.shape, dtype))
    return (result if shares is not None else result / size).astype(value.dtype)


def _counted(value: Lazy, shares: jax.Array, size: int) -> Lazy:
    """The sum times the shares of its micro-batches, with zeros where there is none."""

    def counted(scale):
        return shares * jnp.where(shares == 0, 0, jnp.broadcast_to(one_or(scale), (size,)))

    bases = [dataclasses.replace(x, scale=counted(x.scale)) for x in value.bases]
    outers = [
        dataclasses.replace(
            x, left=where(shares != 0, x.left), right=where(shares != 0, x.right), scale=counted(x.scale)
        )
        for x in value.outers
    ]
    return value.with_terms(bases, outers)


def _sum_of_scales(scale: Scale, size: int, dtype: Any) -> jax.Array:
    """The sum of a scale over M micro-batches."""
    return jnp.sum(jnp.broadcast_to(jnp.asarray(one_or(scale), dtype), (size,)))
