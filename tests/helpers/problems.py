"""Models, training steps, tolerances and the gradient counter that several test modules share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCH_SIZE = 8


def mlp_params(seed: int = 0) -> Any:
    hidden, output = jax.random.split(jax.random.key(seed))
    return {
        "hidden": {"kernel": jax.random.normal(hidden, (4, 3)), "bias": jnp.full(4, 0.1, jnp.float32)},
        "output": jax.random.normal(output, (4,)) / 2,
    }


def mlp_batch(seed: int = 1, size: int = BATCH_SIZE) -> Any:
    inputs, targets = jax.random.split(jax.random.key(seed))
    return {"x": jax.random.normal(inputs, (size, 3)), "y": jax.random.normal(targets, (size,))}


def mlp_loss(params: Any, batch: Any) -> jax.Array:
    def predict(x):
        return params["output"] @ jnp.tanh(params["hidden"]["kernel"] @ x + params["hidden"]["bias"])

    return jnp.mean((jax.vmap(predict)(batch["x"]) - batch["y"]) ** 2)


def cnn_params(channels: int = 4, classes: int = 3) -> Any:
    first, second, output = jax.random.split(jax.random.key(2), 3)
    return {
        "first": jax.random.normal(first, (3, 3, 2, channels)) / 4,
        "second": jax.random.normal(second, (3, 3, channels, channels)) / 6,
        "output": jax.random.normal(output, (channels, classes)) / 2,
    }


def cnn_batch(size: int = BATCH_SIZE, side: int = 6) -> Any:
    return {"x": jax.random.normal(jax.random.key(3), (size, side, side, 2)), "y": jnp.arange(size) % 3}


def cnn_loss(params: Any, batch: Any) -> jax.Array:
    hidden = batch["x"]
    for layer in ("first", "second"):
        hidden = jax.lax.conv_general_dilated(
            hidden, params[layer], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        hidden = jax.nn.relu(hidden)
    logits = jnp.mean(hidden, axis=(1, 2)) @ params["output"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


class CountedPasses(list):
    """Batches that count how often they were gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def split(batch: Any, num_micro_batches: int) -> Any:
    """The batch with a leading axis of contiguous micro-batches on every leaf."""
    return jax.tree.map(lambda x: x.reshape(num_micro_batches, -1, *x.shape[1:]), batch)


def clean_gradient(loss_fn: Callable[..., Any], params: Any, batch: Any, stacked: bool = False) -> Any:
    gradient = jax.grad(loss_fn)
    return jax.vmap(gradient, in_axes=(None, 0))(params, batch) if stacked else gradient(params, batch)


def training_step(
    tx: optax.GradientTransformationExtraArgs, loss_fn: Callable[..., Any] = mlp_loss, stacked: bool = False
) -> Callable[..., Any]:
    """(params, state, batch) → (params, state), in the chain form; stacked: batches are split into micro-batches."""

    def step(params, state, batch):
        grads = clean_gradient(loss_fn, params, batch, stacked)
        updates, state = tx.update(grads, state, params, grad_fn=jax.grad(loss_fn), batch=batch)
        return optax.apply_updates(params, updates), state

    return step


def assert_close(actual: Any, desired: Any) -> None:
    """The same structure and dtypes, and values that agree to sqrt(eps) of the dtype."""

    def check(path, a, b):
        a, b = jnp.asarray(a), jnp.asarray(b)
        where = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, f"dtype of {where}: {a.dtype} and {b.dtype}"
        if jnp.issubdtype(a.dtype, jnp.inexact):
            tolerance = float(jnp.finfo(a.dtype).eps) ** 0.5
            np.testing.assert_allclose(
                np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance, err_msg=where
            )
        else:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=where)

    jax.tree_util.tree_map_with_path(check, actual, desired)


def assert_identical(actual: Any, desired: Any) -> None:
    """The same structure, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class GradientCounter:
    """Counts the per-example gradients that are executed, as opposed to traced."""

    def __init__(self) -> None:
        self._examples = 0

    def counted(self, loss_fn: Callable[..., Any], num_examples: int) -> Callable[..., Any]:
        """The loss of ``num_examples`` examples; each run of its backward pass is counted."""

        def add(value):
            self.add(num_examples * np.size(value))

        @jax.custom_vjp
        def watch(value):
            return value

        def backward(value, cotangent):
            # The value differs between the members of a vmap, so that each of them is counted.
            jax.debug.callback(add, value)
            return (cotangent,)

        watch.defvjp(lambda value: (value, value), backward)
        return lambda *args, **kwargs: watch(loss_fn(*args, **kwargs))

    def add(self, num_examples: int) -> None:
        self._examples += num_examples

    def take(self) -> int:
        """The number of per-example gradients since the last call."""
        jax.effects_barrier()
        examples, self._examples = self._examples, 0
        return examples
