"""Micro-batches in a chain: one inner link each, then the mean."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam
from tests.helpers.problems import assert_close, assert_identical, mlp_batch, mlp_loss, mlp_params, split

PARAMS, BATCH = mlp_params(), mlp_batch()
GRAD_FN = jax.grad(mlp_loss)


def stacked_update(link, num_micro_batches, state=None, batch=BATCH):
    micro_batches = split(batch, num_micro_batches)
    grads = jax.vmap(GRAD_FN, in_axes=(None, 0))(PARAMS, micro_batches)
    state = link.init(PARAMS) if state is None else state
    return link.update(grads, state, PARAMS, grad_fn=GRAD_FN, batch=micro_batches)


@pytest.mark.parametrize("inner", [optax_sam.sam(0.2), optax_sam.stable_sam(0.2), optax_sam.asam(0.2)])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 8])
def test_mean_of_the_inner_link_over_micro_batches(inner, num_micro_batches):
    mean, _ = stacked_update(optax_sam.micro_batched(inner), num_micro_batches)
    each = []
    for index in range(num_micro_batches):
        micro_batch = jax.tree.map(lambda x, i=index: x[i], split(BATCH, num_micro_batches))
        grads = GRAD_FN(PARAMS, micro_batch)
        each.append(inner.update(grads, inner.init(PARAMS), PARAMS, grad_fn=GRAD_FN, batch=micro_batch)[0])
    assert_close(mean, jax.tree.map(lambda *leaves: sum(leaves) / num_micro_batches, *each))


def test_value_fn_and_none_leaves_of_the_batch():
    batch = BATCH | {"weights": None}
    micro_batches = split(batch, 4)
    grads = jax.vmap(GRAD_FN, in_axes=(None, 0))(PARAMS, micro_batches)
    link = optax_sam.msam(0.2)
    mean, _ = link.update(grads, link.init(PARAMS), PARAMS, value_fn=mlp_loss, batch=micro_batches)
    assert_close(mean, stacked_update(link, 4)[0])


def test_one_shared_state_with_averaged_floats_and_a_step_per_update():
    ascent = optax.chain(optax.ema(0.5, debias=False), optax_sam.unnormalized_ascent(optax.constant_schedule(0.1)))
    link = optax_sam.micro_batched(optax_sam.sharpness_aware(ascent))
    state = link.init(PARAMS)
    for step in range(1, 3):
        _, state = stacked_update(link, 4, state)
        ema, schedule = state.ascent_state
        assert jax.tree.structure(state) == jax.tree.structure(link.init(PARAMS))
        assert int(schedule.ascent_step) == int(ema.count) == step
        assert_close(ema.ema, jax.tree.map(lambda g, s=step: g * (1 - 0.5**s), GRAD_FN(PARAMS, BATCH)))


def test_late_msam_switches_inside():
    link = optax_sam.micro_batched(optax_sam.late(optax_sam.sam(0.2), 1))
    first, state = stacked_update(link, 4)
    second, _ = stacked_update(link, 4, state)
    assert_close(first, GRAD_FN(PARAMS, BATCH))
    assert_close(second, stacked_update(optax_sam.msam(0.2), 4)[0])


def test_without_params_the_mean_of_what_needs_none():
    stacks = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])}
    link = optax_sam.micro_batched(optax.scale(2.0))
    mean, _ = link.update(stacks, link.init({"w": stacks["w"][0]}))
    assert_identical(mean, {"w": jnp.array([4.0, 8.0])})


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_narrow_gradients_keep_their_dtype(axis_name):
    grads = jnp.ones((4, 3), jnp.bfloat16)
    link = optax_sam.micro_batched(optax.identity(), axis_name)
    if axis_name is None:
        mean, _ = link.update(grads, link.init(grads[0]), grads[0])
    else:
        mean = jax.vmap(lambda g: link.update(g, link.init(g), g)[0], axis_name="data")(grads)[0]
    assert_identical(mean, jnp.ones(3, jnp.bfloat16))


def test_vmapped_axis_is_the_same_as_stacking():
    link = optax_sam.msam(0.2, axis_name="data")

    def member(micro_batch):
        grads = GRAD_FN(PARAMS, micro_batch)
        return link.update(grads, link.init(PARAMS), PARAMS, grad_fn=GRAD_FN, batch=micro_batch)[0]

    members = jax.vmap(member, axis_name="data")(split(BATCH, 4))
    for index in range(4):
        assert_close(jax.tree.map(lambda x, i=index: x[i], members), stacked_update(optax_sam.msam(0.2), 4)[0])
