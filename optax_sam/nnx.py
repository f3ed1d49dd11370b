r"""Flax NNX: the estimator for models that hold their own params, statistics and random numbers.

A model draws another dropout mask and moves its BatchNorm statistics in each pass. Here every pass of a step is of a
copy of the model as it was before the step, so that all draw the same masks, and the model gets the statistics and
counters of the clean pass alone, once.

Imported by name, ``import optax_sam.nnx``, which needs ``flax`` 0.12.7 or newer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from optax_sam import estimator
from optax_sam._axes import AxisNames
from optax_sam._checks import is_float
from optax_sam._estimate import AscentPer, loss_and_aux
from optax_sam._micro_batches import Strategy
from optax_sam.estimator import GradientEstimator

if not hasattr(nnx, "as_pure"):
    raise ImportError(f"optax_sam.nnx needs Flax 0.12.7, which needs JAX 0.10; this is Flax {flax.__version__}.")


class Options(TypedDict, total=False):
    """The keywords of :func:`optax_sam.gradient_estimator` that go through."""

    num_micro_batches: int
    ascent_per: AscentPer
    strategy: Strategy
    axis_name: AxisNames | None
    batch_argnums: int | Sequence[int]
    weight_fn: Callable[..., jax.typing.ArrayLike] | None
    group_size: int | None


def value_and_grad(
    loss_fn: Callable[..., Any],
    link: optax.GradientTransformation,
    *,
    argnums: int | nnx.DiffState = 0,
    has_aux: bool = False,
    **options: Unpack[Options],
) -> Callable[..., tuple[Any, nnx.State]]:
    """Drop-in for ``nnx.value_and_grad``: the same call and the same result, with the link's gradient.

    Args:
        loss_fn: function of ``(model, batch, *args, **kwargs)``; returns the mean loss of the batch, or
            ``(loss, aux)``.
        link: a link without arrays in its state, such as ``sam(0.05)`` with a constant rho.
        argnums: 0, or ``nnx.DiffState(0, filter)`` to differentiate, and perturb, the variables that the filter
            chooses, such as ``nnx.LoRAParam``.
        has_aux: whether loss_fn returns ``(loss, aux)``.
        options: num_micro_batches, ascent_per, strategy, axis_name, batch_argnums, weight_fn (without the model) and
            group_size, as in :func:`optax_sam.gradient_estimator`.

    Returns:
        A function of ``(model, batch, *args, **kwargs)`` that returns ``(loss, grads)``, or ``((loss, aux), grads)``,
        and updates the statistics and counters of the model. What loss_fn writes into an ``nnx.Param`` is dropped.

    Raises:
        TypeError: as :func:`optax_sam.gradient_estimator`; when called, if another argument holds a Flax NNX object.
        ValueError: as :func:`optax_sam.gradient_estimator`; when called, if the link carries arrays in its state, the
            filter chooses no variable, or loss_fn adds variables to the model.

    Example:
        >>> import jax.numpy as jnp, optax_sam
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> loss_fn = lambda model, x: jnp.mean((model(x) - 1.0) ** 2)
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        >>> loss, grads = value_and_grad(loss_fn, optax_sam.sam(rho=0.05))(model, jnp.ones((4, 2)))
        >>> _ = optimizer.update(model, grads)
    """
    of_model = gradient_estimator(loss_fn, link, argnums=argnums, has_aux=has_aux, **options)

    def stateless(model, /, *args, **kwargs):
        estimator.check_stateless(state := of_model.init(model), cure="optax_sam.nnx.gradient_estimator")
        value, grads, _ = of_model.value_and_grad(model, state, *args, **kwargs)
        return value, grads

    return stateless


def gradient_estimator(
    loss_fn: Callable[..., Any],
    link: optax.GradientTransformation,
    *,
    argnums: int | nnx.DiffState = 0,
    has_aux: bool = False,
    **options: Unpack[Options],
) -> GradientEstimator[Any, Any]:
    """:func:`optax_sam.gradient_estimator` for a model: one call returns loss, gradient and the link's new state.

    With several micro-batches each draws its own random numbers, by folding the keys of the model with its index, and
    takes its own statistics; the model gets their mean (leaves that are not float come from the first).

    Args:
        loss_fn: this and the following as in :func:`value_and_grad`.
        link: any link, with a state or without.
        argnums: 0, or ``nnx.DiffState(0, filter)``.
        has_aux: whether loss_fn returns ``(loss, aux)``.
        options: as in :func:`value_and_grad`.

    Returns:
        A :class:`optax_sam.GradientEstimator`: ``init(model)``, and ``value_and_grad(model, state, batch, *args,
        **kwargs)``, which updates the statistics and counters of the model. The state is a tree of arrays.

    Raises:
        TypeError: as :func:`value_and_grad`.
        ValueError: as :func:`value_and_grad`, except that the link may carry arrays in its state.

    Example:
        >>> import jax.numpy as jnp, optax_sam
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> loss_fn = lambda model, x: jnp.mean((model(x) - 1.0) ** 2)
        >>> estimator = gradient_estimator(loss_fn, optax_sam.late(optax_sam.sam(rho=0.05), start=100))
        >>> state = estimator.init(model)
        >>> loss, grads, state = estimator.value_and_grad(model, state, jnp.ones((4, 2)))
        >>> print(state.switch_step)
        1
    """
    chosen = _filter_of(argnums)
    if weight_fn := options.get("weight_fn"):
        options["weight_fn"] = lambda *args, _model, **kwargs: weight_fn(*args, **kwargs)

    def init(model):
        return link.init(nnx.as_pure(_Parts.of(model, chosen).params))

    def value_and_grad(model, state, /, *args, **kwargs):
        _check_arrays(args, kwargs)
        parts = _Parts.of(model, chosen)

        def pure_loss(arrays, *args, _model, **kwargs):
            keys, shared = _model
            frozen, rest = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), shared)
            copy = parts.merged(arrays, frozen, keys, rest)
            loss, aux = loss_and_aux(loss_fn(copy, *args, **kwargs), has_aux)
            return loss, (aux, _changed(rest, _Parts.of(copy, chosen).rest), jnp.float32(1))

        estimate = estimator.gradient_estimator(pure_loss, link, has_aux=True, **options).value_and_grad
        # Closed over, arrays on an Explicit mesh would not get in. As arguments keys are folded, and what has a leading
        # axis of 1 is shared by all micro-batches.
        _model = parts.scalar_keys(), jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (parts.frozen, parts.rest))
        value, grads, state = estimate(nnx.as_pure(parts.params), state, *args, _model=_model, **kwargs)
        loss, (aux, changed, weight) = value
        parts.update(model, changed, weight)
        variables = jax.tree.unflatten(jax.tree.structure(parts.params), jax.tree.leaves(grads))
        return (loss, aux) if has_aux else loss, variables, state

    estimator.gradient_estimator(loss_fn, link, **options)  # checks the arguments
    return GradientEstimator(init, value_and_grad)


class _Parts(NamedTuple):
    """A model taken apart: what is differentiated, as variables; other params, keys, and what a pass may change."""

    graphdef: Any
    params: Any
    frozen: Any
    keys: Any
    rest: Any

    @classmethod
    def of(cls, model: Any, chosen: Any) -> "_Parts":
        if not isinstance(model, nnx.Module):
            raise TypeError(f"model must be an nnx.Module; got {type(model).__name__}. Put several into one module.")
        graphdef, params, *others = nnx.split(model, chosen, nnx.Param, nnx.RngKey, ...)
        if not jax.tree.leaves(params):
            raise ValueError(f"argnums: {chosen} chooses no variable of the model, a {type(model).__name__}.")
        return cls(graphdef, params, *map(nnx.as_pure, others))

    def scalar_keys(self) -> list[list[jax.Array]]:
        """The keys one by one: layers that are stacked have an array of them each."""
        return [[key.ravel()[index] for index in range(key.size)] for key in jax.tree.leaves(self.keys)]

    def merged(self, arrays: Any, frozen: Any, scalar_keys: list[list[jax.Array]], rest: Any) -> Any:
        """A copy of the model with other arrays and keys."""
        leaves, structure = jax.tree.flatten(self.keys)
        pairs = zip(leaves, scalar_keys, strict=True)
        keys = structure.unflatten([jnp.stack(scalars).reshape(key.shape) for key, scalars in pairs])
        return nnx.merge(self.graphdef, arrays, frozen, keys, rest)

    def update(self, model: Any, changed: dict[int, jax.Array], weight: jax.Array) -> None:
        """Gives the model what a pass changed; of floats nothing, if all that it saw was padding of no weight."""
        leaves, structure = jax.tree.flatten(self.rest)
        for index, new in changed.items():
            leaves[index] = jnp.where(weight == 0, leaves[index], new) if is_float(new) else new
        nnx.update(model, structure.unflatten(leaves))


def _filter_of(argnums: Any) -> Any:
    """The filter that chooses the variables to differentiate."""
    number, chosen = (argnums.argnum, argnums.filter) if isinstance(argnums, nnx.DiffState) else (argnums, nnx.Param)
    if number != 0 or isinstance(number, bool):
        raise ValueError(
            f"The model must be the first argument of loss_fn, argnums=0 or DiffState(0, …); got {argnums=}."
        )
    return chosen


def _changed(before: Any, after: Any) -> dict[int, jax.Array]:
    """The leaves that a pass made, by their place: the others are not to be averaged, which would round them."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            "loss_fn adds variables to the model, or takes some away. Make them when the model is built, or return "
            "what they hold as aux."
        )
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return {index: new for index, (old, new) in enumerate(pairs) if new is not old}


def _check_arrays(args: Any, kwargs: Any) -> None:
    """Raises if an argument other than the model holds an NNX object, which nothing would update."""
    for name, argument in [*enumerate(args, start=1), *kwargs.items()]:
        leaves = jax.tree.leaves(argument, is_leaf=lambda node: isinstance(node, nnx.Variable))
        if any(isinstance(leaf, nnx.Variable) for leaf in leaves):
            raise TypeError(
                f"Argument {name} of loss_fn holds a Flax NNX object, {type(argument).__name__}. Hold it in the model; "
                "of nnx.Rngs pass a key, `rngs.dropout()`, which is folded for each micro-batch."
            )
