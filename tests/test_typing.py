"""A user's program, for pyright: what it should infer and what it should refuse. pytest checks that it runs."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Any, NamedTuple, assert_type

import jax
import jax.numpy as jnp
import optax

import optax_sam


class Params(NamedTuple):
    weight: jax.Array
    bias: jax.Array


PARAMS, BATCH = Params(jnp.ones(3), jnp.zeros([])), jnp.ones((4, 3))


def loss_fn(params: Params, batch: jax.Array) -> jax.Array:
    return jnp.mean((batch @ params.weight + params.bias - 1) ** 2)


def loss_and_accuracy(params: Params, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return loss_fn(params, batch), {"accuracy": jnp.ones([])}


def test_gradients_are_of_the_type_of_the_params():
    value_and_grad = optax_sam.value_and_grad(loss_fn, optax_sam.sam(0.1), num_micro_batches=2, strategy="scan")
    loss, grads = value_and_grad(PARAMS, BATCH)
    assert_type(loss, jax.Array)
    assert_type(grads, Params)
    assert isinstance(grads, Params)


def test_the_value_is_what_loss_fn_returns():
    estimator = optax_sam.gradient_estimator(loss_and_accuracy, optax_sam.sam(0.1), has_aux=True)
    (loss, aux), grads, state = estimator.value_and_grad(PARAMS, estimator.init(PARAMS), BATCH)
    assert_type(loss, jax.Array)
    assert_type(aux, dict[str, jax.Array])
    assert_type(grads, Params)
    assert set(aux) == {"accuracy"}
    updates, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(PARAMS))
    del updates, state, loss


def test_links_are_transformations_of_optax():
    link = optax_sam.measured(optax_sam.late(optax_sam.stable_sam(0.1), start=3))
    assert_type(link, optax.GradientTransformationExtraArgs)
    assert_type(optax_sam.measurements(link.init(PARAMS)), optax_sam.Measurements)


def what_is_refused(any_link: optax.GradientTransformationExtraArgs) -> Any:
    optax_sam.value_and_grad(loss_fn, any_link, strategy="loop")  # pyright: ignore[reportArgumentType]
    optax_sam.value_and_grad(loss_fn, any_link, ascent_per="example")  # pyright: ignore[reportArgumentType]
    optax_sam.value_and_grad(loss_fn, any_link, micro_batches=2)  # pyright: ignore[reportCallIssue]
    optax_sam.value_and_grad(loss_fn, loss_fn)  # pyright: ignore[reportArgumentType]
    optax_sam.value_and_grad(loss_fn, any_link)({"weight": 1.0}, BATCH)  # pyright: ignore[reportArgumentType]
    optax_sam.micro_batched(any_link, axis_name=3)  # pyright: ignore[reportArgumentType]
