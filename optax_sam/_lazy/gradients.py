"""Gradients: the matrix products of a program that are gradients of its weights."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from optax_sam._jaxpr import type_of


class Gradient(NamedTuple):
    """The gradient of a weight as a product: K terms of sizes P and Q."""

    terms: int
    sizes: tuple[int, int]

    @property
    def size(self) -> int:
        return math.prod(self.sizes)


def shapes_of_weights(closed: ClosedJaxpr) -> frozenset[tuple[int, ...]]:
    """The shapes of the arrays that a program closes over, params among them, without the order of axes."""
    return frozenset(tuple(sorted(jnp.shape(x))) for x in closed.consts)


def is_weight(aval: Any, shapes: frozenset[tuple[int, ...]]) -> bool:
    """Whether an array can be the gradient of a weight."""
    return tuple(sorted(aval.shape)) in shapes and jnp.issubdtype(aval.dtype, np.inexact)


def gradient_of(eqn: JaxprEqn, shapes: frozenset[tuple[int, ...]]) -> Gradient | None:
    """What a matrix product is if it has the shape of a weight."""
    (contracted, _), batched = eqn.params["dimension_numbers"]
    out, (left, right) = type_of(eqn.outvars[0]), (type_of(variable).shape for variable in eqn.invars)
    terms = math.prod(left[axis] for axis in contracted)
    if any(batched) or not terms or not is_weight(out, shapes):
        return None
    return Gradient(terms, (math.prod(left) // terms, math.prod(right) // terms))
