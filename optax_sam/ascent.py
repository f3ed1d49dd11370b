r"""The ascent: from the gradient g at the params to the perturbation ε.

An ascent is an ordinary ``optax.GradientTransformation`` whose output is added to the params, to find the point where
the gradient is taken again. So ascents compose with Optax: ``optax.chain(optax.ema(0.9), normalized_ascent(0.05))``
climbs along an average of gradients, and ``optax.chain(optax.freeze(mask), normalized_ascent(0.05))`` leaves some
leaves alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._axes import Declared
from optax_sam._checks import NO_PARAMS_MESSAGE, check_alike, check_nonnegative, check_real
from optax_sam._norms import at_length, norm, scaled, widen


class AscentState(NamedTuple):
    """State of an ascent whose rho follows a schedule.

    Attributes:
        ascent_step: int32 scalar, the number of updates so far; the schedule's argument.
    """

    ascent_step: jax.Array


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
