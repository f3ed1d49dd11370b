r"""The edge of stability: how large a curvature the optimizer tolerates, and how large it is along a step.

A step of gradient descent grows along an eigenvector of the Hessian whose eigenvalue is above 2/η, and training is
often found to take the largest eigenvalue there. Under SAM the edge is lower.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_sam._checks import check_nonnegative
from optax_sam.sharpness.hessian import hessian_of
from optax_sam.sharpness.lanczos import NOT_FINITE_MESSAGE, inner_product, normalized
from optax_sam.sharpness.streaming import (
    LossFn,
    as_change,
    as_real,
    checked_loss,
    loss_of_sum,
    means_over,
    once_per_loss,
)

LONGEST_STEP = 2.0**60
FINEST = 1e-12  # relative accuracy: short of that of float64, where bisection would not end


def sam_edge(
    gradient_norm: jax.typing.ArrayLike, learning_rate: jax.typing.ArrayLike, rho: jax.typing.ArrayLike
) -> jax.Array:
    r"""The edge of stability of SAM: the largest eigenvalue of the Hessian at which its steps do not grow.

    .. math::
        \lambda^* = \frac{\|g\|}{2 \rho} \left( \sqrt{1 + \frac{8 \rho}{\eta \|g\|}} - 1 \right), \qquad
        \eta \lambda^* \left( 1 + \frac{\rho \lambda^*}{\|g\|} \right) = 2

    For gradient descent behind ``sam(rho)``, with the gradient of the whole training set. It falls with ‖g‖, and is
    2/η where rho = 0. With heavy-ball momentum β take η/(1 + β) for the learning rate.

    Args:
        gradient_norm: ‖g‖ at w, ≥ 0, such as ``measurements(state).clean_norm``; an array: elementwise.
        learning_rate: η > 0.
        rho: ρ ≥ 0.

    Returns:
        λ*, in the units of a Hessian.

    Raises:
        ValueError: a number that is negative or not finite, or a learning rate of 0.

    Example:
        >>> edge = sam_edge(gradient_norm=0.2, learning_rate=0.1, rho=0.1)
        >>> print(f"{edge:.2f}, of gradient descent {2 / 0.1:.2f}")
        5.40, of gradient descent 20.00

    Reference:
        Long and Bartlett, `Sharpness-Aware Minimization and the Edge of Stability
        <https://arxiv.org/abs/2309.12488>`_, 2023
    """
    if not isinstance(gradient_norm, Tracer) and not np.all(
        np.isfinite(gradient_norm) & np.greater_equal(gradient_norm, 0)
    ):
        raise ValueError(f"gradient_norm must be finite and at least 0; got {gradient_norm!r}.")
    check_nonnegative("learning_rate", learning_rate, zero=False)
    check_nonnegative("rho", rho)
    rho = jnp.asarray(rho, jnp.result_type(float))
    ratio = jnp.where(rho > 0, 8 * rho / (learning_rate * jnp.asarray(gradient_norm, rho.dtype)), 0)
    return jnp.asarray(4 / (learning_rate * (1 + jnp.sqrt(1 + ratio))))  # no difference of numbers that may be equal


def directional_sharpness(loss_fn: LossFn, params: Any, direction: Any, batches: Iterable[Any]) -> float:
    r"""The curvature of the loss along a direction: one product with the Hessian.

    .. math::
        u^T H u \, / \, \|u\|_2^2, \qquad H = \nabla^2 L(w)

    Along the gradient, an update or an eigenvector of another network, it says what a step in that direction meets.

    Args:
        loss_fn: ``loss_fn(params, batch)`` → mean loss of the batch.
        params: tree of float arrays.
        direction: u, a tree like params, not zero; its length does not matter.
        batches: list of batches that make up L, or another re-iterable collection.

    Returns:
        The curvature.

    Raises:
        TypeError: params or a direction that are not all real floating-point arrays.
        ValueError: a direction that is zero or not like params; an iterator, or a single batch, as batches; a Hessian
            that is not finite.

    Example:
        >>> scales = jnp.array([1.0, -2.0, 10.0])
        >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(scales * w**2) / 2
        >>> directional_sharpness(loss_fn, jnp.ones(3), jnp.array([1.0, 0.0, 1.0]), batches=[jnp.ones(4)])
        5.5
    """
    params = as_real("params", params)
    unit, length = normalized(as_change("direction", direction, params))
    if not 0 < length < math.inf:
        raise ValueError(f"direction has length {length}. Pass one that is finite and not zero.")
    curvature = float(inner_product(unit, hessian_of(loss_fn, params, batches)(unit)))
    if not math.isfinite(curvature):
        raise ValueError(NOT_FINITE_MESSAGE)
    return curvature


def critical_sharpness(
    loss_fn: LossFn, params: Any, updates: Any, batches: Iterable[Any], *, rtol: float = 0.01
) -> float:
    r"""2/η of the shortest step along an update that raises the loss: one gradient, and forward passes.

    .. math::
        \lambda_c = 2 / \eta_c, \qquad \eta_c = \min \{ \eta > 0 : L(w + \eta u) > L(w) \}

    Along u = −g of a quadratic loss it is gᵀHg/‖g‖². With Adam's updates it is a curvature in Adam's own units, to be
    compared with 2/η as the largest eigenvalue is for gradient descent. The step is found by doubling or halving and
    then bisection, about 10 to 20 passes over the batches: where the loss falls, rises and falls again, it is one of
    the crossings.

    Args:
        loss_fn: ``loss_fn(params, batch)`` → mean loss of the batch, in float32 or wider.
        params: tree of float arrays.
        updates: u, a tree like params: the step at a learning rate of 1, such as −g. For updates made with the
            learning rate η, divide the result by η.
        batches: list of batches that make up L, or another re-iterable collection.
        rtol: relative accuracy, > 0.

    Returns:
        λ_c: 0 where no step of up to 2⁶⁰ raises the loss, ∞ where all do that change it, or the shortest.

    Raises:
        TypeError: params or updates that are not all real floating-point arrays.
        ValueError: updates that are not like params; an iterator, or a single batch, as batches; rtol ≤ 0; a loss or
            updates that are not finite.

    Example:
        >>> scales = jnp.array([1.0, 2.0, 10.0])
        >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(scales * w**2) / 2
        >>> w, batches = jnp.array([1.0, 1.0, 0.2]), [jnp.ones(4)]
        >>> g = jax.grad(loss_fn)(w, batches[0])
        >>> print(f"{critical_sharpness(loss_fn, w, -g, batches):.1f}, {g @ (scales * g) / (g @ g):.1f}")
        5.4, 5.4

    Reference:
        Kalra et al., `A Scalable Measure of Loss Landscape Curvature for Analyzing the Training Dynamics of LLMs
        <https://arxiv.org/abs/2601.16979>`_, 2026
    """
    params = as_real("params", params)
    trees = params, as_change("updates", updates, params)
    check_nonnegative("rtol", rtol, zero=False)
    loss = loss_of_sum(loss_fn)

    def loss_after(step: float) -> float:
        return float(means_over(batches, [(1.0, step)], lambda c, batch: loss(c, trees, batch), False)[0])

    here, slope = loss_after(0.0), float(means_over(batches, [trees], _slope(loss_fn), False)[0])
    if not math.isfinite(here + slope):
        raise ValueError(f"The loss at params is {here}, its slope along updates {slope}. Pass what is finite.")
    if slope > 0:  # which rounding of the losses may hide
        return math.inf
    short = _last_fall(loss_after, here)
    if short in (0.0, math.inf):
        return 2 / short if short else math.inf
    long = 2 * short
    while long / short > 1 + max(rtol, FINEST):
        middle = math.sqrt(short * long)
        short, long = (middle, long) if loss_after(middle) <= here else (short, middle)
    return 2 / math.sqrt(short * long)


def _last_fall(loss_after: Callable[[float], float], here: float) -> float:
    """A step that does not raise the loss where twice it does; 0 or ∞ if there is none within bounds."""
    step = 1.0
    if loss_after(step) <= here:
        while loss_after(2 * step) <= here:
            step *= 2
            if step > LONGEST_STEP:
                return math.inf
        return step
    while step >= 1 / LONGEST_STEP:
        step /= 2
        if (after := loss_after(step)) <= here:
            return step if after < here else 0.0  # what rounds to the same at a shorter step never fell
    return 0.0


@once_per_loss
def _slope(loss_fn: LossFn) -> Callable[..., jax.Array]:
    """``((params, updates), batch)`` → the derivative of the loss along updates, compiled once for a loss function."""

    def slope(trees, batch):
        gradient = jax.grad(lambda w: checked_loss(loss_fn(w, batch)))(trees[0])
        return inner_product(gradient, trees[1])

    return jax.jit(slope)
