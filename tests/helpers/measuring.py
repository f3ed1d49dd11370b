"""What a link does, found without its being measured: the reference of the tests of measurement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import Measurements
from tests.helpers.problems import assert_close, mlp_batch, mlp_loss, mlp_params, split

RHO = 0.2
PARAMS, BATCH = mlp_params(), mlp_batch(size=32)
LINKS = {
    "plain": optax.identity(),
    "sam": optax_sam.sam(RHO),
    "masked": optax_sam.sam(RHO, mask=lambda params: jax.tree.map(lambda w: jnp.ndim(w) > 1, params)),
    "usam": optax_sam.usam(RHO),
    "asam": optax_sam.asam(0.5),
    "stable_sam": optax_sam.stable_sam(RHO),
    "three steps": optax_sam.sharpness_aware(optax_sam.normalized_ascent(RHO), steps=3),
    "scheduled": optax_sam.sam(optax.linear_schedule(RHO, 0.4, 4)),
    "chain": optax.chain(optax_sam.sam(RHO), optax.clip_by_global_norm(0.1)),
}
every_link = pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


@functools.cache
def observed(link, loss_fn):
    """(params, batch) → g, s and the last point at which the plain link asks for a gradient, or the params."""
    link = optax.with_extra_args_support(link)

    @jax.jit
    def observe(params, batch):
        points = [params]

        def grad_fn(point):
            points.append(point)
            return jax.grad(loss_fn)(point, batch)

        clean = jax.grad(loss_fn)(params, batch)
        outputs, _ = link.update(clean, link.init(params), params, grad_fn=grad_fn)
        return clean, outputs, points[-1], [loss_fn(point, batch) for point in points]

    return observe


def what_happens(link, params=PARAMS, batch=BATCH, loss_fn=mlp_loss):
    """The measurements of one update, in float64."""
    clean, outputs, point, losses = observed(link, loss_fn)(params, batch)
    g, s = flat(clean), flat(outputs)
    lengths = np.linalg.norm(g), np.linalg.norm(flat(point) - flat(params)), np.linalg.norm(s)
    return Measurements(*lengths, g @ s / lengths[0] / lengths[2], losses[0], losses[-1], active=len(losses) > 1)


def mean_of_what_happens(link, num_micro_batches, params=PARAMS, batch=BATCH):
    micro_batches = split(batch, num_micro_batches)
    each = [
        what_happens(link, params, jax.tree.map(lambda x, i=i: x[i], micro_batches)) for i in range(num_micro_batches)
    ]
    return jax.tree.map(lambda *values: sum(values) / num_micro_batches, *each)


def assert_measured(actual, expected):
    assert isinstance(actual, Measurements)
    assert_close(actual, Measurements(*[jnp.float32(x) for x in expected]))


def chain_step(link, loss_fn=mlp_loss, optimizer=None):
    tx = optax.chain(link, optimizer or optax.sgd(0.1))

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    return tx, step


def estimator_step(link, loss_fn=mlp_loss, **options):
    estimator = optax_sam.gradient_estimator(loss_fn, link, **options)

    def step(params, state, batch):
        _, grads, state = estimator.value_and_grad(params, state, batch)
        return optax.apply_updates(params, optax.tree.scale(-0.1, grads)), state

    return estimator, step
