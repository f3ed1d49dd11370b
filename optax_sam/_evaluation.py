"""Evaluation: from the keywords of ``update``, or from a loss, to the loss and the gradient at a point.

``jax.grad`` of a real loss at complex params is the conjugate of the direction in which the loss rises, and Optax wants
that direction. So what is differentiated here is conjugated here; what the caller's own functions return is left alone.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._axes import check_same_members
from optax_sam._checks import check_loss
from optax_sam._jaxpr import trace_state


def conjugated(gradient: Any) -> Any:
    """The gradient, conjugated where it is complex."""
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradient)


def loss_and_gradient(loss_fn: Callable[..., Any], point: Any, *args: Any, has_aux: bool = False) -> tuple[Any, Any]:
    """``jax.value_and_grad``, with the gradient that Optax wants."""
    value, gradient = jax.value_and_grad(loss_fn, has_aux=has_aux)(point, *args)
    return value, conjugated(gradient)


@contextlib.contextmanager
def explained(params: Any) -> Iterator[None]:
    """Adds to the error of a loss what is behind it, where that is not in sight."""
    try:
        yield
    except Exception as error:
        _note_cause(error, params)
        raise


def _note_cause(error: Exception, params: Any) -> None:
    if type(error).__name__ == "TraceContextError":
        error.add_note(
            "loss_fn changes a Flax NNX object from outside, such as nnx.Rngs or a model with dropout. Use "
            "`optax_sam.nnx.value_and_grad(loss_fn, link)`, which hands the model to loss_fn."
        )
    if isinstance(params, (jax.Array, np.ndarray)) and params.ndim == 1:
        error.add_note(
            "The params are one flat array. If optax.flatten made it, put the link in front: "
            "`optax.chain(sam(rho), optax.flatten(...))`."
        )


def evaluation(
    params: Any, *, grad_fn: Any = None, value_fn: Any = None, value_and_grad_fn: Any = None, others: Any = ()
) -> Callable[..., tuple[Any, Any]]:
    """The function of a point (and a batch) to loss and gradient that keywords describe; without a value, loss is None.

    ``value_and_grad_fn`` goes before ``grad_fn``, and that before the gradient of ``value_fn``.
    """
    if value_and_grad_fn is grad_fn is value_fn is None:
        raise ValueError(
            f"A link evaluates gradients, and got no grad_fn and no value_fn among {sorted(others)}. Call `tx.update("
            "grads, state, params, grad_fn=jax.grad(loss_fn), batch=batch)`; where no keyword gets through, as in "
            "Flax's TrainState.apply_gradients, use `gradient_estimator(loss_fn, link)`."
        )
    both = value_and_grad_fn
    if both is None and grad_fn is None:
        both = functools.partial(loss_and_gradient, value_fn)

    def evaluate(*args):
        with explained(params):
            if both is not None:
                loss, gradient = both(*args)
            else:
                loss, gradient = None if value_fn is None else value_fn(*args), grad_fn(*args)  # pyright: ignore[reportOptionalCall]
        if loss is not None:
            check_loss("what value_fn or value_and_grad_fn returns", loss)
            check_same_members("what value_fn or value_and_grad_fn returns", loss, gradient, params)
        return loss, gradient

    return evaluate


class Recorder:
    """Evaluates the gradients of a link, and keeps the last point, and the loss and aux there.

    ``evaluate`` is a function of a point (and a batch) to loss, aux and gradient.
    """

    def __init__(self, evaluate: Callable[..., tuple[Any, Any, Any]]):
        self._evaluate, self._trace = evaluate, trace_state()
        self.last: tuple[Any, Any, Any] | None = None

    def value_and_grad_fn(self, point: Any, *batch: Any) -> tuple[Any, Any]:
        """Loss and gradient at a point."""
        if trace_state() != self._trace:  # a tracer of the branch would leak out of it
            raise ValueError(
                "measured(link), one_gradient(link): link evaluates a gradient in a branch, a loop or a map, which no "
                "loss can leave. Go inside, as in `micro_batched(measured(sam(rho)))`, and of a chain around the "
                "switch alone."
            )
        loss, aux, gradient = self._evaluate(point, *batch)
        self.last = point, loss, aux
        return loss, gradient

    def grad_fn(self, point: Any, *batch: Any) -> Any:
        """The gradient at a point."""
        return self.value_and_grad_fn(point, *batch)[1]
