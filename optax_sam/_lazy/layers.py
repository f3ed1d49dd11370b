"""Layers: rules for dense layers and tables, where outer products are born and used.

A rule takes the interpreter, an equation and its inputs, and returns the outputs, or NotImplemented where it declines:
then the equation is mapped over micro-batches. To decline is always right; it costs speed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from optax_sam._jaxpr import bind, type_of
from optax_sam._lazy.gradients import Gradient, gradient_of, is_weight
from optax_sam._lazy.interpreter import Interpreter
from optax_sam._lazy.outer import MICRO_BATCH, TERM, Lazy, Outer, applied, einsum, times
from optax_sam._lazy.values import Each, Value, is_lazy, is_zero


def dot_general(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
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


def scatter_add(run: Interpreter, eqn: JaxprEqn, value: Value, indices: Value, updates: Value) -> Value:
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


def _product(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    """The product of rows with w + ε: one with all that the micro-batches share, and thin ones."""
    lazy, x = (a, b) if is_lazy(a) else (b, a)
    if not isinstance(lazy, Lazy):
        return NotImplemented
    x = run.plain(x, "dot_general")
    labels, out = _labels(eqn, lazy is a, len(lazy.shape))
    options = {"dtype": type_of(eqn.outvars[0]).dtype, "precision": eqn.params["precision"]}
    products = [applied(outer, run.stack(x), labels, out, **options) for outer in lazy.outers]
    parts = [part for part in products if part is not None]
    if len(parts) < len(products):
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
        [part] = run.mapped(functools.partial(bind, eqn), *inputs(base.array))
        parts.append(times(run.stack(part), base.scale))
    return Each(functools.reduce(jnp.add, parts))


def gather(run: Interpreter, eqn: JaxprEqn, value: Value, indices: Value) -> Value:
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
        terms = times(terms.stack, outer.scale)
        parts.append(einsum(terms, labels, far, rights, (MICRO_BATCH, *rows, 1), dtype=out.dtype))
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
