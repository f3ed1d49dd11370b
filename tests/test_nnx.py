"""Flax NNX by the recipe of ``examples/README.md``: one dropout mask for both passes, statistics of the clean one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_sam
from tests.helpers.problems import assert_close, assert_identical

BATCH = {"x": jax.random.normal(jax.random.key(0), (16, 3)), "y": jnp.linspace(-1, 1, 16)[:, None]}


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout, self.output = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_of(model, batch):
    # Against rank promotion, which the tests refuse and Flax needs.
    with jax.numpy_rank_promotion("allow"):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


nnx_step = nnx.jit(nnx.value_and_grad(loss_of))


@functools.cache
def split_model():
    return nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)


def recipe(graphdef, rest, masks=None):
    """``loss_fn(params, batch)`` → loss and the new rest, as in the recipe; ``masks`` collects what dropout leaves."""

    def loss_fn(params, batch):
        model = nnx.merge(graphdef, params, rest, copy=True)
        if masks is not None:
            kept = nnx.merge(graphdef, params, rest, copy=True).dropout(jnp.ones((16, 8)))
            jax.debug.callback(lambda mask: masks.append(np.asarray(mask)), kept)
        loss = loss_of(model, batch)
        return loss, nnx.split(model, nnx.Param, ...)[2]

    return loss_fn


def arrays(state):
    """The arrays in a state, keys as numbers."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]


@functools.cache
def plain_step():
    """What NNX itself makes of a step: loss, gradient, and the state of the model after it."""
    model = Network(nnx.Rngs(0))
    loss, grads = nnx_step(model, BATCH)
    return loss, grads, nnx.split(model, nnx.Param, ...)[2]


def test_at_rho_zero_loss_gradient_statistics_and_counters_are_those_of_nnx():
    graphdef, params, rest = split_model()
    function = optax_sam.value_and_grad(recipe(graphdef, rest), optax_sam.sam(0.0), has_aux=True)
    (loss, after), grads = jax.jit(function)(params, BATCH)
    assert_identical((loss, nnx.to_pure_dict(grads)), (plain_step()[0], nnx.to_pure_dict(plain_step()[1])))
    assert_identical(arrays(after), arrays(plain_step()[2]))
    assert int(after["dropout"]["rngs"]["count"][...]) == 1


LINKS = {
    "three ascents": optax_sam.sharpness_aware(optax_sam.normalized_ascent(0.2), steps=3),
    "late": optax_sam.measured(optax_sam.late(optax_sam.sam(0.5), 1)),
}


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_statistics_and_counters_never_see_the_perturbed_params(link):
    graphdef, params, rest = split_model()
    estimator = optax_sam.gradient_estimator(recipe(graphdef, rest), link, has_aux=True)
    run, state = jax.jit(estimator.value_and_grad), estimator.init(params)
    for _ in range(2):
        (loss, after), _, state = run(params, state, BATCH)
        assert_close((loss, arrays(after)), (plain_step()[0], arrays(plain_step()[2])))


def test_both_passes_draw_the_same_mask_and_the_next_step_another():
    graphdef, params, rest = split_model()
    masks = []

    @jax.jit
    def next_rest(params, rest):
        function = optax_sam.value_and_grad(recipe(graphdef, rest, masks), optax_sam.sam(0.1), has_aux=True)
        return function(params, BATCH)[0][1]

    next_rest(params, next_rest(params, rest))
    jax.effects_barrier()
    first, second, third, fourth = masks
    assert set(np.unique(first)) == {0.0, 2.0}
    assert np.array_equal(first, second)
    assert np.array_equal(third, fourth)
    assert not np.array_equal(first, third)


def test_the_same_in_an_optax_chain():
    graphdef, params, rest = split_model()
    tx, loss_fn = optax.chain(optax_sam.sam(0.1), optax.sgd(0.1)), recipe(graphdef, rest)

    @jax.jit
    def step(params, state, batch):
        grads, after = jax.grad(loss_fn, has_aux=True)(params, batch)
        grad_fn = lambda w: jax.grad(loss_fn, has_aux=True)(w, batch)[0]  # noqa: E731
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return updates, after

    updates, after = step(params, tx.init(params), BATCH)
    function = jax.jit(optax_sam.value_and_grad(loss_fn, optax_sam.sam(0.1), has_aux=True))
    (_, expected), grads = function(params, BATCH)
    assert_close(arrays(after), arrays(expected))
    assert_close(jax.tree.leaves(updates), [-0.1 * g for g in jax.tree.leaves(grads)])


def test_without_the_copy_the_second_pass_draws_another_mask():
    """Why the recipe is as it is."""
    model = Network(nnx.Rngs(0))
    kernels = [nnx_step(model, BATCH)[1]["hidden"]["kernel"][...] for _ in range(2)]
    assert not np.allclose(*kernels)


def test_micro_batches_draw_different_masks_from_a_key_that_goes_through_the_estimator():
    graphdef, params, rest = split_model()
    masks = []

    def loss_fn(params, batch, key):
        model = nnx.merge(graphdef, params, rest, copy=True)
        nnx.reseed(model, default=key)
        jax.debug.callback(lambda mask: masks.append(np.asarray(mask)), model.dropout(jnp.ones((4, 8))))
        return loss_of(model, batch), nnx.split(model, nnx.Param, ...)[2]

    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(0.1), has_aux=True, num_micro_batches=4, strategy="scan")
    (_, after), _ = jax.jit(function)(params, BATCH, jax.random.key(5))
    jax.effects_barrier()
    assert len(masks) == 8
    assert sorted(sum(np.array_equal(a, b) for b in masks) for a in masks) == [2] * 8  # both passes of each
    parts = [jax.tree.map(lambda x, j=j: x[4 * j : 4 * j + 4], BATCH) for j in range(4)]
    alone = jax.jit(loss_fn)
    means = [alone(params, part, jax.random.key(5))[1]["norm"]["mean"][...] for part in parts]
    assert_close(after["norm"]["mean"][...], jnp.mean(jnp.stack(means), axis=0))
