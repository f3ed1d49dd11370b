r"""Single pass: links that evaluate one gradient in all, because they ignore the clean one.

In a chain under ``jax.jit`` XLA removes the clean backward pass, which nobody reads. The estimator does not run it, nor
the forward pass: its loss and aux are then those at w + ε, from the pass that is run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._axes import vary, varying_axes
from optax_sam._checks import as_link, check_nonnegative, check_state
from optax_sam._norms import plus, scaled, wide


class OneGradient(optax.GradientTransformationExtraArgs):
    """A link that ignores the clean gradient."""


class MomentumState(NamedTuple):
    """State of :func:`on_momentum`.

    Attributes:
        link_state: the state of the link.
        momentum: v, a tree like the params, in float32 or wider: a sum of float16 gradients overflows.
    """

    link_state: optax.OptState
    momentum: optax.Updates


def one_gradient(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A link without the clean gradient: ``inner`` gets zeros in its place, and one gradient is evaluated in all.

    For ascents that do not climb along g, such as a random one. In the estimator loss and aux are those at the point
    where ``inner`` evaluates its (last) gradient. ``measured`` then knows nothing of w: the norm of g, the angle to it
    and the loss there are NaN. Only ``measured`` and ``sharded`` may stand around it there: inside ``late`` and other
    switches, ``optax.chain`` or ``optax.inject_hyperparams`` the clean pass is run as well, and loss and aux are the
    clean ones.

    Args:
        inner: link whose result does not depend on the gradient that it gets.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with the state of ``inner``.

    Raises:
        TypeError: inner is not a transformation.

    Example:
        >>> import jax, optax_sam
        >>> ascent = optax.chain(optax_sam.random_direction(key=0), optax_sam.normalized_ascent(rho=0.5))
        >>> estimator = optax_sam.gradient_estimator(lambda w: w**2, one_gradient(optax_sam.sharpness_aware(ascent)))
        >>> params = jnp.float32(2.0)
        >>> loss, grads, state = estimator.value_and_grad(params, estimator.init(params))
        >>> print(loss, grads)  # at 2 ± 0.5
        2.25 3.0
    """
    inner = as_link("inner", inner)

    def update(updates, state, params=None, **extra_args):
        nothing = jax.tree.map(lambda g: vary(jnp.zeros_like(g), varying_axes(g)), updates)
        return inner.update(nothing, state, params, **extra_args)

    return OneGradient(inner.init, update)


def on_momentum(
    inner: optax.GradientTransformation, decay: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    r"""A link on a running sum of its own outputs in place of the clean gradient.

    .. math::
        s_t = \mathrm{inner}(v_t), \qquad v_{t+1} = \beta v_t + s_t, \qquad v_0 = 0

    As for :func:`one_gradient`, one gradient is evaluated in all. A gradient that is not finite stays in v: put the
    whole state back, as ``examples/mixed_precision.py`` does.

    Args:
        inner: link from v to s, such as ``sam(rho)``.
        decay: β, a scalar in [0, 1); 0: v is the last output.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with a :class:`MomentumState`.

    Raises:
        TypeError: inner is not a transformation, or decay is not a real scalar.
        ValueError: decay is negative or ≥ 1.

    Example:
        >>> import jax, optax_sam
        >>> link, params = on_momentum(optax_sam.sam(rho=0.5), decay=0.9), jnp.float32(2.0)
        >>> grad_fn, state = jax.grad(lambda w: w**2), link.init(params)
        >>> for _ in range(2):
        ...     updates, state = link.update(grad_fn(params), state, params, grad_fn=grad_fn)
        ...     print(updates)
        4.0
        5.0

    Reference:
        Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational Overhead
        <https://arxiv.org/abs/2401.12033>`_, 2024
    """
    inner = as_link("inner", inner)
    check_nonnegative("decay", decay, below=1)

    def init(params):
        return MomentumState(inner.init(params), wide(optax.tree.zeros_like(params)))

    def update(updates, state, params=None, **extra_args):
        check_state(state, MomentumState)
        momentum = jax.tree.map(lambda v, g: vary(v, varying_axes(g)), state.momentum, updates)
        outputs, link_state = inner.update(momentum, state.link_state, params, **extra_args)
        return outputs, MomentumState(link_state, plus(scaled(momentum, decay), 1, outputs))

    return OneGradient(init, update)


def same_kind(
    link: optax.GradientTransformation, init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """The transformation of two functions around a link, which evaluates one gradient in all if the link does."""
    kind = OneGradient if isinstance(link, OneGradient) else optax.GradientTransformationExtraArgs
    return kind(init, update)
