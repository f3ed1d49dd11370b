r"""Landscape: the loss on a line between two networks, and on a plane through one.

Both take ``loss_fn``, params and ``batches`` as :mod:`optax_sam.sharpness.streaming` describes them. Each batch is
loaded once.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._checks import check_alike, check_nonnegative
from optax_sam.sharpness.lanczos import random_vectors
from optax_sam.sharpness.streaming import LossFn, as_positions, as_real, keys_of, loss_of_sum, means_over


class Line(NamedTuple):
    """The loss on a line, as returned by :func:`loss_along`.

    Attributes:
        positions: (P,) float64, λ: 0 at the first params and 1 at the second.
        losses: (P,) float64.
        second_differences: (P,) float64.
    """

    positions: np.ndarray
    losses: np.ndarray
    second_differences: np.ndarray


class Surface(NamedTuple):
    """The loss on a plane, as returned by :func:`loss_surface`.

    Attributes:
        positions: (P,) float64, the coordinates along both directions; the params are at 0.
        losses: (P, P) float64; ``losses[i, j]`` is at ``positions[i]`` along the first direction and ``positions[j]``
            along the second.
    """

    positions: np.ndarray
    losses: np.ndarray


def loss_along(
    loss_fn: LossFn,
    first: Any,
    second: Any,
    batches: Iterable[Any],
    positions: Any = None,
    *,
    h: float = 0.1,
    progress: bool = False,
) -> Line:
    r"""The loss at w(λ) = (1 − λ)·first + λ·second, and its second differences.

    .. math::
        \frac{L(\lambda + h) + L(\lambda - h) - 2 L(\lambda)}{(2h)^2}

    as in the paper: on a parabola this is a quarter of the second derivative.

    Args:
        loss_fn: ``loss_fn(params, batch)`` → mean loss of the batch.
        first: tree of float arrays.
        second: tree of the same structure and shapes.
        batches: list of batches that make up the loss, or another re-iterable collection.
        positions: (P,) the λ; None: 29 from −0.2 to 1.2.
        h: the distance of the second differences, > 0.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        :class:`Line`.

    Raises:
        TypeError: a number of the wrong type, or params that are not all real floating-point arrays.
        ValueError: h ≤ 0, positions of another shape or not finite, an iterator, or a single batch, as batches, or
            trees that differ in structure or shapes.

    Example:
        >>> line = loss_along(lambda w, x: jnp.mean(x) * w**2, 0.0, 1.0, batches=[jnp.ones(4)], positions=[0.0, 1.0])
        >>> print(line.losses, [f"{curvature:.3f}" for curvature in line.second_differences])
        [0. 1.] ['0.500', '0.500']

    Reference:
        Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training
        <https://arxiv.org/abs/2410.10373>`_, 2025
    """
    first, second = as_real("first", first), as_real("second", second)
    check_alike("second", second, "first", first)
    check_nonnegative("h", h, zero=False)
    positions = as_positions(np.linspace(-0.2, 1.2, 29) if positions is None else positions)
    # Neighbours that coincide to rounding are evaluated once.
    points = np.unique(np.round(np.concatenate([positions - h, positions, positions + h]), 12))
    loss = loss_of_sum(loss_fn)
    losses = means_over(batches, points.tolist(), lambda x, batch: loss((1 - x, x), (first, second), batch), progress)
    below, here, above = (losses[np.searchsorted(points, np.round(positions + d, 12))] for d in (-h, 0, h))
    return Line(positions, here, (above + below - 2 * here) / (2 * h) ** 2)


def loss_surface(
    loss_fn: LossFn,
    params: Any,
    batches: Iterable[Any],
    positions: Any = None,
    *,
    key: jax.Array | None = None,
    progress: bool = False,
) -> Surface:
    r"""The loss on a plane through the params, along two random filter-normalized directions.

    Directions are Gaussian; each filter of a direction is rescaled to the norm of the same filter of the params, so
    that networks of different scales can be compared. A filter is everything but the last axis of a leaf: what feeds
    one output in dense and convolutional kernels of Flax, but not in those of attention, embeddings or stacked layers.
    Leaves of fewer than two axes (biases, scales of norms) do not move.

    Args:
        loss_fn: ``loss_fn(params, batch)`` → mean loss of the batch.
        params: tree of float arrays.
        batches: list of batches that make up the loss, or another re-iterable collection.
        positions: (P,) the coordinates along each of the directions; None: 21 from −1 to 1.
        key: of ``jax.random``, for the directions; None: a fixed one.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        :class:`Surface`; it takes the loss of all batches at P² points.

    Raises:
        TypeError: a number or a key of the wrong type, or params that are not all real floating-point arrays.
        ValueError: positions of another shape or not finite, an iterator, or a single batch, as batches, or params
            without leaves of two axes.

    Example:
        >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(w**2)
        >>> surface = loss_surface(loss_fn, jnp.ones((1, 2)), batches=[jnp.ones(4)], positions=[-1.0, 0.0, 1.0])
        >>> print(np.round(surface.losses, 3))
        [[ 2.  4. 10.]
         [ 4.  2.  4.]
         [10.  4.  2.]]

    Reference:
        Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_, 2018
    """
    params = as_real("params", params)
    if all(leaf.ndim < 2 for leaf in jax.tree.leaves(params)):
        shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
        raise ValueError(f"params must have a leaf of two or more axes, with filters to normalize; got {shapes=}.")
    positions = as_positions(np.linspace(-1, 1, 21) if positions is None else positions)
    draw = random_vectors(jax.random.normal, params)
    trees = params, *(_filter_normalized(draw(k), params) for k in keys_of(key, 2))
    loss = loss_of_sum(loss_fn)
    points = [(1.0, x, y) for x in positions.tolist() for y in positions.tolist()]
    losses = means_over(batches, points, lambda point, batch: loss(point, trees, batch), progress)
    return Surface(positions, losses.reshape(len(positions), len(positions)))


@jax.jit
def _filter_normalized(direction: Any, params: Any) -> Any:
    """The direction, with the norms of the params in each slice along the last axis; 0 in leaves of fewer axes."""

    def normalized(d, w):
        if w.ndim < 2:
            return jnp.zeros_like(w)
        filters = tuple(range(w.ndim - 1))
        ratio = jnp.sqrt(jnp.sum(w * w, filters) / jnp.sum(d * d, filters))
        return d * jnp.broadcast_to(ratio, d.shape)

    return jax.tree.map(normalized, direction, params)
