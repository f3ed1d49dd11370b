"""The toys and the pieces of ``benchmarks/papers/late_phase.py`` against exact values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from benchmarks.papers import late_phase, training
from benchmarks.papers import late_phase_toys as toys

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def valley():
    return toys.run_valley()


def test_gd_stays_and_usam_leaves(valley):
    late = np.array(valley["paths"]["late USAM"])
    np.testing.assert_allclose(valley["paths"]["GD"][-1], [2, 0], atol=2e-6)
    np.testing.assert_allclose(valley["growth"], 1.88, atol=1e-5)
    np.testing.assert_allclose(valley["growth"], valley["exact_growth"], atol=1e-8)
    assert np.all(np.abs(late[:11, 0] - 2) < 2e-6)
    assert abs(late[-1, 0]) < 1.758


def test_usam_grows_from_the_first_step_without_a_switch(valley):
    path = np.array(valley["paths"]["USAM"])
    np.testing.assert_allclose(path[1, 1] / path[0, 1], -1.88, atol=2e-6)


def test_limits_of_stability(valley):
    assert valley["limits"] == pytest.approx(valley["exact_limits"], abs=1e-4)
    assert valley["exact_limits"] == pytest.approx({"GD": 5**0.5, "USAM": 1.758}, abs=2e-4)
    assert valley["ends"]["largest"] < 1.758
    np.testing.assert_allclose(toys.usam_factor(valley["exact_limits"]["USAM"] ** 2), 1, atol=1e-12)


def test_statistics_of_an_exponential_rise():
    sizes = toys.Escape(seeds=2, before=4, after=12, every=2, rise=8)
    losses = np.exp(np.array([[0.0, 0, 0.2, 0.4, 0.6, 0.8, 0.1, -1], [1, 1, 1.4, 1.8, 2.2, 2.6, 0, 0]]))
    found = toys.escape_statistics(losses, sizes)
    assert found["rate"] == pytest.approx([0.1, 0.2])
    assert found["exponential_fit"] == pytest.approx([1, 1])
    assert max(found["linear_fit"]) < 1
    assert found["at_switch"] == pytest.approx(np.exp([0, 1]))
    assert found["peak"] == pytest.approx(np.exp([0.8, 2.6]))
    assert found["steps"][:2] == [-2, 0]


@pytest.mark.parametrize("start", [0, 15, 20])
def test_gradients_are_counted(start):
    assert late_phase.executed_gradients(optax_sam.late(optax_sam.sam(0.1), start), 20) == 1 + (20 - start) / 20


def test_momentum_restarts_and_the_schedule_goes_on():
    task = training.digits(num_images=1024, epochs=1)
    methods = late_phase.methods(task, smoke=True)
    grad_fn = lambda params: jnp.full_like(params, 2.0)  # noqa: E731
    updates = {}
    for name in ("sgd", f"late-{late_phase.MAIN}", f"restarted-{late_phase.MAIN}"):
        tx, params = optax.chain(*methods[name][:2]), jnp.ones(2)
        state, updates[name] = tx.init(params), []
        for _ in range(8):
            step, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            updates[name].append(step)
    sgd, carried, restarted = (np.array(steps) for steps in updates.values())
    rates = np.array([optax.cosine_decay_schedule(late_phase.LEARNING_RATE, 8)(step) for step in range(8)])
    gradient = 2 + late_phase.WEIGHT_DECAY
    np.testing.assert_allclose(carried, sgd, rtol=1e-6)
    np.testing.assert_allclose(restarted[:6], sgd[:6], rtol=1e-6)
    np.testing.assert_allclose(restarted[6], -rates[6] * gradient, rtol=1e-6)
    np.testing.assert_allclose(restarted[7], -rates[7] * gradient * (1 + training.MOMENTUM), rtol=1e-6)


def test_adversarial_link():
    def loss_fn(params, batch):
        return jnp.mean(batch[0] @ params)

    params, images = jnp.array([1.0, -2.0]), jnp.array([[0.5, 0.5], [1.0, 0.0]])
    batch, grad_fn = (images, jnp.zeros(2)), jax.grad(loss_fn)
    link = optax_sam.late(late_phase.adversarial(loss_fn, 3), 1)
    state, found = link.init(params), []
    for _ in range(2):
        grads, state = link.update(grad_fn(params, batch), state, params, grad_fn=grad_fn, batch=batch)
        found.append(grads)
    np.testing.assert_allclose(found[0], [0.75, 0.25])
    np.testing.assert_allclose(found[1], [0.75 + late_phase.RADIUS, 0.25 - late_phase.RADIUS], rtol=1e-6)
