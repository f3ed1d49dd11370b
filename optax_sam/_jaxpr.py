"""Jaxprs: walking through a traced program, and evaluating it by other rules."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, jaxprs_in_params, subjaxprs


def equations(jaxpr: Jaxpr, *primitives: Primitive) -> Iterator[JaxprEqn]:
    """The equations of a program and of all programs in it, of the primitives if some are named."""
    for eqn in jaxpr.eqns:
        if not primitives or eqn.primitive in primitives:
            yield eqn
    for inner in subjaxprs(jaxpr):
        yield from equations(inner, *primitives)


def inner_equations(eqn: JaxprEqn) -> Iterator[JaxprEqn]:
    """The equations of the programs in an equation."""
    for program in jaxprs_in_params(eqn.params):
        yield from equations(program)


def type_of(variable: Any) -> Any:
    """The abstract value of a variable: its shape and dtype."""
    return variable.aval


def evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], outputs_of: Callable[[JaxprEqn, list[Any]], list[Any]]
) -> list[Any]:
    """The outputs of a program, each equation of which is evaluated by ``outputs_of(equation, inputs)``."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for eqn in jaxpr.eqns:
        outputs = outputs_of(eqn, [read(variable) for variable in eqn.invars])
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def bind(eqn: JaxprEqn, *inputs: Any) -> list[Any]:
    """The outputs of an equation as it is."""
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]
