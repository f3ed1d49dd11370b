r"""The estimator: the loss, the clean gradient and the SAM gradient of a batch in one call, at its true cost.

A link in an Optax chain is handed a clean gradient and evaluates the others; the caller owns the batch. The estimator
owns all evaluations, so it can split the batch into micro-batches and average before or after the ascent, and it can
mark params as varying under ``shard_map``, where a gradient would otherwise be summed over the devices unasked. Each
example costs one gradient for the clean pass and as many as the link evaluates for the rest, whatever the number of
micro-batches.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._axes import (
    Axes,
    AxisNames,
    as_axes,
    check_same_members,
    check_unvarying,
    communicates,
    is_mapped,
    shown,
    vary,
)
from optax_sam._checks import (
    as_link,
    check_choice,
    check_int,
    check_loss,
    check_params,
    check_real,
    is_float,
)
from optax_sam._evaluation import Recorder, conjugated, explained, loss_and_gradient
from optax_sam._means import leading_size, mean_over_axes
from optax_sam._mesh import mesh_of_examples, on_each_device
from optax_sam._micro_batches import Strategy, mean_over_micro_batches, weights_of_micro_batches
from optax_sam.single_pass import OneGradient
from optax_sam.switching import chooses_by_gradient

AscentPer = Literal["micro_batch", "device", "batch"]
Params = TypeVar("Params")
Value = TypeVar("Value")  # what loss_fn returns: the loss, or (loss, aux)
EVERYTHING, LOSS_AND_GRADIENT, GRADIENT = slice(None), slice(0, 3, 2), 2  # of (loss, aux, gradient)


class GradientEstimator(NamedTuple, Generic[Params, Value]):
    """A pair of pure functions, as made by :func:`gradient_estimator`.

    Attributes:
        init: from params to the state of the link.
        value_and_grad: from ``(params, state, batch, *args, **kwargs)`` to ``(loss, grads, state)``, or
            ``((loss, aux), grads, state)``.
    """

    init: Callable[[Params], optax.OptState]
    value_and_grad: Callable[Concatenate[Params, optax.OptState, ...], tuple[Value, Params, optax.OptState]]


def gradient_estimator(
    loss_fn: Callable[Concatenate[Params, ...], Value],
    link: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    num_micro_batches: int = 1,
    ascent_per: AscentPer = "micro_batch",
    strategy: Strategy = "auto",
    axis_name: AxisNames | None = None,
    batch_argnums: int | Sequence[int] = 1,
    weight_fn: Callable[..., jax.typing.ArrayLike] | None = None,
    group_size: int | None = None,
) -> GradientEstimator[Params, Value]:
    r"""Applies a link to a loss function: one call returns the loss, the link's gradient and the link's new state.

    The batch is split into ``num_micro_batches`` contiguous parts of equal size. ``ascent_per`` says what one ε
    is computed from:

    - ``"micro_batch"``: each micro-batch has its own ε; their SAM gradients are averaged. This is mSAM.
    - ``"batch"``: clean gradients are averaged over all micro-batches (and devices), then there is one ε for all.
      This is plain SAM, with gradient accumulation and synchronized devices.
    - ``"device"``: one ε for all the micro-batches of one device; SAM gradients are averaged over devices.

    ``strategy`` says how micro-batches are run. All give the same numbers, to rounding:

    - ``"scan"``: one after another in a loop; memory and compile time do not depend on M.
    - ``"unroll"``: one after another in straight-line code.
    - ``"vmap"``: at once, with M copies of the params.
    - ``"lazy"``: at once, with the gradients of dense layers as outer products that are never multiplied out. Fast
      where micro-batches are small and layers wide; needs memory for the activations of the whole batch, of both
      passes. Operations without a rule run as by "vmap"; programs with side effects, callbacks, rbg keys or arrays on
      an Explicit mesh run in a loop.
    - ``"auto"``: "unroll" without ``jax.jit``. Under it "lazy", where that is estimated to take less than 0.9 of the
      time of a loop and at most 1.5 times the memory of one micro-batch of all examples (params, gradients and batch
      included), but never to accumulate gradients (``ascent_per`` "batch" or "device"). Else "scan", two at a time if
      M > 2 is even and what is averaged is of at most 4 MiB. The logger ``"optax_sam"`` tells the choice and its
      reasons, at level INFO.

    ``loss_fn(params, batch, *args, **kwargs)`` returns the mean loss of the batch, or ``(loss, aux)``. Every leaf of
    ``batch`` has a leading axis of B examples; ``batch_argnums`` names further arguments that have one. The others go
    to every call unchanged, except scalar PRNG keys (``jax.random.key``; legacy ``PRNGKey`` arrays cannot be told from
    data): these are folded with the index of the micro-batch (counted over all devices) where there is more than one,
    so that micro-batches draw different dropout masks, and the two passes of one micro-batch the same.

    Loss and aux are those of the clean pass, averaged over micro-batches and devices; for a link without one, such as
    ``momentum_sam``, those at w + ε. Aux leaves that are not float are those of the first micro-batch, so return a
    count as a float mean, ``jnp.mean(logits.argmax(-1) == labels)``. What aux holds for each example does not survive
    an average: evaluate that outside.

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

    On an Explicit mesh ``axis_name`` may name the axis that the batch is sharded over: each device then takes M
    micro-batches of its own examples. On an Auto mesh write the ``jax.shard_map`` around the call. Without either, each
    micro-batch is one of the whole batch, and XLA moves its examples between the devices.

    Args:
        loss_fn: function to differentiate with respect to its first argument.
        link: from g to s: a recipe such as ``sam(0.05)``, a combinator, or any ``optax.GradientTransformation``. Its
            ``update`` is given ``grad_fn``, ``value`` (the clean loss) and ``value_and_grad_fn`` (from a point to loss
            and gradient), each averaged over what shares one ε, and ``micro_batch``, a tuple with the index of what it
            is of, if there are several.
        has_aux: whether loss_fn returns ``(loss, aux)``.
        num_micro_batches: M ≥ 1, a divisor of B.
        ascent_per: ``"micro_batch"``, ``"device"`` or ``"batch"``.
        strategy: how micro-batches are run, one of those above.
        axis_name: axis (or several) whose members hold further parts of the batch, each of M micro-batches: of a
            ``pmap``, ``shard_map`` or ``vmap`` around the call, or of the Explicit mesh that the batch is sharded over.
            Results are averaged over it. Params and state are the same on every member.
        batch_argnums: which arguments of loss_fn hold examples, an int or several, counted as in ``jax.grad`` (params
            are 0). With M > 1, any other array with a leading axis of B is refused; loss_fn closes over what all
            micro-batches share.
        weight_fn: called as loss_fn is, without params, for one micro-batch; returns its weight, a scalar ≥ 0. None:
            equal weights.
        group_size: the number of micro-batches, a divisor of M, that are run at once; a loop runs over the groups. Less
            memory for "lazy" and "vmap". None: all.

    Returns:
        A :class:`GradientEstimator`. Gradients have the structure, shapes and dtypes that ``jax.grad(loss_fn)``
        returns. Those of complex leaves are conjugated on the way to the link, as Optax wants them, and back; where the
        link is a whole optimizer, conjugate its updates once more.

    Raises:
        TypeError: an argument is of the wrong type; when called: params that are not all floating-point arrays, or
            loss_fn returns no scalar loss, or with has_aux no pair, or with M > 1 aux that is not made of arrays.
        ValueError: an unknown ascent_per or strategy, ``"device"`` without axis_name, num_micro_batches < 1, or a
            group_size that does not divide it; when called: leaves of the batch that are scalars, differ in B, or
            cannot be divided by M; another array with a leading axis of B; a loss_fn that communicates beside a
            weight_fn; an axis_name that is neither mapped nor of the batch's Explicit mesh, that the params vary over,
            or that is missing where ``shard_map`` would sum the gradient.

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
    link = as_link("link", link)
    check_int("num_micro_batches", num_micro_batches)
    check_choice("ascent_per", ascent_per, AscentPer)
    check_choice("strategy", strategy, Strategy)
    axes = () if axis_name is None else as_axes(axis_name)
    if ascent_per == "device" and not axes:
        raise ValueError('ascent_per="device" needs axis_name, the axis of the devices. jax.jit alone shows none.')
    argnums = _as_argnums(batch_argnums)
    if group_size is not None:
        check_int("group_size", group_size)
        if num_micro_batches % group_size:
            raise ValueError(f"{num_micro_batches=} must be divisible by {group_size=}.")
    estimate = _Estimate(
        loss_fn, link, has_aux, num_micro_batches, ascent_per, strategy, axes, argnums, weight_fn, group_size
    )
    return GradientEstimator(link.init, estimate.value_and_grad)


class _Arguments(NamedTuple):
    """The arguments of loss_fn behind params: by position, those that carry examples and the others, and by keyword."""

    batch: dict[int, Any]
    others: dict[int, Any]
    keywords: dict[str, Any]

    def with_batch(self, batch: dict[int, Any]) -> tuple[list[Any], dict[str, Any]]:
        """All of them with another batch, as ``loss_fn(params, *args, **kwargs)`` takes them."""
        positions = batch | self.others
        return [positions[number] for number in sorted(positions)], self.keywords


class _Estimate(NamedTuple):
    """The arguments of :func:`gradient_estimator`, and what is done with them."""

    loss_fn: Callable[..., Any]
    link: optax.GradientTransformationExtraArgs
    has_aux: bool
    num_micro_batches: int
    ascent_per: AscentPer
    strategy: Strategy
    axes: Axes
    batch_argnums: tuple[int, ...]
    weight_fn: Callable[..., Any] | None
    group_size: int | None

    def value_and_grad(self, params: Any, state: optax.OptState, /, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """The loss (and aux), the gradient and the new state."""
        check_params("params", params)
        positions = dict(enumerate(args, start=1))
        batch = {number: positions.pop(number) for number in self.batch_argnums if number in positions}
        arguments = _Arguments(batch, positions, kwargs)
        is_whole = not all(map(is_mapped, self.axes))  # of all devices, on an Explicit mesh
        if self.num_micro_batches > 1 or is_whole:
            self._check_split(arguments)
        if is_whole:
            mesh = mesh_of_examples(batch, (params, state, arguments.others, kwargs), self.axes)
            return on_each_device(self.estimate, mesh, self.axes)(params, state, *arguments)
        return self.estimate(params, state, *arguments)

    def estimate(self, params: Any, state: optax.OptState, *arguments: Any) -> tuple[Any, Any, Any]:
        """The same for the part of the batch that this program sees.

        ``ascent_per`` says which part of the mean over micro-batches and devices is taken before the link, so that one
        ε is for all of it, and which after.
        """
        check_unvarying(params, self.axes)
        arguments = _Arguments(*arguments)
        part = _Part(self, params, state, arguments, _weights_of(self, params, arguments))
        match self.ascent_per:
            case "micro_batch":
                results = part.over_all(part.link_on_one)
            case "device":
                place = (jax.lax.axis_index(self.axes),)
                results = part.over_devices(part.link_on(part.over_micro_batches, place))
            case "batch":
                return part.link_on(part.over_all)
        return part.keeping_state_of_padding(results)

    def _check_split(self, arguments: "_Arguments") -> None:
        """Raises if there is nothing to split, or if what is not split could hold examples: it would broadcast."""
        only = len(self.batch_argnums) == 1
        size = leading_size(**{"batch" if only else f"argument {n}": arg for n, arg in arguments.batch.items()})
        if size is None:
            raise ValueError(f"Micro-batches need a batch, at batch_argnums={self.batch_argnums}; got none.")
        for name, tree in (arguments.others | arguments.keywords).items():
            if name == "_model":  # the arrays of a model, by optax_sam.nnx
                continue
            shapes = [leaf.shape for leaf in jax.tree.leaves(tree) if isinstance(leaf, (jax.Array, np.ndarray))]
            if any(shape and shape[0] == size for shape in shapes):
                raise ValueError(
                    f"Argument {name} of loss_fn is as long as the batch, {size}, and is not split. Name its position "
                    f"in batch_argnums, now {self.batch_argnums}; what is shared, close over or pass as x[None]."
                )


class _MicroBatch(NamedTuple):
    """A micro-batch as a function of params to the loss and aux, and its place, the index among others if there are."""

    loss_fn: Callable[[Any], tuple[Any, Any]]
    place: tuple[Any, ...]


Evaluate = Callable[[_MicroBatch], Any]


class _Part(NamedTuple):
    """What one program sees of an estimate, and means over it; ``weights`` are those of its micro-batches, if any."""

    estimate: _Estimate
    params: Any
    state: optax.OptState
    arguments: _Arguments
    weights: jax.Array | None

    def over_micro_batches(self, evaluate: Evaluate) -> Any:
        """The mean of ``evaluate(micro_batch)`` over those of this part."""

        def evaluate_micro_batch(index, batch):
            return evaluate(self._micro_batch(index, batch))

        estimate, strategy = self.estimate, self.estimate.strategy
        if strategy == "vmap" and estimate.axes and chooses_by_gradient(self.state):
            strategy = "scan"  # in a shard_map, JAX's vmap of a branch that members choose for themselves raises
        return mean_over_micro_batches(
            evaluate_micro_batch,
            self.arguments.batch,
            estimate.num_micro_batches,
            strategy,
            self.weights,
            group_size=estimate.group_size,
            may_be_lazy=estimate.ascent_per == "micro_batch",
        )

    def over_devices(self, tree: Any) -> Any:
        """The mean of this device's results and those of the others."""
        return mean_over_axes(tree, self.estimate.axes, None if self.weights is None else jnp.sum(self.weights))

    def over_all(self, evaluate: Evaluate) -> Any:
        """The mean of ``evaluate(micro_batch)`` over those of all devices."""
        return self.over_devices(self.over_micro_batches(evaluate))

    def link_on_one(self, micro_batch: _MicroBatch) -> tuple[Any, Any, Any]:
        """``link_on`` a single micro-batch."""
        return self.link_on(functools.partial(_evaluated_on, micro_batch), micro_batch.place)

    def link_on(self, mean: Callable[[Evaluate], Any], place: tuple[Any, ...] = ()) -> tuple[Any, Any, Any]:
        """Value, gradient and state of the link, with one ε for all the micro-batches that ``mean`` runs over."""

        def grad_fn(point):
            return mean(functools.partial(self._evaluated, point, GRADIENT))

        def value_and_grad_fn(point):
            return mean(functools.partial(self._evaluated, point, LOSS_AND_GRADIENT))

        def evaluate(point):
            loss, aux, gradient = mean(functools.partial(self._evaluated, point, EVERYTHING))
            check_same_members("what loss_fn returns", loss, gradient, self.params)
            return loss, aux, gradient

        if isinstance(self.estimate.link, OneGradient):
            recorder = Recorder(evaluate)
            outputs, state = self._update_alone(recorder, place)
            if recorder.last is None:
                raise TypeError("one_gradient(link): link evaluated no gradient, so there is no loss to return.")
            _, loss, aux = recorder.last
        else:
            loss, aux, clean = evaluate(self.params)
            keywords = {"grad_fn": grad_fn, "value": loss, "value_and_grad_fn": value_and_grad_fn}
            outputs, state = self.estimate.link.update(clean, self.state, self.params, **keywords, micro_batch=place)
        return (loss, aux) if self.estimate.has_aux else loss, conjugated(outputs), state

    def _update_alone(self, recorder: Recorder, place: tuple[Any, ...]) -> tuple[Any, Any]:
        """Gradient and state of a link that ignores the clean gradient: it gets a tree of that type."""
        like = self.params if self.estimate.ascent_per == "batch" else self._own(self.params)
        functions = {"grad_fn": recorder.grad_fn, "value_and_grad_fn": recorder.value_and_grad_fn}
        return self.estimate.link.update(like, self.state, self.params, **functions, micro_batch=place)

    def _evaluated(self, point: Any, chosen: int | slice, micro_batch: _MicroBatch) -> Any:
        """Of loss, aux and gradient at a point those that are chosen: the others need no average."""
        # Where the point is marked as a member's own, shard_map leaves the gradient a member's own too.
        (loss, aux), gradient = loss_and_gradient(micro_batch.loss_fn, self._own(point), has_aux=True)
        return (loss, aux, gradient)[chosen]

    def _own(self, tree: Any) -> Any:
        """The tree, marked as varying over the axes."""
        axes = self.estimate.axes
        return jax.tree.map(lambda x: vary(jnp.asarray(x), axes), tree) if axes else tree

    def _micro_batch(self, index: Any, batch: dict[int, Any]) -> _MicroBatch:
        """A micro-batch, which has its own keys, the same in every pass."""
        estimate, number = self.estimate, self._number(index)
        args, kwargs = _fold_keys(self.arguments.with_batch(batch), number)

        def loss_of_micro_batch(params):
            with explained(params):
                value = estimate.loss_fn(params, *args, **kwargs)
            loss, aux = loss_and_aux(value, estimate.has_aux)
            return self._own(loss), aux  # marked too: of a loss that is averaged already, a part would be missing

        return _MicroBatch(loss_of_micro_batch, () if number is None else (number,))

    def _number(self, index: Any) -> Any:
        """The index of a micro-batch, counted over all devices; None where there is only one."""
        axes, size = self.estimate.axes, self.estimate.num_micro_batches
        if size * (jax.lax.axis_size(axes) if axes else 1) == 1:
            return None
        return jax.lax.axis_index(axes) * size + index if axes else index

    def keeping_state_of_padding(self, results: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """The results; where all weights are 0 no state was averaged, and its floats stay as they were."""
        if self.weights is None:
            return results
        value, gradient, state = results
        axes, weight = self.estimate.axes, jnp.sum(self.weights)
        total = jax.lax.psum(vary(weight, axes), axes) if axes else weight
        kept = jax.tree.map(
            lambda old, new: jnp.where(total == 0, old, new) if is_float(new) else new, self.state, state
        )
        return value, gradient, kept


def _evaluated_on(micro_batch: _MicroBatch, evaluate: Evaluate) -> Any:
    """The mean over one micro-batch."""
    return evaluate(micro_batch)


def loss_and_aux(value: Any, has_aux: bool) -> tuple[Any, Any]:
    """The loss and aux, or None, in what loss_fn returned; raises if that is something else."""
    if not has_aux:
        check_loss("what loss_fn returns", value)
        return value, None
    if not isinstance(value, (tuple, list)) or len(value) != 2:  # an array of two losses would come apart
        raise TypeError(f"loss_fn must return (loss, aux), as has_aux=True says; got {value!r}.")
    check_loss("the first of what loss_fn returns", value[0])
    return value[0], value[1]


def _weights_of(estimate: _Estimate, params: Any, arguments: _Arguments) -> jax.Array | None:
    """The weight of each micro-batch, (num_micro_batches,) in float32 or wider."""
    weight_fn, loss_fn = estimate.weight_fn, estimate.loss_fn
    if weight_fn is None:
        return None
    args, kwargs = arguments.with_batch(arguments.batch)
    if estimate.axes and communicates(lambda params: loss_fn(params, *args, **kwargs), estimate.axes, params):
        raise ValueError(  # a member's gradient would hold parts of losses that have other weights
            f"With weight_fn, loss_fn must not communicate over {shown(estimate.axes)}. Leave that to the estimator."
        )

    def weight(batch):
        args, kwargs = arguments.with_batch(batch)
        value = weight_fn(*args, **kwargs)
        check_real("what weight_fn returns", value)
        return jnp.asarray(value, jnp.result_type(float))

    return weights_of_micro_batches(weight, arguments.batch, estimate.num_micro_batches)


def value_and_grad(
    loss_fn: Callable[Concatenate[Params, ...], Value],
    link: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    num_micro_batches: int = 1,
    ascent_per: AscentPer = "micro_batch",
    strategy: Strategy = "auto",
    axis_name: AxisNames | None = None,
    batch_argnums: int | Sequence[int] = 1,
    weight_fn: Callable[..., jax.typing.ArrayLike] | None = None,
    group_size: int | None = None,
) -> Callable[Concatenate[Params, ...], tuple[Value, Params]]:
    """Drop-in for ``jax.value_and_grad``: the same call and the same result, with the link's gradient.

    Args:
        loss_fn: function to differentiate with respect to its first argument; see :func:`gradient_estimator`.
        link: a link without arrays in its state, such as ``sam(0.05)`` with a constant rho.
        has_aux: this and the following as in :func:`gradient_estimator`.
        num_micro_batches: M ≥ 1.
        ascent_per: ``"micro_batch"``, ``"device"`` or ``"batch"``.
        strategy: ``"auto"``, ``"lazy"``, ``"vmap"``, ``"scan"`` or ``"unroll"``.
        axis_name: axis whose members hold further parts of the batch.
        batch_argnums: which arguments of loss_fn hold examples.
        weight_fn: from the examples to the weight of a micro-batch.
        group_size: the number of micro-batches run at once.

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
    estimator = gradient_estimator(
        loss_fn,
        link,
        has_aux=has_aux,
        num_micro_batches=num_micro_batches,
        ascent_per=ascent_per,
        strategy=strategy,
        axis_name=axis_name,
        batch_argnums=batch_argnums,
        weight_fn=weight_fn,
        group_size=group_size,
    )

    def stateless(params, /, *args, **kwargs):
        check_params("params", params)  # before eval_shape trips over what is none
        check_stateless(state := jax.eval_shape(estimator.init, params))
        value, gradient, _ = estimator.value_and_grad(params, state, *args, **kwargs)
        return value, gradient

    return stateless


def check_stateless(state: optax.OptState, cure: str = "gradient_estimator") -> None:
    """Raises if a link has arrays in its state."""
    if jax.tree.leaves(state):
        raise ValueError(f"value_and_grad keeps no state, and the link has {state}. Use `{cure}`.")


def _as_argnums(batch_argnums: Any) -> tuple[int, ...]:
    """The positions, in ascending order."""
    numbers = batch_argnums if isinstance(batch_argnums, Sequence) else (batch_argnums,)
    for number in numbers:
        check_int("batch_argnums", number)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"batch_argnums must be different positions behind params; got {batch_argnums!r}.")
    return tuple(sorted(map(int, numbers)))


def _fold_keys(tree: Any, number: Any) -> Any:
    """The tree with its scalar PRNG keys folded with the number, all else unchanged."""

    def fold(leaf):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(leaf, number) if is_key and not leaf.ndim else leaf

    return tree if number is None else jax.tree.map(fold, tree)
