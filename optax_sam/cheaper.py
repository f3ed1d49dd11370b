r"""Cheaper than SAM: the members of the family that take fewer than two gradients per step.

They evaluate the SAM gradient late, now and then, where it seems to matter, or without the clean one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._checks import as_link, check_int, check_nonnegative, check_real
from optax_sam._norms import across, at_length, norm, plus
from optax_sam.ascent import normalized_ascent, random_direction
from optax_sam.family import sam
from optax_sam.link import sharpness_aware
from optax_sam.masks import Mask, restricted
from optax_sam.single_pass import on_momentum, one_gradient
from optax_sam.switching import Switch, rule_of_step, switch_at, switch_by, switch_on


def late(inner: optax.GradientTransformation, start: int) -> optax.GradientTransformationExtraArgs:
    """Late-phase SAM: the clean gradient before step ``start``, ``inner`` from then on.

    Before ``start`` a step costs one gradient. For late mSAM the switch goes inside,
    ``micro_batched(late(sam(rho), start), axis_name)``; outside, the early phase would hand on unaveraged gradients,
    which is an error.

    Args:
        inner: the link of the late phase.
        start: the first step (call of ``update``, counted from 0) of the late phase, ≥ 0.

    Returns:
        A link with the state of :func:`optax_sam.switch_at`.

    Raises:
        TypeError: inner is not a transformation, or start is not an int.
        ValueError: start is negative.

    Example:
        >>> tx = optax.chain(late(sam(rho=0.05), start=9_000), optax.sgd(learning_rate=0.1, momentum=0.9))

    Reference:
        Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training
        <https://arxiv.org/abs/2410.10373>`_, 2025
    """
    check_int("start", start, least=0)  # before it is a key: what optax.inject_hyperparams makes of it has no hash
    return switch_at({0: optax.identity(), start: as_link("inner", inner)})


class LookSAMState(NamedTuple):
    """State of :func:`look_sam`.

    Attributes:
        link_state: the state of SAM.
        across: v, the part of the last SAM gradient across its clean gradient; a tree like the params.
    """

    link_state: optax.OptState
    across: optax.Updates


def look_sam(
    rho: optax.ScalarOrSchedule, period: int = 5, alpha: jax.typing.ArrayLike = 0.3, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM in every k-th step, and between them the clean gradient plus what SAM added last.

    .. math::
        s \text{ and } v = s - \langle g, s \rangle / \|g\|_2^2 \, g \quad \text{in steps } 0, k, 2k, \ldots; \qquad
        g + \alpha \, \|g\|_2 / \|v\|_2 \, v \quad \text{between}

    1 + 1/k gradients per step; v is one more copy of the params. Norms are over all leaves. Where s and g point the
    same way to rounding there is no v, and g is left alone.

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of steps
            with SAM.
        period: k ≥ 1.
        alpha: α, a scalar ≥ 0.
        mask: the leaves to perturb; None: all.

    Returns:
        A switch between the two kinds of steps, which share one :class:`LookSAMState`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, period is not an int, alpha is not a real scalar, or
            mask is not made of booleans.
        ValueError: rho or alpha is a negative or non-finite number, or period < 1.

    Example:
        >>> tx = optax.chain(look_sam(rho=0.1, period=5), optax.sgd(learning_rate=0.1, momentum=0.9))

    Reference:
        Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
        <https://arxiv.org/abs/2203.02714>`_, 2022
    """
    check_int("period", period)
    check_nonnegative("alpha", alpha)
    inner = sam(rho, mask=mask)

    def init(params):
        return LookSAMState(inner.init(params), optax.tree.zeros_like(params))

    def look(updates, state, params=None, *, shards=(), **extra_args):
        s, link_state = inner.update(updates, state.link_state, params, shards=shards, **extra_args)
        return s, LookSAMState(link_state, optax.tree.cast_like(across(s, updates, shards), state.across))

    def remember(updates, state, params=None, *, shards=(), **extra_args):
        del params, extra_args
        reused = at_length(state.across, norm(state.across, shards), alpha * norm(updates, shards))
        return plus(updates, 1, reused), state

    links = {
        "between": optax.GradientTransformationExtraArgs(init, remember),
        "look": optax.GradientTransformationExtraArgs(init, look),
    }
    return Switch.between(rule_of_step(lambda step: step % period == 0), links, shares_state=True)


def sam_every(
    rho: optax.ScalarOrSchedule, period: int, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """SAM in every k-th step, and the clean gradient between: 1 + 1/k gradients per step, no state but the step.

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of steps
            with SAM.
        period: k ≥ 1; SAM in steps 0, k, 2k, …
        mask: the leaves to perturb; None: all.

    Returns:
        A link with the state of :func:`optax_sam.switch_by`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, period is not an int, or mask is not made of booleans.
        ValueError: rho is a negative or non-finite number, or period < 1.

    Example:
        >>> tx = optax.chain(sam_every(rho=0.1, period=5), optax.sgd(learning_rate=0.1, momentum=0.9))

    Reference:
        MosaicML, `Composer: SAM <https://docs.mosaicml.com/projects/composer/en/latest/method_cards/sam.html>`_, the
        argument ``interval``, 2021
    """
    check_int("period", period)
    return switch_by(lambda step: step % period == 0, [optax.identity(), sam(rho, mask=mask)])


def momentum_sam(
    rho: optax.ScalarOrSchedule, decay: jax.typing.ArrayLike = 0.9, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: the gradient a step *down* the accumulated past gradients, at the price of one gradient.

    .. math::
        s = \nabla L(w - \rho \, v / \|v\|_2), \qquad v \leftarrow \beta v + s, \quad v_0 = 0

    The minus is the authors': an optimizer with momentum overshoots along sharp directions, and looking ahead climbs.
    The plus is :func:`lagged_sam`. One gradient per step; v is one more copy of the params. In the estimator loss and
    aux are those at w + ε, the only pass there is (see :func:`optax_sam.one_gradient`).

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of
            updates.
        decay: β, a scalar in [0, 1); the momentum of the optimizer behind.
        mask: the leaves to perturb; None: all.

    Returns:
        A link that ignores g and returns s, with the state of :func:`optax_sam.on_momentum`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, decay is not a real scalar, or mask is not made of
            booleans.
        ValueError: rho or decay is negative or not finite, or decay ≥ 1.

    Example:
        >>> tx = optax.chain(momentum_sam(rho=0.3), optax.sgd(learning_rate=0.1, momentum=0.9))

    Reference:
        Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational Overhead
        <https://arxiv.org/abs/2401.12033>`_, 2024
    """
    down = optax.chain(normalized_ascent(rho), optax.scale(-1))
    return on_momentum(sharpness_aware(restricted(down, mask)), decay)


def lagged_sam(
    rho: optax.ScalarOrSchedule, decay: jax.typing.ArrayLike = 0.9, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""SAM along the accumulated past SAM gradients, at the price of one gradient.

    .. math::
        s = \nabla L(w + \rho \, v / \|v\|_2), \qquad v \leftarrow \beta v + s, \quad v_0 = 0

    With β = 0 the ascent is along the last SAM gradient, as in AsyncSAM. One gradient per step; v is one more copy of
    the params. In the estimator loss and aux are those at w + ε, the only pass there is (see
    :func:`optax_sam.one_gradient`).

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of
            updates.
        decay: β, a scalar in [0, 1).
        mask: the leaves to perturb; None: all.

    Returns:
        A link that ignores g and returns s, with the state of :func:`optax_sam.on_momentum`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, decay is not a real scalar, or mask is not made of
            booleans.
        ValueError: rho or decay is negative or not finite, or decay ≥ 1.

    Example:
        >>> tx = optax.chain(lagged_sam(rho=0.1), optax.sgd(learning_rate=0.1, momentum=0.9))

    Reference:
        Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational Overhead
        <https://arxiv.org/abs/2401.12033>`_, 2024, whose ascent goes the other way
    """
    return on_momentum(sam(rho, mask=mask), decay)


def random_sam(
    rho: optax.ScalarOrSchedule, key: jax.Array | int, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient at a random point at distance rho: the control for any claim about the direction of an ascent.

    .. math::
        s = \nabla L(w + \rho \, z / \|z\|_2), \qquad z \sim \mathcal N(0, 1)

    z is new in each step and in each micro-batch. One gradient per step. In the estimator loss and aux are those at
    w + ε, the only pass there is (see :func:`optax_sam.one_gradient`).

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of
            updates.
        key: a PRNG key, or a seed.
        mask: the leaves to perturb; None: all.

    Returns:
        A link that ignores g and returns s.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, key is neither a PRNG key nor an int, or mask is not
            made of booleans.
        ValueError: rho is a negative or non-finite number.

    Example:
        >>> tx = optax.chain(random_sam(rho=0.5, key=0), optax.sgd(learning_rate=0.1, momentum=0.9))

    Reference:
        Wen et al., `SmoothOut <https://arxiv.org/abs/1805.07898>`_, 2018, with noise of a fixed length
    """
    direction = optax.chain(random_direction(key), restricted(normalized_ascent(rho), mask))
    return one_gradient(sharpness_aware(direction))


class SquareNormState(NamedTuple):
    """State of the rule of :func:`ae_sam`.

    Attributes:
        mean: μ, a moving average of ‖g‖².
        deviation: σ, the root of a moving average of its squared distance from μ.
    """

    mean: jax.Array
    deviation: jax.Array


def ae_sam(
    rho: optax.ScalarOrSchedule,
    threshold: optax.ScalarOrSchedule = 0.0,
    decay: jax.typing.ArrayLike = 0.9,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AE-SAM: SAM in the steps whose gradient is unusually long, and the clean gradient in the others.

    .. math::
        \|g\|_2^2 \ge \mu + c \sigma, \qquad \mu \leftarrow \delta \mu + (1 - \delta) \|g\|_2^2, \qquad
        \sigma^2 \leftarrow \delta \sigma^2 + (1 - \delta) (\|g\|_2^2 - \mu)^2

    with μ and σ from zero, brought up to date before they are compared. One or two gradients per step. Under ``vmap``,
    and so in the estimator with ``strategy="vmap"``, both are evaluated in every step. A gradient that is not finite
    stays in μ and σ, and SAM off: put the whole state back, as ``examples/mixed_precision.py`` does.

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of steps
            with SAM.
        threshold: c, a real scalar or a schedule of the number of updates; the paper lets it fall,
            ``optax.linear_schedule(1.0, -1.0, steps)``.
        decay: δ, a scalar in [0, 1).
        mask: the leaves to perturb; None: all.

    Returns:
        A link with the state of :func:`optax_sam.switch_on`.

    Raises:
        TypeError: rho or threshold is neither a real scalar nor a schedule, decay is not a real scalar, or mask is not
            made of booleans.
        ValueError: rho or decay is negative or not finite, or decay ≥ 1.

    Example:
        >>> link = ae_sam(rho=0.1, threshold=optax.linear_schedule(1.0, -1.0, 10_000))
        >>> tx = optax.chain(link, optax.sgd(learning_rate=0.1, momentum=0.9))

    Reference:
        Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
        <https://arxiv.org/abs/2304.14647>`_, 2023
    """
    return switch_on(_is_long(threshold, decay), [optax.identity(), sam(rho, mask=mask)])


def _is_long(threshold: optax.ScalarOrSchedule, decay: jax.typing.ArrayLike) -> optax.GradientTransformationExtraArgs:
    """The rule of :func:`ae_sam`."""
    check_nonnegative("decay", decay, below=1)
    if not callable(threshold):
        check_real("threshold", threshold)

    def init(params):
        mean, deviation = (jnp.zeros([], jax.eval_shape(norm, params).dtype) for _ in range(2))
        return SquareNormState(mean, deviation)

    def update(updates, state, params=None, *, shards=(), **extra_args):
        del params
        square = norm(updates, shards) ** 2
        mean = decay * state.mean + (1 - decay) * square
        parts = jnp.sqrt(decay) * state.deviation, jnp.sqrt(1 - decay) * (square - mean)
        deviation = norm(jnp.stack(parts))  # which neither under- nor overflows, as squares of ‖g‖² would
        limit = threshold(extra_args["switch_step"]) if callable(threshold) else threshold
        dtype = state.mean.dtype
        return square >= mean + limit * deviation, SquareNormState(mean.astype(dtype), deviation.astype(dtype))

    return optax.GradientTransformationExtraArgs(init, update)
