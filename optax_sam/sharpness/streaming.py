r"""Streaming: what the instruments share, losses over batches that are in memory one at a time.

An instrument takes a loss function ``loss_fn(params, batch)`` that returns the mean over the examples of the batch, and
``batches``, a re-iterable collection that yields the same batches on every pass: a list of batches, of arrays of
indices into what the loss reads, or an object that loads them. The loss L(w) is the mean over all examples; a batch
weighs as much as its arrays are long, padding included.

``loss_fn`` is compiled at the first call and the program kept while the function lives; of a bound method, while its
owner lives. Values captured by closure, or read from the owner, are frozen at the first call; pass anything that
changes through params or batch. The loss is a scalar of float32 or wider. Narrower params are widened first.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_sam._checks import check_alike, check_loss, check_params, is_real
from optax_sam._means import leading_size
from optax_sam._norms import widen

LossFn = Callable[[Any, Any], jax.Array]


class Estimate(NamedTuple):
    """A mean over random samples.

    Attributes:
        mean: the estimate.
        standard_error: its standard deviation over choices of the samples.
    """

    mean: float
    standard_error: float


def as_real(name: str, params: Any) -> Any:
    """The tree as arrays of float32 or wider."""
    check_params(name, params, np.floating)
    if not jax.tree.leaves(params):
        raise ValueError(f"{name} must hold arrays; got {params!r}. Pass what the loss is differentiated by.")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, widen(leaf).dtype), params)


def as_change(name: str, tree: Any, params: Any) -> Any:
    """A tree like params, such as a direction, in the types of these."""
    check_params(name, tree, np.floating)
    check_alike(name, tree, "params", params)
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), tree, params)


def as_scale(scale: Any, params: Any) -> Any:
    """The factors of a scale, a prefix of params, in the structure and types of params; None where there is none."""
    if scale is None:
        return None

    def factor_of(path, leaf, factor):
        if jnp.broadcast_shapes(jnp.shape(factor), leaf.shape) != leaf.shape:
            raise ValueError(
                f"scale must have the shapes of params, or broadcast to them; got {jnp.shape(factor)} for {leaf.shape} "
                f"at {jax.tree_util.keystr(path) or 'the only leaf'}."
            )
        return jnp.broadcast_to(jnp.asarray(factor, leaf.dtype), leaf.shape)

    return jax.tree.map_with_path(factor_of, params, jax.tree.broadcast(scale, params))


def scaled(vector: Any, scale: Any) -> Any:
    """D · vector; the vector where there is no scale."""
    return vector if scale is None else jax.tree.map(jnp.multiply, vector, scale)


def sized(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Each batch after the number of its examples; a batch without arrays counts as one example."""
    wrong = ValueError(
        f"batches must be a list of batches, not empty, or another collection to be gone through again; got a "
        f"{type(batches).__name__}. A single batch goes into a list, [batch]; a stack becomes one, list(stack)."
    )
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable) or _is_one_batch(batches):
        raise wrong
    is_empty = True
    for batch in batches:
        is_empty = False
        yield leading_size(batch=batch) or 1, batch
    if is_empty:  # or all of it was taken in a pass before
        raise wrong


def _is_one_batch(batches: Any) -> bool:
    """Whether this looks like a batch, whose rows or parts would be taken for batches."""
    is_tuple_of_arrays = isinstance(batches, tuple) and any(hasattr(part, "shape") for part in batches)
    return is_tuple_of_arrays or isinstance(batches, (Mapping, jax.Array, np.ndarray))


def means_over(
    batches: Iterable[Any],
    points: Sequence[Any],
    evaluate: Callable[[Any, Any], Any],
    progress: bool,
) -> np.ndarray:
    """The mean of the scalar ``evaluate(point, batch)`` over the examples, for P points in one pass: (P,) float64."""
    total = len(points) * len(batches) if isinstance(batches, Sequence) else None
    totals, counts = np.zeros(len(points)), np.zeros(len(points))
    pairs = ((index, size, batch) for size, batch in sized(batches) for index in range(len(points)))
    for index, size, batch in shown(pairs, progress, total, "losses"):
        totals[index] += size * float(evaluate(points[index], batch))
        counts[index] += size
    return totals / counts


def once_per_loss(compile_for: Callable[..., Any]) -> Callable[..., Any]:
    """``compile_for(loss_fn, ...)``, called once for a loss function, whose life it does not prolong.

    A bound method, made anew at each access, stands for its owner. What cannot be weakly referenced is compiled for
    each call; under ``jax.jit``, where it becomes a part of another program, it is traced for each.
    """
    programs = {}

    @functools.wraps(compile_for)
    def find(loss_fn: Any, *options: Any) -> Any:
        if isinstance(jnp.zeros([]), Tracer):
            return compile_for(loss_fn, *options)
        try:
            parts = loss_fn.__func__, loss_fn.__self__
        except AttributeError:
            parts = (loss_fn,)
        key = *map(id, parts), *options
        if key not in programs:
            try:
                references = [weakref.ref(part, lambda _: programs.pop(key, None)) for part in parts]
            except TypeError:
                return compile_for(loss_fn, *options)
            programs[key] = compile_for(functools.partial(_call, references), *options)
        return programs[key]

    return find


def _call(references: list[Callable[[], Any]], *args: Any) -> Any:
    """Calls a function, or one with the owner that it was bound to."""
    function, *owner = [reference() for reference in references]
    return function(*owner, *args)


@once_per_loss
def loss_of_sum(loss_fn: LossFn) -> Callable[..., jax.Array]:
    """From ``(factors, trees, batch)`` to the loss at the sum of factor · tree; compiled once for a loss function."""

    def loss(factors, trees, batch):
        def weighted_sum(*leaves):
            return functools.reduce(jnp.add, [c * leaf for c, leaf in zip(factors, leaves, strict=True)])

        return checked_loss(loss_fn(jax.tree.map(weighted_sum, *trees), batch))

    return jax.jit(loss)


def checked_loss(loss: Any) -> jax.Array:
    """The loss, refused where it is no scalar, or so narrow that differences would be rounding."""
    check_loss("loss_fn(params, batch)", loss)
    dtype = jnp.result_type(loss)
    if jnp.finfo(dtype).bits < 32:
        raise TypeError(f"loss_fn must return float32 or wider; got {dtype}. Cast the logits before the loss.")
    return loss


def estimate(samples: Any) -> Estimate:
    """The mean of at least two samples."""
    return Estimate(float(np.mean(samples)), float(np.std(samples, ddof=1) / np.sqrt(len(samples))))


def keys_of(key: jax.Array | None, number: int) -> list[jax.Array]:
    """So many keys from one, or from a fixed one."""
    return list(jax.random.split(jax.random.key(0) if key is None else key, number))


def as_positions(positions: Any) -> np.ndarray:
    """Positions (P,) as float64."""
    array = np.asarray(positions)
    if array.ndim != 1 or not array.size or not is_real(array.dtype) or not np.all(np.isfinite(array)):
        raise ValueError(f"positions must be a list of finite real numbers; got {positions!r}.")
    return array.astype(np.float64)


def shown(items: Iterable[Any], progress: bool, total: int | None, name: str) -> Iterable[Any]:
    """The items, under a progress bar if asked for."""
    if not progress:
        return items
    import tqdm  # of the extra "sharpness"

    return tqdm.tqdm(items, total=total, desc=name, leave=False)
