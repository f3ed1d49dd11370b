r"""Switching: which link is active at which step.

The branches stand in one ``lax.switch``, so that one compiled program serves all phases and the gradients of inactive
links are not evaluated. What follows in the chain (momentum!) is carried across a switch; to give each phase its own,
put whole optimizers in the phases: ``switch_at({0: optax.sgd(0.1, 0.9), 9_000: optax.chain(sam(0.05), optax.sgd(0.1,
0.9))})``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_sam._axes import differs_between_members, noting_averages, vary, varying_axes
from optax_sam._checks import as_link, check_function, check_state, is_float
from optax_sam._convolution import canonicalized


class SwitchState(NamedTuple):
    """State of :func:`switch_by` and :func:`switch_at`.

    Attributes:
        switch_step: int32 scalar, the number of updates so far.
        phase: int32 scalar, the index of the link of the last update; 0 before the first. In a chain,
            ``optax.tree.get(state, "phase")``.
        link_states: the state of each link; those of inactive links stay as they are.
    """

    switch_step: jax.Array
    phase: jax.Array
    link_states: tuple[optax.OptState, ...]


def switch_at(phases: Mapping[int, optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    r"""One link per phase of training: phase k is active for steps in [start_k, start_{k+1}).

    Steps are calls of ``update``, counted from 0. Schedules inside a link count the steps in which it was active.

    With micro-batches, in the estimator or in ``micro_batched``, phases are links, not whole optimizers: Adam would run
    on each micro-batch, and its steps be averaged. Switch optimizers behind the average, with a second ``switch_at``.

    Args:
        phases: from the first step of a phase to its link, in increasing order, beginning at step 0.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` that forwards all extra arguments.

    Raises:
        TypeError: phases is not a mapping from int to transformations.
        ValueError: phases is empty, unordered, or does not begin at 0; at ``update``, the outputs or states of the
            phases differ in structure, shape or dtype.

    Example:
        >>> import optax_sam
        >>> link = switch_at({0: optax.identity(), 9_000: optax_sam.sam(rho=0.05)})
        >>> print(link.init(jnp.zeros(2)).switch_step)
        0

    Reference:
        Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training
        <https://arxiv.org/abs/2410.10373>`_, 2025
    """
    if not isinstance(phases, Mapping):
        raise TypeError(f"phases must be a mapping from first step to link; got {phases!r}.")
    starts = list(phases)
    for start in starts:
        if isinstance(start, bool) or not isinstance(start, (int, np.integer)):
            raise TypeError(
                f"The keys of phases must be ints, the first step of each phase; got {start!r}. For a part of "
                "training write int(0.9 * num_steps)."
            )
    if not starts or starts[0] != 0 or starts != sorted(starts):
        raise ValueError(
            f"The keys of phases must begin at 0 and increase; got {starts}. To do nothing in the first phase write "
            "`switch_at({0: optax.identity(), start: link})`."
        )
    if starts[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"The start of phases must fit in int32, the dtype of the step counter; got {starts[-1]}.")
    boundaries = np.asarray(starts[1:], np.int32)
    return _switch(
        lambda step: jnp.sum(step >= boundaries, dtype=jnp.int32),
        {f"the phase from step {start}": as_link(f"phases[{start}]", link) for start, link in phases.items()},
    )


def switch_by(
    index_fn: Callable[[jax.Array], jax.typing.ArrayLike], links: Sequence[optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """The link that a function of the step chooses: alternation, every k-th step, windows.

    Steps are calls of ``update``, counted from 0. Schedules inside a link count the steps in which it was active.

    Args:
        index_fn: from the step (int32 scalar) to an index into links (integer or boolean scalar); clipped to the
            valid range.
        links: the links to choose from.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` that forwards all extra arguments.

    Raises:
        TypeError: index_fn is not a function, links is not a sequence of transformations, or the index is not an
            integer.
        ValueError: links is empty, or the index is not a scalar; at ``update``, the outputs or states of the links
            differ in structure, shape or dtype.

    Example:
        >>> import optax_sam
        >>> every_fifth = switch_by(lambda step: step % 5 == 0, [optax.identity(), optax_sam.sam(rho=0.05)])
        >>> print(every_fifth.init(jnp.zeros(2)).switch_step)
        0
    """
    check_function("index_fn", index_fn, "the step")
    if not isinstance(links, Sequence) or isinstance(links, optax.GradientTransformation):
        raise TypeError(f"links must be a sequence of transformations; got {links!r}.")
    if not links:
        raise ValueError("links must hold at least one link; got an empty sequence.")
    return _switch(index_fn, {f"link {index}": as_link(f"links[{index}]", link) for index, link in enumerate(links)})


class Switch(optax.GradientTransformationExtraArgs):
    """A switch whose links can be reached, by what has to go inside of it."""

    each: Callable[[Callable[[optax.GradientTransformation], optax.GradientTransformation]], "Switch"]


def _switch(
    index_fn: Callable[[jax.Array], jax.typing.ArrayLike],
    named_links: Mapping[str, optax.GradientTransformationExtraArgs],
) -> Switch:
    names, links = list(named_links), list(named_links.values())
    checked = set()

    def init(params):
        start, first = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return SwitchState(start, first, link_states=tuple(link.init(params) for link in links))

    def update(updates, state, params=None, **extra_args):
        check_state(state, SwitchState)
        if len(state.link_states) != len(links):
            raise ValueError(
                f"state must be of a switch between {len(links)} links; got one of {len(state.link_states)}. Build the "
                "same switch again, or begin with init(params)."
            )
        shard_axes = {
            axis for shards in extra_args.get("shards", ()) if shards.mask is not False for axis in shards.axes
        }
        axes, averages = varying_axes(updates) - shard_axes, {}  # over shards, what is not sharded stays the same

        def branch(position):
            def run():
                states = list(state.link_states)
                with noting_averages() as averages[position]:
                    outputs, states[position] = links[position].update(updates, states[position], params, **extra_args)
                return outputs, jax.tree.map(lambda leaf: vary(leaf, axes) if is_float(leaf) else leaf, tuple(states))

            return run

        branches = [branch(position) for position in range(len(links))]
        index = _checked_index(index_fn, state.switch_step)
        phase = jnp.clip(index, 0, len(links) - 1)
        if isinstance(phase, Tracer):
            outputs, states = _in_one_program(index, branches, lambda: _check_alike(names, branches, averages))
            _check_averages(names, averages)
        else:  # without jit, lax.switch would be compiled in every call
            kind = _kind((updates, state, params)), *sorted(extra_args)
            if kind not in checked:
                _check_alike(names, branches, averages)
                checked.add(kind)
            outputs, states = branches[int(phase)]()
        next_step = jnp.asarray(optax.safe_increment(state.switch_step))
        return outputs, SwitchState(switch_step=next_step, phase=phase, link_states=states)

    switch = Switch(init, update)
    switch.each = lambda wrap: _switch(
        index_fn, {name: as_link(name, wrap(link)) for name, link in named_links.items()}
    )
    return switch


def _in_one_program(index: jax.Array, branches: Sequence[Callable[[], Any]], check: Callable[[], None]) -> Any:
    """``branches[index]()``, where the index is only known when the program runs; ``check`` explains differences."""
    try:
        return jax.lax.switch(index, list(map(canonicalized, branches)))
    except TypeError:
        check()
        raise


def _kind(tree: Any) -> Any:
    """What decides about the structure and types of an update, hashable."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, *map(jax.typeof, leaves)


def _checked_index(index_fn: Callable[[jax.Array], jax.typing.ArrayLike], step: jax.Array) -> jax.Array:
    chosen = index_fn(step)
    dtype = getattr(chosen, "dtype", type(chosen))
    if not (jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.bool_)):
        raise TypeError(f"index_fn must return an integer or a boolean; got {chosen!r}.")
    index = jnp.asarray(chosen)
    if index.shape:
        raise ValueError(f"index_fn must return a scalar; got an array of shape {index.shape}.")
    if differs_between_members(index, index_fn, step):
        raise ValueError(
            "index_fn must return the same on all members of a mapped axis; it differs between them. A gradient that "
            "communicates over the axis would wait for ever for members in another branch."
        )
    return index.astype(jnp.int32)


def _check_averages(names: Sequence[str], averages: Mapping[int, set[str]]) -> None:
    """Raises if one branch returns an average over micro-batches and another does not."""
    for position, average in sorted(averages.items()):
        for what in sorted(average ^ averages[min(averages)]):
            does, does_not = (position, min(averages)) if what in average else (min(averages), position)
            raise ValueError(
                f"Of a switch, {names[does]} averages over {what} and {names[does_not]} does not. Averaging belongs "
                "around the switch, `micro_batched(switch_at({...}))`, or into every branch: a plain one is "
                "`micro_batched(optax.identity(), ...)`."
            )


def _check_alike(names: Sequence[str], branches: Sequence[Callable[[], Any]], averages: Mapping[int, set[str]]) -> None:
    """Raises a ValueError if two branches return different things, with the ``averages`` that running them notes."""
    first, *others = [jax.eval_shape(branch) for branch in branches]
    _check_averages(names, averages)
    for name, other in zip(names[1:], others, strict=True):
        pair = f"{names[0]} and {name} of a switch must return the same kind of update and state"
        if jax.tree.structure(first) != jax.tree.structure(other):
            raise ValueError(f"{pair}; got structures {jax.tree.structure(first)} and {jax.tree.structure(other)}.")
        for (path, a), b in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(other), strict=True):
            if jax.typeof(a).update(weak_type=False) != jax.typeof(b).update(weak_type=False):
                raise ValueError(
                    f"{pair}; at {jax.tree_util.keystr(path)} of (update, state) they are {jax.typeof(a)} and "
                    f"{jax.typeof(b)}."
                )
