r"""Sharpness: how much the loss rises near the params, in the worst case and on average.

The worst case is that of a micro-batch, so that it depends on how a batch is split; an average is that of the loss, so
that it does not. See :mod:`optax_sam.sharpness.streaming` for what ``loss_fn``, ``params`` and ``batches`` are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam._axes import check_same_members, check_unvarying, varying_axes
from optax_sam._checks import check_int, check_nonnegative
from optax_sam._convolution import canonicalized
from optax_sam._means import leading_size
from optax_sam._micro_batches import mean_over_micro_batches
from optax_sam.ascent import normalized_ascent
from optax_sam.sharpness.lanczos import random_vectors
from optax_sam.sharpness.streaming import (
    Estimate,
    LossFn,
    as_real,
    as_scale,
    checked_loss,
    estimate,
    keys_of,
    loss_of_sum,
    means_over,
    once_per_loss,
    scaled,
)


def m_sharpness(
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    rho: float,
    num_micro_batches: int = 1,
    *,
    steps: int = 1,
    scale: Any = None,
) -> jax.Array:
    r"""Worst-case m-sharpness: how much the loss of a micro-batch rises within distance rho, on average.

    .. math::
        \frac1M \sum_{j=1}^{M} \max_{\|\delta_j\| \le \rho} L_j(w + \delta_j) - L_j(w)

    One step leads to rho·g/‖g‖, the perturbation of SAM. Several are normalized gradient steps of length 2·rho/steps,
    each projected onto the ball. The largest loss on the way counts, that at w included: it is a lower bound of the
    maximum, and 0 where the gradient is. Micro-batches are evaluated one after the other in one compiled program, also
    as a part of your own.

    Args:
        loss_fn: ``loss_fn(params, batch)`` → mean loss of the batch.
        params: tree of float arrays.
        batch: leaves (B, ...); micro-batch j is examples j·B/M to (j + 1)·B/M. The paper's have 128 examples.
        rho: radius of the ball, ≥ 0.
        num_micro_batches: M ≥ 1, a divisor of B.
        steps: gradients for each micro-batch; the paper takes 20.
        scale: tree like params, or a prefix of it, of arrays, numbers or booleans that broadcast to them: L(w + D·δ),
            D = diag(scale), instead. A mask: the leaves that move. |w| + eta: the ball of ASAM, which rescaling of the
            weights does not change (Kwon et al. 2021).

    Returns:
        The rise, a scalar.

    Raises:
        TypeError: a number of the wrong type, or params that are not all real floating-point arrays.
        ValueError: rho < 0; leaves of the batch that are scalars, differ in B, or cannot be divided by M (and the
            devices that an Explicit mesh shards B over); in ``shard_map``, params that vary over an axis and a loss
            that does not, or the other way round.

    Example:
        >>> loss_fn = lambda w, x: jnp.mean((w - x) ** 2) / 2
        >>> examples = jnp.array([0.0, 0.0, 1.0, 1.0])
        >>> print(f"{m_sharpness(loss_fn, 3.0, examples, rho=0.5, num_micro_batches=2):.3f}")
        1.375

    Reference:
        Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware Minimization
        <https://arxiv.org/abs/2206.06232>`_, 2022
    """
    params = as_real("params", params)
    check_nonnegative("rho", rho)
    check_int("steps", steps)
    if num_micro_batches > 1:
        leading_size(batch=batch)  # leaves of several sizes may all be divisible
    return _worst_rise(loss_fn, num_micro_batches, steps)(params, as_scale(scale, params), rho, batch)


def average_sharpness(
    loss_fn: LossFn,
    params: Any,
    batches: Iterable[Any],
    sigma: float,
    *,
    num_samples: int = 5,
    key: jax.Array | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Average-case sharpness: how much the loss rises in Gaussian noise.

    .. math::
        \mathbb{E}_{\delta \sim N(0, \sigma^2 I)} \; L(w + \delta) - L(w)

    Args:
        loss_fn: ``loss_fn(params, batch)`` → mean loss of the batch.
        params: tree of float arrays.
        batches: list of batches that make up the loss, or another re-iterable collection.
        sigma: standard deviation of each element of δ, ≥ 0.
        num_samples: how many δ, ≥ 2; all batches see the same ones.
        key: of ``jax.random``, for the samples; None: a fixed one.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        :class:`Estimate`.

    Raises:
        TypeError: a number or a key of the wrong type, or params that are not all real floating-point arrays.
        ValueError: an iterator, or a single batch, as batches.

    Example:
        >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(w**2)
        >>> rise = average_sharpness(loss_fn, jnp.zeros(1000), batches=[jnp.ones(4)], sigma=0.1)
        >>> print(f"{rise.mean:.1f} ± {rise.standard_error:.1f}")
        9.8 ± 0.1

    Reference:
        Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware Minimization
        <https://arxiv.org/abs/2206.06232>`_, 2022
    """
    params = as_real("params", params)
    loss, draw = loss_of_sum(loss_fn), random_vectors(jax.random.normal, params)
    samples = keys_of(key, num_samples)
    points = [(0.0, samples[0]), *((float(sigma), sample) for sample in samples)]
    losses = means_over(
        batches, points, lambda point, batch: loss((1.0, point[0]), (params, draw(point[1])), batch), progress
    )
    return estimate(losses[1:] - losses[0])


@once_per_loss
def _worst_rise(loss_fn: LossFn, num_micro_batches: int, steps: int) -> Callable[..., jax.Array]:
    """``(params, scale, rho, batch)`` → the mean over micro-batches of the largest rise on the way of an ascent."""

    def rise_of_one(params, scale, rho, batch):
        ascent = normalized_ascent(2 * rho / steps)

        def loss_at(delta):
            return checked_loss(loss_fn(optax.tree.add(params, scaled(delta, scale)), batch))

        def climb(delta, _):
            value, gradient = jax.value_and_grad(loss_at)(delta)
            _check_axes(value, params, gradient)
            step, _ = ascent.update(gradient, ascent.init(params))
            projected = optax.projections.projection_l2_ball(optax.tree.add(delta, step), rho)
            return jax.tree.map(lambda d: jnp.where(rho > 0, d, 0), projected), value

        start = optax.tree.zeros_like(params)
        if steps == 1:  # straight-line code can be evaluated lazily
            delta, values = climb(start, None)
        else:
            delta, values = jax.lax.scan(canonicalized(climb), start, length=steps)
        return jnp.maximum(jnp.max(values), loss_at(delta)) - jnp.ravel(values)[0]

    def rise(params, scale, rho, batch):
        def evaluate(_index, micro_batch):
            return rise_of_one(params, scale, rho, micro_batch)

        return mean_over_micro_batches(evaluate, batch, num_micro_batches, "auto", may_be_lazy=True)

    return jax.jit(rise)


def _check_axes(value: jax.Array, params: Any, gradient: Any) -> None:
    """Raises where ``shard_map`` summed the gradient, or where norms would be those of shards."""
    check_same_members("what loss_fn returns", value, gradient, params)
    check_unvarying(params, varying_axes(params) - varying_axes(value))
