r"""Lanczos: a symmetric operator on trees, seen through the vectors it generates.

The iteration is driven from the host, one compiled product after another, so that a product may stream over batches
and the caller may stop when residuals are small. matfree has the same decompositions for products that can be traced
and a number of them that is known beforehand; it is the oracle of the tests. Vectors are trees like the params and keep
their shardings; the basis grows by blocks of a few vectors, sharded alike.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from optax_sam._norms import at_length, norm
from optax_sam.sharpness.streaming import scaled

BLOCK = 16  # vectors of the basis that are allocated at once
NOT_FINITE_MESSAGE = "The Hessian is not finite at these params: a product with it holds nan or inf."


class Projection(NamedTuple):
    r"""An operator A in an orthonormal basis Q of j vectors that it generated.

    .. math::
        A \, Q = Q \, M + \beta \, q_{j+1} e_j^T

    M is tridiagonal and symmetric but for rounding errors of the products. They stay in M, so that residuals include
    them.

    Attributes:
        matrix: M, (j, j) float64.
        remainder: β, the length of what the basis does not hold of the last product.
        blocks: Q, trees of leaves (R, ...) with R of its vectors each and zeros behind the last; gone once the
            iteration goes on.
    """

    matrix: np.ndarray
    remainder: float
    blocks: list[Any]

    def eigenpairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values θ, in ascending order, vectors s in the basis, and residuals ‖A Q s − θ Q s‖."""
        values, vectors = np.linalg.eigh((self.matrix + self.matrix.T) / 2)
        inside = np.linalg.norm(self.matrix @ vectors - vectors * values, axis=0)
        return values, vectors, np.hypot(inside, self.remainder * vectors[-1])

    def combined(self, coefficients: np.ndarray) -> Any:
        """Q s, the tree that has these (j,) coefficients in the basis."""
        rows = len(jax.tree.leaves(self.blocks[0])[0])
        padded = np.zeros(rows * len(self.blocks))
        padded[: len(coefficients)] = coefficients
        parts = [_combined(block, part) for block, part in zip(self.blocks, padded.reshape(-1, rows), strict=True)]
        return functools.reduce(optax.tree.add, parts)


def projections(
    product: Callable[[Any], Any], start: Any, num_products: int, scale: Any = None
) -> Iterator[Projection]:
    """The operator in the basis of 1, 2, … ``num_products`` vectors, by Lanczos with full reorthogonalization.

    Where a product leaves nothing outside the basis, which then holds all that ``start`` has to do with, the basis goes
    on in a random direction.

    Args:
        product: from a tree like ``start`` to its product with the operator.
        start: tree of float arrays, not zero; its length does not matter.
        num_products: at most the dimension.
        scale: tree like ``start``, of which random directions are multiples; None: of ones.

    Raises:
        ValueError: a product is not finite.
    """
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(start))
    matrix = np.zeros((num_products + 1, num_products))
    rows = min(BLOCK, num_products)
    blocks, home = [], start
    vector, _ = normalized(start)
    for index in range(num_products):
        image = product(vector)
        if index == 0:  # what JAX may move goes where the product takes it
            home = jax.tree.map(lambda leaf, other: leaf if leaf.committed else other, start, image)
            vector = _placed(vector, home)
        if index % rows == 0:
            blocks.append(jax.tree.map(lambda leaf: _empty_block(leaf, rows), home))
        blocks[-1] = _with_row(blocks[-1], index % rows, vector)
        rest, coefficients = _orthogonalized(blocks, _placed(image, home))
        vector, remainder = normalized(rest)
        matrix[: index + 1, index] = coefficients[: index + 1]
        matrix[index + 1, index] = remainder
        if not np.all(np.isfinite(matrix[:, index])):
            raise ValueError(NOT_FINITE_MESSAGE)
        yield Projection(matrix[: index + 1, : index + 1].copy(), remainder, blocks)
        if remainder <= 10 * eps * np.max(np.abs(matrix)):
            matrix[index + 1, index] = 0
            fresh = random_vectors(jax.random.normal, home)(jax.random.fold_in(jax.random.key(1), index))
            fresh, _ = normalized(scaled(fresh, scale))
            vector, _ = normalized(_orthogonalized(blocks, fresh)[0])


def random_vectors(sampler: Callable[..., jax.Array], like: Any) -> Callable[[jax.Array], Any]:
    """From a key to a random tree of the types and shardings of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    types = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    draw = _leaves_drawn(sampler, types, tuple(map(_chosen_sharding, leaves)))
    return lambda key: jax.tree.unflatten(structure, draw(key))


@functools.lru_cache(maxsize=16)
def _leaves_drawn(sampler: Callable[..., jax.Array], types: Any, shardings: Any) -> Callable[[jax.Array], Any]:
    def draw(key):
        keys = jax.random.split(key, len(types))
        return tuple(sampler(key, shape, dtype) for key, (shape, dtype) in zip(keys, types, strict=True))

    return jax.jit(draw, out_shardings=shardings)


def _chosen_sharding(leaf: jax.Array) -> Sharding | None:
    """The sharding of the leaf, None where JAX may move it to where it is needed."""
    return leaf.sharding if leaf.committed else None


def _placed(vector: Any, home: Any) -> Any:
    """The vector, where ``home`` is."""

    def place(leaf, other):
        sharding = _chosen_sharding(other)
        return leaf if sharding is None else jax.device_put(leaf, sharding)

    return jax.tree.map(place, vector, home)


@jax.jit
def inner_product(first: Any, second: Any) -> jax.Array:
    """The sum over all leaves of the products of their elements."""
    rows = jax.tree.map(lambda leaf: leaf[None], first)
    return _products_with(rows, second)[0]


def _products_with(rows: Any, vector: Any) -> jax.Array:
    """(R,) inner products of a vector with each of the vectors in a tree of leaves (R, ...)."""

    def products(rows, leaf):
        mesh = jax.typeof(leaf).sharding.mesh
        everywhere = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
        return jnp.tensordot(rows, leaf, leaf.ndim, precision="highest", out_sharding=everywhere)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(products, rows, vector)))


def _orthogonalized(blocks: list[Any], vector: Any) -> tuple[Any, np.ndarray]:
    """The vector without its components in the basis, and these; twice is enough."""
    coefficients = []
    for _ in range(2):
        parts = []
        for rows in blocks:
            vector, part = _without(rows, vector)
            parts.append(part)
        coefficients.append(np.concatenate(jax.device_get(parts)).astype(np.float64))
    return vector, np.sum(coefficients, axis=0)


@jax.jit
def _without(rows: Any, vector: Any) -> tuple[Any, jax.Array]:
    coefficients = _products_with(rows, vector)
    return optax.tree.sub(vector, _combined(rows, coefficients)), coefficients


@jax.jit
def _combined(rows: Any, coefficients: jax.Array) -> Any:
    """The sum of the vectors in a tree of leaves (R, ...), each with its coefficient."""
    return jax.tree.map(lambda leaf: jnp.tensordot(coefficients.astype(leaf.dtype), leaf, 1, precision="highest"), rows)


def normalized(vector: Any) -> tuple[Any, float]:
    """The vector at length 1, or zero, and its length."""
    unit_vector, length = _unit_and_length(vector)
    return unit_vector, float(length)


@jax.jit
def _unit_and_length(vector: Any) -> tuple[Any, jax.Array]:
    length = norm(vector)
    return at_length(vector, length, 1.0), length


def _empty_block(leaf: jax.Array, rows: int) -> jax.Array:
    """Zeros (rows, ...) for vectors such as the leaf, sharded as it is."""
    sharding = None
    if isinstance(leaf.sharding, NamedSharding):
        sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec))
    return jnp.zeros((rows, *leaf.shape), leaf.dtype, device=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _with_row(rows: Any, index: int, vector: Any) -> Any:
    return jax.tree.map(lambda r, leaf: jax.lax.dynamic_update_index_in_dim(r, leaf, index, 0), rows, vector)
