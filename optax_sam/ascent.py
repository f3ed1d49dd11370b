r"""The ascent: from the gradient g at the params to the perturbation ε.

An ascent is an ordinary ``optax.GradientTransformation`` whose output is added to the params, to find the point where
the gradient is taken again. So ascents compose with Optax: ``optax.chain(optax.ema(0.9), normalized_ascent(0.05))``
climbs along an average of gradients, and ``optax.chain(optax.freeze(mask), normalized_ascent(0.05))`` leaves some
leaves alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._axes import Declared, axes_of_leaves, vary, varying_axes
from optax_sam._checks import NO_PARAMS_MESSAGE, as_key, check_alike, check_nonnegative, check_real
from optax_sam._norms import at_length, norm, plus, scaled, widen


class AscentState(NamedTuple):
    """State of an ascent whose rho follows a schedule, or of a random direction.

    Attributes:
        ascent_step: int32 scalar, the number of updates so far.
    """

    ascent_step: jax.Array


class AverageState(NamedTuple):
    """State of :func:`less_average`.

    Attributes:
        has_begun: 0 before the first update, then 1; a float, so that a batch of padding alone leaves it as it is.
        mean: m, a tree like the params.
    """

    has_begun: jax.Array
    mean: optax.Updates


def normalized_ascent(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Step of length rho along the gradient.

    .. math::
        \varepsilon = \rho \, g / \|g\|_2

    with one norm over all leaves, accumulated in float32 or wider. A zero gradient gives ε = 0.

    Args:
        rho: length of ε, in the units of the params: a scalar ≥ 0, or a schedule of the number of updates.

    Returns:
        An ``optax.GradientTransformation`` from g to ε; shapes and dtypes of the leaves are kept.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule.
        ValueError: rho is a negative or non-finite number.

    Example:
        >>> ascent = normalized_ascent(0.5)
        >>> perturbation, _ = ascent.update({"w": jnp.array([3.0, 4.0])}, ascent.init({"w": jnp.zeros(2)}))
        >>> print(perturbation["w"])
        [0.3 0.4]

    Reference:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021
    """

    def perturbation(radius, updates, params, shards):
        del params
        return at_length(updates, norm(updates, shards), radius)

    return _ascent(rho, perturbation)


def unnormalized_ascent(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Step of rho times the gradient (USAM).

    .. math::
        \varepsilon = \rho \, g

    Args:
        rho: step size, in units of params per gradient: a scalar ≥ 0, or a schedule of the number of updates.

    Returns:
        An ``optax.GradientTransformation`` from g to ε; shapes and dtypes of the leaves are kept.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule.
        ValueError: rho is a negative or non-finite number.

    Example:
        >>> ascent = unnormalized_ascent(0.5)
        >>> perturbation, _ = ascent.update({"w": jnp.array([3.0, 4.0])}, ascent.init({"w": jnp.zeros(2)}))
        >>> print(perturbation["w"])
        [1.5 2. ]

    Reference:
        Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware Minimization
        <https://arxiv.org/abs/2206.06232>`_, 2022
    """

    def perturbation(radius, updates, params, shards):
        del params, shards
        return scaled(updates, radius)

    return _ascent(rho, perturbation)


def adaptive_ascent(
    rho: optax.ScalarOrSchedule, eta: jax.typing.ArrayLike = 0.01
) -> optax.GradientTransformationExtraArgs:
    r"""Step of length rho in units of the params' own magnitude (ASAM).

    .. math::
        \varepsilon = \rho \, T^2 g / \|T g\|_2, \qquad T = |w| + \eta

    with one norm over all leaves. ``update`` needs the params.

    Args:
        rho: length of T⁻¹ε, relative to the params: a scalar ≥ 0, or a schedule of the number of updates. Useful
            values are about ten times those of :func:`normalized_ascent`.
        eta: scalar ≥ 0, in the units of the params; lets params at zero move.

    Returns:
        An ``optax.GradientTransformation`` from g to ε; shapes and dtypes of the leaves are kept.

    Raises:
        TypeError: rho is neither a real scalar nor a schedule, or eta is not a real scalar.
        ValueError: rho or eta is a negative or non-finite number; at ``update``, params are missing.

    Example:
        >>> ascent = adaptive_ascent(0.5, eta=0.0)
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> perturbation, _ = ascent.update({"w": jnp.array([1.0, 1.0])}, ascent.init(params), params)
        >>> print([f"{e:.2f}" for e in perturbation["w"]])
        ['0.90', '1.60']

    Reference:
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks
        <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    check_nonnegative("eta", eta)

    def perturbation(radius, updates, params, shards):
        if params is None:
            raise ValueError(NO_PARAMS_MESSAGE)
        check_alike("params", params, "updates", updates)
        widths = jax.tree.map(lambda w, g: (jnp.abs(widen(w)) + eta).astype(widen(g).dtype), params, updates)
        stretched = jax.tree.map(lambda t, g: t * widen(g), widths, updates)
        climb = at_length(stretched, norm(stretched, shards), radius)
        return jax.tree.map(lambda t, e, g: (t * e).astype(jnp.asarray(g).dtype), widths, climb, updates)

    return _ascent(rho, perturbation)


def random_direction(key: jax.Array | int) -> optax.GradientTransformationExtraArgs:
    r"""Gaussian noise in place of the gradient.

    .. math::
        z \sim \mathcal N(0, 1)

    ``optax.chain(random_direction(key), normalized_ascent(rho))`` is an ascent in a random direction. The noise is new
    in each update, in each micro-batch and in each shard.

    Args:
        key: a PRNG key, or a seed.

    Returns:
        An ``optax.GradientTransformation`` from g to z; shapes and dtypes of the leaves are kept.

    Raises:
        TypeError: key is neither a PRNG key nor an int.

    Example:
        >>> noise = random_direction(key=0)
        >>> z, _ = noise.update(jnp.ones(10_000), noise.init(jnp.ones(10_000)))
        >>> print(f"{jnp.std(z):.1f}")
        1.0
    """
    as_key(key)

    def init(params):
        del params
        return AscentState(ascent_step=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, *, shards=(), micro_batch=(), **extra_args):
        del params, extra_args
        own = functools.reduce(jax.random.fold_in, micro_batch, jax.random.fold_in(as_key(key), state.ascent_step))
        leaves, structure = jax.tree.flatten(updates)
        noise = []
        for number, (leaf, axes) in enumerate(zip(leaves, axes_of_leaves(updates, shards), strict=True)):
            of_leaf = jax.random.fold_in(own, number)
            of_leaf = jax.random.fold_in(of_leaf, jax.lax.axis_index(axes)) if axes else of_leaf
            drawn = jax.random.normal(of_leaf, jnp.shape(leaf), widen(leaf).dtype)
            noise.append(vary(drawn.astype(jnp.asarray(leaf).dtype), varying_axes(leaf)))
        next_step = jnp.asarray(optax.safe_increment(state.ascent_step))
        return structure.unflatten(noise), AscentState(ascent_step=next_step)

    return optax.GradientTransformationExtraArgs(init, update)


def less_average(sigma: jax.typing.ArrayLike = 1.0, decay: jax.typing.ArrayLike = 0.9) -> optax.GradientTransformation:
    r"""The gradient less its average over the steps before.

    .. math::
        d_t = g_t - \sigma m_t, \qquad m_{t+1} = \beta m_t + (1 - \beta) g_t, \qquad m_1 = g_0, \quad d_0 = g_0

    What is left is the part that batches do not share: ``optax.chain(less_average(), normalized_ascent(rho))``. A
    gradient that is not finite stays in the average: put the whole state back, as ``examples/mixed_precision.py`` does.

    Args:
        sigma: σ, a real scalar.
        decay: β, a scalar in [0, 1).

    Returns:
        An ``optax.GradientTransformation`` from g to d; shapes and dtypes of the leaves are kept.

    Raises:
        TypeError: sigma or decay is not a real scalar.
        ValueError: decay is negative or ≥ 1.

    Example:
        >>> noise = less_average(decay=0.5)
        >>> state = noise.init(jnp.float32(0.0))
        >>> for gradient in (1.0, 2.0, 3.0):
        ...     direction, state = noise.update(jnp.float32(gradient), state)
        ...     print(direction)
        1.0
        1.0
        1.5

    Reference:
        Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, 2024
    """
    check_real("sigma", sigma)
    check_nonnegative("decay", decay, below=1)

    def init(params):
        return AverageState(has_begun=jnp.zeros([], jnp.float32), mean=optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        direction = plus(updates, -jnp.asarray(sigma), state.mean)
        mean = plus(scaled(state.mean, decay), 1 - decay, updates)
        mean = jax.tree.map(lambda g, m: jnp.where(state.has_begun == 0, g, m), updates, mean)
        return direction, AverageState(jnp.ones_like(state.has_begun), optax.tree.cast_like(mean, state.mean))

    return optax.GradientTransformation(init, update)


def _ascent(
    rho: optax.ScalarOrSchedule, perturbation: Callable[[Any, Any, Any, Declared], Any]
) -> optax.GradientTransformationExtraArgs:
    """The transformation ``perturbation(rho, updates, params, shards)``, with a step count if rho is a schedule."""
    schedule = rho if callable(rho) else None
    if schedule is None:
        check_nonnegative("rho", rho)

    def init(params):
        del params
        return optax.EmptyState() if schedule is None else AscentState(ascent_step=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, *, shards=(), **extra_args):
        del extra_args
        if schedule is None:
            return perturbation(rho, updates, params, shards), state
        radius = schedule(state.ascent_step)
        check_real("rho(step)", radius)
        next_step = jnp.asarray(optax.safe_increment(state.ascent_step))
        return perturbation(radius, updates, params, shards), AscentState(ascent_step=next_step)

    return optax.GradientTransformationExtraArgs(init, update)
