"""What the table of ``examples/README.md`` says about other libraries, where both sides run here."""

import jax
import optax
import optax.contrib
import pytest

import optax_sam
from tests.helpers.problems import assert_close, mlp_batch, mlp_loss, mlp_params

OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))
ASCENT = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
MOMENTUM = optax.chain(optax.sgd(0.05, momentum=0.5))


def two_steps(tx, grad_fn):
    """Params after two steps; ``grad_fn`` takes what the transformation hands to it."""
    params, batch = mlp_params(), mlp_batch()
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(mlp_loss)(params, batch), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("period", [2, 3, 4])
def test_opaque_sam_of_optax(period):
    theirs = optax.contrib.sam(OPTIMIZER, ASCENT, sync_period=period, opaque_mode=True)
    link = optax_sam.sharpness_aware(optax_sam.normalized_ascent(0.1), steps=period - 1)
    expected = two_steps(theirs, lambda params, _: jax.grad(mlp_loss)(params, mlp_batch()))
    assert_close(
        two_steps(optax.chain(link, OPTIMIZER), lambda params: jax.grad(mlp_loss)(params, mlp_batch())), expected
    )


def test_any_adversarial_optimizer_is_an_ascent_with_the_other_sign():
    """Its state begins afresh in each step there, and goes on here: the first step is the same."""
    theirs = optax.contrib.sam(optax.sgd(0.1), MOMENTUM, sync_period=2, opaque_mode=True)
    ours = optax.chain(optax_sam.sharpness_aware(optax.chain(MOMENTUM, optax.scale(-1))), optax.sgd(0.1))
    params, batch = mlp_params(), mlp_batch()
    grads = jax.grad(mlp_loss)(params, batch)
    expected, _ = theirs.update(grads, theirs.init(params), params, grad_fn=lambda w, _: jax.grad(mlp_loss)(w, batch))
    actual, _ = ours.update(grads, ours.init(params), params, grad_fn=lambda w: jax.grad(mlp_loss)(w, batch))
    assert_close(actual, expected)
