r"""The estimator: the loss, the clean gradient and the SAM gradient of a batch in one call, at its true cost.

A link in an Optax chain is handed a clean gradient and evaluates the others; the caller owns the batch. The estimator
owns all evaluations, so it can split the batch into micro-batches and average before or after the ascent, and it can
mark params as varying under ``shard_map``, where a gradient would otherwise be summed over the devices unasked. Each
example costs one gradient for the clean pass and as many as the link evaluates for the rest, whatever the number of
micro-batches.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._axes import AxisNames, as_axes, check_mapped, communicates, vary
from optax_sam._checks import (
    as_link,
    check_arrays,
    check_choice,
    check_floating,
    check_function,
    check_int,
    check_loss,
    check_pair,
    check_real,
    is_float,
)
from optax_sam._means import (
    STRATEGIES,
    check_batch,
    check_divisible,
    mean_over_micro_batches,
    weights_of_micro_batches,
)
from optax_sam.averaging import check_replicated, leading_size, mean_over_axes
from optax_sam.link import check_same_members, conjugated
from optax_sam.sharding import mesh_axes_of_examples, num_devices, on_each_device

ASCENTS_PER = ("micro_batch", "device", "batch")


class ValueAndGradFn(Protocol):
    """See :func:`gradient_estimator`."""

    def __call__(self, params: Any, state: optax.OptState, /, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]: ...


class GradientEstimator(NamedTuple):
    """A pair of pure functions, as made by :func:`gradient_estimator`.

    Attributes:
        init: from params to the state of the link.
        value_and_grad: from ``(params, state, batch, *args, **kwargs)`` to ``(loss, grads, state)``, or
            ``((loss, aux), grads, state)``.
    """

    init: Callable[[Any], optax.OptState]
    value_and_grad: ValueAndGradFn


def gradient_estimator(
    loss_fn: Callable[..., Any],
    link: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    num_micro_batches: int = 1,
    ascent_per: str = "micro_batch",
    strategy: str = "auto",
    axis_name: AxisNames | None = None,
    batch_argnums: int | Sequence[int] = 1,
    weight_fn: Callable[..., Any] | None = None,
) -> GradientEstimator:
    r"""Applies a link to a loss function: one call returns the loss, the link's gradient and the link's new state.

    The batch is split into ``num_micro_batches`` contiguous parts of equal size. ``ascent_per`` says what one ε
    is computed from:

    - ``"micro_batch"``: each micro-batch has its own ε; their SAM gradients are averaged. This is mSAM.
    - ``"batch"``: clean gradients are averaged over all micro-batches (and devices), then there is one ε for all.
      This is plain SAM, with gradient accumulation and synchronized devices.
    - ``"device"``: one ε for all the micro-batches of one device; SAM gradients are averaged over devices.

    ``loss_fn(params, batch, *args, **kwargs)`` returns the mean loss of the batch, or ``(loss, aux)``. Every leaf of
    ``batch`` has a leading axis of B examples; ``batch_argnums`` names further arguments that have one. The others go
    to every call unchanged, except scalar PRNG keys (``jax.random.key``; legacy ``PRNGKey`` arrays cannot be told from
    data): these are folded with the index of the micro-batch (counted over all devices) where there is more than one,
    so that micro-batches draw different dropout masks, and the two passes of one micro-batch the same.

    Loss and aux are those of the clean pass, averaged over micro-batches and devices. Aux leaves that are not float are
    those of the first micro-batch, so return a count as a float mean, ``jnp.mean(logits.argmax(-1) == labels)``. What
    aux holds for each example does not survive an average: evaluate that outside.

    .. math::
        \bar x = \sum_j m_j x_j \Big/ \sum_j m_j

    is the average with a ``weight_fn`` that returns m_j. Padded micro-batches hold different numbers of valid examples
    or tokens: let loss_fn return the mean over the valid ones and weight_fn their number, and gradients accumulate
    exactly. A micro-batch of weight 0 contributes nothing, even if its loss is 0/0; if all are 0, so are loss, aux and
    gradients, and the floats in the states of micro-batches stay as they were.

    A link with M > 1 acts on each micro-batch, and its outputs are averaged. For a whole optimizer or a clipping that
    is hardly what is meant: put it behind the estimator, ``optimizer.update(grads, ...)``, or use
    ``ascent_per="batch"``. To start an optimizer afresh with late SAM, switch it there too:
    ``switch_at({0: optax.adam(1e-3), start: optax.adam(1e-3)})``.

    A loss that averages over ``axis_name`` itself, with ``jax.lax.pmean``, gives the same gradients as one that leaves
    it to the estimator. With ``weight_fn`` loss_fn must not communicate over ``axis_name``.

    A batch that is sharded over D devices of an Explicit mesh, with M a multiple of D, stays where it is: each device
    takes M / D micro-batches. XLA cannot do that for a batch on an Auto mesh; use ``jax.shard_map`` and ``axis_name``.

    Args:
        loss_fn: function to differentiate with respect to its first argument.
        link: from g to s: a recipe such as ``sam(0.05)``, a combinator, or any ``optax.GradientTransformation``. Its
            ``update`` is given ``grad_fn``, ``value`` (the clean loss) and ``value_and_grad_fn`` (from a point to loss
            and gradient), each averaged over what shares one ε.
        has_aux: whether loss_fn returns ``(loss, aux)``.
        num_micro_batches: M ≥ 1, a divisor of B.
        ascent_per: ``"micro_batch"``, ``"device"`` or ``"batch"``.
        strategy: how micro-batches are run; all give the same numbers. ``"vmap"``: at once, with M copies of the
            params. ``"scan"``: one after another in a loop; memory and compile time independent of M. ``"unroll"``:
            one after another in straight-line code. ``"auto"``: "unroll" without ``jax.jit``; under it "scan", two at a
            time if M > 2 is even and what is averaged is of at most 4 MiB (chosen by ``benchmarks/step_cost.py``).
        axis_name: axis (or several) of ``pmap``, ``shard_map`` or ``vmap`` whose members hold further parts of the
            batch; results are averaged over it. Params and state are the same on every member.
        batch_argnums: which arguments of loss_fn hold examples, an int or several, counted as in ``jax.grad`` (params
            are 0). With M > 1, any other array with a leading axis of B is refused; loss_fn closes over what all
            micro-batches share.
        weight_fn: called as loss_fn is, without params, for one micro-batch; returns its weight, a scalar ≥ 0. None:
            equal weights.

    Returns:
        A :class:`GradientEstimator`. Gradients have the structure, shapes and dtypes that ``jax.grad(loss_fn)``
        returns. Those of complex leaves are conjugated on the way to the link, as Optax wants them, and back; where the
        link is a whole optimizer, conjugate its updates once more.

    Raises:
        TypeError: an argument is of the wrong type; when called: params that are not all floating-point arrays, or
            loss_fn returns no scalar loss, or with has_aux no pair, or with M > 1 aux that is not made of arrays.
        ValueError: an unknown ascent_per or strategy, ``"device"`` without axis_name, num_micro_batches < 1; when
            called: leaves of the batch that are scalars, differ in B, or cannot be divided by M; another array with a
            leading axis of B; a loss_fn that communicates beside a weight_fn; a state that is not of this link;
            axis_name is not a mapped axis, is one that the params vary over, or is missing where ``shard_map`` would
            sum the gradient.

    Example:
        >>> import optax_sam
        >>> loss_fn = lambda w, x: jnp.mean((w * x - 1.0) ** 2)
        >>> estimator = gradient_estimator(loss_fn, optax_sam.sam(rho=0.1), num_micro_batches=2)
        >>> params, batch = jnp.float32(0.5), jnp.array([1.0, 2.0, 3.0, 4.0])
        >>> loss, grads, state = estimator.value_and_grad(params, estimator.init(params), batch)
        >>> print(f"{loss:.3f} {grads:.2f}")
        0.375 3.50

    Reference:
        Behdin et al., `mSAM: Micro-Batch-Averaged Sharpness-Aware Minimization
        <https://arxiv.org/abs/2302.09693>`_, 2023
    """
    check_function("loss_fn", loss_fn, "params and a batch")
    link = as_link("link", link)
    check_choice("has_aux", has_aux, (True, False))
    check_int("num_micro_batches", num_micro_batches)
    check_choice("ascent_per", ascent_per, ASCENTS_PER)
    check_choice("strategy", strategy, STRATEGIES)
    axes = () if axis_name is None else as_axes(axis_name)
    if ascent_per == "device" and not axes:
        raise ValueError(
            'ascent_per="device" needs axis_name, the mapped axis whose members are the devices; under jax.jit alone '
            'devices are not visible. There, one ε per device is ascent_per="micro_batch" with num_micro_batches = the '
            'number of devices, and one ε for all is ascent_per="batch".'
        )
    if weight_fn is not None:
        check_function("weight_fn", weight_fn, "a batch")
    argnums = _as_argnums(batch_argnums)
    estimate = _Estimate(loss_fn, link, has_aux, num_micro_batches, ascent_per, strategy, axes, argnums, weight_fn)
    return GradientEstimator(link.init, _checked_arguments(link.init, _on_the_devices_of_the_batch(estimate)))


class _Estimate(NamedTuple):
    """What an estimator does with the part of the batch that it sees: the arguments of :func:`gradient_estimator`."""

    loss_fn: Callable[..., Any]
    link: optax.GradientTransformationExtraArgs
    has_aux: bool
    num_micro_batches: int
    ascent_per: str
    strategy: str
    axes: tuple[str, ...]
    batch_argnums: tuple[int, ...]
    weight_fn: Callable[..., Any] | None

    def run(self, params: Any, state: optax.OptState, batch: tuple, others: Any) -> tuple[Any, Any, Any]:
        """The loss (and aux), the gradient and the new state."""
        check_mapped(self.axes)
        check_replicated(params, self.axes)
        if self.num_micro_batches > 1 and self.axes:
            members = jax.lax.axis_size(self.axes)
            check_divisible((leading_size(batch=batch) or 0) * members, members, self.num_micro_batches)
        weights = self._weights(batch, others)
        if weights is not None and self.axes:
            self._check_own_loss(params, batch, others)

        def mark(tree):
            """The tree, marked as varying over the axes: its gradient is then this member's own, not their sum."""
            return jax.tree.map(lambda x: vary(jnp.asarray(x), self.axes), tree) if self.axes else tree

        def apply_link(average):
            """Value, gradient and state of the link, where ``average`` runs over all the losses that share one ε."""

            def evaluate(loss_fn, point):
                def member_loss(point):  # marked too: of a loss that is already averaged, a part would be missing
                    value = loss_fn(point)
                    return (mark(value[0]), value[1]) if self.has_aux else mark(value)

                value, gradient = jax.value_and_grad(member_loss, has_aux=self.has_aux)(mark(point))
                loss, aux = value if self.has_aux else (value, None)
                return loss, aux, conjugated(gradient)

            def grad_fn(point):
                return average(lambda loss_fn: evaluate(loss_fn, point)[2])

            def value_and_grad_fn(point):
                return average(lambda loss_fn: evaluate(loss_fn, point)[::2])

            loss, aux, clean = average(lambda loss_fn: evaluate(loss_fn, params))
            check_same_members("What loss_fn returns", loss, clean, params)
            extra_args = {"grad_fn": grad_fn, "value": loss, "value_and_grad_fn": value_and_grad_fn}
            outputs, next_state = self.link.update(clean, state, params, **extra_args)
            return (loss, aux) if self.has_aux else loss, conjugated(outputs), next_state

        def over_micro_batches(evaluate):
            def evaluate_one(index, micro_batch):
                args, kwargs = _fold_keys(self._arguments(micro_batch, others), self._micro_batch_number(index))
                return evaluate(lambda params: self._loss(params, *args, **kwargs))

            return mean_over_micro_batches(evaluate_one, batch, self.num_micro_batches, self.strategy, weights)

        def over_devices(tree):
            weight = None if weights is None else jnp.sum(weights)
            return mean_over_axes(tree, self.axes, weight) if self.axes else tree

        if self.ascent_per == "micro_batch":
            results = over_devices(over_micro_batches(lambda loss_fn: apply_link(lambda evaluate: evaluate(loss_fn))))
        elif self.ascent_per == "device":
            results = over_devices(apply_link(over_micro_batches))
        else:
            return apply_link(lambda evaluate: over_devices(over_micro_batches(evaluate)))
        return results if weights is None else self._with_state(state, results, jnp.sum(weights))

    def _with_state(
        self, state: optax.OptState, results: tuple[Any, Any, Any], weight: jax.Array
    ) -> tuple[Any, Any, Any]:
        """The results; where all weights are 0 no state was averaged, and its floats stay as they were."""
        value, gradient, next_state = results
        total = jax.lax.psum(vary(weight, self.axes), self.axes) if self.axes else weight
        kept = jax.tree.map(
            lambda old, new: jnp.where(total == 0, old, new) if is_float(new) else new, state, next_state
        )
        return value, gradient, kept

    def split_arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, Any]:
        """The arguments that carry examples, and the others; raises if there is nothing to split, or too little is."""
        numbers = [number for number in self.batch_argnums if number <= len(args)]
        batch = tuple(args[number - 1] for number in numbers)
        others = {number: arg for number, arg in enumerate(args, start=1) if number not in numbers}
        if self.num_micro_batches > 1:
            if len(numbers) < len(self.batch_argnums) and len(self.batch_argnums) > 1:
                raise ValueError(
                    f"batch_argnums={self.batch_argnums} names an argument that value_and_grad did not get: behind "
                    f"params and state there are {len(args)}. Pass them by position, as loss_fn takes them."
                )
            names = ["batch"] if len(numbers) == 1 else [f"argument {number} of loss_fn" for number in numbers]
            size = check_batch(dict(zip(names, batch, strict=True)), self.num_micro_batches)
            self._check_shared(others, kwargs, size)
        return batch, (others, kwargs)

    def _arguments(self, batch: tuple, others: Any) -> tuple[tuple, dict[str, Any]]:
        """What ``split_arguments`` took apart."""
        rest, kwargs = others
        args = rest | dict(zip(self.batch_argnums, batch, strict=False))
        return tuple(args[number] for number in sorted(args)), kwargs

    def _check_own_loss(self, params: Any, batch: tuple, others: Any) -> None:
        """Raises if loss_fn communicates: a member's gradient would hold parts of losses that have other weights."""
        args, kwargs = self._arguments(batch, others)
        if communicates(lambda params: self.loss_fn(params, *args, **kwargs), self.axes, params):
            raise ValueError(
                f"With weight_fn, loss_fn must not communicate over {self.axes}, as it does with a jax.lax collective: "
                "a weight is of one member. Leave the average to the estimator, or weigh in loss_fn and drop weight_fn."
            )

    def _check_shared(self, others: dict[int, Any], kwargs: dict[str, Any], size: int) -> None:
        """Raises if an argument that is not split could hold examples: it would be broadcast, silently."""
        named = {f"argument {number} of loss_fn": (arg, number) for number, arg in others.items()}
        named |= {f"keyword {name} of loss_fn": (arg, None) for name, arg in kwargs.items()}
        for name, (tree, number) in named.items():
            for leaf in jax.tree.leaves(tree):
                if isinstance(leaf, (jax.Array, np.ndarray)) and leaf.ndim and leaf.shape[0] == size:
                    cure = "pass it by position and name that in batch_argnums"
                    if number is not None:
                        cure = f"pass batch_argnums={(*self.batch_argnums, number)}"
                    raise ValueError(
                        f"{name} has a leading axis of {size}, as the batch has, and is not split into micro-batches. "
                        f"If it holds examples, {cure}; if all micro-batches share it, let loss_fn close over it, or "
                        "give it another leading axis, x[None]."
                    )

    def _weights(self, batch: tuple, others: Any) -> jax.Array | None:
        """The weight of each micro-batch, (num_micro_batches,) in float32 or wider."""
        if self.weight_fn is None:
            return None
        weight_fn = self.weight_fn

        def weight(micro_batch):
            args, kwargs = self._arguments(micro_batch, others)
            value = weight_fn(*args, **kwargs)
            check_real("what weight_fn returns", value)
            return jnp.asarray(value, jnp.result_type(float))

        return weights_of_micro_batches(weight, batch, self.num_micro_batches)

    def _loss(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """What loss_fn returns, refused unless that is the loss, or the loss and aux."""
        try:
            value = self.loss_fn(params, *args, **kwargs)
        except Exception as error:
            if type(error).__name__ == "TraceContextError":
                error.add_note(
                    "loss_fn changes a Flax NNX object from outside, such as nnx.Rngs or a model with dropout. Split it"
                    " outside, and in loss_fn use a copy: `nnx.merge(graphdef, params, rest, copy=True)`."
                )
            raise
        if not self.has_aux:
            check_loss("what loss_fn returns", value, cure="for (loss, aux) pass has_aux=True")
            return value
        check_pair("loss_fn", value, "(loss, aux), as has_aux=True says")
        check_loss("the first of what loss_fn returns", value[0])
        if self.num_micro_batches > 1 or self.axes or self.weight_fn:
            check_arrays("aux", value[1])
        return value

    def _micro_batch_number(self, index: Any) -> Any:
        """The index of a micro-batch, counted over all members of the axes; None where there is only one."""
        if self.num_micro_batches * (jax.lax.axis_size(self.axes) if self.axes else 1) == 1:
            return None
        return jax.lax.axis_index(self.axes) * self.num_micro_batches + index if self.axes else index


def _on_the_devices_of_the_batch(estimate: _Estimate) -> ValueAndGradFn:
    """``estimate.run``, on each device by itself where it is known to hold whole micro-batches: no example moves."""

    def value_and_grad(params, state, /, *args, **kwargs):
        num_micro_batches = estimate.num_micro_batches
        batch, others = estimate.split_arguments(args, kwargs)
        if num_micro_batches > 1:
            mesh, mesh_axes = mesh_axes_of_examples(batch, (params, state, others))
            devices = num_devices(mesh, mesh_axes)
            if mesh_axes and num_micro_batches % devices == 0 and not estimate.axes:
                own = estimate._replace(num_micro_batches=num_micro_batches // devices, axes=mesh_axes)
                return on_each_device(own.run, mesh, mesh_axes)(params, state, batch, others)
        return estimate.run(params, state, batch, others)

    return value_and_grad


def _checked_arguments(init: Callable[[Any], optax.OptState], function: ValueAndGradFn) -> ValueAndGradFn:
    """The function; raises unless params are floating-point and the state has the structure that ``init`` makes."""

    def value_and_grad(params, state, /, *args, **kwargs):
        check_floating("params", params)
        structure, expected = jax.tree.structure(state), jax.tree.structure(jax.eval_shape(init, params))
        if structure != expected:
            raise ValueError(
                f"state must be what init(params) or the last value_and_grad returned, {expected}; got {structure}. "
                "Call value_and_grad(params, state, batch)."
            )
        return function(params, state, *args, **kwargs)

    return value_and_grad


def value_and_grad(
    loss_fn: Callable[..., Any], link: optax.GradientTransformation, **options: Any
) -> Callable[..., tuple[Any, Any]]:
    """Drop-in for ``jax.value_and_grad``: the same call and the same result, with the link's gradient.

    Args:
        loss_fn: function to differentiate with respect to its first argument; see :func:`gradient_estimator`.
        link: a link without arrays in its state, such as ``sam(0.05)`` with a constant rho.
        **options: the keywords of :func:`gradient_estimator`: ``has_aux``, ``num_micro_batches``, ``ascent_per``,
            ``strategy``, ``axis_name``, ``batch_argnums``, ``weight_fn``.

    Returns:
        A function of ``(params, batch, *args, **kwargs)`` that returns ``(loss, grads)``, or ``((loss, aux), grads)``.

    Raises:
        TypeError: as :func:`gradient_estimator`.
        ValueError: as :func:`gradient_estimator`; when called, if the link carries arrays in its state.

    Example:
        >>> import optax_sam
        >>> loss_fn = lambda w, x: jnp.mean((w - x) ** 2)
        >>> loss, grads = value_and_grad(loss_fn, optax_sam.sam(rho=0.1))(jnp.float32(1.0), jnp.zeros(3))
        >>> print(f"{loss:.1f} {grads:.1f}")
        1.0 2.2
    """
    estimator = gradient_estimator(loss_fn, link, **options)

    def stateless(params, /, *args, **kwargs):
        check_floating("params", params)
        state = jax.eval_shape(estimator.init, params)
        if jax.tree.leaves(state):
            raise ValueError(
                f"value_and_grad keeps no state, and this link carries one: {state}. Use `gradient_estimator(loss_fn, "
                "link)`, whose value_and_grad takes the state and returns the new one."
            )
        value, gradient, _ = estimator.value_and_grad(params, state, *args, **kwargs)
        return value, gradient

    return stateless


def _as_argnums(batch_argnums: Any) -> tuple[int, ...]:
    """The positions, in ascending order."""
    numbers = batch_argnums if isinstance(batch_argnums, Sequence) else (batch_argnums,)
    if not numbers or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"batch_argnums must be an int or a tuple of ints; got {batch_argnums!r}.")
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"batch_argnums must be different positions behind params, which are argument 0; got {batch_argnums!r}."
        )
    return tuple(sorted(map(int, numbers)))


def _fold_keys(tree: Any, number: Any) -> Any:
    """The tree with its scalar PRNG keys folded with the number, all else unchanged."""

    def fold(leaf):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(leaf, number) if is_key and not leaf.ndim else leaf

    return tree if number is None else jax.tree.map(fold, tree)
