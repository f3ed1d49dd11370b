"""Jaxprs: walking through a traced program, and evaluating it by other rules.

What has another name in JAX 0.9 is looked up here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.core
import jax.extend.core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive

_core: Any = jax.extend.core if hasattr(jax.extend.core, "get_opaque_trace_state") else jax.core
trace_state: Callable[[], Any] = _core.get_opaque_trace_state


def equations(jaxpr: Jaxpr, *primitives: Primitive) -> Iterator[JaxprEqn]:
    """The equations of a program and of all programs in it, of the primitives if some are named."""
    for eqn in jaxpr.eqns:
        if not primitives or eqn.primitive in primitives:
            yield eqn
        for inner in programs_in(eqn.params):
            yield from equations(inner, *primitives)


def inner_equations(eqn: JaxprEqn) -> Iterator[JaxprEqn]:
    """The equations of the programs in an equation."""
    for program in programs_in(eqn.params):
        yield from equations(program)


def programs_in(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The programs among the parameters of an equation, in tuples too."""
    for value in params.values():
        for program in value if isinstance(value, tuple) else (value,):
            if isinstance(program, Jaxpr | ClosedJaxpr):
                yield program.jaxpr if isinstance(program, ClosedJaxpr) else program


def varying_axes_of(aval: Any) -> frozenset[str]:
    """The mapped axes over which an array of this type varies, where that is tracked."""
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma


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
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ([], params)  # a tuple in JAX 0.9.0
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]
