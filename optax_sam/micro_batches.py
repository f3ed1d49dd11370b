r"""Micro-batches: the mean of a function over equal parts of a batch, in a loop, unrolled or vmapped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optax_sam._norms import widen
from optax_sam.averaging import leading_size, mean_of_stack
from optax_sam.axes import vary
from optax_sam.checks import is_float
from optax_sam.convolution import canonicalized
from optax_sam.sharding import axes_in, num_devices

STRATEGIES = ("auto", "vmap", "scan", "unroll")
PAIRED_BYTES = 1 << 22  # up to this size of what is averaged, two at a time stay in the caches


def mean_over_micro_batches(
    evaluate: Callable[[Any, tuple, dict], Any], args: tuple, kwargs: dict, num_micro_batches: int, strategy: str
) -> Any:
    """The mean of ``evaluate(index, args, kwargs)`` over the micro-batches of ``args[0]``."""
    if num_micro_batches == 1:
        return evaluate(0, args, kwargs)
    indices = jnp.arange(num_micro_batches)
    micro_batches = indices, _split(args[0], num_micro_batches)

    def evaluate_micro_batch(index, micro_batch):
        return jax.tree.map(jnp.asarray, evaluate(index, (micro_batch, *args[1:]), kwargs))

    def micro_batch_at(index):
        return jax.tree.map(lambda x: jax.lax.index_in_dim(x, index, keepdims=False), micro_batches)

    def add(total, numbered):
        leaves = jax.tree.leaves(evaluate_micro_batch(*numbered))
        return [t + widen(x) if is_float(x) else t for t, x in zip(total, leaves, strict=True)]

    if strategy == "vmap":
        return mean_of_stack(jax.vmap(evaluate_micro_batch)(*micro_batches))
    # Without jit, a loop would be compiled in every call.
    is_loop = strategy == "scan" or (strategy == "auto" and isinstance(indices, Tracer))
    leaves, structure = _types_of(lambda: evaluate_micro_batch(*micro_batch_at(0))) if is_loop else ([], None)
    if is_loop and all(map(is_float, leaves)):
        done, total = 0, [_wide_zeros(aval) for aval in leaves]
    else:  # what is not float is that of the first
        leaves, structure = jax.tree.flatten(evaluate_micro_batch(*micro_batch_at(0)))
        done, total = 1, [widen(x) if is_float(x) else x for x in leaves]
    if is_loop:
        rest = jax.tree.map(lambda x: jax.lax.slice_in_dim(x, done, num_micro_batches), micro_batches)
        unroll = 1 if strategy == "scan" else _at_a_time(num_micro_batches - done, leaves)
        total, _ = jax.lax.scan(
            canonicalized(lambda total, numbered: (add(total, numbered), None)), total, rest, unroll=unroll
        )
    else:
        for index in range(1, num_micro_batches):
            total = add(total, micro_batch_at(index))
    mean = [(t / num_micro_batches).astype(x.dtype) if is_float(x) else t for t, x in zip(total, leaves, strict=True)]
    return jax.tree.unflatten(structure, mean)


def _types_of(function: Callable[[], Any]) -> tuple[list[Any], Any]:
    """The abstract values of what the function returns, and their structure."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)()
    return closed.out_avals, jax.tree.structure(shapes)


def _at_a_time(length: int, results: list[Any]) -> int:
    """How many micro-batches make one turn of a loop over so many; all in one turn would be none."""
    is_small = sum(x.size * x.dtype.itemsize for x in results if is_float(x)) <= PAIRED_BYTES
    return 2 if is_small and length > 2 and length % 2 == 0 else 1


def _wide_zeros(aval: Any) -> jax.Array:
    """Zeros of the type of a traced array, in float32 or wider."""
    dtype = aval.dtype if jnp.finfo(aval.dtype).bits >= 32 else jnp.float32
    return vary(jax.lax.full(aval.shape, 0, dtype, sharding=aval.sharding), aval.mat.varying)


def _split(batch: Any, num_micro_batches: int) -> Any:
    """The batch with leaves (B, ...) reshaped to (num_micro_batches, B / num_micro_batches, ...)."""

    def split(leaf):
        leaf = jnp.asarray(leaf)
        mesh, spec = jax.typeof(leaf).sharding.mesh, jax.typeof(leaf).sharding.spec
        check_divisible(leaf.shape[0], num_devices(mesh, axes_in(spec[:1])), num_micro_batches)
        shape = num_micro_batches, leaf.shape[0] // num_micro_batches, *leaf.shape[1:]
        sharding = NamedSharding(mesh, PartitionSpec(None, *spec)) if any(spec) else None
        return jnp.reshape(leaf, shape, out_sharding=sharding)

    return jax.tree.map(split, batch)


def check_batch(args: tuple, num_micro_batches: int) -> None:
    """Raises unless the first of the arguments of a loss can be split, where it has to be."""
    if num_micro_batches > 1 and (not args or leading_size(batch=args[0]) is None):
        raise ValueError(
            f"{num_micro_batches=} needs a batch to split, the argument behind params (and state); got "
            f"{args[0] if args else 'none'}."
        )


def check_divisible(batch_size: int, devices: int, num_micro_batches: int) -> None:
    """Raises unless the batch makes ``num_micro_batches`` equal parts on, or spread over, each of the devices."""
    if batch_size % (devices * num_micro_batches):
        raise ValueError(
            f"{batch_size=} must be divisible by devices × num_micro_batches = {devices} × {num_micro_batches}."
        )
