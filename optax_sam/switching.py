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

from optax_sam._axes import differs_between_members, vary, varying_axes
from optax_sam._checks import as_link, check_int, check_state, if_injected, is_float
from optax_sam._convolution import canonicalized
from optax_sam.averaging import averages_in


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
        TypeError: phases is not a mapping from int to transformations; at ``update``, the outputs or states of the
            phases differ in structure, shape or dtype.
        ValueError: phases is empty, unordered, or does not begin at 0; at ``update``, one phase averages over
            micro-batches and another does not.

    Example:
        >>> import optax_sam
        >>> link = switch_at({0: optax.identity(), 9_000: optax_sam.sam(rho=0.05)})
        >>> print(link.init(jnp.zeros(2)).switch_step)
        0

    Reference:
        Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training
        <https://arxiv.org/abs/2410.10373>`_, 2025
    """
    starts = list(phases)
    for start in starts:
        check_int("The start of a phase", start, least=0)
    if not starts or starts[0] != 0 or starts != sorted(starts) or starts[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"phases must begin at 0, `{{0: optax.identity(), ...}}`, and increase in int32; got {starts}."
        )
    boundaries = np.asarray(starts[1:], np.int32)  # NumPy's, so that they are constants of the program
    return Switch.between(
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
        TypeError: index_fn is not a function, or links is not a sequence of transformations; at ``update``, the index
            is not an integer, or the outputs or states of the links differ in structure, shape or dtype.
        ValueError: at ``update``, one link averages over micro-batches and another does not, or index_fn reads its
            place on a mapped axis.

    Example:
        >>> import optax_sam
        >>> every_fifth = switch_by(lambda step: step % 5 == 0, [optax.identity(), optax_sam.sam(rho=0.05)])
        >>> print(every_fifth.init(jnp.zeros(2)).switch_step)
        0
    """
    if not callable(index_fn):
        raise TypeError(f"index_fn must be a function of the step; got {index_fn!r}.{if_injected(index_fn)}")
    named_links = {f"link {index}": as_link(f"links[{index}]", link) for index, link in enumerate(links)}
    return Switch.between(index_fn, named_links)


class Switch(optax.GradientTransformationExtraArgs):
    """A switch whose links can be reached by what has to go inside of it."""

    index_fn: Callable[[jax.Array], jax.typing.ArrayLike]
    links: Mapping[str, optax.GradientTransformationExtraArgs]

    @classmethod
    def between(
        cls,
        index_fn: Callable[[jax.Array], jax.typing.ArrayLike],
        links: Mapping[str, optax.GradientTransformationExtraArgs],
    ) -> "Switch":
        """The switch, whose errors name the links."""

        def init(params):
            start, first = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
            return SwitchState(start, first, link_states=tuple(link.init(params) for link in links.values()))

        tried = set()

        def update(updates, state, params=None, **extra_args):
            check_state(state, SwitchState)
            if len(state.link_states) != len(links):
                raise ValueError(f"state is of a switch between {len(state.link_states)} links, not {len(links)}.")
            _check_averages(list(links), state.link_states)
            index = _index_at(index_fn, state.switch_step)
            phase = jnp.clip(index, 0, len(links) - 1)
            branches = _branches(links, updates, state, params, extra_args)
            if isinstance(phase, Tracer):
                outputs, states = jax.lax.switch(index, list(map(canonicalized, branches)))
            else:  # without jit, lax.switch would be compiled in every call; that it could be is tried once
                if (kind := _kind((updates, state, params))) not in tried:
                    jax.eval_shape(lambda index: jax.lax.switch(index, branches), index)
                    tried.add(kind)
                outputs, states = branches[int(phase)]()
            next_step = jnp.asarray(optax.safe_increment(state.switch_step))
            return outputs, SwitchState(switch_step=next_step, phase=phase, link_states=states)

        switch = cls(init, update)
        switch.index_fn, switch.links = index_fn, links
        return switch

    def each(self, wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation]) -> "Switch":
        """The same switch between wrapped links."""
        return self.between(self.index_fn, {name: as_link(name, wrap(link)) for name, link in self.links.items()})


def _kind(tree: Any) -> Any:
    """What decides about the types of an update, hashable."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, *map(jax.typeof, leaves)


def _branches(
    links: Mapping[str, optax.GradientTransformationExtraArgs],
    updates: Any,
    state: SwitchState,
    params: Any,
    extra_args: dict[str, Any],
) -> list[Callable[[], Any]]:
    """For each link the function to its outputs and the states of all links."""
    shard_axes = {axis for shards in extra_args.get("shards", ()) if shards.mask is not False for axis in shards.axes}
    axes = varying_axes(updates) - shard_axes  # over shards, what is not sharded stays the same

    def branch(position, name, link):
        def run():
            states = list(state.link_states)
            outputs, states[position] = link.update(updates, states[position], params, **extra_args)
            # All branches must return one type, and any of them may have made a float vary.
            return outputs, jax.tree.map(lambda leaf: vary(leaf, axes) if is_float(leaf) else leaf, tuple(states))

        run.__name__ = name  # by which JAX calls it where branches differ
        return run

    return [branch(position, name, link) for position, (name, link) in enumerate(links.items())]


def _index_at(index_fn: Callable[[jax.Array], jax.typing.ArrayLike], step: jax.Array) -> jax.Array:
    """The index of the link, an int32 scalar."""
    index = jnp.asarray(index_fn(step))
    if index.shape or not (jnp.issubdtype(index.dtype, np.integer) or index.dtype == np.bool_):
        raise TypeError(f"index_fn must return an integer or a boolean, a scalar; got {jax.typeof(index)}.")
    if differs_between_members(index, index_fn, step):  # a hang: members would wait for those in another branch
        raise ValueError("index_fn reads its place on a mapped axis, where all members must choose the same.")
    return index.astype(jnp.int32)


def _check_averages(names: Sequence[str], states: Sequence[optax.OptState]) -> None:
    """Raises if links average over different things: what follows would get the one or the other."""
    averages = [sorted(averages_in(state)) for state in states]
    for name, average in zip(names, averages, strict=True):
        if average != averages[0]:
            raise ValueError(
                f"Of a switch, {name} averages over {average or 'nothing'}, {names[0]} over "
                f"{averages[0] or 'nothing'}. Average around it, `micro_batched(switch_at({{...}}))`, or in every link."
            )
