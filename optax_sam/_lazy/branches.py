"""Branches: programs in programs, evaluated for all micro-batches; what comes out of a branch has one form in all."""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from optax_sam._axes import axes_of_traffic, vary, varying_axes
from optax_sam._jaxpr import type_of, varying_axes_of
from optax_sam._lazy.grams import rarely
from optax_sam._lazy.interpreter import Interpreter
from optax_sam._lazy.outer import Base, Lazy, Outer, one_or
from optax_sam._lazy.values import Each, Value, as_lazy, is_lazy, is_own
from optax_sam._norms import norm_of_leaves


def jit(run: Interpreter, eqn: JaxprEqn, *values: Value) -> Any:
    return run.run(eqn.params["jaxpr"], values) if any(map(is_own, values)) else NotImplemented


def checkpoint(run: Interpreter, eqn: JaxprEqn, *values: Value) -> Any:
    # Without a barrier XLA would keep what it is to compute again.
    if eqn.params["differentiated"] and np.any(eqn.params["prevent_cse"]):
        values = jax.lax.optimization_barrier(values)
    return run.run(ClosedJaxpr(eqn.params["jaxpr"], ()), values)


def custom_jvp(run: Interpreter, eqn: JaxprEqn, *values: Value) -> Any:
    """A norm, whose derivative is right without the rule that it has; other functions keep theirs."""
    closed = eqn.params["call_jaxpr"]
    is_norm = [inner.params.get("name") for inner in closed.eqns] == [norm_of_leaves.__name__]
    return run.run(closed, values) if is_norm and any(map(is_lazy, values)) else NotImplemented


def scan(run: Interpreter, eqn: JaxprEqn, *values: Value) -> Any:
    """The loop of a norm as straight-line code."""
    if not any(map(is_lazy, values)) or not _is_loop_of_norm(eqn):
        return NotImplemented
    *consts, carry = values
    turns = []
    for _ in range(eqn.params["length"]):
        carry, turn = run.run(eqn.params["jaxpr"], [*consts, carry])
        turns.append(run.plain(turn, "scan"))
    return [carry, *run.mapped(lambda *own: [jnp.stack(own)], *turns)]


def _is_loop_of_norm(eqn: JaxprEqn) -> bool:
    """Whether a loop is of two turns over constants that carry one value and stack another.

    Told by shapes: the parameters that would say what is carried have changed their names between versions of JAX.
    """
    closed, length = eqn.params["jaxpr"], eqn.params["length"]
    inputs, outputs = ([type_of(variable).shape for variable in part] for part in (eqn.invars, eqn.outvars))
    of_body = [aval.shape for aval in closed.out_avals]
    if length != 2 or eqn.params["reverse"] or len(of_body) != 2 or inputs != [aval.shape for aval in closed.in_avals]:
        return False
    return outputs == [of_body[0], (length, *of_body[1])]


def cond(run: Interpreter, eqn: JaxprEqn, index: Value, *values: Value) -> Any:
    branches = eqn.params["branches"]
    if isinstance(index, Each):
        return _cond_of_each(run, branches, index.stack, values)
    traced = [jax.make_jaxpr(functools.partial(run.run, branch, values), return_shape=True)() for branch in branches]
    forms = [_form(outputs) for outputs in zip(*(shapes for _, shapes in traced), strict=True)]

    def formed(closed, shapes):
        outputs = jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(closed)())
        with_forms = zip(outputs, forms, eqn.outvars, strict=True)
        return [_in_form(run, x, form, varying_axes_of(type_of(variable))) for x, form, variable in with_forms]

    return jax.lax.switch(index, [functools.partial(formed, *both) for both in traced])


def _cond_of_each(run: Interpreter, branches: Sequence[ClosedJaxpr], indices: jax.Array, values: Any) -> Any:
    """Each branch for all micro-batches, if one of them takes it: norms take a second pass but rarely."""

    def outputs_of(branch, run=run):
        return [run.stack(run.plain(x, "cond")) for x in run.run(branch, values)]

    def if_taken(number, branch):
        if not branch.eqns or axes_of_traffic(branch.jaxpr):
            return outputs_of(branch)
        taken = rarely(lambda: outputs_of(branch))
        shapes = run.shapes_of(functools.partial(outputs_of, branch))
        axes = varying_axes(indices, values)
        zeros = [vary(jnp.zeros(x.shape, x.dtype), axes) for x in shapes]
        return jax.lax.cond(jnp.any(indices == number), taken, lambda: zeros)

    def choose(index, *cases):
        return jax.lax.select_n(index.astype(jnp.int32), *cases)

    outputs = [if_taken(number, branch) for number, branch in enumerate(branches)]
    return [Each(jax.vmap(choose)(indices, *cases)) for cases in zip(*outputs, strict=True)]


Form = dict[Any, Base | Outer] | type[Each] | None  # the terms of a sum, or one for each, or a shared array


def _form(values: Sequence[Value]) -> Form:
    """The form that an output has in all branches: of sums all terms that one of them has.

    Of ``late(sam(rho), start)`` a branch returns the clean gradients and another the SAM gradients: two sums of one
    outer product each, of the same shapes, so that the form is one such term.
    """
    like = next((x for x in values if isinstance(x, Lazy) and x.outers), None)
    if like is None:
        return Each if any(map(is_own, values)) else None
    sums: list[Any] = [as_lazy(value, like) for value in values]
    if None in sums:
        return Each
    return _all_terms(sums)


def _all_terms(sums: Sequence[Lazy]) -> dict[Any, Base | Outer]:
    """The terms that one of the sums has, with scales where one of them has some."""
    form = {}
    for value in sums:
        for place, term in _places(value).items():
            if place not in form or term.scale is not None:
                form[place] = term
    return form


def _places(value: Lazy) -> dict[Any, Base | Outer]:
    """The terms by their kind, and by how many of that kind come before."""
    count, found = collections.Counter(), {}
    for term in value.terms:
        leaves, structure = jax.tree.flatten(dataclasses.replace(term, scale=None))
        kind = structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
        found[kind, count[kind]] = term
        count[kind] += 1
    return found


def _in_form(run: Interpreter, value: Value, form: Form, axes: frozenset[str]) -> Value:
    """The value in that form."""
    if isinstance(form, dict):
        value = _with_all_terms(run, value if isinstance(value, Lazy) else Lazy.of(value), form)
    else:
        value = run.plain(value, "cond")
        value = Each(run.stack(value)) if form is Each else value
    return jax.tree.map(lambda x: vary(jnp.asarray(x), axes), value)


def _zeros(like: Base | Outer) -> Any:
    """A term of zeros."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dataclasses.replace(like, scale=None))


def _with_all_terms(run: Interpreter, value: Lazy, form: dict[Any, Base | Outer]) -> Lazy:
    """The sum with zeros for the terms of the form that it does not have, and scales (M,) where the form has some."""
    own, terms = _places(value), []
    for place, like in form.items():
        term = own[place] if place in own else _zeros(like)
        if like.scale is not None:
            scale = jnp.asarray(one_or(term.scale), jnp.promote_types(value.dtype, np.float32))
            term = dataclasses.replace(term, scale=jnp.broadcast_to(scale, (run.size,)))
        terms.append(term)
    bases = [term for term in terms if isinstance(term, Base)]
    return value.with_terms(bases, [term for term in terms if isinstance(term, Outer)])
