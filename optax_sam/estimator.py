r"""The estimator: the loss, the clean gradient and the SAM gradient of a batch in one call, at its true cost.

A link in an Optax chain is handed a clean gradient and evaluates the others; the caller owns the batch. The estimator
owns all evaluations, so it can split the batch into micro-batches and average before or after the ascent, and it can
mark params as varying under ``shard_map``, where a gradient would otherwise be summed over the devices unasked. Each
example costs one gradient for the clean pass and as many as the link evaluates for the rest, whatever the number of
micro-batches.
"""

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, NamedTuple, TypeVar

import jax
import optax

from optax_sam._axes import AxisNames, as_axes
from optax_sam._checks import as_link, check_choice, check_int, check_params
from optax_sam._estimate import AscentPer, Estimate
from optax_sam._micro_batches import Strategy

Params = TypeVar("Params")
Value = TypeVar("Value")  # what loss_fn returns: the loss, or (loss, aux)


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
        >>> import jax.numpy as jnp, optax_sam
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
    estimate = Estimate(
        loss_fn, link, has_aux, num_micro_batches, ascent_per, strategy, axes, argnums, weight_fn, group_size
    )
    return GradientEstimator(link.init, estimate.value_and_grad)


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
        >>> import jax.numpy as jnp, optax_sam
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
