"""Sharpness of a layer, in the units of the weights, and of the linearized network: dense matrices and matfree."""

import jax
import jax.numpy as jnp
import matfree.decomp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_sam
from tests.helpers.problems import mlp_batch, mlp_loss, mlp_params

BATCH, PARAMS = mlp_batch(size=12), mlp_params()
BATCHES = [jax.tree.map(lambda x: x[:8], BATCH), jax.tree.map(lambda x: x[8:], BATCH)]
FLAT, UNRAVEL = ravel_pytree(PARAMS)
HESSIAN = np.asarray(jax.hessian(lambda w: mlp_loss(UNRAVEL(w), BATCH))(FLAT), np.float64)


def in_units_of_weights(params, eta=0.01):
    return jax.tree.map(lambda w: jnp.abs(w) + eta, params)


def layer(name):
    return {key: jax.tree.map(lambda _, key=key: key == name, value) for key, value in PARAMS.items()}


SCALES = {
    "weights": in_units_of_weights(PARAMS),
    "hidden layer": layer("hidden"),
    "output layer": layer("output"),
    "signs": jax.tree.map(lambda w: -2.0 * jnp.sign(w), PARAMS),
    "numbers": {"hidden": {"kernel": 2, "bias": 0.5}, "output": np.float64(3)},
}
every_scale = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)


def dense(scale):
    full = jax.tree.map(lambda factor, w: np.broadcast_to(factor, w.shape).astype(np.float32), scale, PARAMS)
    diagonal = np.asarray(ravel_pytree(full)[0], np.float64)
    kept = np.flatnonzero(diagonal)
    return (diagonal[:, None] * HESSIAN * diagonal)[np.ix_(kept, kept)]


@every_scale
def test_eigenvalues_and_trace_are_those_of_the_dense_matrix(scale):
    values = np.linalg.eigvalsh(dense(scale))
    found = optax_sam.hessian_eigenvalues(mlp_loss, PARAMS, BATCHES, scale=scale, num_smallest=1, rtol=1e-4)
    np.testing.assert_allclose(found.values, values[[-1, 0]], atol=1e-4 * np.abs(values).max())
    trace = optax_sam.hessian_trace(mlp_loss, PARAMS, BATCHES, scale=scale, num_probes=200)
    assert abs(trace.mean - values.sum()) < 4 * trace.standard_error + 1e-4
    density = optax_sam.spectral_density(mlp_loss, PARAMS, BATCHES, scale=scale, num_products=len(FLAT))
    assert density.nodes.max() == pytest.approx(values[-1], rel=1e-3)


def test_blocks_of_the_layers_are_those_of_the_hessian():
    for name, part in (("hidden", slice(0, 16)), ("output", slice(16, 20))):
        found = optax_sam.hessian_eigenvalues(mlp_loss, PARAMS, BATCHES, scale=layer(name), rtol=1e-4)
        assert found.values[0] == pytest.approx(np.linalg.eigvalsh(HESSIAN[part, part])[-1], rel=1e-3)


def test_a_scale_of_zeros_is_refused():
    for measure in (optax_sam.hessian_eigenvalues, optax_sam.track_eigenvalue):
        with pytest.raises(ValueError, match="scale is zero for all params"):
            measure(mlp_loss, PARAMS, BATCHES, scale=False)


@pytest.mark.parametrize("size", [5, 12])
def test_the_largest_of_a_block_is_not_a_zero_of_what_is_left_out(size):
    scale = jnp.arange(40) < size
    loss_fn = lambda w, x: -jnp.mean(x) * jnp.sum(jnp.arange(1.0, 41) * w**2) / 2  # noqa: E731
    found = optax_sam.hessian_eigenvalues(loss_fn, jnp.ones(40), [jnp.ones(1)], scale=scale, num_smallest=1, rtol=1e-5)
    np.testing.assert_allclose(found.values, [-1, -size], rtol=1e-4)
    repeated = lambda w, x: -jnp.mean(x) * jnp.sum(w**2) / 2  # noqa: E731
    found = optax_sam.hessian_eigenvalues(repeated, jnp.ones(40), [jnp.ones(1)], scale=scale, k=3, rtol=1e-5)
    np.testing.assert_allclose(found.values, [-1, -1, -1], rtol=1e-5)


def relu_loss(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["first"])
    return jnp.mean((hidden @ params["second"] - batch["y"]) ** 2)


def test_rescaling_of_a_relu_network_changes_only_the_plain_sharpness():
    first, second = jax.random.split(jax.random.key(7))
    params = {"first": jax.random.normal(first, (3, 5)), "second": jax.random.normal(second, (5,))}
    rescaled = {"first": 4 * params["first"], "second": params["second"] / 4}

    def sharpness(w, scale):
        return optax_sam.hessian_eigenvalues(relu_loss, w, BATCHES, scale=scale, rtol=1e-4).values[0]

    def rise(w, scale):
        return float(optax_sam.m_sharpness(relu_loss, w, BATCH, 0.2, steps=5, scale=scale))

    for measure in (sharpness, rise):
        plain, plain_rescaled = measure(params, None), measure(rescaled, None)
        adaptive, adaptive_rescaled = (measure(w, in_units_of_weights(w, eta=0.0)) for w in (params, rescaled))
        assert abs(plain_rescaled / plain - 1) > 0.5
        assert adaptive_rescaled == pytest.approx(adaptive, rel=1e-3)


def test_one_step_in_units_of_the_weights_is_the_perturbation_of_asam():
    gradient = jax.grad(mlp_loss)(PARAMS, BATCH)
    ascent = optax_sam.adaptive_ascent(0.2, eta=0.01)
    perturbation, _ = ascent.update(gradient, ascent.init(PARAMS), PARAMS)
    expected = mlp_loss(optax.tree.add(PARAMS, perturbation), BATCH) - mlp_loss(PARAMS, BATCH)
    rise = optax_sam.m_sharpness(mlp_loss, PARAMS, BATCH, 0.2, scale=in_units_of_weights(PARAMS))
    np.testing.assert_allclose(rise, expected, rtol=1e-4)


def test_of_a_mask_only_its_leaves_move():
    gradient = jax.grad(mlp_loss)(PARAMS, BATCH)
    masked = optax.tree.scale(0.2 / optax.tree.norm(gradient["output"]), gradient["output"])
    moved = PARAMS | {"output": PARAMS["output"] + masked}
    rise = optax_sam.m_sharpness(mlp_loss, PARAMS, BATCH, 0.2, scale=layer("output"))
    np.testing.assert_allclose(rise, mlp_loss(moved, BATCH) - mlp_loss(PARAMS, BATCH), rtol=1e-4)


def outputs(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"].T + params["hidden"]["bias"][None])
    return jnp.outer(hidden @ params["output"], jnp.array([1.0, -0.5]))


def cross_entropy(logits, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, (batch["y"] > 0).astype(int)))


@pytest.mark.heavy
def test_gauss_newton_against_jacobians_and_matfree():
    loss_fn = optax_sam.gauss_newton(outputs, cross_entropy)
    plain = lambda params, batch: cross_entropy(outputs(params, batch), batch)  # noqa: E731
    value, gradient = jax.value_and_grad(loss_fn)(PARAMS, BATCH)
    expected_value, expected_gradient = jax.value_and_grad(plain)(PARAMS, BATCH)
    assert value == expected_value
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradient, expected_gradient)

    def total(batch):
        jacobian = jax.jacobian(lambda w: outputs(UNRAVEL(w), batch))(FLAT)
        curvature = jax.hessian(cross_entropy)(outputs(PARAMS, batch), batch)
        return np.einsum("iap,iajb,jbq->pq", *(np.asarray(x, np.float64) for x in (jacobian, curvature, jacobian)))

    matrix = total(BATCH)
    found = optax_sam.hessian_eigenvalues(loss_fn, PARAMS, BATCHES, k=2, num_smallest=1, rtol=1e-4)
    values = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(found.values, values[[-1, -2, 0]], atol=1e-4 * values[-1])
    full = jax.hessian(lambda w: plain(UNRAVEL(w), BATCH))(FLAT)
    assert np.linalg.eigvalsh(full)[0] < -1e-3 * values[-1]  # so that the difference matters
    tridiagonal = matfree.decomp.tridiag_sym(len(FLAT), materialize=True)
    _, small, *_ = tridiagonal(lambda v: jnp.asarray(matrix, jnp.float32) @ v, jnp.ones(len(FLAT)))
    assert found.values[0] == pytest.approx(np.linalg.eigvalsh(small)[-1], rel=1e-3)
    trace = optax_sam.hessian_trace(loss_fn, PARAMS, BATCHES, num_probes=200)
    assert abs(trace.mean - values.sum()) < 4 * trace.standard_error


def test_outputs_that_are_integers_stay_as_they_are():
    with_labels = lambda params, batch: (outputs(params, batch), jnp.argmax(outputs(params, batch), axis=1))  # noqa: E731
    loss_fn = optax_sam.gauss_newton(with_labels, lambda both, batch: cross_entropy(both[0], batch) * (both[1][0] + 1))
    plain = optax_sam.gauss_newton(outputs, cross_entropy)
    factor = float(loss_fn(PARAMS, BATCH) / plain(PARAMS, BATCH))
    assert factor in (1, 2)
    curvatures = [optax_sam.directional_sharpness(loss, PARAMS, PARAMS, BATCHES[:1]) for loss in (loss_fn, plain)]
    assert curvatures[0] == pytest.approx(factor * curvatures[1], rel=1e-5)


@pytest.mark.heavy
def test_gauss_newton_is_itself_a_loss_for_the_other_instruments():
    loss_fn = optax_sam.gauss_newton(outputs, cross_entropy)
    plain = lambda params, batch: cross_entropy(outputs(params, batch), batch)  # noqa: E731
    for measure in (
        lambda f: optax_sam.m_sharpness(f, PARAMS, BATCH, 0.1, num_micro_batches=4, steps=3),
        lambda f: optax_sam.average_sharpness(f, PARAMS, BATCHES, 0.1).mean,
    ):
        np.testing.assert_allclose(measure(loss_fn), measure(plain), rtol=1e-4)
