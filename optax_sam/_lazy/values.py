"""Values: what an equation takes and returns when the program of one micro-batch is evaluated for all of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_sam._lazy.outer import Lazy

Value = Any  # a shared jax.Array, or one of Each, Full, Lazy, Product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Each:
    """An array for each micro-batch, (M, ...)."""

    stack: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Full:
    """A scalar, shared or one for each micro-batch, (M,), in all places of an array."""

    scalar: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """The product of two sums, element by element; most are added up next."""

    first: Lazy
    second: Lazy


def is_own(value: Value) -> bool:
    """Whether the value is not a shared array, and may differ between micro-batches."""
    return isinstance(value, (Each, Full, Lazy, Product))


def is_lazy(value: Value) -> bool:
    """Whether the value would have to be multiplied out."""
    return isinstance(value, Product) or (isinstance(value, Lazy) and bool(value.outers))


def is_zero(value: Value) -> bool:
    """Whether the value is known to be zero: a sum without terms, or a constant."""
    if isinstance(value, Lazy):
        return not value.bases and not value.outers
    is_constant = not isinstance(value, (Each, Full, Product, Tracer)) and not np.ndim(value)
    return is_constant and jnp.issubdtype(jnp.result_type(value), np.number) and bool(value == 0)


def as_lazy(value: Value, like: Lazy) -> Lazy | None:
    """A sum, or a shared array of the same shape as a sum; None for what is neither."""
    if isinstance(value, Lazy):
        return value
    if isinstance(value, (Each, Full, Product)) or np.shape(value) != like.shape:
        return None
    return Lazy.of(value if hasattr(value, "dtype") else jnp.asarray(value))


def as_scalar(value: Value) -> Any:
    """The scalar, shared or (M,), that is in all places of the value; None if there is no such scalar."""
    if isinstance(value, Full):
        return value.scalar
    if isinstance(value, Each):
        return value.stack if value.stack.ndim == 1 else None
    return value if not isinstance(value, (Lazy, Product)) and not np.ndim(value) else None
