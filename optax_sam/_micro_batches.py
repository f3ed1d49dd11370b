r"""Micro-batches: the mean of a function over those of a batch, by one of several strategies.

Float leaves are averaged, in float32 or wider, with weights if there are some; the others are those of the first.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr

from optax_sam._axes import vary, varying_axes
from optax_sam._checks import is_float
from optax_sam._convolution import canonicalized
from optax_sam._jaxpr import varying_axes_of
from optax_sam._lazy import lazy_mean
from optax_sam._means import mean_of_stack, shares_of, weighted
from optax_sam._mesh import split_leading
from optax_sam._norms import widen

Traced = tuple[ClosedJaxpr, Any]  # the program of one micro-batch, and the shapes that it returns in their structure
Strategy = Literal["auto", "vmap", "scan", "unroll", "lazy"]
PAIRED_BYTES = 1 << 22  # of what is averaged: two micro-batches a turn save time as long as their sums stay in cache


def mean_over_micro_batches(
    evaluate: Callable[[Any, Any], Any],
    batch: Any,
    num_micro_batches: int,
    strategy: Strategy,
    weights: jax.Array | None = None,
    *,
    group_size: int | None = None,
    may_be_lazy: bool = False,
) -> Any:
    """The mean of ``evaluate(index, micro_batch)``, with weights (num_micro_batches,) if given.

    With ``group_size`` a loop runs over groups of micro-batches, each by the strategy. "auto" only takes "lazy" if it
    may: who accumulates wants little memory.
    """
    shares = None if weights is None else shares_of(weights, jnp.sum(weights))
    if num_micro_batches == 1:
        result = evaluate(0, batch)
        return result if shares is None else jax.tree.map(lambda x: weighted(x, shares[0]), result)
    indices = jnp.arange(num_micro_batches)
    stacks, rebuilt = _split(batch, num_micro_batches)

    def evaluate_part(index, leaves):
        return jax.tree.map(_as_array, evaluate(index, rebuilt(leaves)))

    if strategy == "auto" and not isinstance(indices, Tracer):
        strategy = "unroll"  # without jit a loop would be compiled in every call
    mean = functools.partial(_mean, evaluate_part, strategy=strategy, may_be_lazy=may_be_lazy)
    if group_size is None or group_size == num_micro_batches:
        return mean(indices, stacks, shares)

    def evaluate_group(_, entry):
        return mean(*entry)

    groups = num_micro_batches // group_size
    entries = jax.tree.map(lambda x: split_leading(x, groups), (indices, stacks, shares))
    traced = jax.make_jaxpr(evaluate_group, return_shape=True)(0, _entry(entries, 0))
    return _sums_in_a_loop(evaluate_group, traced, jnp.arange(groups), entries, None, 1).means(groups, shares)


def _as_array(leaf: Any) -> jax.Array:
    if isinstance(leaf, (str, bytes)):
        raise TypeError(
            f"aux holds {leaf!r}, which has no mean over micro-batches. Return arrays in aux, and names apart."
        )
    return jnp.asarray(leaf)


def _mean(
    evaluate: Callable[..., Any],
    indices: jax.Array,
    stacks: list[jax.Array],
    shares: jax.Array | None,
    strategy: Strategy,
    may_be_lazy: bool,
) -> Any:
    """The mean of evaluate(index, leaves) over micro-batches, or with shares their weighted sum."""
    if strategy == "vmap":
        return mean_of_stack(jax.vmap(evaluate)(indices, stacks), shares)
    if strategy == "unroll":
        return _sums_in_line(evaluate, range(len(indices)), stacks, shares).means(len(indices), shares)
    traced = jax.make_jaxpr(evaluate, return_shape=True)(indices[0], _entry(stacks, 0))
    is_auto = strategy == "auto"
    if strategy == "lazy" or (is_auto and may_be_lazy):
        closed, shapes = traced
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shapes)]
        means = lazy_mean(closed, names, [indices, *stacks], shares, only_if_cheaper=is_auto)
        if means is not None:
            return jax.tree.unflatten(jax.tree.structure(shapes), means)
    sums = _sums_in_a_loop(evaluate, traced, indices, stacks, shares, most_at_a_time=2 if is_auto else 1)
    return sums.means(len(indices), shares)


def weights_of_micro_batches(weight_fn: Callable[[Any], Any], batch: Any, num_micro_batches: int) -> jax.Array:
    """``weight_fn(micro_batch)`` of each, (num_micro_batches,)."""
    if num_micro_batches == 1:
        return weight_fn(batch)[None]
    stacks, rebuilt = _split(batch, num_micro_batches)
    return jax.vmap(lambda leaves: weight_fn(rebuilt(leaves)))(stacks)


def _split(batch: Any, num_micro_batches: int) -> tuple[list[jax.Array], Callable[[Any], Any]]:
    """The leaves (M, B / M, ...), and the function from leaves of one micro-batch to the micro-batch.

    A batch of stacks is never built: its class may check the ranks of what it holds.
    """
    leaves, structure = jax.tree.flatten(batch)
    return [split_leading(leaf, num_micro_batches) for leaf in leaves], structure.unflatten


class _Sums(NamedTuple):
    """Sums over micro-batches: the totals, what the terms were like, and the structure that both are leaves of."""

    totals: list[Any]
    like: list[Any]
    structure: Any

    def means(self, size: int, shares: jax.Array | None) -> Any:
        count = size if shares is None else 1

        def mean(total, like):
            return (total / count).astype(like.dtype) if is_float(total) else total

        return self.structure.unflatten(map(mean, self.totals, self.like))


def _sums_in_a_loop(
    evaluate: Callable[..., Any],
    traced: Traced,
    indices: jax.Array,
    stacks: Any,
    shares: jax.Array | None,
    most_at_a_time: int,
) -> _Sums:
    def add(totals, entry):
        index, leaves, share = entry
        terms = _terms(jax.tree.leaves(evaluate(index, leaves)), share)
        return [t + x if is_float(x) else jnp.where(index == 0, x, t) for t, x in zip(totals, terms, strict=True)], None

    # From zeros on, not from the first term: a loop that begins behind its first turn is two copies of the program.
    closed, shapes = traced
    zeros = [_zeros(aval, varying_axes(shares)) for aval in closed.out_avals]
    at_a_time = min(most_at_a_time, _at_a_time(len(indices), closed.out_avals))
    totals, _ = jax.lax.scan(canonicalized(add), zeros, (indices, stacks, shares), unroll=at_a_time)
    return _Sums(totals, closed.out_avals, jax.tree.structure(shapes))


def _sums_in_line(evaluate: Callable[..., Any], indices: range, stacks: Any, shares: jax.Array | None) -> _Sums:
    """The same, one micro-batch after another in straight-line code."""
    totals, like, structure = [], [], None
    for index in indices:
        like, structure = jax.tree.flatten(evaluate(index, _entry(stacks, index)))
        terms = _terms(like, None if shares is None else shares[index])
        totals = [t + x if is_float(x) else t for t, x in zip(totals, terms, strict=True)] if index else terms
    return _Sums(totals, like, structure)


def _terms(results: list[Any], share: jax.Array | None) -> list[Any]:
    """What each result adds to a sum, in float32 or wider."""
    wide = [widen(x) if is_float(x) else x for x in results]
    return wide if share is None else [weighted(x, share) for x in wide]


def _entry(stacks: Any, index: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.index_in_dim(x, index, keepdims=False), stacks)


def _at_a_time(length: int, results: list[Any]) -> int:
    """How many micro-batches make one turn of a loop over so many; all in one turn would be no loop."""
    is_small = sum(x.size * x.dtype.itemsize for x in results if is_float(x)) <= PAIRED_BYTES
    return 2 if is_small and length > 2 and length % 2 == 0 else 1


def _zeros(aval: Any, axes_of_shares: frozenset[str]) -> jax.Array:
    """Zeros of the type of a traced array; of floats, that of their products with a share in float32 or wider."""
    dtype = jnp.float32 if is_float(aval) and jnp.finfo(aval.dtype).bits < 32 else aval.dtype
    varying = varying_axes_of(aval) | (axes_of_shares if is_float(aval) else frozenset())
    return vary(jax.lax.full(aval.shape, 0, dtype, sharding=aval.sharding), varying)
