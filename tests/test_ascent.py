"""Ascents: from a gradient to a perturbation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from tests.helpers.problems import assert_close, assert_identical

ASCENTS = {
    "normalized": optax_sam.normalized_ascent,
    "unnormalized": optax_sam.unnormalized_ascent,
    "adaptive": optax_sam.adaptive_ascent,
}
every_ascent = pytest.mark.parametrize("make", ASCENTS.values(), ids=ASCENTS)


def climb(ascent, grads, params):
    return ascent.update(grads, ascent.init(params), params)[0]


@every_ascent
def test_zero_gradient_gives_zero_and_finite_derivatives(make):
    params = {"a": jnp.ones(3), "b": None, "c": jnp.zeros((2, 2), jnp.bfloat16), "d": jnp.ones(2, jnp.float16)}
    grads = jax.tree.map(jnp.zeros_like, params)

    def total(grads):
        epsilon = climb(make(0.1), grads, params)
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(epsilon))

    assert_identical(climb(make(0.1), grads, params), grads)
    assert all(np.all(np.isfinite(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(jax.grad(total)(grads)))


@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_length_is_rho_for_gradients_of_any_size(jit):
    ascend = jit(lambda grads: climb(optax_sam.normalized_ascent(0.05), grads, grads))
    for scale in (1e-35, 1e-18, 1e-10, 1e-3, 1.0, 1e4, 1e10, 1e18, 1e35):
        epsilon = ascend({"a": scale * jnp.array([3.0, 0.0]), "b": scale * jnp.array([[4.0]])})
        assert_close(epsilon, {"a": jnp.array([0.03, 0.0]), "b": jnp.array([[0.04]])})


@every_ascent
@pytest.mark.parametrize("scale", [1e-38, 1e-37, 8e37])
def test_gradients_at_the_limits_of_float32_give_no_nan(make, scale):
    grads = {"a": scale * jnp.array([3.0, 0.0]), "b": scale * jnp.array([[4.0]])}
    epsilon = climb(make(0.05), grads, jax.tree.map(jnp.ones_like, grads))
    assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(epsilon))


def test_tiny_float64_leaves_beside_float32_ones():
    with jax.enable_x64(True):
        grads = {"a": jnp.array([3e-160, 4e-160]), "b": jnp.zeros(2, jnp.float32)}
        epsilon = climb(optax_sam.normalized_ascent(0.5), grads, grads)
        assert_close(epsilon, {"a": jnp.array([0.3, 0.4]), "b": jnp.zeros(2, jnp.float32)})


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_non_finite_gradient_stays_visible(bad):
    grads = jnp.array([1.0, bad])
    assert not np.all(np.isfinite(climb(optax_sam.normalized_ascent(0.1), grads, grads)))


@every_ascent
def test_splitting_a_leaf_changes_nothing(make):
    grads, params = jnp.arange(1.0, 7.0), jnp.linspace(-1.0, 1.0, 6)
    whole = climb(make(0.3), grads, params)
    parts = climb(make(0.3), [grads[:2], grads[2:]], [params[:2], params[2:]])
    assert_close(jnp.concatenate(parts), whole)


@pytest.mark.parametrize("name", ["normalized", "adaptive"])
def test_scaling_the_loss_changes_nothing(name):
    grads, params = jnp.arange(1.0, 7.0), jnp.linspace(-1.0, 1.0, 6)
    ascent = ASCENTS[name](0.3)
    assert_close(climb(ascent, 1e5 * grads, params), climb(ascent, grads, params))


def test_adaptive_ascent_has_length_rho_in_units_of_the_params():
    params, grads = jnp.array([2.0, -0.5, 0.0]), jnp.array([1.0, -2.0, 3.0])
    epsilon = climb(optax_sam.adaptive_ascent(0.3, eta=0.1), grads, params)
    np.testing.assert_allclose(np.linalg.norm(epsilon / (np.abs(params) + 0.1)), 0.3, rtol=1e-6)
    assert np.all(np.sign(epsilon) == np.sign(grads))


@every_ascent
def test_schedule_counts_updates(make):
    grads = params = jnp.array([3.0, 4.0])
    ascent = make(lambda step: 0.1 * (step + 1))
    state = ascent.init(params)
    for step in range(3):
        assert state.ascent_step.dtype == jnp.int32
        assert int(state.ascent_step) == step
        epsilon, state = ascent.update(grads, state, params)
        assert_close(epsilon, climb(make(0.1 * (step + 1)), grads, params))


@every_ascent
def test_strict_dtype_promotion_is_enough(make):
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    with jax.numpy_dtype_promotion("strict"):
        epsilon = jax.jit(lambda g, p: climb(make(jnp.float32(0.1)), g, p))(params, params)
    assert [leaf.dtype for leaf in jax.tree.leaves(epsilon)] == [jnp.bfloat16, jnp.float32]


def test_one_huge_element_among_ordinary_and_tiny_ones():
    grads, params = jnp.array([1e30, -1.0, 1e-30]), jnp.ones(3)
    assert_close(climb(optax_sam.normalized_ascent(0.1), grads, params), jnp.array([0.1, 0.0, 0.0]))
    assert_close(climb(optax_sam.adaptive_ascent(0.1, eta=0.0), grads, params), jnp.array([0.1, 0.0, 0.0]))


@every_ascent
@pytest.mark.parametrize("rho", [np.float64(0.3), np.array(0.3), jnp.float32(0.3), 0], ids=repr)
def test_rho_is_any_real_scalar(make, rho):
    grads, params = {"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([1.0, -1.0])}
    expected = climb(make(float(rho)), grads, params)
    assert_close(climb(make(rho), grads, params), expected)
    assert_close(jax.jit(lambda rho: climb(make(rho), grads, params))(jnp.float32(rho)), expected)


@every_ascent
def test_frozen_leaves_stay_out_of_the_perturbation_and_of_the_norm(make):
    grads, params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}, {"a": jnp.array([1.0, 2.0]), "b": jnp.ones(1)}
    epsilon = climb(optax.chain(optax.freeze({"a": False, "b": True}), make(0.5)), grads, params)
    assert not np.any(epsilon["b"])
    assert_close(epsilon["a"], climb(make(0.5), grads["a"], params["a"]))


def test_ascents_compose_with_optax():
    ascent = optax.chain(optax.ema(0.5, debias=False), optax_sam.unnormalized_ascent(1.0))
    params, state = jnp.zeros(1), ascent.init(jnp.zeros(1))
    for expected in (0.5, 0.75):
        epsilon, state = ascent.update(jnp.ones(1), state, params)
        assert float(epsilon[0]) == expected


def test_rho_may_be_a_constant_array_where_everything_is_traced():
    rho = jnp.float32(0.5)
    assert float(jax.jit(lambda: optax_sam.unnormalized_ascent(rho).update(1.0, optax.EmptyState())[0])()) == 0.5
