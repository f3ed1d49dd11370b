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

from optax_sam._axes import axes_of_traffic, differs_between_members, is_checked, vary, varying_axes
from optax_sam._checks import as_link, check_int, check_state, if_injected, is_float
from optax_sam._convolution import canonicalized
from optax_sam.averaging import averages_in


class SwitchState(NamedTuple):
    """State of :func:`switch_by` and :func:`switch_at`.

    Attributes:
        switch_step: int32 scalar, the number of updates so far.
        phase: int32 scalar, the index of the link of the last update; 0 before the first. In a chain,
            ``optax.tree.get(state, "phase")``.
        link_states: the state of each link, or one that all share; those of inactive links stay as they are.
        rule_state: the state of the rule of :func:`switch_on`.
    """

    switch_step: jax.Array
    phase: jax.Array
    link_states: tuple[optax.OptState, ...]
    rule_state: optax.OptState = ()


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
        rule_of_step(lambda step: jnp.sum(step >= boundaries, dtype=jnp.int32)),
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
    return Switch.between(rule_of_step(index_fn), _named(links))


class RuleState(NamedTuple):
    """State of the rule of :func:`switch_on`; its type tells that members of an axis may be in different phases.

    Attributes:
        inner: the state of the rule.
    """

    inner: optax.OptState


def switch_on(
    rule: optax.GradientTransformation, links: Sequence[optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """The link that a rule chooses, which sees the gradient and has a state.

    Args:
        rule: a transformation from the gradient to an index into links (integer or boolean scalar; clipped to the valid
            range) in place of updates. Its ``update`` gets the keywords of the switch, and ``switch_step``.
        links: the links to choose from.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` that forwards all extra arguments.

    Raises:
        TypeError: rule is not a transformation, or links is not a sequence of them; at ``update``, the index is not an
            integer, or the outputs or states of the links differ in structure, shape or dtype.
        ValueError: at ``update``, one link averages over micro-batches and another does not, or members of a mapped
            axis choose for themselves between links that communicate over it. In a chain under ``pmap`` or
            ``check_vma=False`` nothing tells: a member's own gradient beside a ``grad_fn`` that averages hangs.

    Example:
        >>> import optax_sam
        >>> is_long = optax.stateless(lambda updates, params: optax_sam.norm(updates) > 1)
        >>> where_steep = switch_on(is_long, [optax.identity(), optax_sam.sam(rho=0.05)])
        >>> print(where_steep.init(jnp.zeros(2)).switch_step)
        0
    """
    rule = as_link("rule", rule)

    def init(params):
        return RuleState(rule.init(params))

    def update(updates, state, params=None, **extra_args):
        index, inner = rule.update(updates, state.inner, params, **extra_args)
        return index, RuleState(inner)

    return Switch.between(optax.GradientTransformationExtraArgs(init, update), _named(links))


def _named(links: Sequence[optax.GradientTransformation]) -> dict[str, optax.GradientTransformationExtraArgs]:
    return {f"link {index}": as_link(f"links[{index}]", link) for index, link in enumerate(links)}


class RuleOfStep(optax.GradientTransformationExtraArgs):
    """A rule by which all members of a mapped axis choose the same."""


def rule_of_step(index_fn: Callable[[jax.Array], jax.typing.ArrayLike]) -> RuleOfStep:
    """The rule that a function of the step makes."""

    def update(updates, state, params=None, **extra_args):
        del updates, params
        step = extra_args["switch_step"]
        index = jnp.asarray(index_fn(step))
        if differs_between_members(index, index_fn, step):  # a hang: members wait for those in another branch
            raise ValueError("index_fn reads its place on a mapped axis, where all members must choose the same.")
        return index, state

    return RuleOfStep(lambda params: (), update)


After = Callable[[list[optax.OptState], optax.OptState], list[optax.OptState]]


class Switch(optax.GradientTransformationExtraArgs):
    """A switch that exposes its links to wrappers that belong inside it."""

    rule: optax.GradientTransformationExtraArgs
    links: Mapping[str, optax.GradientTransformationExtraArgs]
    shares_state: bool

    @classmethod
    def between(
        cls,
        rule: optax.GradientTransformationExtraArgs,
        links: Mapping[str, optax.GradientTransformationExtraArgs],
        *,
        shares_state: bool = False,
        after: After | None = None,
    ) -> "Switch":
        """The switch, whose errors name the links; with one state for all of them if it is shared.

        ``after`` makes of the states of all links and the new one of the active link those that are kept.
        """

        def init(params):
            step, phase = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
            with_state = list(links.values())[:1] if shares_state else links.values()
            return SwitchState(step, phase, tuple(link.init(params) for link in with_state), rule.init(params))

        tried = set()

        def update(updates, state, params=None, **extra_args):
            check_state(state, SwitchState)
            if not shares_state:
                _check_states(list(links), state.link_states)
            step = state.switch_step
            index, rule_state = rule.update(updates, state.rule_state, params, switch_step=step, **extra_args)
            index = _as_index(index)
            phase = jnp.clip(index, 0, len(links) - 1)
            branches = _branches(links, updates, state, params, extra_args, after)
            if isinstance(phase, Tracer):
                if not isinstance(rule, RuleOfStep):
                    _check_choice(index, branches, extra_args)
                outputs, states = jax.lax.switch(index, list(map(canonicalized, branches)))
            else:  # without jit, lax.switch would be compiled in every call; that it could be is tried once
                if (kind := _kind((updates, state, params))) not in tried:
                    jax.eval_shape(lambda index: jax.lax.switch(index, branches), index)
                    tried.add(kind)
                outputs, states = branches[int(phase)]()
            return outputs, SwitchState(jnp.asarray(optax.safe_increment(step)), phase, states, rule_state)

        switch = cls(init, update)
        switch.rule, switch.links, switch.shares_state = rule, links, shares_state
        return switch

    def each(
        self,
        wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation],
        after: After | None = None,
    ) -> "Switch":
        """The same switch between wrapped links."""
        wrapped = {name: as_link(name, wrap(link)) for name, link in self.links.items()}
        return self.between(self.rule, wrapped, shares_state=self.shares_state, after=after)


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
    after: After | None,
) -> list[Callable[[], Any]]:
    """For each link the function to its outputs and the states of all links."""
    axes = varying_axes(updates) - _shard_axes(extra_args)  # over shards, what is not sharded stays the same
    is_own = chooses_by_gradient(state)

    def branch(position, name, link):
        def run():
            states = list(state.link_states)
            own = min(position, len(states) - 1)  # the only one if they share it
            outputs, states[own] = link.update(updates, states[own], params, **extra_args)
            states = states if after is None else after(states, states[own])
            # All branches must return one type, and any of them may have made a float vary; and an integer, where
            # members of an axis choose for themselves.
            return outputs, jax.tree.map(
                lambda leaf: vary(leaf, axes) if is_own or is_float(leaf) else leaf, tuple(states)
            )

        run.__name__ = name  # by which JAX calls it where branches differ
        return run

    return [branch(position, name, link) for position, (name, link) in enumerate(links.items())]


def _as_index(index: Any) -> jax.Array:
    """The index of the link, an int32 scalar."""
    index = jnp.asarray(index)
    if index.shape or not (jnp.issubdtype(index.dtype, np.integer) or index.dtype == np.bool_):
        raise TypeError(
            f"An index_fn or a rule must return an integer or a boolean, a scalar; got {jax.typeof(index)}."
        )
    return index.astype(jnp.int32)


def chooses_by_gradient(state: Any) -> bool:
    """Whether a link with this state holds a switch whose rule sees the gradient."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, RuleState))
    return any(isinstance(node, RuleState) for node in nodes)


def _shard_axes(extra_args: dict[str, Any]) -> set[str]:
    return {axis for shards in extra_args.get("shards", ()) if shards.mask is not False for axis in shards.axes}


def _check_choice(index: jax.Array, branches: Sequence[Callable[[], Any]], extra_args: dict[str, Any]) -> None:
    """Raises if members choose for themselves, and would wait in one branch for those in another."""
    own, has_own_gradient = varying_axes(index), bool(extra_args.get("micro_batch"))
    if not own and not has_own_gradient:
        return
    traffic = frozenset[str]().union(*(axes_of_traffic(jax.make_jaxpr(branch)().jaxpr) for branch in branches))
    # Where nothing is tracked, a member's own gradient tells that it chooses for itself.
    untracked = {axis for axis in traffic if has_own_gradient and not is_checked((axis,))} - _shard_axes(extra_args)
    for axis in sorted((traffic & own) | untracked):
        raise ValueError(
            f"Members of the mapped axis {axis!r} choose for themselves between links that communicate over it. Leave "
            "averages in the loss to the estimator or to micro_batched, or give the switch the mean gradient."
        )


def _check_states(names: Sequence[str], states: Sequence[optax.OptState]) -> None:
    """Raises if states are of other links, or average over different things: what follows gets the one or the other."""
    if len(states) != len(names):
        raise ValueError(f"state is of a switch between {len(states)} links, not {len(names)}.")
    averages = [sorted(averages_in(state)) for state in states]
    for name, average in zip(names, averages, strict=True):
        if average != averages[0]:
            raise ValueError(
                f"Of a switch, {name} averages over {average or 'nothing'}, {names[0]} over "
                f"{averages[0] or 'nothing'}. Average around it, `micro_batched(switch_at({{...}}))`, or in every link."
            )
