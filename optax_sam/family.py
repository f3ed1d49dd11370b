r"""The family: the algorithms of the papers, each a few lines of composition, at two gradients per step.

Those that are cheaper stand in ``cheaper.py``.

``mask`` chooses the leaves that are perturbed, as in ``optax.add_decayed_weights``: a tree of booleans with the
structure of the params (or a prefix of it, but not one boolean for all), or a function from params to such a tree. The
other leaves move by exactly 0 and stay out of the norm; their gradient is still taken at the perturbed point.
"""

import jax
import jax.numpy as jnp
import optax

from optax_sam._axes import AxisNames
from optax_sam._checks import check_nonnegative
from optax_sam._norms import across, plus, wide
from optax_sam.ascent import adaptive_ascent, less_average, normalized_ascent, unnormalized_ascent
from optax_sam.averaging import micro_batched
from optax_sam.combination import combined
from optax_sam.link import sharpness_aware
from optax_sam.masks import Mask, restricted
from optax_sam.renormalization import renormalized


def sam(rho: optax.ScalarOrSchedule, *, mask: Mask | None = None) -> optax.GradientTransformationExtraArgs:
    r"""SAM: the gradient at the end of a step of length rho along the normalized gradient.

    .. math::
        s = \nabla L(w + \rho \, g / \|g\|_2)

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of
            updates.
        mask: the leaves to perturb; None: all.

    Returns:
        A link from g to s; ``update`` takes ``grad_fn`` and the other arguments of :func:`optax_sam.sharpness_aware`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, or mask is not made of booleans.
        ValueError: rho is a negative or non-finite number.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w: jnp.sum(w**2)
        >>> tx = optax.chain(sam(rho=0.5), optax.sgd(learning_rate=0.1))
        >>> params = jnp.array([3.0, 4.0])
        >>> grads = jax.grad(loss_fn)(params)
        >>> updates, _ = tx.update(grads, tx.init(params), params, grad_fn=jax.grad(loss_fn))
        >>> print([f"{u:.2f}" for u in updates])
        ['-0.66', '-0.88']

    Reference:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    return sharpness_aware(restricted(normalized_ascent(rho), mask))


def usam(rho: optax.ScalarOrSchedule, *, mask: Mask | None = None) -> optax.GradientTransformationExtraArgs:
    r"""USAM: SAM with an unnormalized ascent, the form that theory is about.

    .. math::
        s = \nabla L(w + \rho \, g)

    Args:
        rho: step size of the ascent, in units of params per gradient: a scalar ≥ 0, or a schedule of the number of
            updates.
        mask: the leaves to perturb; None: all.

    Returns:
        A link from g to s; ``update`` takes ``grad_fn`` and the other arguments of :func:`optax_sam.sharpness_aware`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, or mask is not made of booleans.
        ValueError: rho is a negative or non-finite number.

    Example:
        >>> loss_fn = lambda w: w**2
        >>> link = usam(rho=0.25)
        >>> s, _ = link.update(2.0, link.init(1.0), 1.0, grad_fn=jax.grad(loss_fn))
        >>> print(s)
        3.0

    Reference:
        Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware Minimization
        <https://arxiv.org/abs/2206.06232>`_, 2022
    """
    return sharpness_aware(restricted(unnormalized_ascent(rho), mask))


def asam(
    rho: optax.ScalarOrSchedule, eta: jax.typing.ArrayLike = 0.01, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""ASAM: SAM with a perturbation in proportion to the params.

    .. math::
        s = \nabla L(w + \rho \, T^2 g / \|T g\|_2), \qquad T = |w| + \eta

    Args:
        rho: relative length of the perturbation: a scalar ≥ 0, or a schedule of the number of updates. About ten
            times that of :func:`sam`.
        eta: scalar ≥ 0, in the units of the params; lets params at zero move.
        mask: the leaves to perturb; None: all.

    Returns:
        A link from g to s; ``update`` takes ``grad_fn`` and the other arguments of :func:`optax_sam.sharpness_aware`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, eta is not a real scalar, or mask is not made of
            booleans.
        ValueError: rho or eta is a negative or non-finite number.

    Example:
        >>> loss_fn = lambda w: w**2
        >>> link = asam(rho=0.5, eta=0.0)
        >>> s, _ = link.update(4.0, link.init(2.0), 2.0, grad_fn=jax.grad(loss_fn))
        >>> print(s)
        6.0

    Reference:
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks
        <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    return sharpness_aware(restricted(adaptive_ascent(rho, eta), mask))


def stable_sam(
    rho: optax.ScalarOrSchedule, *, max_scale: jax.typing.ArrayLike | None = None, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""StableSAM: the direction of the SAM gradient at the length of the clean gradient.

    .. math::
        \tilde s = s \, \|g\|_2 / \|s\|_2, \qquad s = \nabla L(w + \rho \, g / \|g\|_2)

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of
            updates.
        max_scale: upper bound of the factor; 1 is the truncated variant of the authors. None: no bound.
        mask: the leaves to perturb; None: all. The norms of the renormalization are over all leaves.

    Returns:
        A link from g to s̃; ``update`` takes ``grad_fn`` and the other arguments of :func:`optax_sam.sharpness_aware`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, max_scale is not a real scalar, or mask is not made of
            booleans.
        ValueError: rho or max_scale is a negative or non-finite number.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w: jnp.sum(w**4)
        >>> params, link = jnp.array([1.0, 2.0]), stable_sam(rho=0.5)
        >>> grads = jax.grad(loss_fn)(params)
        >>> s, _ = link.update(grads, link.init(params), params, grad_fn=jax.grad(loss_fn))
        >>> print(f"{optax.tree.norm(grads):.3f} {optax.tree.norm(s):.3f}")
        32.249 32.249

    Reference:
        Tan et al., `Stabilizing Sharpness-Aware Minimization Through A Simple Renormalization Strategy
        <https://arxiv.org/abs/2401.07250>`_, 2024
    """
    return renormalized(sam(rho, mask=mask), max_scale=max_scale)


def msam(
    rho: optax.ScalarOrSchedule, axis_name: AxisNames | None = None, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""mSAM: one SAM gradient per micro-batch, all at the same params, then their mean.

    .. math::
        \bar s = \frac1M \sum_{j=1}^{M} \nabla L_j(w + \rho \, g_j / \|g_j\|_2)

    In an Optax chain, ``updates`` and ``batch`` carry the micro-batches; see :func:`optax_sam.micro_batched` for
    their shapes. For batches that are not yet split, ``gradient_estimator(loss_fn, sam(rho), num_micro_batches=M)``
    does it all, at two gradients per example.

    Args:
        rho: length of each perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of
            updates.
        axis_name: the mapped axis (or several) whose members are the micro-batches; None: a leading axis of updates
            and batch.
        mask: the leaves to perturb; None: all.

    Returns:
        A link from the gradients of the micro-batches to s̄.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, axis_name is not made of strings, or mask is not made of
            booleans.
        ValueError: rho is a negative or non-finite number.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, x: jnp.mean((w * x - 1.0) ** 2)
        >>> params, batch = 0.5, jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)
        >>> link = msam(rho=0.1)
        >>> s, _ = link.update(grads, link.init(params), params, grad_fn=jax.grad(loss_fn), batch=batch)
        >>> print(f"{s:.2f}")
        3.50

    Reference:
        Behdin et al., `mSAM: Micro-Batch-Averaged Sharpness-Aware Minimization
        <https://arxiv.org/abs/2302.09693>`_, 2023
    """
    return micro_batched(sam(rho, mask=mask), axis_name)


def gsam(
    rho: optax.ScalarOrSchedule, alpha: jax.typing.ArrayLike, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM: the SAM gradient less a part of the clean gradient across it, which lowers the surrogate gap too.

    .. math::
        \tilde s = s - \alpha \, (g - \langle g, s \rangle / \|s\|_2^2 \, s), \qquad
            s = \nabla L(w + \rho \, g / \|g\|_2)

    Two gradients per step, no state. The paper ties rho to the learning rate: :func:`rho_by_learning_rate`.

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of
            updates.
        alpha: weight of the surrogate gap, a scalar ≥ 0. 0: SAM.
        mask: the leaves to perturb; None: all.

    Returns:
        A link from g to s̃; ``update`` takes ``grad_fn`` and the other arguments of :func:`optax_sam.sharpness_aware`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, alpha is not a real scalar, or mask is not made of
            booleans.
        ValueError: rho or alpha is a negative or non-finite number.

    Example:
        >>> import jax.numpy as jnp
        >>> grad_fn, params = jax.grad(lambda w: w[0] ** 2 + 2 * w[1] ** 2), jnp.ones(2)
        >>> link = gsam(rho=1.0, alpha=0.5)
        >>> s, _ = link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn)
        >>> print([f"{g:.2f}" for g in s])
        ['2.69', '7.66']

    Reference:
        Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
        <https://arxiv.org/abs/2203.08065>`_, 2022
    """
    check_nonnegative("alpha", alpha)
    return combined(sam(rho, mask=mask), lambda g, s, shards: plus(s, -jnp.asarray(alpha), across(g, s, shards)))


def rho_by_learning_rate(
    learning_rate: optax.Schedule, lr_min: float, lr_max: float, rho_min: float, rho_max: float
) -> optax.Schedule:
    r"""A schedule of rho that follows the learning rate, as GSAM has it.

    .. math::
        \rho_t = \rho_\min + (\rho_\max - \rho_\min) \,
            \frac{\eta_t - \eta_\min}{\eta_\max - \eta_\min}

    Args:
        learning_rate: the schedule of the optimizer, from the number of updates to η.
        lr_min: the learning rate at which rho is rho_min.
        lr_max: the learning rate at which rho is rho_max; not lr_min.
        rho_min: the least rho, also where the learning rate is below lr_min, as in a warm-up.
        rho_max: the largest rho.

    Returns:
        A schedule from the number of updates of the link to rho.

    Raises:
        TypeError: learning_rate is not a schedule.
        ValueError: lr_min is lr_max.

    Example:
        >>> learning_rate = optax.cosine_decay_schedule(0.1, decay_steps=100)
        >>> rho = rho_by_learning_rate(learning_rate, lr_min=0.0, lr_max=0.1, rho_min=0.02, rho_max=0.2)
        >>> print(f"{rho(0):.2f} {rho(50):.2f} {rho(100):.2f}")
        0.20 0.11 0.02

    Reference:
        Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
        <https://arxiv.org/abs/2203.08065>`_, 2022
    """
    if lr_min == lr_max:
        raise ValueError(f"lr_min and lr_max must differ; got {lr_min=} and {lr_max=}.")
    if not callable(learning_rate):
        raise TypeError(f"learning_rate must be a schedule, a function of the step; got {learning_rate!r}.")

    def rho(step):
        share = jnp.clip((learning_rate(step) - lr_min) / (lr_max - lr_min), 0, 1)
        return rho_min + (rho_max - rho_min) * share

    return rho


def wsam(
    rho: optax.ScalarOrSchedule, gamma: jax.typing.ArrayLike, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""WSAM: the clean gradient and a weighted sharpness term.

    .. math::
        \tilde s = g + \frac{\gamma}{1 - \gamma} (s - g), \qquad s = \nabla L(w + \rho \, g / \|g\|_2)

    γ = 0 is the clean gradient, 1/2 is SAM, more goes beyond. Two gradients per step, no state. The authors' decoupled
    variant, which adds the sharpness term behind the optimizer, is not this one.

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of
            updates.
        gamma: γ, a scalar in [0, 1).
        mask: the leaves to perturb; None: all.

    Returns:
        A link from g to s̃; ``update`` takes ``grad_fn`` and the other arguments of :func:`optax_sam.sharpness_aware`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, gamma is not a real scalar, or mask is not made of
            booleans.
        ValueError: rho or gamma is a negative or non-finite number, or gamma ≥ 1.

    Example:
        >>> loss_fn = lambda w: w**2
        >>> link = wsam(rho=0.5, gamma=0.75)
        >>> s, _ = link.update(2.0, link.init(1.0), 1.0, grad_fn=jax.grad(loss_fn))
        >>> print(s)
        5.0

    Reference:
        Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term
        <https://arxiv.org/abs/2305.15817>`_, 2023
    """
    check_nonnegative("gamma", gamma, below=1)
    weight = gamma / (1 - gamma)
    return combined(sam(rho, mask=mask), lambda g, s, _: plus(g, weight, optax.tree.sub(wide(s), wide(g))))


def friendly_sam(
    rho: optax.ScalarOrSchedule,
    sigma: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.9,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly SAM: an ascent along what the batch adds to the average gradient.

    .. math::
        s = \nabla L(w + \rho \, d / \|d\|_2), \qquad d = g - \sigma m, \qquad m \leftarrow \beta m + (1 - \beta) g

    with d = g in the first step, and m = g after it. Two gradients per step; m is one more copy of the params.

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of
            updates.
        sigma: σ, a real scalar.
        decay: β, a scalar in [0, 1).
        mask: the leaves to perturb; None: all.

    Returns:
        A link from g to s; ``update`` takes ``grad_fn`` and the other arguments of :func:`optax_sam.sharpness_aware`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, sigma or decay is not a real scalar, or mask is not made
            of booleans.
        ValueError: rho or decay is negative or not finite, or decay ≥ 1.

    Example:
        >>> tx = optax.chain(friendly_sam(rho=0.1), optax.sgd(learning_rate=0.1, momentum=0.9))

    Reference:
        Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, 2024
    """
    return sharpness_aware(restricted(optax.chain(less_average(sigma, decay), normalized_ascent(rho)), mask))


def vasso(
    rho: optax.ScalarOrSchedule, theta: jax.typing.ArrayLike = 0.4, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""VaSSO: an ascent along a moving average of gradients, which varies less from batch to batch.

    .. math::
        s = \nabla L(w + \rho \, d / \|d\|_2), \qquad d \leftarrow (1 - \theta) d + \theta g, \quad d_0 = 0

    Two gradients per step; d is one more copy of the params. θ = 1 is SAM. A gradient that is not finite stays in d:
    put the whole state back, as ``examples/mixed_precision.py`` does.

    Args:
        rho: length of the perturbation, in the units of the params: a scalar ≥ 0, or a schedule of the number of
            updates.
        theta: θ, a scalar in (0, 1]; 1 − θ is the ``decay`` of ``optax.ema``.
        mask: the leaves to perturb; None: all.

    Returns:
        A link from g to s; ``update`` takes ``grad_fn`` and the other arguments of :func:`optax_sam.sharpness_aware`.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, theta is not a real scalar, or mask is not made of
            booleans.
        ValueError: rho or theta is a negative or non-finite number, theta is 0 (no ascent) or above 1.

    Example:
        >>> tx = optax.chain(vasso(rho=0.1), optax.sgd(learning_rate=0.1, momentum=0.9))

    Reference:
        Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance Suppression
        <https://arxiv.org/abs/2309.15639>`_, 2023
    """
    check_nonnegative("theta", theta, zero=False)
    check_nonnegative("1 - theta", 1 - theta)
    average = optax.ema(1 - theta, debias=False)
    return sharpness_aware(restricted(optax.chain(average, normalized_ascent(rho)), mask))
