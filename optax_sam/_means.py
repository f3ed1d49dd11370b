r"""Micro-batches: the mean of a function over equal parts of a batch, in a loop, unrolled or vmapped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optax_sam._axes import vary, varying_axes
from optax_sam._checks import is_float
from optax_sam._convolution import canonicalized
from optax_sam._norms import widen
from optax_sam.averaging import leading_size, mean_of_stack, shares_of, weighted
from optax_sam.sharding import axes_in, num_devices

STRATEGIES = ("auto", "vmap", "scan", "unroll")
PAIRED_BYTES = 1 << 22  # up to this size of what is averaged, two at a time stay in the caches


def mean_over_micro_batches(
    evaluate: Callable[[Any, Any], Any],
    batch: Any,
    num_micro_batches: int,
    strategy: str,
    weights: jax.Array | None = None,
) -> Any:
    """The mean of ``evaluate(index, micro_batch)`` over the micro-batches, with weights (num_micro_batches,) if given.

    What is not float is that of the first micro-batch.
    """
    shares = None if weights is None else shares_of(weights, jnp.sum(weights))
    if num_micro_batches == 1:
        result = evaluate(0, batch)
        return result if shares is None else jax.tree.map(lambda x: weighted(x, shares[0]), result)
    leaves, structure = jax.tree.flatten(batch)
    indices, stacks = jnp.arange(num_micro_batches), [_split(leaf, num_micro_batches) for leaf in leaves]

    def evaluate_one(index, micro_batch):
        # Only micro-batches are rebuilt, of the ranks that the batch had: its class may check them.
        return jax.tree.map(jnp.asarray, evaluate(index, jax.tree.unflatten(structure, micro_batch)))

    if strategy == "vmap":
        return mean_of_stack(jax.vmap(evaluate_one)(indices, stacks), shares)
    # Without jit, a loop would be compiled in every call.
    if strategy == "scan" or (strategy == "auto" and isinstance(indices, Tracer)):
        most_at_a_time = 1 if strategy == "scan" else 2
        totals, like, structure = _sums_in_a_loop(evaluate_one, (indices, stacks, shares), most_at_a_time)
    else:
        totals, like, structure = _sums_in_line(evaluate_one, (range(num_micro_batches), stacks, shares))

    def mean(total, kind):
        if not is_float(total):
            return total
        return (total / num_micro_batches if shares is None else total).astype(kind.dtype)

    return jax.tree.unflatten(structure, list(map(mean, totals, like)))


def _sums_in_a_loop(
    evaluate: Callable[..., Any], entries: Any, most_at_a_time: int
) -> tuple[list[Any], list[Any], Any]:
    """The sums of what ``evaluate(index, micro_batch)`` returns, its abstract values, and its structure."""

    def add(totals, entry):
        index, micro_batch, share = entry
        terms = _terms(jax.tree.leaves(evaluate(index, micro_batch)), share)
        return [t + x if is_float(x) else jnp.where(index == 0, x, t) for t, x in zip(totals, terms, strict=True)], None

    indices, stacks, shares = entries
    closed, shapes = jax.make_jaxpr(evaluate, return_shape=True)(indices[0], _entry(stacks, 0))
    zeros, length = [_zeros(aval, varying_axes(shares)) for aval in closed.out_avals], len(indices)
    at_a_time = min(most_at_a_time, _at_a_time(length, closed.out_avals))
    totals, _ = jax.lax.scan(canonicalized(add), zeros, entries, unroll=at_a_time)
    return totals, closed.out_avals, jax.tree.structure(shapes)


def _sums_in_line(evaluate: Callable[..., Any], entries: Any) -> tuple[list[Any], list[Any], Any]:
    """The same, one micro-batch after another in straight-line code."""
    indices, stacks, shares = entries
    totals, like, structure = [], [], None
    for index in indices:
        like, structure = jax.tree.flatten(evaluate(index, _entry(stacks, index)))
        terms = _terms(like, None if shares is None else shares[index])
        totals = [t + x if is_float(x) else t for t, x in zip(totals, terms, strict=True)] if index else terms
    return totals, like, structure


def _terms(results: list[Any], share: jax.Array | None) -> list[Any]:
    """What each result adds to a sum, in float32 or wider."""
    wide = [widen(x) if is_float(x) else x for x in results]
    return wide if share is None else [weighted(x, share) for x in wide]


def _entry(stacks: list[jax.Array], index: int) -> list[jax.Array]:
    return [jax.lax.index_in_dim(x, index, keepdims=False) for x in stacks]


def _at_a_time(length: int, results: list[Any]) -> int:
    """How many micro-batches make one turn of a loop over so many; all in one turn would be none."""
    is_small = sum(x.size * x.dtype.itemsize for x in results if is_float(x)) <= PAIRED_BYTES
    return 2 if is_small and length > 2 and length % 2 == 0 else 1


def _zeros(aval: Any, axes_of_shares: frozenset[str]) -> jax.Array:
    """Zeros of the type of a traced array; of floats, that of their products with a share in float32 or wider."""
    dtype = jnp.float32 if is_float(aval) and jnp.finfo(aval.dtype).bits < 32 else aval.dtype
    varying = aval.mat.varying | (axes_of_shares if is_float(aval) else frozenset())
    return vary(jax.lax.full(aval.shape, 0, dtype, sharding=aval.sharding), varying)


def _split(leaf: Any, num_micro_batches: int) -> jax.Array:
    """The leaf (B, ...) as (num_micro_batches, B / num_micro_batches, ...)."""
    leaf = jnp.asarray(leaf)
    mesh, spec = jax.typeof(leaf).sharding.mesh, jax.typeof(leaf).sharding.spec
    check_divisible(leaf.shape[0], num_devices(mesh, axes_in(spec[:1])), num_micro_batches)
    shape = num_micro_batches, leaf.shape[0] // num_micro_batches, *leaf.shape[1:]
    sharding = NamedSharding(mesh, PartitionSpec(None, *spec)) if any(spec) else None
    return jnp.reshape(leaf, shape, out_sharding=sharding)


def weights_of_micro_batches(weight_fn: Callable[[Any], Any], batch: Any, num_micro_batches: int) -> jax.Array:
    """``weight_fn(micro_batch)`` of each, (num_micro_batches,)."""
    if num_micro_batches == 1:
        return weight_fn(batch)[None]
    leaves, structure = jax.tree.flatten(batch)
    stacks = [_split(leaf, num_micro_batches) for leaf in leaves]
    return jax.vmap(lambda micro_batch: weight_fn(jax.tree.unflatten(structure, micro_batch)))(stacks)


def check_batch(batch: dict[str, Any], num_micro_batches: int) -> int:
    """The number of examples in named trees; raises unless there are some to split."""
    size = leading_size(**batch)
    if size is None:
        raise ValueError(
            f"{num_micro_batches=} needs a batch to split, the argument behind params (and state); got "
            f"{next(iter(batch.values()), 'none')}."
        )
    return size


def check_divisible(batch_size: int, devices: int, num_micro_batches: int) -> None:
    """Raises unless the batch makes ``num_micro_batches`` equal parts on, or spread over, each of the devices."""
    if batch_size % (devices * num_micro_batches):
        raise ValueError(
            f"{batch_size=} must be divisible by devices × num_micro_batches = {devices} × {num_micro_batches}."
        )
