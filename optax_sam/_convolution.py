r"""Convolutions in loops and branches, in the one layout that XLA runs fast there.

XLA on CPUs has fast convolutions for one layout (examples first, channels last) and brings others into it, but only in
the entry computation of a program. The gradient of a convolution with respect to its kernel is in another layout;
inside ``lax.scan`` or ``lax.switch`` it runs up to a hundred times slower. Here the convolutions of a function are
brought into that layout before they get there. Numbers do not change.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, jaxpr_as_fun
from jax.extend.core.primitives import conv_general_dilated_p, jit_p, remat_p


def canonicalized(function: Callable[..., Any]) -> Callable[..., Any]:
    """Prepares a loop or branch body for XLA:CPU; a no-op on other backends."""
    if jax.default_backend() != "cpu":
        return function

    @functools.wraps(function)
    def rewritten(*args):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        if _has_convolution(closed.jaxpr):
            outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        else:
            outputs = jaxpr_as_fun(closed)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return rewritten


def _has_convolution(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive is conv_general_dilated_p
        or (eqn.primitive is jit_p and _has_convolution(eqn.params["jaxpr"].jaxpr))
        or (eqn.primitive is remat_p and _has_convolution(eqn.params["jaxpr"]))
        for eqn in jaxpr.eqns
    )


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr, its convolutions made canonical, also in nested ``jax.jit`` and ``jax.checkpoint``."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for eqn in jaxpr.eqns:
        inputs = [read(variable) for variable in eqn.invars]
        if eqn.primitive is conv_general_dilated_p:
            outputs = [_convolve(*inputs, **eqn.params)]
        elif eqn.primitive is jit_p and _has_convolution(eqn.params["jaxpr"].jaxpr):
            outputs = _evaluate(eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts, inputs)
        elif eqn.primitive is remat_p and _has_convolution(eqn.params["jaxpr"]):
            inner = jax.make_jaxpr(functools.partial(_evaluate_closed, eqn.params["jaxpr"]))(*inputs).jaxpr
            outputs = remat_p.bind(*inputs, **eqn.params | {"jaxpr": inner})
        else:
            with eqn.ctx.manager:
                outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _evaluate_closed(jaxpr: Jaxpr, *args: Any) -> list[Any]:
    return _evaluate(jaxpr, (), args)


def _convolve(lhs: jax.Array, rhs: jax.Array, *, dimension_numbers: Any, **params: Any) -> jax.Array:
    """A convolution by way of (examples, space, channels) * (space, channels, filters)."""
    batch, feature, *space = dimension_numbers.lhs_spec
    filters, channels, *kernel = dimension_numbers.rhs_spec
    rank = len(space)
    last = (0, rank + 1, *range(1, rank + 1))
    output = conv_general_dilated_p.bind(
        jnp.transpose(lhs, (batch, *space, feature)),
        jnp.transpose(rhs, (*kernel, channels, filters)),
        dimension_numbers=jax.lax.ConvDimensionNumbers(last, (rank + 1, rank, *range(rank)), last),
        **params,
    )
    order = [0] * (rank + 2)
    for source, target in zip(last, dimension_numbers.out_spec, strict=True):
        order[target] = source
    return jnp.transpose(output, order)
