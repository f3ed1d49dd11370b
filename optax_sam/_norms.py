r"""Norms: the length of a tree of arrays over all its leaves and shards, inner products, and rescaling to a length.

Squares of float32 numbers underflow below 1e-19 and overflow above 1e19. A sum of squares far from both limits is used
as it is; otherwise it is taken again at a scale c, a power of two:

.. math::
    \|x\|_2 = \frac1c \sqrt{\sum_i (c \, x_i)^2}, \qquad c \in \{2^{62}, 2^{-64}\}

which covers norms from 1e-37 to 3e38. Almost every step of a training run takes one pass.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._axes import Axes, Declared, axes_of_leaves, union, vary, varying_axes
from optax_sam._checks import check_alike, is_float


def norm(tree: Any, shards: Declared = ()) -> jax.Array:
    r"""The L2 norm over all leaves, and over all their shards.

    .. math::
        \|x\|_2 = \sqrt{\sum_i |x_i|^2}

    The sum is taken in float32 or wider: ``optax.tree.norm`` adds in the dtype of the leaves, where bfloat16 is off by
    half and float16 overflows. Accurate for float32 norms from 1e-37 to 3e38; the derivative at zero is zero.

    Args:
        tree: tree of float arrays.
        shards: the keyword ``shards`` that :func:`optax_sam.sharded` hands to a link; () where nothing is sharded.

    Returns:
        The norm, a float32 scalar, or float64 if a leaf has 64 bits.

    Raises:
        TypeError: a leaf is not floating-point.

    Example:
        >>> print(norm({"a": jnp.array([2.0, 3.0]), "b": jnp.array(6.0)}))
        7.0
    """
    leaves, axes = _wide_leaves(tree, shards)
    if not leaves:
        return jnp.zeros([], jnp.float32)
    return norm_of_leaves(leaves, axes, _way(leaves, axes))


def vdot(a: Any, b: Any, shards: Declared = ()) -> jax.Array:
    r"""The inner product of two trees over all leaves, and over all their shards.

    .. math::
        \langle a, b \rangle = \mathrm{Re} \sum_i \bar a_i \, b_i, \qquad \langle a, a \rangle = \|a\|_2^2

    Complex leaves count as pairs of real numbers. Both trees are scaled to norms near 1 first, in float32 or wider, so
    tiny and huge ones keep full precision.

    Args:
        a: tree of float arrays.
        b: tree of the same structure and shapes.
        shards: the keyword ``shards`` that :func:`optax_sam.sharded` hands to a link; () where nothing is sharded.

    Returns:
        The inner product, a float32 scalar, or float64 if a leaf has 64 bits.

    Raises:
        TypeError: a leaf is not floating-point.
        ValueError: the trees differ in structure or shapes.

    Example:
        >>> print(vdot([jnp.array([2.0, 3.0]), 1.0], [jnp.array([1.0, 1.0]), 6.0]))
        11.0
    """
    check_alike("a", a, "b", b)
    units = [power_of_two(norm(tree, shards)) for tree in (a, b)]
    (first, axes), (second, others) = (
        _wide_leaves(scaled(wide(x), 1 / unit), shards) for x, unit in zip((a, b), units, strict=True)
    )
    if not first:
        return jnp.zeros([], jnp.float32)
    axes = [union(names, more) for names, more in zip(axes, others, strict=True)]
    return _sum_of_products(first, second, axes) * units[0] * units[1]


def at_length(tree: Any, current: jax.Array, length: jax.typing.ArrayLike) -> Any:
    """Rescales a tree of norm ``current`` to another norm; zero stays zero. Dtypes are kept."""
    largest, zero = jnp.finfo(current.dtype).max, current == 0
    target = jnp.minimum(jnp.asarray(length).astype(current.dtype), largest)
    # An infinite factor would make NaN of the zeros in the tree, and an infinite norm a zero of everything finite.
    factor = jnp.minimum(target / jnp.where(zero, 1, jnp.minimum(current, largest)), largest)
    return scaled(tree, jnp.where(zero, 0, factor))


def scaled(tree: Any, factor: jax.typing.ArrayLike) -> Any:
    """factor · tree, multiplied in float32 or wider; dtypes are kept."""
    factor = jnp.asarray(factor)
    factor = widen(factor) if is_float(factor) else factor.astype(jnp.float32)

    def scale(leaf):
        leaf = jnp.asarray(leaf)
        dtype = np.result_type(widen(leaf).dtype, factor.dtype)
        return (leaf.astype(dtype) * factor.astype(jnp.finfo(dtype).dtype)).astype(leaf.dtype)

    return jax.tree.map(scale, tree)


def plus(tree: Any, factor: jax.typing.ArrayLike, other: Any) -> Any:
    """tree + factor · other, added in float32 or wider; dtypes are those of the tree."""
    terms = scaled(wide(other), factor)
    return jax.tree.map(lambda x, y: (widen(x) + y).astype(jnp.asarray(x).dtype), tree, terms)


def across(tree: Any, other: Any, shards: Declared = ()) -> Any:
    """The part of a tree across another: x − ⟨x, y⟩/‖y‖² · y; x where y is zero.

    Zero where the two point the same way to rounding: what is left there has no direction.
    """
    unit = at_length(wide(other), norm(other, shards), 1.0)
    rest = plus(tree, -vdot(unit, tree, shards), unit)
    length = norm(rest, shards)
    of_leaves = [jnp.finfo(jnp.result_type(leaf)).eps for leaf in jax.tree.leaves((tree, other))]
    rounding = max([100 * jnp.finfo(length.dtype).eps, *(2 * eps for eps in of_leaves)])
    is_rounding = length <= rounding * norm(tree, shards)
    return jax.tree.map(lambda x: jnp.where(is_rounding, 0, x), rest)


def wide(tree: Any) -> Any:
    """The tree with leaves of float32 (complex64) or wider."""
    return jax.tree.map(widen, tree)


def widen(leaf: jax.typing.ArrayLike) -> jax.Array:
    """The leaf as an array of float32 (complex64) or wider."""
    leaf = jnp.asarray(leaf)
    if not is_float(leaf):
        raise TypeError(f"a tree of updates or params must have floating-point leaves; got one of dtype {leaf.dtype}.")
    return leaf if jnp.finfo(leaf.dtype).bits >= 32 else leaf.astype(jnp.float32)


def power_of_two(length: jax.Array) -> jax.Array:
    """A power of two near a norm, so that a division by it is exact; 1 for 0."""
    _, exponent = jnp.frexp(jax.lax.stop_gradient(jnp.where(jnp.isfinite(length), length, 1)))
    return jnp.ldexp(jnp.ones_like(length), jnp.clip(exponent, -126, 126))


def _wide_leaves(tree: Any, shards: Declared) -> tuple[list[jax.Array], tuple[Axes, ...]]:
    """The leaves in one precision, without those that are empty, and the axes over which each is sharded."""
    pairs = zip(jax.tree.leaves(tree), axes_of_leaves(tree, shards), strict=True)
    leaves, axes = [], []
    for leaf, names in pairs:
        if jnp.size(leaf):
            leaves.append(widen(leaf))
            axes.append(names)
    precision = np.result_type(jnp.float32, *(jnp.finfo(leaf.dtype).dtype for leaf in leaves))
    return [leaf.astype(np.result_type(leaf.dtype, precision)) for leaf in leaves], tuple(axes)


def _way(leaves: list[jax.Array], axes: tuple[Axes, ...]) -> str:
    """How the second pass runs: skipped by a branch on CPUs, always taken elsewhere."""
    if any(jax.typeof(leaf).sharding.mesh.explicit_axes for leaf in leaves):
        return "line"  # under vmap, an Explicit mesh has neither branches nor loops
    # Members of an axis would have to agree on a branch before its reduction, and a GPU would wait for the host.
    return "loop" if any(axes) or jax.default_backend() != "cpu" else "branch"


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnums=(1, 2))  # or a branch would be compiled in every call that is not in a jit
def norm_of_leaves(leaves: list[jax.Array], axes: tuple[Axes, ...], way: str) -> jax.Array:
    first, square = _squares_in_a_loop(leaves, axes) if way == "loop" else _squares(leaves, axes, way)
    root = jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))  # has a derivative at 0, too
    return root / jnp.where(_fits(first), 1, _scale_for(first))


@norm_of_leaves.defjvp
def _norm_derivative(axes: tuple[Axes, ...], way: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (leaves,), (changes,) = primals, tangents
    length = norm_of_leaves(leaves, axes, way)
    return length, _sum_of_products(at_length(leaves, length, 1.0), changes, axes)


def _fits(square: jax.Array) -> jax.Array:
    """Whether a sum of squares is far from under- and overflow: what underflows in it is below 2⁻³³ of the norm."""
    return (square > 2.0**-60) & (square < 2.0**126)


def _scale_for(square: jax.Array) -> jax.Array:
    return jnp.where(square < 1, 2.0**62, 2.0**-64).astype(square.dtype)


def _squares(leaves: list[jax.Array], axes: tuple[Axes, ...], way: str) -> tuple[jax.Array, jax.Array]:
    """The sum of squares, and the same at a scale if it needs one."""
    first = _sum_of_products(leaves, leaves, axes)

    def again():
        return _sum_of_squares(leaves, _scale_for(first), axes)

    if way == "branch":
        # The branch is also a wall. Without one XLA:CPU repeats the norm, which depends on every leaf, in the pass over
        # each: 13 times the program, and 10 times the time to compile, for StableSAM on 300 leaves. tests/test_xla.py
        # tells when that is over.
        return first, jax.lax.cond(_fits(first), lambda: first, again)
    return first, jnp.where(_fits(first), first, again())


def _squares_in_a_loop(leaves: list[jax.Array], axes: tuple[Axes, ...]) -> tuple[jax.Array, jax.Array]:
    """The same with both passes as turns of one loop, which compiles a single pass and is a wall too."""

    def take(scale, _):
        square = _sum_of_squares(leaves, scale, axes)
        return _scale_for(square), square

    dtype = jnp.finfo(leaves[0].dtype).dtype
    varying = varying_axes(leaves) - {axis for names in axes for axis in names}
    _, (first, second) = jax.lax.scan(take, vary(jnp.ones([], dtype), varying), length=2)
    return first, jnp.where(_fits(first), first, second)


def _sum_of_squares(leaves: Sequence[jax.Array], scale: jax.Array, axes: Sequence[Axes]) -> jax.Array:
    leaves = [leaf * scale.astype(jnp.finfo(leaf.dtype).dtype) for leaf in leaves]
    return _sum_of_products(leaves, leaves, axes)


def _sum_of_products(first: Sequence[jax.Array], second: Sequence[jax.Array], axes: Sequence[Axes]) -> jax.Array:
    """The real part of the sum of products over elements and shards, with one reduction for each set of axes."""
    sums: dict[Axes, jax.Array] = {}
    for a, b, names in zip(first, second, axes, strict=True):
        is_complex = jnp.iscomplexobj(a) or jnp.iscomplexobj(b)
        product = jnp.real(a) * jnp.real(b) + jnp.imag(a) * jnp.imag(b) if is_complex else a * b
        sums[names] = sums[names] + jnp.sum(product) if names in sums else jnp.sum(product)
    totals = [jax.lax.psum(vary(x, names), names) if names else x for names, x in sums.items()]
    return functools.reduce(jnp.add, totals)
