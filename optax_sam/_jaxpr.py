"""Jaxprs: walking through a traced program, and evaluating it with other rules for some primitives."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, subjaxprs
from jax.extend.core.primitives import jit_p, remat_p

Rules = Mapping[Primitive, Callable[..., Any]]


def equations(jaxpr: Jaxpr, *primitives: Primitive) -> Iterator[JaxprEqn]:
    """The equations of a program and of all programs in it, of the primitives if some are named."""
    for eqn in jaxpr.eqns:
        if not primitives or eqn.primitive in primitives:
            yield eqn
    for inner in subjaxprs(jaxpr):
        yield from equations(inner, *primitives)


def evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], rules: Rules) -> list[Any]:
    """The outputs of a program in which ``rules[primitive](*inputs, **params)`` stands for the primitive.

    The rules hold in nested ``jax.jit`` and ``jax.checkpoint`` too, but not inside of loops, branches and derivative
    rules of the program: these are single equations, evaluated as they are.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for eqn in jaxpr.eqns:
        outputs = _outputs(eqn, [read(variable) for variable in eqn.invars], rules)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def reached(jaxpr: Jaxpr, rules: Rules) -> bool:
    """Whether ``evaluate`` would use one of the rules."""
    return any(eqn.primitive in rules or _inner_reached(eqn, rules) for eqn in jaxpr.eqns)


def _inner_reached(eqn: JaxprEqn, rules: Rules) -> bool:
    if eqn.primitive is jit_p:
        return reached(eqn.params["jaxpr"].jaxpr, rules)
    return eqn.primitive is remat_p and reached(eqn.params["jaxpr"], rules)


def _outputs(eqn: JaxprEqn, inputs: list[Any], rules: Rules) -> list[Any]:
    if eqn.primitive in rules:
        outputs = rules[eqn.primitive](*inputs, **eqn.params)
    elif not _inner_reached(eqn, rules):
        with eqn.ctx.manager:
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    elif eqn.primitive is jit_p:
        return evaluate(eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts, inputs, rules)
    else:
        # Still a checkpoint, or what it was to recompute would be kept.
        body = functools.partial(evaluate, eqn.params["jaxpr"], (), rules=rules)
        rewritten = jax.make_jaxpr(lambda *args: body(args))(*inputs).jaxpr
        return remat_p.bind(*inputs, **eqn.params | {"jaxpr": rewritten})
    return outputs if eqn.primitive.multiple_results else [outputs]
