"""The largest eigenvalue while training: a few products each time, because the last eigenvector is nearly the next."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import optax

from optax_sam._checks import check_int
from optax_sam.sharpness.hessian import FEWEST_PRODUCTS, dimension, hessian_of
from optax_sam.sharpness.lanczos import normalized, projections, random_vectors
from optax_sam.sharpness.streaming import LossFn, as_change, as_real, as_scale, scaled

FRESH = 0.01  # of the start is random: an eigenvector that has become the first is found even if orthogonal to the last


class TrackedEigenvalue(NamedTuple):
    """The largest eigenvalue as it is known so far, as returned by :func:`track_eigenvalue`.

    Attributes:
        value: an estimate from below, but for rounding.
        residual: how far from a true eigenvalue it is at most.
        vector: the estimate of the eigenvector, a tree like params of length 1.
        num_updates: how often it was tracked.
    """

    value: float
    residual: float
    vector: Any
    num_updates: int


def track_eigenvalue(
    loss_fn: LossFn,
    params: Any,
    batches: Iterable[Any],
    previous: TrackedEigenvalue | None = None,
    *,
    num_products: int = 4,
    scale: Any = None,
) -> TrackedEigenvalue:
    r"""The largest eigenvalue of the Hessian, by a few steps of Lanczos from the eigenvector that was found before.

    While training, the eigenvector turns slowly. Called every 10 to 100 steps, four products are usually enough for a
    per cent or so; ``residual`` says whether they were. The first call makes more of them. Where another eigenvalue
    becomes the largest, a few calls pass until it is found.

    Args:
        loss_fn: ``loss_fn(params, batch)`` → mean loss of the batch.
        params: tree of float arrays.
        batches: list of batches that make up L, or another re-iterable collection; the same, or as many, each time.
        previous: what the call before returned; None: begin at a random vector.
        num_products: products H·v of each call but the first, ≥ 2: one alone would not improve the eigenvector.
        scale: tree like params: of D·H·D, D = diag(scale), instead; see :func:`optax_sam.hessian_eigenvalues`.

    Returns:
        :class:`TrackedEigenvalue`, with the shardings of params.

    Raises:
        TypeError: num_products is not an int, or params that are not all real floating-point arrays.
        ValueError: num_products < 2; the result of other params as ``previous``; a scale of other shapes; an iterator,
            or a single batch, as batches; a Hessian that is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(jnp.arange(8.0) * w**4) / 12
        >>> w, batches, found = jnp.ones(8), [jnp.ones(4)], None
        >>> for step in range(3):
        ...     found = track_eigenvalue(loss_fn, w, batches, found)
        ...     print(f"{found.value:.2f}")
        ...     w *= 0.9
        7.00
        5.67
        4.59
    """
    params = as_real("params", params)
    scale = as_scale(scale, params)
    check_int("num_products", num_products, least=2)
    count = 0 if previous is None else previous.num_updates
    fresh = random_vectors(jax.random.normal, params)(jax.random.fold_in(jax.random.key(0), count))
    fresh, _ = normalized(scaled(fresh, scale))
    if previous is None:
        num_products = max(num_products, FEWEST_PRODUCTS)
        start = fresh
    else:
        start = optax.tree.add_scale(as_change("previous.vector", previous.vector, params), FRESH, fresh)
    product = hessian_of(loss_fn, params, batches, scale)
    *_, projection = projections(product, start, min(num_products, dimension(params, scale)), scale)
    values, vectors, residuals = projection.eigenpairs()
    vector, _ = normalized(projection.combined(vectors[:, -1]))
    return TrackedEigenvalue(float(values[-1]), float(residuals[-1]), vector, count + 1)
