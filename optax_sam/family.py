r"""The family: the algorithms of the papers, each one line of composition.

``mask`` chooses the leaves that are perturbed, as in ``optax.add_decayed_weights``: a tree of booleans with the
structure of the params (or a prefix of it, but not one boolean for all), or a function from params to such a tree. The
other leaves move by exactly 0 and stay out of the norm; their gradient is still taken at the perturbed point.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._axes import AxisNames
from optax_sam._checks import as_link, check_int, spread_mask
from optax_sam.ascent import adaptive_ascent, normalized_ascent, unnormalized_ascent
from optax_sam.averaging import micro_batched
from optax_sam.link import sharpness_aware
from optax_sam.renormalization import renormalized
from optax_sam.switching import switch_at

Mask = Any | Callable[[optax.Params], Any]


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
    return sharpness_aware(_masked(normalized_ascent(rho), mask))


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
    return sharpness_aware(_masked(unnormalized_ascent(rho), mask))


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
    return sharpness_aware(_masked(adaptive_ascent(rho, eta), mask))


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


def _masked(ascent: optax.GradientTransformation, mask: Mask | None) -> optax.GradientTransformation:
    if mask is None:
        return ascent
    if isinstance(mask, (bool, np.bool_, np.ndarray, jax.Array)):
        raise TypeError(f"mask is {mask!r}, as inject_hyperparams makes of a function. Pass static_args='mask' there.")

    def keep(updates, params):
        return jax.tree.map(lambda chosen, g: _kept(chosen, jnp.asarray(g)), spread_mask(mask, params), updates)

    return optax.chain(optax.stateless(keep), ascent)


def _kept(chosen: bool | jax.Array, leaf: jax.Array) -> jax.Array:
    if isinstance(chosen, jax.Array):
        return jnp.where(chosen, leaf, 0)
    return leaf if chosen else jnp.zeros_like(leaf)  # known when traced: nothing to select
