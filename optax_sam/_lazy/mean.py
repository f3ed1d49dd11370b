"""The mean over micro-batches, evaluated lazily where that can be, or where it pays."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from optax_sam._lazy import branches, elementwise, layers, outer
from optax_sam._lazy.gradients import shapes_of_weights
from optax_sam._lazy.interpreter import Interpreter
from optax_sam._lazy.outer import Lazy
from optax_sam._lazy.plan import is_promising, plan, why_not_lazy
from optax_sam._lazy.values import Each
from optax_sam._means import mean_of_stack

LOGGER = logging.getLogger("optax_sam")
RULES: dict[str, Callable[..., Any]] = {
    "add": elementwise.add,
    "add_any": elementwise.add,
    "broadcast_in_dim": elementwise.broadcast_in_dim,
    "cond": branches.cond,
    "conj": elementwise.conj,
    "convert_element_type": elementwise.convert,
    "copy": elementwise.same,
    "custom_jvp_call": branches.custom_jvp,
    "div": elementwise.div,
    "dot_general": layers.dot_general,
    "gather": layers.gather,
    "integer_pow": elementwise.power,
    "jit": branches.jit,
    "mul": elementwise.mul,
    "name": elementwise.same,
    "neg": elementwise.neg,
    "optimization_barrier": elementwise.barrier,
    "pvary": elementwise.vary,
    "reduce_sum": elementwise.reduce_sum,
    "remat2": branches.checkpoint,
    "scan": branches.scan,
    "scatter-add": layers.scatter_add,
    "select_n": elementwise.select_n,
    "square": elementwise.power,
    "stop_gradient": elementwise.stop_gradient,
    "sub": elementwise.sub,
    "transpose": elementwise.transpose,
}


def lazy_mean(
    closed: ClosedJaxpr,
    names: Sequence[str],
    args: Sequence[jax.Array],
    shares: jax.Array | None,
    only_if_cheaper: bool,
) -> list[jax.Array] | None:
    """The means of the outputs of a program of one micro-batch, of args (M, ...); with shares (M,) the weighted sums.

    None where the program cannot be evaluated for all micro-batches at once, or where that does not pay. The log says
    which, by the names of the outputs.
    """
    size = len(args[0])
    reason = why_not_lazy(closed, args)
    if reason is None and only_if_cheaper and not is_promising(closed):
        reason = "the shapes of its weights"
    if reason is not None:
        LOGGER.info("%d micro-batches: a loop, for %s", size, reason)
        return None
    run = Interpreter(size, shapes_of_weights(closed), RULES)
    try:
        lazily = jax.make_jaxpr(functools.partial(_means, run, closed))(args, shares)
    except NotImplementedError as error:  # a primitive that cannot be mapped
        LOGGER.info("%d micro-batches: a loop, for %s", size, error)
        return None
    estimate = plan(run, closed, lazily.jaxpr, names)
    LOGGER.info("%d micro-batches: %s", size, estimate)
    if only_if_cheaper and not estimate.is_lazy:
        return None
    return jaxpr_as_fun(lazily)(*jax.tree.leaves((args, shares)))


def _means(run: Interpreter, closed: ClosedJaxpr, args: Sequence[Any], shares: jax.Array | None) -> list[jax.Array]:
    def mean(value):
        run.stays_lazy.append(isinstance(value, Lazy) and bool(value.outers))
        if isinstance(value, Lazy) and jnp.issubdtype(value.dtype, np.inexact):
            return outer.mean(value, shares, run.size)
        stack = run.stack(run.plain(value, "mean"))
        run.averaged.append(stack.shape[1:])
        return mean_of_stack(stack, shares)

    return list(map(mean, run.run(closed, list(map(Each, args)))))
