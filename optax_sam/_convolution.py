r"""Convolutions in loops and branches, in the one layout that XLA:CPU runs fast there.

XLA:CPU is fast for one layout, examples first and channels last, and transposes others into it, but only in the entry
computation of a program. A kernel's gradient is a convolution in another layout, and inside of ``lax.scan`` or
``lax.switch`` it runs up to a hundred times slower. So the convolutions of a body are transposed here, before XLA sees
them. Numbers do not change.

The smallest program that shows it, and fails once XLA needs no help, is in ``tests/test_xla.py``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, jaxpr_as_fun
from jax.extend.core.primitives import conv_general_dilated_p, jit_p, remat_p

from optax_sam._jaxpr import bind, evaluate


def canonicalized(function: Callable[..., Any]) -> Callable[..., Any]:
    """Prepares a loop or branch body for XLA:CPU; a no-op on other backends."""
    if jax.default_backend() != "cpu":
        return function

    @functools.wraps(function)
    def rewritten(*args):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        if _convolves(closed.jaxpr):
            outputs = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), _outputs)
        else:
            outputs = jaxpr_as_fun(closed)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return rewritten


def _convolves(jaxpr: Jaxpr) -> bool:
    """Whether there is a convolution, in nested ``jax.jit`` and ``jax.checkpoint`` too.

    Those inside of loops, branches and derivative rules of the program stay as they are.
    """
    return any(eqn.primitive is conv_general_dilated_p or _convolves_inside(eqn) for eqn in jaxpr.eqns)


def _convolves_inside(eqn: JaxprEqn) -> bool:
    if eqn.primitive is jit_p:
        return _convolves(eqn.params["jaxpr"].jaxpr)
    return eqn.primitive is remat_p and _convolves(eqn.params["jaxpr"])


def _outputs(eqn: JaxprEqn, inputs: list[Any]) -> list[Any]:
    if eqn.primitive is conv_general_dilated_p:
        return [_convolve(*inputs, **eqn.params)]
    if not _convolves_inside(eqn):
        return bind(eqn, *inputs)
    if eqn.primitive is jit_p:
        return evaluate(eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts, inputs, _outputs)
    # Still a checkpoint, or what it was to recompute would be kept.
    rewritten = jax.make_jaxpr(lambda *args: evaluate(eqn.params["jaxpr"], (), args, _outputs))(*inputs).jaxpr
    return remat_p.bind(*inputs, **eqn.params | {"jaxpr": rewritten})


def _convolve(lhs: jax.Array, rhs: jax.Array, *, dimension_numbers: Any, **params: Any) -> jax.Array:
    """A convolution by way of (examples, space, channels) * (space, channels, filters)."""
    batch, feature, *space = dimension_numbers.lhs_spec
    filters, channels, *kernel = dimension_numbers.rhs_spec  # JAX's order: output features first
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
