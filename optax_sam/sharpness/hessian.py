r"""The Hessian: its eigenvalues, trace and spectral density.

For a loss that is streamed over batches; see :mod:`optax_sam.sharpness.streaming` for what ``loss_fn``, ``params`` and
``batches`` are. Products H·v are forward over reverse, one compiled program for all of them.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._checks import check_int, check_nonnegative
from optax_sam.sharpness.lanczos import NOT_FINITE_MESSAGE, inner_product, projections, random_vectors
from optax_sam.sharpness.streaming import (
    Estimate,
    LossFn,
    as_positions,
    as_real,
    as_scale,
    checked_loss,
    estimate,
    keys_of,
    once_per_loss,
    scaled,
    shown,
    sized,
)

SMALLEST = 0.01  # of the largest magnitude: below, the tolerance is absolute, and above the rounding of float32
FEWEST_PRODUCTS = 10  # before that, an eigenvector that the first one hardly contains may be missed


class Eigenvalues(NamedTuple):
    """Eigenvalues of a Hessian, as returned by :func:`hessian_eigenvalues`.

    Attributes:
        values: (k + num_smallest,) float64, the k largest and then the smallest ones, all in descending order.
        residuals: (k + num_smallest,) float64. Each value lies within its residual of a true eigenvalue, but for
            rounding. A larger one may, rarely, be missed.
        num_products: how many products of the Hessian with a vector it took.
        converged: whether every residual is ≤ ``rtol · max(|value|, 0.01 · largest |value|)``. This promises neither
            multiplicity (a repeated eigenvalue may be returned once, and what follows it is then one further down) nor
            the relative accuracy of values far below the largest.
    """

    values: np.ndarray
    residuals: np.ndarray
    num_products: int
    converged: bool


class SpectralDensity(NamedTuple):
    """The distribution of the eigenvalues of a Hessian, as returned by :func:`spectral_density`.

    Attributes:
        nodes: (num_probes, num_products) float64, where the mass is.
        weights: (num_probes, num_products) float64, how much; each row adds up to 1.
    """

    nodes: np.ndarray
    weights: np.ndarray

    def smoothed(self, positions: np.ndarray, width: float) -> np.ndarray:
        """The density at (P,) positions, as a sum of Gaussians with standard deviation ``width``."""
        check_nonnegative("width", width, zero=False)
        distances = (as_positions(positions)[:, None, None] - self.nodes) / width
        bells = np.exp(-0.5 * distances**2) / (width * np.sqrt(2 * np.pi))
        return np.sum(bells * self.weights, axis=(1, 2)) / len(self.nodes)


def hessian_eigenvalues(
    loss_fn: LossFn,
    params: Any,
    batches: Iterable[Any],
    k: int = 1,
    *,
    num_smallest: int = 0,
    scale: Any = None,
    rtol: float = 1e-3,
    max_products: int = 100,
    progress: bool = False,
) -> Eigenvalues:
    r"""The k largest eigenvalues of the Hessian H = ∇²L(w), and the smallest, by Lanczos.

    Largest means algebraically, not in magnitude. Each value lies within its residual of a true eigenvalue of H as it
    is computed, with the rounding of float32 and of the matrix products of the loss. An eigenvalue that repeats, or
    several that lie closer together than the tolerance, may be returned once; what follows is then one further down.
    Values below a hundredth of the largest magnitude are accurate relative to that, not to themselves.

    Each product H·v costs two to four gradients of every batch. Memory: one copy of the params, with their shardings,
    for each product so far, and a few more.

    Args:
        loss_fn: ``loss_fn(params, batch)`` → mean loss of the batch.
        params: tree of float arrays.
        batches: list of batches that make up L, or another re-iterable collection.
        k: how many of the largest, ≥ 1.
        num_smallest: how many of the smallest, ≥ 0.
        scale: tree like params, or a prefix of it, of arrays, numbers or booleans that broadcast to them: of D·H·D,
            D = diag(scale), instead, on the params whose scale is not zero. A mask: the block of some leaves, such as
            a layer. |w| + eta: a sharpness that rescaling of the weights does not change (Kwon et al. 2021).
        rtol: stops once every residual is ≤ ``rtol · max(|value|, 0.01 · largest |value|)``, the largest at both ends
            of the spectrum, returned or not.
        max_products: stops with a warning after so many products H·v.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        :class:`Eigenvalues`.

    Raises:
        TypeError: a number of the wrong type, or params that are not all real floating-point arrays.
        ValueError: k < 1, num_smallest < 0, or more eigenvalues than there are params or products; a scale of other
            shapes; an iterator, or a single batch, as batches; a Hessian that is not finite.

    Example:
        >>> scales = jnp.array([1.0, -2.0, 10.0])
        >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(scales * w**2) / 2
        >>> found = hessian_eigenvalues(loss_fn, jnp.ones(3), batches=[jnp.ones(4)], k=1, num_smallest=1)
        >>> print([f"{value:.2f}" for value in found.values], found.converged)
        ['10.00', '-2.00'] True

    Reference:
        Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian Eigenvalue Density
        <https://arxiv.org/abs/1901.10159>`_, 2019
    """
    params = as_real("params", params)
    scale = as_scale(scale, params)
    check_int("k", k)
    check_int("num_smallest", num_smallest, least=0)
    size, wanted = dimension(params, scale), k + num_smallest
    if wanted > min(size, max_products):
        raise ValueError(f"k + num_smallest = {wanted} is more than there are, of {size} params and {max_products=}.")
    most = min(max_products, size)
    fewest = min(max(FEWEST_PRODUCTS, wanted), most)
    start = scaled(random_vectors(jax.random.normal, params)(jax.random.key(0)), scale)
    steps = projections(hessian_of(loss_fn, params, batches, scale), start, most, scale)
    found = Eigenvalues(np.array([]), np.array([]), 0, False)
    for projection in shown(steps, progress, most, "Hessian · vector"):
        number = len(projection.matrix)
        if number < fewest:
            continue
        values, _, residuals = projection.eigenpairs()
        chosen = [*range(number - 1, number - 1 - k, -1), *range(num_smallest - 1, -1, -1)]
        sizes = np.maximum(np.abs(values[chosen]), SMALLEST * np.max(np.abs(values)))
        within = bool(np.all(residuals[chosen] <= rtol * sizes))
        found = Eigenvalues(values[chosen], residuals[chosen], number, within)
        if within:
            return found
    cure = "Raise rtol: what is left is rounding" if found.num_products == size else "Raise max_products"
    warnings.warn(
        f"The eigenvalues {found.values} have residuals {found.residuals} after {found.num_products} products: not "
        f"within {rtol=}. {cure}; or the loss is not that precise, or not the same in every pass over the batches.",
        stacklevel=2,
    )
    return found


def hessian_trace(
    loss_fn: LossFn,
    params: Any,
    batches: Iterable[Any],
    *,
    scale: Any = None,
    num_probes: int = 30,
    key: jax.Array | None = None,
    progress: bool = False,
) -> Estimate:
    r"""The trace of the Hessian by Hutchinson's estimator: the mean of vᵀHv over random signs v.

    Args:
        loss_fn: ``loss_fn(params, batch)`` → mean loss of the batch.
        params: tree of float arrays.
        batches: list of batches that make up the loss, or another re-iterable collection.
        scale: tree like params: of D·H·D, D = diag(scale), instead; see :func:`hessian_eigenvalues`.
        num_probes: products with H, ≥ 2; the standard error falls with its square root.
        key: of ``jax.random``, for the probes; None: a fixed one.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        :class:`Estimate`.

    Raises:
        TypeError: a number or a key of the wrong type, or params that are not all real floating-point arrays.
        ValueError: num_probes < 2; an iterator, or a single batch, as batches; a Hessian that is not finite.

    Example:
        >>> scales = jnp.array([1.0, -2.0, 10.0])
        >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(scales * w**2) / 2
        >>> hessian_trace(loss_fn, jnp.ones(3), batches=[jnp.ones(4)])
        Estimate(mean=9.0, standard_error=0.0)

    Reference:
        Hutchinson, `A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines
        <https://doi.org/10.1080/03610918908812806>`_, 1989
    """
    params = as_real("params", params)
    scale = as_scale(scale, params)
    check_int("num_probes", num_probes, least=2)
    hessian = hessian_of(loss_fn, params, batches, scale)
    draw = random_vectors(jax.random.rademacher, params)
    samples = []
    for probe in shown(keys_of(key, num_probes), progress, num_probes, "probes"):
        signs = draw(probe)
        samples.append(float(inner_product(signs, hessian(signs))))
    if not np.all(np.isfinite(samples)):
        raise ValueError(NOT_FINITE_MESSAGE)
    return estimate(samples)


def spectral_density(
    loss_fn: LossFn,
    params: Any,
    batches: Iterable[Any],
    *,
    scale: Any = None,
    num_probes: int = 5,
    num_products: int = 50,
    key: jax.Array | None = None,
    progress: bool = False,
) -> SpectralDensity:
    r"""The distribution of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    Args:
        loss_fn: ``loss_fn(params, batch)`` → mean loss of the batch.
        params: tree of float arrays.
        batches: list of batches that make up the loss, or another re-iterable collection.
        scale: tree like params: of D·H·D, D = diag(scale), instead; see :func:`hessian_eigenvalues`.
        num_probes: random vectors to average over.
        num_products: products with H for each of them, the number of nodes; at most that of the params is used.
        key: of ``jax.random``, for the probes; None: a fixed one.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        :class:`SpectralDensity`.

    Raises:
        TypeError: a number or a key of the wrong type, or params that are not all real floating-point arrays.
        ValueError: num_probes or num_products < 1; an iterator, or a single batch, as batches; a Hessian that is not
            finite.

    Example:
        >>> scales = jnp.array([1.0, -2.0, 10.0])
        >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(scales * w**2) / 2
        >>> density = spectral_density(loss_fn, jnp.ones(3), batches=[jnp.ones(4)])
        >>> print(density.nodes.shape, [f"{node:.2f}" for node in density.nodes[0]])
        (5, 3) ['-2.00', '1.00', '10.00']

    Reference:
        Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian Eigenvalue Density
        <https://arxiv.org/abs/1901.10159>`_, 2019
    """
    params = as_real("params", params)
    scale = as_scale(scale, params)
    for name, number in (("num_probes", num_probes), ("num_products", num_products)):
        check_int(name, number)
    num_products = min(num_products, dimension(params))
    hessian = hessian_of(loss_fn, params, batches, scale)
    draw = random_vectors(jax.random.normal, params)
    steps = (step for probe in keys_of(key, num_probes) for step in projections(hessian, draw(probe), num_products))
    nodes, weights = [], []
    for projection in shown(steps, progress, num_probes * num_products, "Hessian · vector"):
        if len(projection.matrix) == num_products:
            values, vectors, _ = projection.eigenpairs()
            nodes.append(values)
            weights.append(vectors[0] ** 2)
    return SpectralDensity(np.stack(nodes), np.stack(weights))


def hessian_of(loss_fn: LossFn, params: Any, batches: Iterable[Any], scale: Any = None) -> Callable[[Any], Any]:
    """From a vector, a tree like params, to its product with D·H·D, H the Hessian of the loss over all batches."""
    add_product = _hessian_product(loss_fn)

    def product(vector):
        total, count = jax.tree.map(jnp.zeros_like, vector), 0
        for size, batch in sized(batches):
            total = add_product(total, params, vector, scale, batch, size)
            count += size
        return optax.tree.scale(1 / count, total)

    return product


@once_per_loss
def _hessian_product(loss_fn: LossFn) -> Callable[..., Any]:
    """``(total, params, vector, scale, batch, size)`` → total + size · D·H·D · vector, compiled once for a loss."""

    def add_product(total, params, vector, scale, batch, size):
        gradient = jax.grad(lambda w: checked_loss(loss_fn(w, batch)))
        _, product = jax.jvp(gradient, (params,), (scaled(vector, scale),))
        return optax.tree.add_scale(total, size, scaled(product, scale))

    return jax.jit(add_product, donate_argnums=0)


def dimension(params: Any, scale: Any = None) -> int:
    """How many numbers params are, or those of them whose scale is not zero."""
    if scale is None:
        return sum(leaf.size for leaf in jax.tree.leaves(params))
    number = sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(scale))
    if not number:
        raise ValueError("scale is zero for all params. Pass one that is not, such as a mask with some True.")
    return number
