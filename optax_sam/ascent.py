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
import numpy as np
import optax

from optax_sam.axes import Declared, axes_of_leaves, vary
from optax_sam.checks import NO_PARAMS_MESSAGE, check_alike, check_nonnegative, check_real, check_state, is_float


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
        norm = norm_of(updates, shards)
        factor = divide(radius, norm.ratio)
        return jax.tree.map(lambda g: rescale(g, norm.unit, factor), updates)

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
        one = jnp.ones([], jnp.float32)
        return jax.tree.map(lambda g: rescale(g, one, jnp.asarray(radius)), updates)

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
        norm = norm_of(stretched, shards)
        factor = divide(radius, norm.ratio)
        return jax.tree.map(
            lambda t, h, g: (t * rescale(h, norm.unit, factor)).astype(jnp.asarray(g).dtype), widths, stretched, updates
        )

    return _ascent(rho, perturbation)


def _ascent(
    rho: optax.ScalarOrSchedule, perturbation: Callable[[Any, Any, Any, Declared], Any]
) -> optax.GradientTransformationExtraArgs:
    """The transformation ``perturbation(rho, updates, params, shards)``, with a step count if rho is a schedule."""
    schedule = rho if callable(rho) else None
    if schedule is None:
        check_nonnegative("rho", rho, or_schedule=True)

    def init(params):
        del params
        return optax.EmptyState() if schedule is None else AscentState(ascent_step=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, *, shards=(), **extra_args):
        del extra_args
        check_state(state, AscentState if schedule else optax.EmptyState)
        if schedule is None:
            return perturbation(rho, updates, params, shards), state
        radius = schedule(state.ascent_step)
        check_real("rho(step)", radius)
        next_step = jnp.asarray(optax.safe_increment(state.ascent_step))
        return perturbation(radius, updates, params, shards), AscentState(ascent_step=next_step)

    return optax.GradientTransformationExtraArgs(init, update)


class Norm(NamedTuple):
    """The L2 norm unit · ratio of a tree, in two factors that do not overflow where it or its square would.

    Attributes:
        unit: a power of two; 1 unless the largest element is extreme.
        ratio: the norm in this unit.
    """

    unit: jax.Array
    ratio: jax.Array


def norm_of(tree: Any, shards: Declared = ()) -> Norm:
    """L2 norm over all leaves and all their shards, in float32 or wider; exact zero for zero.

    ``optax.tree.norm`` squares and adds in the dtype of the leaves: bfloat16 sums are off by half, float16 ones
    overflow.
    """
    pairs = zip(jax.tree.leaves(tree), axes_of_leaves(tree, shards), strict=True)
    leaves = [(widen(leaf), axes) for leaf, axes in pairs if jnp.size(leaf)]
    wide = any(jnp.finfo(leaf.dtype).bits > 32 for leaf, _ in leaves)
    dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)
    if not leaves:
        return Norm(unit=jnp.ones([], dtype), ratio=jnp.zeros([], dtype))
    leaves = [(leaf.astype(np.result_type(leaf.dtype, dtype)), axes) for leaf, axes in leaves]
    leaves_by_axes = {}
    for leaf, axes in leaves:
        leaves_by_axes.setdefault(axes, []).append(leaf)
    groups = [(axes, *_square_of(leaves)) for axes, leaves in leaves_by_axes.items()]
    unit = functools.reduce(jnp.maximum, [_over(jax.lax.pmax, own, axes) for axes, own, _ in groups])
    unit = jnp.where(unit == 0, 1, unit)
    sums = [_over(jax.lax.psum, square * (own / unit) * (own / unit), axes) for axes, own, square in groups]
    square = functools.reduce(jnp.add, sums)
    zero = square == 0
    return Norm(unit, ratio=jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square))))


def _square_of(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A unit, 0 for zeros and else a power of two, and the squared norm of the leaves in it: it does not overflow."""
    square = functools.reduce(jnp.add, map(_sum_of_squares, leaves))
    # A GPU waits for the host to branch, so that the longer way costs less; and on an Explicit mesh there is no
    # branching under vmap.
    if jax.default_backend() != "cpu" or any(jax.typeof(leaf).sharding.mesh.explicit_axes for leaf in leaves):
        return _rescaled_square(leaves, square)
    large = 2.0 ** (jnp.finfo(square.dtype).maxexp // 2)
    return jax.lax.cond((square > 1 / large) & (square < large), _given_square, _rescaled_square, leaves, square)


def _given_square(leaves: list[jax.Array], square: jax.Array) -> tuple[jax.Array, jax.Array]:
    del leaves
    return jnp.ones_like(square), square


def _rescaled_square(leaves: list[jax.Array], square: jax.Array) -> tuple[jax.Array, jax.Array]:
    del square
    # A scale for each leaf, and a division by the unit of all: what is cheap and depends on all leaves, XLA would
    # repeat in the loop over each of them, and take minutes to compile a few hundred.
    units, squares = map(jnp.stack, zip(*map(_rescaled_square_of_leaf, leaves), strict=True))
    unit = jnp.max(units)
    safe = jnp.where(unit == 0, 1, unit)
    return unit, jnp.sum(squares * (units / safe) * (units / safe))


def _rescaled_square_of_leaf(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A unit, 0 for zeros, and the squared norm of the leaf in it; that of the largest element does not underflow."""
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(leaf)))
    safe = 5 * jnp.finfo(peak.dtype).maxexp // 16
    is_small = (peak > 0) & (peak < 2.0**-safe)
    scale = jnp.where(peak > 2.0**safe, 4.0**-safe, jnp.where(is_small, 4.0**safe, 1.0)).astype(peak.dtype)
    return jnp.where(peak == 0, 0, 1 / scale), _sum_of_squares(leaf * scale)


def _over(reduce: Callable[..., jax.Array], x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """x, reduced over mapped axes if there are any."""
    return reduce(vary(x, axes), axes) if axes else x


def widen(leaf: jax.typing.ArrayLike) -> jax.Array:
    """The leaf as an array of float32 (complex64) or wider."""
    leaf = jnp.asarray(leaf)
    if not is_float(leaf):
        raise TypeError(f"updates and params must have floating-point leaves; got one of dtype {leaf.dtype}.")
    return leaf if jnp.finfo(leaf.dtype).bits >= 32 else leaf.astype(jnp.float32)


def _sum_of_squares(leaf: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(leaf.real) + jnp.square(leaf.imag)) if jnp.iscomplexobj(leaf) else jnp.sum(leaf * leaf)


def rescale(leaf: jax.typing.ArrayLike, unit: jax.Array, factor: jax.Array) -> jax.Array:
    """leaf / unit · factor in float32 or wider, back in the leaf's dtype."""
    leaf = jnp.asarray(leaf)
    wide = widen(leaf)
    wide = wide.astype(np.result_type(wide.dtype, unit.dtype))
    real = jnp.finfo(wide.dtype).dtype
    return (wide * (1 / unit).astype(real) * factor.astype(real)).astype(leaf.dtype)


def divide(target: jax.typing.ArrayLike, ratio: jax.Array) -> jax.Array:
    """target / ratio, and zero for a ratio of zero."""
    zero = ratio == 0
    return jnp.where(zero, 0, jnp.asarray(target).astype(ratio.dtype) / jnp.where(zero, 1, ratio))
