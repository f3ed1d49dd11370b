"""Axes: what varies over which mapped axis, and what that means for norms and for averages.

A mapped axis is one of ``jax.pmap``, ``jax.shard_map`` or ``jax.vmap`` with an axis name. Only ``shard_map`` with
``check_vma=True`` knows what varies over it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.extend.core import Jaxpr, subjaxprs
from jax.extend.core.primitives import axis_index_p

AxisNames = str | Sequence[str]


def varying_axes(*trees: Any) -> frozenset[str]:
    """The mapped axes over which ``shard_map`` knows a leaf of the trees to vary; empty where it does not check."""
    return frozenset[str]().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(trees)))


def check_mapped(axes: Sequence[str]) -> None:
    """Raises unless all axes are mapped ones."""
    for axis in axes:
        try:
            jax.lax.axis_index(axis)
        except NameError as error:
            raise ValueError(
                f"axis_name={axis!r} is not a mapped axis here. Call this under jax.pmap, jax.shard_map or jax.vmap "
                "with that axis name, or leave axis_name out."
            ) from error


def is_checked(axes: Sequence[str]) -> bool:
    """Whether the axes belong to a ``shard_map`` that tracks what varies over them (``check_vma=True``)."""
    check_mapped(axes)
    return varying_axes(jax.lax.axis_index(axes)).issuperset(axes)


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """x, marked as varying over the axes too, where that is tracked."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x) and is_checked((axis,)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def depends_on_member(function: Callable[..., Any], *args: jax.Array) -> bool:
    """Whether the function returns different things on the members of a mapped axis, given the same arguments."""

    def reads_index(jaxpr: Jaxpr) -> bool:
        return any(eqn.primitive is axis_index_p for eqn in jaxpr.eqns) or any(map(reads_index, subjaxprs(jaxpr)))

    result = function(*args)
    return isinstance(result, Tracer) and reads_index(jax.make_jaxpr(function)(*args).jaxpr)


def as_axes(axis_name: Any) -> tuple[str, ...]:
    """The names in axis_name, which is one of them or several."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(axes, Sequence) or not axes or not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"axis_name must be the name of a mapped axis, or a tuple of names; got {axis_name!r}.")
    return tuple(axes)


class Shards(NamedTuple):
    """How the leaves of params and gradients are sharded inside a ``shard_map``; see :func:`optax_sam.sharded`.

    Attributes:
        axes: the mapped axes over whose members leaves are sharded.
        mask: which leaves are; None: those that ``shard_map`` knows to vary.
    """

    axes: tuple[str, ...] = ()
    mask: Any = None

    def axes_of_leaves(self, tree: Any) -> list[tuple[str, ...]]:
        """The axes over which each leaf is sharded."""
        leaves = jax.tree.leaves(tree)
        if not self.axes or not leaves:
            return [()] * len(leaves)
        if self.mask is not None:
            mask = self.mask(tree) if callable(self.mask) else self.mask
            return [self.axes if chosen else () for chosen in jax.tree.leaves(jax.tree.broadcast(mask, tree))]
        if not is_checked(self.axes):
            raise ValueError(
                f"sharded(link, {self.axes}): which leaves are sharded is only known under shard_map with "
                "check_vma=True. Pass `mask`, a tree of booleans with the structure of the params, True where sharded."
            )
        return [tuple(axis for axis in self.axes if axis in varying_axes(leaf)) for leaf in leaves]


def check_declared(params: Any, shards: Shards) -> None:
    """Raises if params vary over a mapped axis in a way that nobody explained: norms could be wrong."""
    for axis in sorted(varying_axes(params) - set(shards.axes)):
        raise ValueError(
            f"The params vary over the mapped axis {axis!r}. If they are sharded over it, norms must be summed over "
            f"it: `sharded(link, {axis!r})`. If they are replicated and were marked by jax.lax.pcast, pass the "
            f"unmarked params. If each member has a network of its own: `sharded(link, {axis!r}, mask=False)`."
        )


_averages: ContextVar[set[str] | None] = ContextVar("averages", default=None)


@contextlib.contextmanager
def noting_averages() -> Iterator[set[str]]:
    """Collects what the links that are traced inside average over.

    Only ``shard_map`` with ``check_vma=True`` shows in the types which of two branches returned an average.
    """
    outside, inside = _averages.get(), set[str]()
    token = _averages.set(inside)
    try:
        yield inside
    finally:
        _averages.reset(token)
        if outside is not None:
            outside |= inside


def note_average(what: str) -> None:
    """To be called by a link that averages over the axis it names."""
    averages = _averages.get()
    if averages is not None:
        averages.add(what)
