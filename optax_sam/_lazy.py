"""Lazy evaluation: the rules by which gradients of weights are born, used and averaged as outer products.

A rule takes the interpreter, an equation and its inputs, and returns the outputs, or NotImplemented: then the equation
is mapped over micro-batches. To decline is always right; it costs speed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from optax_sam import _branches, _outer
from optax_sam._axes import vary
from optax_sam._interpreter import (
    Each,
    Full,
    Gradient,
    Interpreter,
    Product,
    Value,
    as_lazy,
    as_scalar,
    gradient_of,
    is_lazy,
    is_weight,
    is_zero,
)
from optax_sam._jaxpr import bind, type_of
from optax_sam._outer import MICRO_BATCH, TERM, Lazy, Outer


def lazy_means(
    run: Interpreter, closed: ClosedJaxpr, mean_of_stack: Callable[..., Any], args: Sequence[Any], shares: Any
) -> list[jax.Array]:
    """The means of the outputs of a program of one micro-batch, of args (M, ...), with shares (M,) if given."""

    def mean(value):
        run.stays_lazy.append(isinstance(value, Lazy) and bool(value.outers))
        if isinstance(value, Lazy) and jnp.issubdtype(value.dtype, np.inexact):
            return _outer.mean(value, shares, run.size)
        stack = run.stack(run.plain(value, "mean"))
        run.averaged.append(stack.shape[1:])
        return mean_of_stack(stack, shares)

    return list(map(mean, run.run(closed, list(map(Each, args)))))


# --- where outer products are born -----------------------------------------------------------------------------------


def _dot_general(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    _, batched = eqn.params["dimension_numbers"]
    if any(batched):
        return NotImplemented
    if isinstance(a, Each) and isinstance(b, Each):
        return _gradient(run, eqn, a.stack, b.stack)
    return _product(run, eqn, a, b) if is_lazy(a) != is_lazy(b) else NotImplemented


def _gradient(run: Interpreter, eqn: JaxprEqn, left: jax.Array, right: jax.Array) -> Value:
    """The gradient of a weight, an outer product where that is the smaller form of it."""
    gradient, out = gradient_of(eqn, run.weights), type_of(eqn.outvars[0])
    if gradient is None or not _is_thin(run, gradient):
        return NotImplemented
    of_left, of_right = eqn.params["dimension_numbers"][0]
    left, right = _factor(left, of_left), _factor(right, of_right)
    axes, others = tuple(range(left.ndim - 2)), tuple(range(left.ndim - 2, out.ndim))
    outer = Outer(left, right, axes, others, precision=eqn.params["precision"])
    return Lazy((), (outer,), out.shape, out.dtype)


def _factor(stack: jax.Array, contracted: Sequence[int]) -> jax.Array:
    """(M, ...) as (M, K, ...), with the contracted axes as one."""
    free = [axis for axis in range(stack.ndim - 1) if axis not in contracted]
    stack = jnp.transpose(stack, (0, *(axis + 1 for axis in (*contracted, *free))))
    return jnp.reshape(stack, (len(stack), -1, *stack.shape[1 + len(contracted) :]))


def _is_thin(run: Interpreter, gradient: Gradient) -> bool:
    """Whether the factors are smaller than the product."""
    is_thin = gradient.terms * sum(gradient.sizes) < gradient.size
    (run.lazy if is_thin else run.formed).append(gradient)
    return is_thin


def _scatter_add(run: Interpreter, eqn: JaxprEqn, value: Value, indices: Value, updates: Value) -> Value:
    """The gradient of a table: for each example a one at its row, and the gradient of the row."""
    out = type_of(eqn.outvars[0])
    if not is_zero(value) or not isinstance(indices, Each) or not isinstance(updates, Each) or not _adds_rows(eqn):
        return NotImplemented
    rows, right = jnp.reshape(indices.stack, (run.size, -1)), jnp.reshape(updates.stack, (run.size, -1, out.shape[1]))
    if not is_weight(out, run.weights) or not _is_thin(run, Gradient(rows.shape[1], out.shape)):
        return NotImplemented
    if eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP:
        rows = jnp.clip(rows, 0, out.shape[0] - 1)
    is_there = (rows >= 0) & (rows < out.shape[0])
    right = jnp.where(is_there[..., None], right, 0)  # what is dropped may be NaN, and 0 · NaN is NaN
    return Lazy(
        (), (Outer(jax.nn.one_hot(rows, out.shape[0], dtype=out.dtype), right, (0,), (1,)),), out.shape, out.dtype
    )


def _adds_rows(eqn: JaxprEqn) -> bool:
    """Whether a scatter adds whole rows to a matrix."""
    numbers, (table, _, updates) = eqn.params["dimension_numbers"], map(type_of, eqn.invars)
    return (
        table.ndim == 2
        and numbers.update_window_dims == (updates.ndim - 1,)
        and numbers.inserted_window_dims == numbers.scatter_dims_to_operand_dims == (0,)
        and not numbers.operand_batching_dims
        and updates.shape[-1] == table.shape[1]
    )


# --- where they are used ---------------------------------------------------------------------------------------------


def _product(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    """The product of rows with w + ε: one with all that the micro-batches share, and thin ones."""
    lazy, x = (a, b) if is_lazy(a) else (b, a)
    if not isinstance(lazy, Lazy):
        return NotImplemented
    x = run.plain(x, "dot_general")
    labels, out = _labels(eqn, lazy is a, len(lazy.shape))
    options = {"dtype": type_of(eqn.outvars[0]).dtype, "precision": eqn.params["precision"]}
    applied = [_outer.applied(outer, run.stack(x), labels, out, **options) for outer in lazy.outers]
    parts = [part for part in applied if part is not None]
    if len(parts) < len(applied):
        return NotImplemented
    return _with_bases(run, eqn, lazy, lambda array: (array, x) if lazy is a else (x, array), parts)


def _labels(eqn: JaxprEqn, is_left: bool, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The labels of the axes of the other operand and of the product; 0, 1, ... are those of the lazy one."""
    (of_left, of_right), _ = eqn.params["dimension_numbers"]
    contracted, others = (of_left, of_right) if is_left else (of_right, of_left)
    labels = [rank + axis for axis in range(len(type_of(eqn.invars[is_left]).shape))]  # invars[1] if that is the right
    for axis, label in zip(others, contracted, strict=True):
        labels[axis] = label
    free = [axis for axis in range(rank) if axis not in contracted]
    rows = [label for label in labels if label >= rank]
    return (MICRO_BATCH, *labels), (MICRO_BATCH, *(free + rows if is_left else rows + free))


def _with_bases(
    run: Interpreter, eqn: JaxprEqn, lazy: Lazy, inputs: Callable[[jax.Array], Any], parts: list[jax.Array]
) -> Each:
    """The sum of these parts and of what the equation makes of the arrays that micro-batches share."""
    run.uses += 1
    for base in lazy.bases:
        [part] = run.mapped(lambda *own: bind(eqn, own), *inputs(base.array))
        parts.append(_outer.times(run.stack(part), base.scale))
    return Each(functools.reduce(jnp.add, parts))


def _gather(run: Interpreter, eqn: JaxprEqn, value: Value, indices: Value) -> Value:
    """Rows of a table: those of an outer product are products with rows of one factor."""
    if not isinstance(value, Lazy) or not value.outers or not _takes_rows(eqn):
        return NotImplemented
    if any({outer.axes, outer.others} != {(0,), (1,)} for outer in value.outers):
        return NotImplemented
    if [base.scale for base in value.bases] != [None]:  # w, which alone has the value of a row that is not there
        return NotImplemented
    out = type_of(eqn.outvars[0])
    indices = run.plain(indices, "gather")
    rows, parts = tuple(range(2, 1 + out.ndim)), []
    for outer in value.outers:
        (near, _), (far, _) = sorted(outer.sides(), key=lambda side: side[1])
        params = eqn.params | {"slice_sizes": (1, near.shape[1]), "fill_value": 0}
        table = Each(near.swapaxes(1, 2))
        [terms] = run.mapped(lambda *own, params=params: [eqn.primitive.bind(*own, **params)], table, indices)
        labels, rights = (MICRO_BATCH, *rows, TERM), (MICRO_BATCH, TERM, 1)
        terms = _outer.times(terms.stack, outer.scale)
        parts.append(_outer.einsum(terms, labels, far, rights, (MICRO_BATCH, *rows, 1), dtype=out.dtype))
    return _with_bases(run, eqn, value, lambda array: (array, indices), parts)


def _takes_rows(eqn: JaxprEqn) -> bool:
    """Whether a gather takes whole rows of a matrix."""
    numbers, (table, _) = eqn.params["dimension_numbers"], map(type_of, eqn.invars)
    return (
        table.ndim == 2
        and numbers.offset_dims == (type_of(eqn.outvars[0]).ndim - 1,)
        and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and eqn.params["slice_sizes"] == (1, table.shape[1])
    )


# --- arithmetic of sums ----------------------------------------------------------------------------------------------


def _add(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    for value, other in ((a, b), (b, a)):
        if is_zero(value) and isinstance(other, (Lazy, Product)):
            return other
    return _combined(_outer.total, a, b)


def _sub(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    return a if is_zero(b) and isinstance(a, (Lazy, Product)) else _combined(_outer.difference, a, b)


def _combined(function: Callable[[Lazy, Lazy], Lazy], a: Value, b: Value) -> Value:
    like = next((x for x in (a, b) if isinstance(x, Lazy) and x.outers), None)
    first, second = (None if like is None else as_lazy(x, like) for x in (a, b))
    return NotImplemented if first is None or second is None else function(first, second)


def _mul(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    a, b = (a, b) if isinstance(a, Lazy) else (b, a)
    if not isinstance(a, Lazy):
        return NotImplemented
    if (scalar := as_scalar(b)) is not None:
        return NotImplemented if jnp.iscomplexobj(scalar) else _outer.scaled(a, scalar)
    b = as_lazy(b, a)
    return NotImplemented if b is None or not (a.outers or b.outers) else Product(a, b)


def _div(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    scalar = as_scalar(b)
    if not isinstance(a, Lazy) or scalar is None or jnp.iscomplexobj(scalar) or is_zero(a):  # 0/0 is not 0
        return NotImplemented
    return _outer.scaled(a, 1 / scalar)


def _neg(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    return _outer.scaled(value, -1.0) if isinstance(value, Lazy) else NotImplemented


def _power(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    power = eqn.params.get("y", 2)
    if not isinstance(value, Lazy) or power not in (1, 2):
        return NotImplemented
    return value if is_zero(value) or power == 1 else Product(value, value)


def _reduce_sum(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    if not isinstance(value, Product) or len(eqn.params["axes"]) < len(value.first.shape):
        return NotImplemented
    result = _outer.inner_product(value.first, value.second, run.size)
    if result is None:
        return NotImplemented
    run.uses += 1
    return Each(result.astype(type_of(eqn.outvars[0]).dtype))


def _select_n(run: Interpreter, eqn: JaxprEqn, which: Value, *cases: Value) -> Value:
    """A choice by one scalar, as clipping makes it."""
    index, like = as_scalar(which), next((x for x in cases if isinstance(x, Lazy) and x.outers), None)
    sums = [] if like is None else [x for case in cases if (x := as_lazy(case, like)) is not None]
    if index is None or len(sums) < len(cases):
        return NotImplemented
    return _outer.selected(index, sums)


# --- what only passes them on ----------------------------------------------------------------------------------------


def _transpose(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    if not isinstance(value, Lazy):
        return NotImplemented
    permutation = eqn.params["permutation"]
    bases = [dataclasses.replace(base, array=jnp.transpose(base.array, permutation)) for base in value.bases]
    outers = [
        dataclasses.replace(
            outer, axes=tuple(map(permutation.index, outer.axes)), others=tuple(map(permutation.index, outer.others))
        )
        for outer in value.outers
    ]
    return Lazy(tuple(bases), tuple(outers), type_of(eqn.outvars[0]).shape, value.dtype)


def _broadcast_in_dim(run: Interpreter, eqn: JaxprEqn, value: Value, *sizes: Value) -> Value:
    out = type_of(eqn.outvars[0])
    scalar = as_scalar(value)
    if sizes or not out.shape or scalar is None or isinstance(value, Full):
        return NotImplemented
    if is_zero(value) and jnp.issubdtype(out.dtype, np.inexact):
        return Lazy((), (), out.shape, out.dtype)
    return Full(jnp.asarray(scalar, out.dtype), out.shape)


def _conj(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    """That of factors and arrays: their scales are real."""
    if not isinstance(value, Lazy):
        return NotImplemented
    bases = [dataclasses.replace(base, array=base.array.conj()) for base in value.bases]
    outers = [dataclasses.replace(outer, left=outer.left.conj(), right=outer.right.conj()) for outer in value.outers]
    return value.with_terms(bases, outers)


def _convert(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    dtype = eqn.params["new_dtype"]
    if is_zero(value) and not isinstance(value, Lazy):
        return np.zeros([], dtype)  # still a constant
    # In float16 a factor can be zero where the product is not.
    if not isinstance(value, Lazy) or not jnp.issubdtype(dtype, np.inexact) or dtype == jnp.float16:
        return NotImplemented
    bases = [dataclasses.replace(base, array=base.array.astype(dtype)) for base in value.bases]
    outers = [
        dataclasses.replace(outer, left=outer.left.astype(dtype), right=outer.right.astype(dtype))
        for outer in value.outers
    ]
    return Lazy(tuple(bases), tuple(outers), value.shape, np.dtype(dtype))


def _same(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    return value if isinstance(value, (Lazy, Full, Product)) else NotImplemented


def _stop_gradient(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    return jax.tree.map(jax.lax.stop_gradient, value) if isinstance(value, (Lazy, Full, Product)) else NotImplemented


def _vary(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    axes = eqn.params["axes"]
    return jax.tree.map(lambda x: vary(jnp.asarray(x), axes), value) if is_lazy(value) else NotImplemented


def _barrier(run: Interpreter, eqn: JaxprEqn, *values: Value) -> Any:
    return list(jax.lax.optimization_barrier(values))


RULES: dict[str, Callable[..., Any]] = {
    "add": _add,
    "add_any": _add,
    "broadcast_in_dim": _broadcast_in_dim,
    "cond": _branches.cond,
    "conj": _conj,
    "convert_element_type": _convert,
    "copy": _same,
    "custom_jvp_call": _branches.custom_jvp,
    "div": _div,
    "dot_general": _dot_general,
    "gather": _gather,
    "integer_pow": _power,
    "jit": _branches.jit,
    "mul": _mul,
    "name": _same,
    "neg": _neg,
    "optimization_barrier": _barrier,
    "pvary": _vary,
    "reduce_sum": _reduce_sum,
    "remat2": _branches.checkpoint,
    "scan": _branches.scan,
    "scatter-add": _scatter_add,
    "select_n": _select_n,
    "square": _power,
    "stop_gradient": _stop_gradient,
    "sub": _sub,
    "transpose": _transpose,
}
