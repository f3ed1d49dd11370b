"""Renormalization: the norm that went in comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from tests.helpers.problems import assert_close, mlp_batch, mlp_loss, mlp_params


def scaled_by(factor):
    return optax.stateless(lambda g, _: jax.tree.map(lambda x: (factor * x).astype(x.dtype), g))


def renormalize(link, grads):
    return link.update(grads, link.init(grads), grads)[0]


@pytest.mark.parametrize("factor", [1e-3, 1.0, 7.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_any_factor_is_undone(factor, dtype):
    grads = {"a": jnp.array([3.0, -1.0], dtype), "b": jnp.array([[0.5]], dtype)}
    assert_close(renormalize(optax_sam.renormalized(scaled_by(factor)), grads), grads)


@pytest.mark.parametrize(("factor", "expected"), [(0.5, 0.5), (2.0, 1.0)])
def test_truncated_variant_only_shortens(factor, expected):
    grads = jnp.array([3.0, 4.0])
    outputs = renormalize(optax_sam.renormalized(scaled_by(factor), max_scale=1.0), grads)
    assert_close(outputs, expected * grads)


def test_norm_of_the_sam_gradient_is_that_of_the_clean_gradient():
    params, grad_fn = mlp_params(), jax.grad(mlp_loss)
    grads, batch = grad_fn(params, mlp_batch()), mlp_batch()
    plain, stable = optax_sam.asam(0.5), optax_sam.renormalized(optax_sam.asam(0.5))
    s, _ = plain.update(grads, plain.init(params), params, grad_fn=grad_fn, batch=batch)
    renormalized, _ = stable.update(grads, stable.init(params), params, grad_fn=grad_fn, batch=batch)
    norms = [np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(t))) for t in (grads, s)]
    assert abs(norms[1] / norms[0] - 1) > 0.01
    assert_close(renormalized, jax.tree.map(lambda x: x * np.float32(norms[0] / norms[1]), s))


@pytest.mark.parametrize("outer", [0.0, 1.0])
def test_zero_in_or_out_is_zero(outer):
    grads = outer * jnp.array([3.0, 4.0])
    outputs = renormalize(optax_sam.renormalized(scaled_by(0.0 if outer else 1.0)), grads)
    assert np.array_equal(outputs, np.zeros(2))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_gradient_stays_visible(bad):
    assert not np.all(np.isfinite(renormalize(optax_sam.renormalized(scaled_by(2.0)), jnp.array([1.0, bad]))))


def test_state_is_that_of_the_inner_transformation():
    inner = optax.trace(0.9)
    assert_close(optax_sam.renormalized(inner).init(jnp.ones(2)), inner.init(jnp.ones(2)))


def test_averaging_inside_is_refused():
    link = optax_sam.renormalized(optax_sam.msam(0.1))
    with pytest.raises(ValueError, match=r"this one averages.*`micro_batched\(renormalized"):
        link.update(jnp.ones((4, 2)), link.init(jnp.ones(2)), jnp.ones(2), grad_fn=lambda p, b: p, batch=jnp.ones(4))


@pytest.mark.parametrize(("size", "factor"), [(1e15, 1e-10), (1e-15, 1e10), (1e20, 1e-35), (1e-15, 1e35)])
def test_norms_of_very_different_sizes(size, factor):
    grads = jnp.array([3.0, -4.0]) * size
    link = optax_sam.renormalized(optax.scale(factor))
    for update in (link.update, jax.jit(link.update)):
        np.testing.assert_allclose(update(grads, link.init(grads))[0], grads, rtol=1e-5)


def test_extreme_gradients_keep_their_norm():
    grads = jnp.array([1e38, 1.0, 0.0])
    assert_close(jax.jit(lambda g: renormalize(optax_sam.renormalized(scaled_by(0.5)), g))(grads), grads)
