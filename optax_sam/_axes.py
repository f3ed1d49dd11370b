"""Axes: what varies over which mapped axis, and what that means for norms and for averages.

A mapped axis is one of ``jax.pmap``, ``jax.shard_map`` or ``jax.vmap`` with an axis name. Only ``shard_map`` with
``check_vma=True`` knows what varies over it; the checks here read that, and elsewhere they pass.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.extend.core import Jaxpr
from jax.extend.core.primitives import axis_index_p

from optax_sam._checks import spread_mask
from optax_sam._jaxpr import equations, varying_axes_of

AxisNames = str | Sequence[str]
Axes = tuple[str, ...]
STAYING = ("axis_index", "pvary", "pcast")  # primitives that name an axis and send nothing over it


def as_axes(axis_name: Any) -> Axes:
    """The names in axis_name, which is one of them or several."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(axes, Sequence) or not axes or not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"axis_name must be the name of an axis, or a tuple of names; got {axis_name!r}.")
    return tuple(axes)


def shown(axes: Axes) -> str:
    """The axes as a user writes axis_name."""
    return repr(axes[0] if len(axes) == 1 else axes)


def is_mapped(axis: str) -> bool:
    """Whether the axis is that of a map around this call."""
    try:
        jax.lax.axis_index(axis)
    except NameError:
        return False
    return True


def varying_axes(*trees: Any) -> frozenset[str]:
    """The mapped axes over which ``shard_map`` knows a leaf of the trees to vary; empty where it does not check."""
    return frozenset[str]().union(*(varying_axes_of(jax.typeof(leaf)) for leaf in jax.tree.leaves(trees)))


def is_checked(axes: Sequence[str]) -> bool:
    """Whether the axes belong to a ``shard_map`` that tracks what varies over them (``check_vma=True``)."""
    # Nothing else tells: a value that varies over no axis looks the same whether JAX tracks it or not.
    return varying_axes(jax.lax.axis_index(axes)).issuperset(axes)


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """x, marked as varying over the axes too, where that is tracked."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x) and is_checked((axis,)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def differs_between_members(result: jax.Array, function: Callable[..., Any], *args: jax.Array) -> bool:
    """Whether ``result = function(*args)`` differs between members of a mapped axis, its arguments being alike."""
    if varying_axes(result) or not isinstance(result, Tracer):
        return bool(varying_axes(result))
    # Where nothing is tracked, only the function can tell: does it ask for its place on an axis?
    places = (eqn.params["axis_name"] for eqn in equations(jax.make_jaxpr(function)(*args).jaxpr, axis_index_p))
    return any(not is_checked(as_axes(axes)) for axes in places)


def communicates(function: Callable[..., Any], axes: Iterable[str], *args: Any) -> bool:
    """Whether the function moves data between the members of one of the mapped axes."""
    return bool(axes_of_traffic(jax.make_jaxpr(function)(*args).jaxpr) & set(axes))


def axes_of_traffic(jaxpr: Jaxpr) -> frozenset[Any]:
    """The mapped axes between whose members a program moves data."""
    found = frozenset[Any]()
    for eqn in equations(jaxpr):
        if eqn.primitive.name not in STAYING:
            found = found.union(*(_as_names(eqn.params.get(key, ())) for key in ("axes", "axis_name")))
    return frozenset(name for name in found if isinstance(name, str))


def _as_names(names: Any) -> tuple[Any, ...]:
    return tuple(names) if isinstance(names, (tuple, list, set, frozenset)) else (names,)


class Shards(NamedTuple):
    """One declaration of how params are sharded inside a map; see :func:`optax_sam.sharded`.

    Attributes:
        axes: the mapped axes over whose members leaves are sharded.
        mask: which leaves are; None: those that ``shard_map`` knows to vary.
    """

    axes: Axes
    mask: Any = None

    def axes_of_leaves(self, tree: Any) -> list[Axes]:
        """The axes over which each leaf is sharded."""
        if self.mask is not None:
            return [self.axes if chosen else () for chosen in jax.tree.leaves(spread_mask(self.mask, tree))]
        if not is_checked(self.axes):
            raise ValueError(
                f"sharded(link, {shown(self.axes)}) needs a `mask`: only shard_map with check_vma tells shards."
            )
        return [tuple(axis for axis in self.axes if axis in varying_axes(leaf)) for leaf in jax.tree.leaves(tree)]


Declared = tuple[Shards, ...]


def axes_of_leaves(tree: Any, declared: Declared) -> list[Axes]:
    """The mapped axes over which each leaf is sharded."""
    found = [()] * len(jax.tree.leaves(tree))
    for shards in declared:
        found = [union(axes, more) for axes, more in zip(found, shards.axes_of_leaves(tree), strict=True)]
    return found


def union(axes: Axes, more: Axes) -> Axes:
    """Each name once, in order: equal sets are equal tuples, and a leaf is summed over an axis once."""
    return tuple(dict.fromkeys((*axes, *more)))


def check_unvarying(params: Any, axes: Iterable[str]) -> None:
    """Raises if params are known to vary over one of the axes: norms and averages would be those of one member."""
    for axis in sorted(varying_axes(params) & set(axes)):
        raise ValueError(
            f"The params vary over the mapped axis {axis!r}. If they are its shards, average in the loss and use "
            f"`sharded(link, {axis!r})`, for a network on each member with mask=False; else pass them without pcast."
        )


def check_declared(params: Any, gradient: Any, declared: Declared) -> None:
    """Raises if params vary over an undeclared axis, or do not vary where their gradient does."""
    axes = {axis for shards in declared for axis in shards.axes}
    check_unvarying(params, varying_axes(params) - axes)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(gradient), strict=False) if declared else ()
    for axis in sorted({axis for w, g in pairs for axis in varying_axes(g) & axes - varying_axes(w)}):
        raise ValueError(
            f"sharded(link, {axis!r}): a gradient varies over {axis!r} and its param does not, so it is part of a sum. "
            "An axis holds shards of the params or micro-batches, not both."
        )


def check_same_members(name: str, value: Any, gradient: Any, params: Any) -> None:
    """Raises unless a loss and its gradient are of the same members of each mapped axis.

    ``shard_map`` sums a gradient over the axes that its point does not vary over. So it is that of all members where
    replicated params meet a member's own loss, and a part of it where marked params meet an averaged loss.
    """
    for leaf, param in zip(jax.tree.leaves(gradient), jax.tree.leaves(params), strict=False):
        own_loss, own_gradient = varying_axes(value), varying_axes(leaf)
        for axis in sorted((own_loss - own_gradient) | (own_gradient - own_loss - varying_axes(param))):
            one, other = ("loss", "gradient") if axis in own_loss else ("gradient", "loss")
            raise ValueError(
                f"{name}: over the mapped axis {axis!r}, the {one} is a member's own and the {other} that of all. "
                f"Average both or neither, or use `gradient_estimator(loss_fn, link, axis_name={axis!r})`."
            )
