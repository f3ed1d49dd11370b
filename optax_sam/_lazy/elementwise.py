"""Elementwise: rules for arithmetic with sums of outer products, and for what only passes them on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from optax_sam import _axes
from optax_sam._jaxpr import type_of
from optax_sam._lazy import outer
from optax_sam._lazy.grams import inner_product
from optax_sam._lazy.interpreter import Interpreter
from optax_sam._lazy.outer import Lazy
from optax_sam._lazy.values import Each, Full, Product, Value, as_lazy, as_scalar, is_lazy, is_zero


def add(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    for value, other in ((a, b), (b, a)):
        if is_zero(value) and isinstance(other, (Lazy, Product)):
            return other
    return _combined(outer.total, a, b)


def sub(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    return a if is_zero(b) and isinstance(a, (Lazy, Product)) else _combined(outer.difference, a, b)


def _combined(function: Callable[[Lazy, Lazy], Lazy], a: Value, b: Value) -> Value:
    like = next((x for x in (a, b) if isinstance(x, Lazy) and x.outers), None)
    first, second = (None if like is None else as_lazy(x, like) for x in (a, b))
    return NotImplemented if first is None or second is None else function(first, second)


def mul(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    a, b = (a, b) if isinstance(a, Lazy) else (b, a)
    if not isinstance(a, Lazy):
        return NotImplemented
    if (scalar := as_scalar(b)) is not None:
        return NotImplemented if jnp.iscomplexobj(scalar) else outer.scaled(a, scalar)
    b = as_lazy(b, a)
    return NotImplemented if b is None or not (a.outers or b.outers) else Product(a, b)


def div(run: Interpreter, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    scalar = as_scalar(b)
    if not isinstance(a, Lazy) or scalar is None or jnp.iscomplexobj(scalar) or is_zero(a):  # 0/0 is not 0
        return NotImplemented
    return outer.scaled(a, 1 / scalar)


def neg(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    return outer.scaled(value, -1.0) if isinstance(value, Lazy) else NotImplemented


def power(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    power = eqn.params.get("y", 2)
    if not isinstance(value, Lazy) or power not in (1, 2):
        return NotImplemented
    return value if is_zero(value) or power == 1 else Product(value, value)


def reduce_sum(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    if not isinstance(value, Product) or len(eqn.params["axes"]) < len(value.first.shape):
        return NotImplemented
    result = inner_product(value.first, value.second, run.size)
    if result is None:
        return NotImplemented
    run.uses += 1
    return Each(result.astype(type_of(eqn.outvars[0]).dtype))


def select_n(run: Interpreter, eqn: JaxprEqn, which: Value, *cases: Value) -> Value:
    """A choice by one scalar, as clipping makes it."""
    index, like = as_scalar(which), next((x for x in cases if isinstance(x, Lazy) and x.outers), None)
    sums = [] if like is None else [x for case in cases if (x := as_lazy(case, like)) is not None]
    if index is None or len(sums) < len(cases):
        return NotImplemented
    return outer.selected(index, sums)


def transpose(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
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


def broadcast_in_dim(run: Interpreter, eqn: JaxprEqn, value: Value, *sizes: Value) -> Value:
    out = type_of(eqn.outvars[0])
    scalar = as_scalar(value)
    if sizes or not out.shape or scalar is None or isinstance(value, Full):
        return NotImplemented
    if is_zero(value) and jnp.issubdtype(out.dtype, np.inexact):
        return Lazy((), (), out.shape, out.dtype)
    return Full(jnp.asarray(scalar, out.dtype), out.shape)


def conj(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    """That of factors and arrays: their scales are real."""
    return value.map_arrays(jnp.conj) if isinstance(value, Lazy) else NotImplemented


def convert(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    dtype = eqn.params["new_dtype"]
    if is_zero(value) and not isinstance(value, Lazy):
        return np.zeros([], dtype)  # still a constant
    # In float16 a factor can be zero where the product is not.
    if not isinstance(value, Lazy) or not jnp.issubdtype(dtype, np.inexact) or dtype == jnp.float16:
        return NotImplemented
    return dataclasses.replace(value.map_arrays(lambda x: x.astype(dtype)), dtype=np.dtype(dtype))


def same(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    return value if isinstance(value, (Lazy, Full, Product)) else NotImplemented


def stop_gradient(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    return jax.tree.map(jax.lax.stop_gradient, value) if isinstance(value, (Lazy, Full, Product)) else NotImplemented


def vary(run: Interpreter, eqn: JaxprEqn, value: Value) -> Value:
    axes = eqn.params["axes"]
    return jax.tree.map(lambda x: _axes.vary(jnp.asarray(x), axes), value) if is_lazy(value) else NotImplemented


def barrier(run: Interpreter, eqn: JaxprEqn, *values: Value) -> Any:
    return list(jax.lax.optimization_barrier(values))
