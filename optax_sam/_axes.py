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

from optax_sam._checks import spread_mask

AxisNames = str | Sequence[str]
STAYING = ("axis_index", "pvary", "pcast")  # primitives that name an axis and send nothing over it


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


def differs_between_members(result: jax.Array, function: Callable[..., Any], *args: jax.Array) -> bool:
    """Whether ``result = function(*args)`` differs between members of a mapped axis, given that the arguments do not.

    Where nothing is tracked: whether the function asks for its place on the axis.
    """

    def reads_index(jaxpr: Jaxpr) -> bool:
        here = (eqn.params["axis_name"] for eqn in jaxpr.eqns if eqn.primitive is axis_index_p)
        return any(not is_checked(as_axes(axes)) for axes in here) or any(map(reads_index, subjaxprs(jaxpr)))

    untracked = isinstance(result, Tracer) and not varying_axes(result)
    return reads_index(jax.make_jaxpr(function)(*args).jaxpr) if untracked else bool(varying_axes(result))


def communicates(function: Callable[..., Any], axes: Iterable[str], *args: Any) -> bool:
    """Whether the function moves data between the members of one of the mapped axes."""

    def does(jaxpr: Jaxpr) -> bool:
        for eqn in jaxpr.eqns:
            names = [name for key in ("axes", "axis_name") for name in _as_names(eqn.params.get(key, ()))]
            if set(names) & set(axes) and eqn.primitive.name not in STAYING:
                return True
        return any(map(does, subjaxprs(jaxpr)))

    return does(jax.make_jaxpr(function)(*args).jaxpr)


def _as_names(names: Any) -> tuple[Any, ...]:
    return tuple(names) if isinstance(names, (tuple, list, set, frozenset)) else (names,)


def as_axes(axis_name: Any) -> tuple[str, ...]:
    """The names in axis_name, which is one of them or several."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(axes, Sequence) or not axes or not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"axis_name must be the name of a mapped axis, or a tuple of names; got {axis_name!r}.")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis_name must hold each name once; got {axis_name!r}.")
    return tuple(axes)


class Shards(NamedTuple):
    """One declaration of how params are sharded inside a map; see :func:`optax_sam.sharded`.

    Attributes:
        axes: the mapped axes over whose members leaves are sharded.
        mask: which leaves are; None: those that ``shard_map`` knows to vary.
    """

    axes: tuple[str, ...]
    mask: Any = None

    def axes_of_leaves(self, tree: Any) -> list[tuple[str, ...]]:
        """The axes over which each leaf is sharded."""
        if self.mask is not None:
            return [self.axes if chosen else () for chosen in jax.tree.leaves(spread_mask(self.mask, tree))]
        if not is_checked(self.axes):
            raise ValueError(
                f"sharded(link, {self.axes}): which leaves are sharded is only known under shard_map with "
                "check_vma=True. Pass `mask`, a tree of booleans with the structure of the params, True where sharded; "
                "then the gradients must be right too, which with collectives in the loss they are not."
            )
        return [tuple(axis for axis in self.axes if axis in varying_axes(leaf)) for leaf in jax.tree.leaves(tree)]


Declared = tuple[Shards, ...]


def axes_of_leaves(tree: Any, declared: Declared) -> list[tuple[str, ...]]:
    """The mapped axes over which each leaf is sharded."""
    if not isinstance(declared, tuple) or not all(isinstance(shards, Shards) for shards in declared):
        raise TypeError(
            f"shards must be what `sharded(link, axis_name)` hands to the update of link; got {declared!r}."
        )
    found = [[] for _ in jax.tree.leaves(tree)]
    for shards in declared:
        for axes, more in zip(found, shards.axes_of_leaves(tree), strict=True):
            axes += [axis for axis in more if axis not in axes]
    return [tuple(axes) for axes in found]


def check_declared(params: Any, gradient: Any, declared: Declared) -> None:
    """Raises if params vary over a mapped axis that was not declared: norms could be wrong."""
    for axis in sorted(varying_axes(params) - {axis for shards in declared for axis in shards.axes}):
        raise ValueError(
            f"The params vary over the mapped axis {axis!r}. If they are sharded over it, norms must be summed over "
            f"it: `sharded(link, {axis!r})`. If they are replicated and were marked by jax.lax.pcast, pass the "
            f"unmarked params. If each member has a network of its own: `sharded(link, {axis!r}, mask=False)`."
        )
    if params is None or not declared:
        return
    for param, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(gradient), strict=True):
        for shards in declared:
            for axis in sorted(varying_axes(leaf) & set(shards.axes) - varying_axes(param)):
                raise ValueError(
                    f"sharded(link, {axis!r}): a gradient varies over {axis!r} and its param does not, so it is a part "
                    "of a sum and no shard. An axis holds shards of the params or micro-batches, not both."
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
