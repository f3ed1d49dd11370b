"""Micro-batches in a chain: one inner link each, then the mean."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam
from tests.helpers.problems import assert_close, assert_identical, mlp_batch, mlp_loss, mlp_params, split

PARAMS, BATCH = mlp_params(), mlp_batch()
GRAD_FN = jax.grad(mlp_loss)
SAM = optax_sam.sam(0.2)


def stacked_update(link, num_micro_batches, state=None):
    @jax.jit
    def update(state, micro_batches):
        grads = jax.vmap(GRAD_FN, in_axes=(None, 0))(PARAMS, micro_batches)
        return link.update(grads, state, PARAMS, grad_fn=GRAD_FN, batch=micro_batches)

    return update(link.init(PARAMS) if state is None else state, split(BATCH, num_micro_batches))


@functools.cache
def mean_over_parts(inner, num_micro_batches):
    """The mean of what ``inner`` makes of the gradient of each part of the batch."""

    @jax.jit
    def update(micro_batch):
        grads = GRAD_FN(PARAMS, micro_batch)
        return inner.update(grads, inner.init(PARAMS), PARAMS, grad_fn=GRAD_FN, batch=micro_batch)[0]

    parts = split(BATCH, num_micro_batches)
    each = [update(jax.tree.map(lambda x, i=index: x[i], parts)) for index in range(num_micro_batches)]
    return jax.tree.map(lambda *leaves: sum(leaves) / num_micro_batches, *each)


@pytest.mark.parametrize(
    ("inner", "num_micro_batches"),
    [(SAM, 1), (SAM, 8), (optax_sam.stable_sam(0.2), 2), (optax_sam.asam(0.2), 4)],
    ids=["sam-1", "sam-8", "stable_sam-2", "asam-4"],
)
def test_mean_of_the_inner_link_over_micro_batches(inner, num_micro_batches):
    mean, _ = stacked_update(optax_sam.micro_batched(inner), num_micro_batches)
    assert_close(mean, mean_over_parts(inner, num_micro_batches))


def test_value_fn_and_none_leaves_of_the_batch():
    link = optax_sam.msam(0.2)

    @jax.jit
    def update(micro_batches):
        grads = jax.vmap(GRAD_FN, in_axes=(None, 0))(PARAMS, micro_batches)
        return link.update(grads, link.init(PARAMS), PARAMS, value_fn=mlp_loss, batch=micro_batches)[0]

    assert_close(update(split(BATCH | {"weights": None}, 4)), mean_over_parts(SAM, 4))


def test_one_shared_state_with_averaged_floats_and_a_step_per_update():
    ascent = optax.chain(optax.ema(0.5, debias=False), optax_sam.unnormalized_ascent(optax.constant_schedule(0.1)))
    link = optax_sam.micro_batched(optax_sam.sharpness_aware(ascent))
    state = link.init(PARAMS)
    for step in range(1, 3):
        _, state = stacked_update(link, 4, state)
        ema, schedule = state.link_state.ascent_state
        assert jax.tree.structure(state) == jax.tree.structure(link.init(PARAMS))
        assert int(schedule.ascent_step) == int(ema.count) == step
        assert_close(ema.ema, jax.tree.map(lambda g, s=step: g * (1 - 0.5**s), GRAD_FN(PARAMS, BATCH)))


def test_late_msam_switches_inside():
    link = optax_sam.micro_batched(optax_sam.late(SAM, 1))
    first, state = stacked_update(link, 4)
    second, _ = stacked_update(link, 4, state)
    assert_close(first, GRAD_FN(PARAMS, BATCH))
    assert_close(second, mean_over_parts(SAM, 4))


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


def test_all_members_of_a_vmapped_axis_have_the_mean():
    link = optax_sam.msam(0.2, axis_name="data")

    def member(micro_batch):
        grads = GRAD_FN(PARAMS, micro_batch)
        return link.update(grads, link.init(PARAMS), PARAMS, grad_fn=GRAD_FN, batch=micro_batch)[0]

    outputs = jax.jit(jax.vmap(member, axis_name="data"))(split(BATCH, 4))
    assert_close(outputs, jax.tree.map(lambda x: jnp.stack([x] * 4), mean_over_parts(SAM, 4)))
