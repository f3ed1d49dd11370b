"""The interpreter: the program of one micro-batch, evaluated for all of them at once.

A value is an array that all micro-batches share, or one for each (:class:`Each`), or a sum of outer products for each
(:class:`Lazy`). An equation has a rule, which may decline. Where no rule applies, what is lazy is multiplied out and
the equation mapped over micro-batches: right, and not faster.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from optax_sam._jaxpr import bind, evaluate, inner_equations
from optax_sam._lazy.gradients import Gradient
from optax_sam._lazy.outer import Base, Lazy, multiplied_out
from optax_sam._lazy.values import Each, Full, Product, Value

SLOW = {"conv_general_dilated", "scan", "while"}


class Interpreter:
    """Evaluates programs for M micro-batches, and records what its cost depends on.

    Attributes:
        size: M.
        weights: the shapes of weights, without the order of axes.
        lazy: the gradients that became outer products.
        formed: those that are smaller when multiplied out.
        multiplied_out: the primitives for which sums were multiplied out, and these.
        uses: the number of products, norms and lookups that were made of sums.
        stays_lazy: for each output, whether it was averaged as a sum.
        averaged: the shapes of the outputs averaged as stacks.
        slow: the primitives mapped over micro-batches of which XLA makes loops or grouped convolutions.
        own: the variables of the program that have a value for each micro-batch.
    """

    def __init__(self, size: int, weights: frozenset[tuple[int, ...]], rules: Mapping[str, Callable[..., Any]]):
        self.size, self.weights, self._rules = size, weights, rules
        self.lazy: list[Gradient] = []
        self.formed: list[Gradient] = []
        self.multiplied_out: list[tuple[str, Lazy]] = []
        self.uses = 0
        self.stays_lazy: list[bool] = []
        self.averaged: list[tuple[int, ...]] = []
        self.slow: set[str] = set()
        self.own: set[Var] = set()

    def run(self, closed: ClosedJaxpr, args: Sequence[Value]) -> list[Value]:
        """The outputs of a program."""
        return evaluate(closed.jaxpr, closed.consts, args, self._outputs)

    def _outputs(self, eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        rule = self._rules.get(name)
        outputs = NotImplemented if rule is None else rule(self, eqn, *inputs)
        if outputs is NotImplemented:
            inputs = [self.plain(x, name) for x in inputs]
            if any(isinstance(x, Each) for x in inputs):
                self.slow |= SLOW & {name, *(inner.primitive.name for inner in inner_equations(eqn))}
            outputs = self.mapped(functools.partial(bind, eqn), *inputs)
        elif not eqn.primitive.multiple_results:
            outputs = [outputs]
        self.own |= {variable for variable, x in zip(eqn.outvars, outputs, strict=True) if isinstance(x, Each)}
        return outputs

    def shapes_of(self, function: Callable[["Interpreter"], Any]) -> Any:
        """The shapes of what a function makes of an interpreter like this one; nothing is recorded."""
        return jax.eval_shape(lambda: function(Interpreter(self.size, self.weights, self._rules)))

    def mapped(self, function: Callable[..., list[jax.Array]], *inputs: Any) -> list[Any]:
        """A function of arrays, shared or one for each micro-batch."""
        if not any(isinstance(x, Each) for x in inputs):
            return function(*inputs)
        axes = [0 if isinstance(x, Each) else None for x in inputs]
        stacks = [x.stack if isinstance(x, Each) else x for x in inputs]
        return list(map(Each, jax.vmap(function, in_axes=axes, axis_size=self.size)(*stacks)))

    def plain(self, value: Value, user: str) -> Any:
        """The value as a shared array or one for each micro-batch."""
        if isinstance(value, Product):
            return self.mapped(lambda a, b: [a * b], *(self.plain(x, user) for x in (value.first, value.second)))[0]
        if isinstance(value, Full):
            if not value.scalar.ndim:
                return jnp.broadcast_to(value.scalar, value.shape)
            return Each(jax.lax.broadcast_in_dim(value.scalar, (self.size, *value.shape), (0,)))
        if not isinstance(value, Lazy):
            return value
        if value.outers:
            self.multiplied_out.append((user, value))
        terms = [self._multiplied(base) for base in value.bases]
        terms += [Each(multiplied_out(outer, value.dtype)) for outer in value.outers]
        if not terms:
            return jnp.zeros(value.shape, value.dtype)
        return functools.reduce(lambda a, b: self.mapped(lambda x, y: [x + y], a, b)[0], terms)

    def _multiplied(self, base: Base) -> Any:
        if base.scale is None:
            return base.array
        scale = jnp.asarray(base.scale, base.array.dtype)
        return self.mapped(lambda x, y: [x * y], Each(scale) if scale.ndim else scale, base.array)[0]

    def stack(self, value: Any) -> jax.Array:
        """A shared array, or one for each micro-batch, as a stack (M, ...)."""
        return value.stack if isinstance(value, Each) else jnp.broadcast_to(value, (self.size, *jnp.shape(value)))
