"""Checks: a wrong argument is refused by its name, with what came and what to do.

They read types, shapes and the values of constants, never those of traced arrays: a compiled step is free of them.
"""

import sys
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

NO_PARAMS_MESSAGE = (
    "You are using a transformation that requires the current value of parameters, but you are not passing `params` "
    "when calling `update`."
)


def as_link(name: str, transformation: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation, made to accept extra arguments."""
    if not isinstance(transformation, optax.GradientTransformation):
        raise TypeError(f"{name} must be an optax.GradientTransformation; got {transformation!r}.")
    return optax.with_extra_args_support(transformation)


def check_state(state: Any, kind: type[Any]) -> None:
    """Raises unless state is of the kind that the ``init`` of a transformation makes."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be what init(params) makes, here {kind.__name__}; got {type(state).__name__}. Pass the state "
            "of all of tx, restored with a target: without one it loses its types."
        )


def if_injected(value: Any) -> str:
    """A cure for what ``optax.inject_hyperparams`` makes of ints and functions: an array."""
    return " Under optax.inject_hyperparams name it in static_args." if isinstance(value, jax.Array) else ""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises unless value is one of the arguments of a ``Literal``."""
    if not isinstance(value, type(get_args(choices)[0])) or value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}; got {name}={value!r}.")


def check_int(name: str, value: Any, least: int = 1) -> None:
    """Raises unless value is an int ≥ least."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int; got {name}={value!r}.{if_injected(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {name}={value!r}.")


def check_real(name: str, value: Any) -> None:
    """Raises unless value is a real scalar. An array would broadcast: a rho for each element."""
    if getattr(value, "ndim", 0) or not is_real(getattr(value, "dtype", type(value))):
        raise TypeError(f"{name} must be a real scalar; got {value!r}.")


def check_nonnegative(name: str, value: Any, *, zero: bool = True, below: float = np.inf) -> None:
    """Raises unless value is a real scalar and, where that is known, finite and not negative (nor zero)."""
    check_real(name, value)
    if not isinstance(value, Tracer) and not (0 <= float(value) < below and (zero or value)):
        bound = "finite" if below == np.inf else f"below {below}"
        raise ValueError(f"{name} must be {bound} and {'at least' if zero else 'above'} 0; got {name}={value!r}.")


def as_key(key: Any) -> jax.Array:
    """The PRNG key; raises unless it is one, typed or legacy, or a seed."""
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return jax.random.key(int(key))
    if isinstance(key, (jax.Array, np.ndarray)):
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == 0 if is_typed else (key.dtype, key.shape) == (np.uint32, (2,)):
            return jnp.asarray(key)
    raise TypeError(f"key must be one PRNG key, or an int as its seed; got {key!r}.{if_injected(key)}")


def is_real(dtype: Any) -> bool:
    """Whether the dtype, or the type of a Python scalar, is one of integers or real floating-point numbers."""
    return jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.floating)


def is_float(x: jax.typing.ArrayLike) -> bool:
    """Whether x is of a real or complex floating-point dtype."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def check_params(name: str, params: Any, kind: type[np.inexact] = np.inexact) -> None:
    """Raises unless all leaves are floating-point arrays that a small step can move."""
    flax_nnx = sys.modules.get("flax.nnx")  # which a caller with a model has imported
    if flax_nnx is not None and isinstance(params, flax_nnx.Module):
        raise TypeError(
            f"{name} is a model of Flax NNX, {type(params).__name__}, whose statistics and keys are no params. Use "
            "`optax_sam.nnx.value_and_grad(loss_fn, link)(model, batch)`, or its params, nnx.state(model, nnx.Param)."
        )
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        # Of fewer bits not even stochastic rounding moves them: ε is far below their spacing.
        if not jnp.issubdtype(dtype, kind) or jnp.finfo(dtype).bits < 16:
            real = "real " if kind is np.floating else ""
            raise TypeError(
                f"{name} must have {real}floating-point leaves of 16 bits or more; got {dtype} at {_place(path)}. Use "
                "eqx.partition(model, eqx.is_inexact_array), or optax_sam.nnx for models of Flax NNX."
            )


def check_alike(name: str, tree: Any, other_name: str, other: Any, cure: str = "") -> None:
    """Raises unless the trees have the same structure and shapes: arithmetic between them would broadcast."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(other)
    if structure != expected:
        raise ValueError(f"{name} must have the tree structure of {other_name}, {expected}; got {structure}.{cure}")
    for (path, leaf), like in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        if jnp.shape(leaf) != jnp.shape(like):
            raise ValueError(
                f"{name} must have the shapes of {other_name}; got {jnp.shape(leaf)} instead of {jnp.shape(like)} at "
                f"{_place(path)}.{cure}"
            )


def _place(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the only leaf"


def check_loss(name: str, loss: Any) -> None:
    """Raises unless loss is a real floating-point scalar."""
    if getattr(loss, "ndim", 0) or not jnp.issubdtype(getattr(loss, "dtype", type(loss)), np.floating):
        raise TypeError(
            f"{name} must be the loss, a floating-point scalar; got {loss!r}. Take the mean over examples, and pass "
            "has_aux=True to the estimator for (loss, aux)."
        )


def check_mask(mask: Any) -> None:
    """Raises unless mask is a tree of booleans, or a function, which is left uncalled."""
    for path, leaf in [] if callable(mask) else jax.tree.leaves_with_path(mask):
        if getattr(leaf, "ndim", 0) or not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), np.bool_):
            raise TypeError(
                "mask must be a tree of booleans like the params, or a function from params to one; got "
                f"mask{jax.tree_util.keystr(path)}={leaf!r}."
            )


def spread_mask(mask: Any, tree: Any) -> Any:
    """The mask, a prefix of the tree or a function, as booleans in the structure of the tree."""
    chosen = mask(tree) if callable(mask) else mask
    check_mask(chosen)
    return jax.tree.broadcast(chosen, tree)
