r"""The link: from the clean gradient g to the SAM gradient s, with any ascent.

``sharpness_aware(ascent)`` is the only place that evaluates gradients. It stands first in an Optax chain; everything
behind it (clipping, weight decay, momentum, schedules) acts on s and needs no change.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._axes import check_declared, vary, varying_axes
from optax_sam._checks import (
    NO_PARAMS_MESSAGE,
    as_link,
    check_alike,
    check_floating,
    check_function,
    check_int,
    check_loss,
    check_state,
    check_width,
)
from optax_sam._rounding import rounded_sum


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    Attributes:
        ascent_state: state of the ascent, advanced once per update.
    """

    ascent_state: optax.OptState


def sharpness_aware(
    ascent: optax.GradientTransformation,
    *,
    steps: int = 1,
    projection: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient at w by the gradient at w + ε.

    .. math::
        s = \nabla L(w + \varepsilon), \qquad \varepsilon = \mathrm{ascent}(\nabla L(w))

    With ``steps`` > 1 the ascent is repeated from the perturbed point and its outputs are added up,
    :math:`\varepsilon_{k+1} = \Pi(\varepsilon_k + \mathrm{ascent}(\nabla L(w + \varepsilon_k)))`; the ascent's state
    advances once per update, so that a schedule of rho counts training steps.

    ``update(updates, state, params, *, grad_fn=None, value_fn=None, batch=None, **extra_args)`` takes the clean
    gradient as ``updates`` and evaluates ``steps`` more gradients:

    - ``grad_fn(params)`` returns a gradient like ``updates``; with ``batch`` given it is called as ``grad_fn(params,
      batch)``, so that ``jax.grad(loss_fn)`` itself can be passed;
    - ``value_fn``, a scalar function of the same arguments, is differentiated where ``grad_fn`` is not given. Optax's
      line searches take it too, which makes ``optax.chain(sam(0.05), optax.lbfgs())`` possible.

    A leaf of the params narrower than float32 is rounded stochastically at w + ε, or ε of the usual size would round
    away: the rounding is a fixed function of w, ε and the place in the leaf, unbiased over the elements, and makes ε
    longer than asked. Gradients of complex leaves are passed as Optax wants them, conjugated, and so ``grad_fn``
    returns them; that of ``value_fn`` is conjugated here.

    Args:
        ascent: transformation from g to ε. It sees the point its gradient was taken at as ``params``.
        steps: number of ascents, ≥ 1.
        projection: applied to ε after each ascent, for example
            ``functools.partial(optax.projections.projection_l2_ball, scale=0.1)``.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` from g to s. The params it was given are never changed.

    Raises:
        TypeError: an argument is of the wrong type, params have 8 bits or fewer, or ``grad_fn`` returns a tuple, as
            ``jax.value_and_grad`` does.
        ValueError: steps < 1; at ``update``: params missing, neither ``grad_fn`` nor ``value_fn`` given, or
            ``grad_fn``, ``ascent`` or ``projection`` returns a tree of another structure or of other shapes than the
            params.

    Example:
        >>> import optax
        >>> loss_fn = lambda w: jnp.sum(w**4)
        >>> link = sharpness_aware(optax.scale(0.01))
        >>> params = jnp.array([1.0, 2.0])
        >>> grads, _ = link.update(jax.grad(loss_fn)(params), link.init(params), params, grad_fn=jax.grad(loss_fn))
        >>> print([f"{g:.3f}" for g in grads])
        ['4.499', '49.949']

    Reference:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    ascent = as_link("ascent", ascent)
    check_int("steps", steps)
    if projection is not None:
        check_function("projection", projection, "the perturbation")

    def init(params):
        return SharpnessAwareState(ascent_state=ascent.init(params))

    def update(updates, state, params=None, *, grad_fn=None, value_fn=None, batch=None, shards=(), **extra_args):
        if params is None:
            raise ValueError(NO_PARAMS_MESSAGE)
        check_state(state, SharpnessAwareState)
        gradient_at = _gradient_function(grad_fn, value_fn, batch, params, extra_args)
        check_floating("params", params)
        check_width(params)
        _check_gradient("updates", updates, params)
        check_declared(params, updates, shards)
        gradient, ascent_state = updates, state.ascent_state
        perturbation, point = None, params
        for step in range(steps):
            climb, next_state = ascent.update(gradient, state.ascent_state, point, shards=shards, **extra_args)
            check_alike("what ascent returned", climb, "the params", params)
            if step == 0:
                perturbation, ascent_state = climb, next_state
            else:
                perturbation = optax.tree.add(perturbation, climb)
            if projection is not None:
                projected = projection(perturbation)
                check_alike("what projection returned", projected, "the perturbation", perturbation)
                perturbation = optax.tree.cast_like(jax.tree.map(jnp.asarray, projected), perturbation)
            point = _displaced(params, perturbation, like=updates)
            gradient = gradient_at(point)
            _check_gradient("the gradient that grad_fn returned", gradient, params)
        return gradient, SharpnessAwareState(ascent_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _gradient_function(grad_fn: Any, value_fn: Any, batch: Any, params: Any, others: Any) -> Callable[[Any], Any]:
    """The function params → gradient that the keywords of ``update`` describe."""
    for name, function in (("grad_fn", grad_fn), ("value_fn", value_fn)):
        if function is not None:
            check_function(name, function, "the params")
    if grad_fn is None:
        if value_fn is None:
            raise ValueError(
                "A sharpness-aware update evaluates the gradient again, and got neither grad_fn nor value_fn"
                f"{', only ' + ', '.join(sorted(others)) if others else ''}. Call `tx.update(grads, state, params, "
                "grad_fn=jax.grad(loss_fn), batch=batch)` or pass `value_fn=loss_fn`; where a wrapper such as Flax's "
                "TrainState.apply_gradients forwards no keywords, use `gradient_estimator(loss_fn, link)`."
            )
        grad_fn = _own_gradient(value_fn, params)

    def gradient_at(point):
        try:
            return grad_fn(point) if batch is None else grad_fn(point, batch)
        except Exception as error:
            if isinstance(params, (jax.Array, np.ndarray)) and params.ndim == 1:
                error.add_note(
                    "The params came as one flat array. If optax.flatten is around this link, put the link in front: "
                    "`optax.chain(sam(rho), optax.flatten(...))`."
                )
            raise

    return gradient_at


def _own_gradient(value_fn: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """The gradient of value_fn, refused where ``shard_map`` makes it that of other members than the value."""

    def gradient_at(*args):
        value, gradient = jax.value_and_grad(returning_loss("value_fn", value_fn))(*args)
        check_same_members("What value_fn returns", value, gradient, params)
        return conjugated(gradient)

    return gradient_at


def conjugated(gradient: Any) -> Any:
    """The gradient, conjugated where it is complex: the loss rises along the conjugate of what ``jax.grad`` returns."""
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradient)


def returning_loss(name: str, value_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, refused when it returns something else than the loss."""

    def checked(*args):
        loss = value_fn(*args)
        check_loss(f"what {name} returns", loss)
        return loss

    return checked


def check_same_members(name: str, value: jax.Array, gradient: Any, params: Any) -> None:
    """Raises unless ``shard_map`` made the gradient of a value that of the same members of its axes."""
    for leaf in jax.tree.leaves(gradient):
        for axis in sorted(varying_axes(value) - varying_axes(leaf)):
            raise ValueError(
                f"{name} varies over the mapped axis {axis!r} and its gradient does not: shard_map summed it over the "
                f"devices, because params are replicated. Let `gradient_estimator(loss_fn, link, axis_name={axis!r})` "
                f"average; or average the loss, with jax.lax.pmean(loss, {axis!r})."
            )
    check_not_averaged(name, value, gradient, params)


def check_not_averaged(name: str, value: jax.Array, gradient: Any, params: Any) -> None:
    """Raises if a gradient is a member's own and the value is that of all members of a mapped axis."""
    for leaf, param in zip(jax.tree.leaves(gradient), jax.tree.leaves(params), strict=True):
        for axis in sorted(varying_axes(leaf) - varying_axes(value) - varying_axes(param)):
            raise ValueError(
                f"{name} is averaged over the mapped axis {axis!r} and the gradient is a member's own: under shard_map "
                "that of an averaged loss is too small by the size of the axis. Take jax.lax.pmean out of the loss and "
                f"let micro_batched average, or use `gradient_estimator(loss_fn, link, axis_name={axis!r})`."
            )


def _check_gradient(what: str, gradient: Any, params: Any) -> None:
    """Raises unless gradient has the structure and shapes of params."""
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "The params are optax.LookaheadParams, and the loss is of params.fast. Take the gradient with "
            "`gradient_estimator(loss_fn, link)` at params.fast, and give it to optax.lookahead."
        )
    if any(isinstance(leaf, optax.MaskedNode) for leaf in jax.tree.leaves(params, is_leaf=_is_masked)):
        raise ValueError(
            "The params contain optax.MaskedNode: this link stands inside optax.masked or optax.partition, where the "
            "loss cannot be evaluated. Put the link before them, `optax.chain(sam(rho), optax.masked(...))`; to "
            "perturb only some of the leaves use the `mask` argument of the recipes."
        )
    is_like_params = jax.tree.structure(gradient) == jax.tree.structure(params)
    if isinstance(gradient, tuple) and not isinstance(params, tuple) and not is_like_params:
        raise TypeError(
            f"{what} is a tuple of length {len(gradient)}, as functions made by jax.value_and_grad or with "
            "has_aux=True return; take the gradient out of it, or use jax.grad(loss_fn), which returns it alone."
        )
    check_alike(what, gradient, "the params", params)
    check_floating(what, gradient, cure="Pass what jax.grad(loss_fn) returns")


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _displaced(params: Any, perturbation: Any, like: Any) -> Any:
    """params + perturbation, varying over the same mapped axes as the leaves of ``like``.

    Under ``shard_map`` the gradient at a point that does not vary over an axis is summed over that axis. A leaf that
    the ascent leaves alone would be such a point, and its gradient too large by the number of devices.
    """
    return jax.tree.map(
        lambda w, e, g: vary(rounded_sum(jnp.asarray(w), jnp.asarray(e)), varying_axes(g)), params, perturbation, like
    )
