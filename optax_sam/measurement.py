r"""Measurement: what SAM does during training, recorded in the state.

``measured(link)`` notes where its link evaluates gradients, and takes the loss there from the same evaluation: no
gradient is added, and no forward pass where loss and gradient come from one function. Unmeasured
links have no overhead.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._axes import Declared, check_declared, check_same_members
from optax_sam._checks import as_link, check_loss
from optax_sam._evaluation import Recorder, evaluation
from optax_sam._norms import at_length, norm, wide, widen
from optax_sam.averaging import check_no_average
from optax_sam.single_pass import OneGradient, same_kind
from optax_sam.switching import RuleOfStep, Switch, SwitchState

UNKNOWN = np.float32(np.nan)  # what nobody evaluated


class Measurements(NamedTuple):
    """What a link did in its last update: float32 scalars, all 0 before the first.

    With micro-batches each is the mean over them. What belongs to w (the norm and the loss there, and the angle) is NaN
    for a link that evaluates one gradient in all, such as ``momentum_sam``: nobody evaluates it.

    Attributes:
        clean_norm: ‖g‖ of what the link got.
        perturbation_norm: ‖ε‖ as the params were moved, after rounding, for the last gradient that the link evaluated;
            0 where it evaluated none.
        sam_norm: ‖s‖ of what the link returned.
        cosine: cos(g, s); 1 if both are zero, 0 if one is.
        clean_loss: L(w).
        perturbed_loss: L(w + ε); the clean loss where the link evaluated no gradient.
        active: 1 if the link evaluated a gradient, else 0; a float, so that it has a mean.
    """

    clean_norm: jax.Array
    perturbation_norm: jax.Array
    sam_norm: jax.Array
    cosine: jax.Array
    clean_loss: jax.Array
    perturbed_loss: jax.Array
    active: jax.Array


class MeasuredState(NamedTuple):
    """State of :func:`measured`.

    Attributes:
        link_state: the state of the link.
        measurements: those of the last update.
    """

    link_state: optax.OptState
    measurements: Measurements


def measured(link: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""The link, with norms, angle and losses of its last update in the state; :func:`measurements` reads them.

    .. math::
        \|g\|, \quad \|\varepsilon\|, \quad \|s\|, \quad \cos(g, s), \quad L(w), \quad L(w + \varepsilon)

    Updates and evaluations are those of ``link``; the cost is a few passes over the params, for the norms. Of a switch
    each link is measured, ``measured(late(sam(rho), start))``; the state is then that of the switch. What averages or
    maps goes around it: ``micro_batched(measured(sam(rho)))``, ``sharded(measured(sam(rho)), "model")``.

    In the estimator, ``gradient_estimator(loss_fn, measured(sam(rho)))``, nothing else is needed. An Optax chain is
    called as for Optax's line searches, ``tx.update(grads, state, params, value=loss, value_fn=loss_fn, batch=batch)``:

    - ``value`` is the loss at the params, a scalar;
    - ``value_fn`` is differentiated at w + ε, as ``value_fn(params)``, or ``value_fn(params, batch)`` with batch given;
    - ``grad_fn``, where given, keeps precedence over the gradient of ``value_fn``, which is then evaluated for the
      loss alone: one more forward pass, unless XLA finds it in ``grad_fn``;
    - ``value_and_grad_fn``, where given, replaces both. It is a function of the same arguments that returns the loss
      and the gradient, for instance averaged over devices (of complex params conjugated, as ``updates`` are).

    Args:
        link: link to measure, or another transformation such as ``optax.identity()``.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with a :class:`MeasuredState`, or, of a switch, one for each link.

    Raises:
        TypeError: link is not a transformation; at ``update``, a loss is not a scalar.
        ValueError: at ``update``: ``value`` or ``value_fn`` is missing; a loss and its gradient are averaged over
            different members of a mapped axis; link averages, or evaluates gradients inside of a branch, a loop or a
            map of its own; or sharded params were not declared with ``sharded``.

    Example:
        >>> import optax_sam
        >>> loss_fn = lambda w: jnp.sum(w**4)
        >>> tx = optax.chain(measured(optax_sam.sam(rho=0.5)), optax.sgd(0.1))
        >>> params = jnp.array([1.0, 2.0])
        >>> loss, grads = jax.value_and_grad(loss_fn)(params)
        >>> _, state = tx.update(grads, tx.init(params), params, value=loss, value_fn=loss_fn)
        >>> print(f"{measurements(state).clean_loss:.2f} {measurements(state).perturbed_loss:.2f}")
        17.00 40.09
    """
    link = as_link("link", link)
    if isinstance(link, Switch):
        return link.each(measured, after=None if isinstance(link.rule, RuleOfStep) else _with_the_same)

    def init(params):
        zeros = Measurements(*(jnp.zeros([], jnp.float32) for _ in Measurements._fields))
        return MeasuredState(link.init(params), zeros)

    is_single = isinstance(link, OneGradient)

    def update(updates, state, params=None, *, value=None, value_fn=None, shards=(), **extra_args):
        check_no_average("measured", state.link_state)
        check_declared(params, updates, shards)
        functions = {name: extra_args.pop(name, None) for name in ("grad_fn", "value_and_grad_fn")}
        if is_single:
            value = UNKNOWN
        _check_losses(value, value_fn or functions["value_and_grad_fn"])
        if not is_single:
            check_same_members("value", value, updates, params)
        evaluate = evaluation(params, value_fn=value_fn, **functions)
        recorder = Recorder(lambda *args: _without_aux(*evaluate(*args)))
        extra_args |= {"value": value, "value_fn": value_fn, "grad_fn": recorder.grad_fn, "shards": shards}
        outputs, link_state = link.update(updates, state.link_state, params, **extra_args)
        point, perturbed_loss, _ = recorder.last or (params, value, None)
        displacement = jax.tree.map(lambda p, w: widen(p) - widen(w), point, params) if recorder.last else None
        norms = _norms_and_cosine(updates, displacement, outputs, shards)
        losses = [jnp.array(loss, jnp.float32) for loss in (value, perturbed_loss)]  # copies: states are donated
        found = Measurements(*norms, *losses, active=jnp.float32(recorder.last is not None))
        if is_single:
            found = found._replace(clean_norm=jnp.array(UNKNOWN), cosine=jnp.array(UNKNOWN))
        return outputs, MeasuredState(link_state, found)

    return same_kind(link, init, update)


def _check_losses(value: Any, value_fn: Any) -> None:
    """Raises without the loss at w, or without a function that returns that at w + ε."""
    if value is None or value_fn is None:
        raise ValueError(
            f"measured(link) needs the losses at w and w + ε; got {value=} and {value_fn=}. Pass `value=loss, "
            "value_fn=loss_fn, batch=batch` to update, or use `gradient_estimator(loss_fn, measured(link))`."
        )
    check_loss("value", value)


def _with_the_same(states: list[Any], active: Any) -> list[Any]:
    """The states with the measurements of the active link in all: micro-batches in different phases have one mean."""
    [found] = _found_in(active, "a phase of a switch")

    def is_measured(node):
        return isinstance(node, MeasuredState)

    return jax.tree.map(
        lambda node: node._replace(measurements=found) if is_measured(node) else node, states, is_leaf=is_measured
    )


def _without_aux(loss: Any, gradient: Any) -> tuple[Any, None, Any]:
    return loss, None, gradient


def measurements(state: Any) -> Measurements:
    """The measurements of the last update, found in a state.

    Where a switch holds a measured link in each phase: those of the phase of the last update.

    Args:
        state: state of an Optax chain or an estimator, or any tree with one, such as a ``TrainState``.

    Returns:
        The :class:`Measurements`; the same inside and outside of ``jax.jit``.

    Raises:
        ValueError: there is no measured link, there are several that are not phases of one switch, or a phase of a
            switch has none and another has.

    Example:
        >>> import optax_sam
        >>> link = measured(optax_sam.sam(rho=0.5))
        >>> print(measurements(link.init(jnp.zeros(2))).active)
        0.0
    """
    found = _found_in(state, "this state")
    if not found:
        raise ValueError(
            f"measurements(state): a {type(state).__name__} without a measured link, or without its types."
        )
    return found[0]


def _found_in(state: Any, where: str) -> list[Measurements]:
    """The measurements in a state, one at most; of a switch those of the current phase."""
    found = []
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, (MeasuredState, SwitchState))):
        if isinstance(node, MeasuredState):
            arrays = jax.tree.leaves(node.measurements)  # without the references that Flax NNX wraps them in
            found += [Measurements(*arrays), *_found_in(node.link_state, where)]
        elif isinstance(node, SwitchState):
            found += _found_in_phases(node)
    if len(found) > 1:
        raise ValueError(
            f"measurements(state): {len(found)} measured links in {where}. Pass the part of the state of one."
        )
    return found


def _found_in_phases(switch: SwitchState) -> list[Measurements]:
    phases = [_found_in(state, f"phase {index} of a switch") for index, state in enumerate(switch.link_states)]
    if not any(phases):
        return []
    if not all(phases):
        raise ValueError(
            f"measurements(state): phase {phases.index([])} of a switch has no measured link and another has. Measure "
            "the switch, `measured(late(sam(rho), start))`, or each phase, a plain one by `measured(optax.identity())`."
        )
    [current], *others = phases
    for index, [other] in enumerate(others, start=1):
        is_current = switch.phase == index
        current = jax.tree.map(lambda a, b, is_current=is_current: jnp.where(is_current, b, a), current, other)
    return [current]


def _norms_and_cosine(clean: Any, displacement: Any, outputs: Any, shards: Declared) -> list[jax.Array]:
    """‖g‖, ‖ε‖, ‖s‖ and cos(g, s)."""
    clean_norm, length, sam_norm = (norm(tree, shards) for tree in (clean, displacement, outputs))
    # For small angles this is right to the last bit; a sum of products would be off by several, and exceed 1.
    units = at_length(wide(clean), clean_norm, 1.0), at_length(wide(outputs), sam_norm, 1.0)
    cosine = jnp.clip(1 - norm(jax.tree.map(jnp.subtract, *units), shards) ** 2 / 2, -1, 1)
    clean_is_zero, sam_is_zero = clean_norm == 0, sam_norm == 0
    cosine = jnp.where(clean_is_zero | sam_is_zero, (clean_is_zero & sam_is_zero).astype(cosine.dtype), cosine)
    return [x.astype(jnp.float32) for x in (clean_norm, length, sam_norm, cosine)]
