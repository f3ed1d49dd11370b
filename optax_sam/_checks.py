"""Checks: a wrong argument is refused by its name, with the value that came and what is wanted instead.

They read types, shapes and the values of constants, never those of traced arrays: a compiled step is free of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

NO_PARAMS_MESSAGE = (
    "You are using a transformation that requires the current value of parameters, but you are not passing `params` "
    "when calling `update`."
)
ONLY_PARAMS = (
    "Let the loss close over what is not trained; of a whole model take the params, with "
    "`eqx.partition(model, eqx.is_inexact_array)` or `nnx.split(model, nnx.Param, ...)`"
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
            f"state must be what init(params) or the last update returned, here {kind.__name__}; got "
            f"{type(state).__name__}. Call `tx.update(grads, state, params)` with the state of all of tx; one "
            "that was restored from a checkpoint without a target has lost its types."
        )


def check_function(name: str, function: Any, arguments: str) -> None:
    """Raises unless function can be called; ``arguments`` says what with."""
    if not callable(function):
        raise TypeError(f"{name} must be a function of {arguments}; got {function!r}.{_if_injected(function)}")


def _if_injected(value: Any) -> str:
    cure = " Where optax.inject_hyperparams made an array of it, name it in static_args."
    return cure if isinstance(value, jax.Array) else ""


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises unless value is one of the choices, all of one type."""
    if not isinstance(value, type(choices[0])) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {name}={value!r}.")


def check_int(name: str, value: Any, least: int = 1) -> None:
    """Raises unless value is an int ≥ least."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int; got {name}={value!r}.{_if_injected(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {name}={value!r}.")


def check_real(name: str, value: Any, or_schedule: bool = False) -> None:
    """Raises unless value is a real scalar."""
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
        raise ValueError(f"{name} must be a scalar; got an array of shape {value.shape}.")
    if not is_real(getattr(value, "dtype", type(value))):
        raise TypeError(f"{name} must be a real scalar{' or a schedule' if or_schedule else ''}; got {value!r}.")


def check_nonnegative(name: str, value: Any, or_schedule: bool = False) -> None:
    """Raises unless value is a finite real scalar ≥ 0."""
    check_real(name, value, or_schedule)
    if not isinstance(value, Tracer) and not 0 <= _number(value) < np.inf:
        raise ValueError(f"{name} must be finite and at least 0; got {name}={value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Raises unless value is a finite real scalar > 0."""
    check_real(name, value)
    if not 0 < _number(value) < np.inf:
        raise ValueError(f"{name} must be finite and positive; got {name}={value!r}.")


def _number(value: Any) -> float:
    """The scalar as a Python number: comparing an array would be traced under ``jax.jit``."""
    return value.item() if hasattr(value, "item") else value


def is_real(dtype: Any) -> bool:
    """Whether the dtype, or the type of a Python scalar, is one of integers or real floating-point numbers."""
    return jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.floating)


def is_float(x: jax.typing.ArrayLike) -> bool:
    """Whether x is of a real or complex floating-point dtype."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def check_floating(name: str, tree: Any, kind: type[np.inexact] = np.inexact, cure: str = ONLY_PARAMS) -> None:
    """Raises unless all leaves are of a floating-point dtype of this kind."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, kind):
            raise TypeError(
                f"{name} must have {'real ' if kind is np.floating else ''}floating-point leaves; got dtype {dtype} at "
                f"{_place(path)}. {cure}."
            )


def check_width(params: Any) -> None:
    """Raises for params of 8 bits or less: ε of the usual size would be zero in their dtype."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if jnp.finfo(jnp.result_type(leaf)).bits < 16:
            raise TypeError(
                f"params must have leaves of 16 bits or more, or ε rounds to zero; got {jnp.result_type(leaf)} at "
                f"{_place(path)}. Keep params in bfloat16 or wider, and cast them in the loss."
            )


def check_alike(name: str, tree: Any, other_name: str, other: Any) -> None:
    """Raises unless the trees have the same structure and shapes."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(other)
    if structure != expected:
        raise ValueError(f"{name} must have the tree structure of {other_name}, {expected}; got {structure}.")
    for (path, leaf), like in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        if jnp.shape(leaf) != jnp.shape(like):
            raise ValueError(
                f"{name} must have the shapes of {other_name}; got {jnp.shape(leaf)} instead of {jnp.shape(like)} at "
                f"{_place(path)}."
            )


def _place(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the only leaf"


def check_loss(name: str, loss: Any, cure: str = "of (loss, aux) take the loss") -> None:
    """Raises unless loss is a real floating-point scalar."""
    if getattr(loss, "ndim", 0) or not jnp.issubdtype(getattr(loss, "dtype", type(loss)), np.floating):
        raise TypeError(
            f"{name} must be the loss, a floating-point scalar; got {_described(loss)}. Of the losses of several "
            f"examples take the mean; {cure}."
        )


def check_pair(name: str, result: Any, parts: str) -> None:
    """Raises unless the function of this name returned two things."""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(f"{name} must return {parts}; got {_described(result)}.")


def check_arrays(name: str, tree: Any) -> None:
    """Raises unless all leaves are arrays or numbers."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            raise TypeError(
                f"{name} must hold arrays and numbers, to be averaged; got {leaf!r} at {_place(path)}. Return static "
                "values outside of aux, and of modules and nnx.Rngs their state, `nnx.state(model)`."
            )


def _described(result: Any) -> str:
    """What a function returned, with the types of arrays in place of values or tracers."""
    return repr(jax.tree.map(lambda x: jax.typeof(x) if isinstance(x, jax.Array) else x, result))


def check_mask(mask: Any) -> None:
    """Raises unless mask is a tree of booleans, or a function, which is left uncalled."""
    if callable(mask):
        return
    for path, leaf in jax.tree.leaves_with_path(mask):
        if getattr(leaf, "ndim", 0) or not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), np.bool_):
            raise TypeError(
                "mask must be a tree of booleans, one for each leaf of the params, or a function from the params to "
                f"such a tree; got mask{jax.tree_util.keystr(path)}={leaf!r}."
            )


def spread_mask(mask: Any, tree: Any) -> Any:
    """The mask, a prefix of the tree or a function, as booleans in the structure of the tree."""
    chosen = mask(tree) if callable(mask) else mask
    check_mask(chosen)
    try:
        return jax.tree.broadcast(chosen, tree)
    except ValueError as error:
        raise ValueError(
            f"mask must have the structure of the params, {jax.tree.structure(tree)}, or be a prefix of it; got "
            f"{jax.tree.structure(chosen)}."
        ) from error
