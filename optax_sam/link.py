r"""The link: from the clean gradient g to the SAM gradient s, with any ascent.

``sharpness_aware(ascent)`` is the only place that evaluates gradients. It stands first in an Optax chain; everything
behind it (clipping, weight decay, momentum, schedules) acts on s and needs no change.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._axes import check_declared, vary, varying_axes
from optax_sam._checks import (
    NO_PARAMS_MESSAGE,
    as_link,
    check_alike,
    check_int,
    check_params,
    check_state,
)
from optax_sam._evaluation import evaluation
from optax_sam._rounding import rounded_sum

GRADIENT_ALONE = " Take the gradient alone, as jax.grad(loss_fn) returns it: no (value, gradient), no (gradient, aux)."


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
        TypeError: an argument is of the wrong type, or a leaf of the params is not floating-point of 16 bits or more.
        ValueError: steps < 1; at ``update``: params missing, neither ``grad_fn`` nor ``value_fn`` given, or
            ``grad_fn``, ``ascent`` or ``projection`` returns a tree of another structure or of other shapes than the
            params, such as the pair of ``jax.value_and_grad``.

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

    def init(params):
        return SharpnessAwareState(ascent_state=ascent.init(params))

    def update(updates, state, params=None, *, grad_fn=None, value_fn=None, batch=None, shards=(), **extra_args):
        if params is None:
            raise ValueError(NO_PARAMS_MESSAGE)
        check_state(state, SharpnessAwareState)
        _check_whole(params)
        check_params("params", params)
        check_alike("updates", updates, "params", params, cure=GRADIENT_ALONE)
        check_declared(params, updates, shards)
        value_fn = value_fn if grad_fn is None else None  # no forward pass for a loss that nobody reads
        evaluate = evaluation(params, grad_fn=grad_fn, value_fn=value_fn, others=extra_args)
        examples = () if batch is None else (batch,)
        gradient, ascent_state = updates, state.ascent_state
        perturbation, point = None, params
        for step in range(steps):
            climb, next_state = ascent.update(gradient, state.ascent_state, point, shards=shards, **extra_args)
            check_alike("what ascent returned", climb, "params", params)
            if step == 0:  # the state is that of one update, or a schedule of rho would count ascents
                perturbation, ascent_state = climb, next_state
            else:
                perturbation = optax.tree.add(perturbation, climb)
            if projection is not None:
                projected = projection(perturbation)
                check_alike("what projection returned", projected, "the perturbation", perturbation)
                perturbation = optax.tree.cast_like(jax.tree.map(jnp.asarray, projected), perturbation)
            point = _displaced(params, perturbation, like=updates)
            _, gradient = evaluate(point, *examples)
            check_alike("the gradient that grad_fn returned", gradient, "params", params, cure=GRADIENT_ALONE)
        return gradient, SharpnessAwareState(ascent_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_whole(params: Any) -> None:
    """Raises for params that ``optax.masked`` or ``optax.partition`` took leaves out of: a loss needs all of them."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            "The params contain optax.MaskedNode: put the link in front of optax.masked or optax.partition: inside "
            "no loss can be evaluated. To perturb some leaves alone it has a `mask` of its own."
        )


def _displaced(params: Any, perturbation: Any, like: Any) -> Any:
    """params + perturbation, varying over the same mapped axes as the leaves of ``like``.

    Under ``shard_map`` the gradient at a point that does not vary over an axis is summed over that axis. A leaf that
    the ascent leaves alone would be such a point, and its gradient too large by the number of devices.
    """
    return jax.tree.map(
        lambda w, e, g: vary(rounded_sum(jnp.asarray(w), jnp.asarray(e)), varying_axes(g)), params, perturbation, like
    )
