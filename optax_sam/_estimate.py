r"""The estimate: what the estimator does with its arguments, for the part of the batch that one program sees.

``ascent_per`` says which part of the mean over micro-batches and devices is taken before the link, so that one ε is for
all of it, and which after.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._axes import Axes, check_same_members, check_unvarying, communicates, is_mapped, shown, vary
from optax_sam._checks import check_loss, check_params, check_real, is_float
from optax_sam._evaluation import Recorder, conjugated, explained, loss_and_gradient
from optax_sam._means import leading_size, mean_over_axes
from optax_sam._mesh import mesh_of_examples, on_each_device
from optax_sam._micro_batches import Strategy, mean_over_micro_batches, weights_of_micro_batches
from optax_sam.single_pass import OneGradient
from optax_sam.switching import chooses_by_gradient

AscentPer = Literal["micro_batch", "device", "batch"]
EVERYTHING, LOSS_AND_GRADIENT, GRADIENT = slice(None), slice(0, 3, 2), 2  # of (loss, aux, gradient)


class _Arguments(NamedTuple):
    """The arguments of loss_fn behind params: by position, those that carry examples and the others, and by keyword."""

    batch: dict[int, Any]
    others: dict[int, Any]
    keywords: dict[str, Any]

    def with_batch(self, batch: dict[int, Any]) -> tuple[list[Any], dict[str, Any]]:
        """All of them with another batch, as ``loss_fn(params, *args, **kwargs)`` takes them."""
        positions = batch | self.others
        return [positions[number] for number in sorted(positions)], self.keywords


class Estimate(NamedTuple):
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
        """The same for the part of the batch that this program sees."""
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
            shapes = [leaf.shape for leaf in jax.tree.leaves(tree) if isinstance(leaf, (jax.Array, np.ndarray))]
            if size > 1 and any(shape and shape[0] == size for shape in shapes):
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

    estimate: Estimate
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


def _weights_of(estimate: Estimate, params: Any, arguments: _Arguments) -> jax.Array | None:
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


def _fold_keys(tree: Any, number: Any) -> Any:
    """The tree with its scalar PRNG keys folded with the number, all else unchanged."""

    def fold(leaf):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(leaf, number) if is_key and not leaf.ndim else leaf

    return tree if number is None else jax.tree.map(fold, tree)
