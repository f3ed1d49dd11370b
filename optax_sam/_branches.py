"""Branches: programs in programs, evaluated for all micro-batches; what comes out of a branch has one form in all."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from optax_sam import _outer
from optax_sam._axes import axes_of_traffic, vary, varying_axes
from optax_sam._interpreter import Each, Full, Interpreter, Product, Value, as_lazy, is_lazy
from optax_sam._jaxpr import type_of
from optax_sam._norms import norm_of_leaves
from optax_sam._outer import Base, Lazy, Outer


def jit(run: Interpreter, eqn: JaxprEqn, *values: Value) -> Any:
    is_own = any(isinstance(x, (Each, Full, Lazy, Product)) for x in values)
    return run.run(eqn.params["jaxpr"], values) if is_own else NotImplemented


def checkpoint(run: Interpreter, eqn: JaxprEqn, *values: Value) -> Any:
    if eqn.params["differentiated"] and np.any(
        eqn.params["prevent_cse"]
    ):  # or XLA would keep what it is to compute again
        values = jax.lax.optimization_barrier(values)
    return run.run(ClosedJaxpr(eqn.params["jaxpr"], ()), values)


def custom_jvp(run: Interpreter, eqn: JaxprEqn, *values: Value) -> Any:
    """A norm, whose derivative is right without the rule that it has; other functions keep theirs."""
    closed = eqn.params["call_jaxpr"]
    is_norm = [inner.params.get("name") for inner in closed.eqns] == [norm_of_leaves.__name__]
    return run.run(closed, values) if is_norm and any(map(is_lazy, values)) else NotImplemented


def scan(run: Interpreter, eqn: JaxprEqn, *values: Value) -> Any:
    """The loop of a norm, two turns over constants that carry one value and stack another, as straight-line code."""
    closed, length = eqn.params["jaxpr"], eqn.params["length"]
    if length != 2 or eqn.params["reverse"] or len(closed.out_avals) != 2 or not any(map(is_lazy, values)):
        return NotImplemented
    carried, stacked = (type_of(variable).shape for variable in eqn.outvars)
    slices = [type_of(variable).shape for variable in eqn.invars] != [aval.shape for aval in closed.in_avals]
    if slices or carried != closed.out_avals[0].shape or stacked != (length, *closed.out_avals[1].shape):
        return NotImplemented
    *consts, carry = values
    turns = []
    for _ in range(length):
        carry, turn = run.run(closed, [*consts, carry])
        turns.append(run.plain(turn, "scan"))
    return [carry, *run.mapped(lambda *own: [jnp.stack(own)], *turns)]


def cond(run: Interpreter, eqn: JaxprEqn, index: Value, *values: Value) -> Any:
    branches = eqn.params["branches"]
    if isinstance(index, Each):
        return _cond_of_each(run, branches, index.stack, values) if any(map(is_lazy, values)) else NotImplemented
    traced = [jax.make_jaxpr(functools.partial(run.run, branch, values), return_shape=True)() for branch in branches]
    forms = [_form(outputs) for outputs in zip(*(shapes for _, shapes in traced), strict=True)]

    def formed(closed, shapes):
        outputs = jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(closed)())
        with_forms = zip(outputs, forms, eqn.outvars, strict=True)
        return [_in_form(run, x, form, type_of(variable).mat.varying) for x, form, variable in with_forms]

    return jax.lax.switch(index, [functools.partial(formed, *both) for both in traced])


def _cond_of_each(run: Interpreter, branches: Sequence[ClosedJaxpr], indices: jax.Array, values: Any) -> Any:
    """Each branch for all micro-batches, if one of them takes it: norms take a second pass but rarely."""

    def outputs_of(branch, run=run):
        return [run.stack(run.plain(x, "cond")) for x in run.run(branch, values)]

    def if_taken(number, branch):
        if not branch.eqns or axes_of_traffic(branch.jaxpr):
            return outputs_of(branch)
        taken = _outer.rarely(lambda: outputs_of(branch))
        shapes = run.shapes_of(functools.partial(outputs_of, branch))
        axes = varying_axes(indices, values)
        zeros = [vary(jnp.zeros(x.shape, x.dtype), axes) for x in shapes]
        return jax.lax.cond(jnp.any(indices == number), taken, lambda: zeros)

    def choose(index, *cases):
        return jax.lax.select_n(index.astype(jnp.int32), *cases)

    outputs = [if_taken(number, branch) for number, branch in enumerate(branches)]
    return [Each(jax.vmap(choose)(indices, *cases)) for cases in zip(*outputs, strict=True)]


Form = tuple[Base | Outer, ...] | type[Each] | None  # the terms of a sum, or one for each, or a shared array


def _form(values: Sequence[Value]) -> Form:
    """The form that an output has in all branches.

    Of ``late(sam(rho), start)`` a branch returns the clean gradients and another the SAM gradients: two sums of one
    outer product each, of the same shapes, so that the form is one such term.
    """
    like = next((x for x in values if isinstance(x, Lazy) and x.outers), None)
    if like is None:
        return Each if any(isinstance(x, (Each, Full, Product)) for x in values) else None
    terms: list[Base | Outer] = []
    for value in values:
        if (value := as_lazy(value, like)) is None:
            return Each
        free = list(range(len(terms)))
        for term in (*value.bases, *value.outers):
            place = next((i for i in free if _kind(terms[i]) == _kind(term)), None)
            if place is None:
                terms.append(term)
                continue
            free.remove(place)
            if term.scale is not None:
                terms[place] = term  # a place has scales if one of its terms has
    return tuple(terms)


def _kind(term: Base | Outer) -> Any:
    leaves, structure = jax.tree.flatten(dataclasses.replace(term, scale=None))
    return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def _in_form(run: Interpreter, value: Value, form: Form, axes: frozenset[str]) -> Value:
    """The value in that form."""
    if isinstance(form, tuple):
        value = _with_all_terms(run, value, form)
    else:
        value = run.plain(value, "cond")
        value = Each(run.stack(value)) if form is Each else value
    return jax.tree.map(lambda x: vary(jnp.asarray(x), axes), value)


def _with_all_terms(run: Interpreter, value: Any, form: tuple[Base | Outer, ...]) -> Lazy:
    """The sum with zeros for the terms of the form that it does not have, and scales (M,) where the form has some."""
    value = value if isinstance(value, Lazy) else Lazy((Base(value),), (), value.shape, value.dtype)
    rest, terms = [*value.bases, *value.outers], []
    for place in form:
        term = next((x for x in rest if _kind(x) == _kind(place)), None)
        if term is None:
            term = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dataclasses.replace(place, scale=None))
        else:
            rest.remove(term)
        if place.scale is not None:
            scale = jnp.asarray(1.0 if term.scale is None else term.scale, jnp.promote_types(value.dtype, np.float32))
            term = dataclasses.replace(term, scale=jnp.broadcast_to(scale, (run.size,)))
        terms.append(term)
    bases = [term for term in terms if isinstance(term, Base)]
    return value.with_terms(bases, [term for term in terms if isinstance(term, Outer)])
