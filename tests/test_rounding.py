"""w + ε in narrow dtypes: one of the two neighbours, right on average, with the derivative of the exact sum."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import checkify

import optax_sam
from optax_sam import _rounding
from optax_sam._rounding import rounded_sum

NARROW = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
SPAN = {"bfloat16": (-35, 37), "float16": (-9, 4)}  # powers of ten, float16's subnormal numbers included


def neighbours(exact, dtype):
    """The nearest numbers of the dtype below and above float64 numbers."""
    nearest = exact.astype(dtype)
    below = np.where(nearest.astype(np.float64) > exact, np.nextafter(nearest, dtype(-np.inf)), nearest)
    above = np.where(nearest.astype(np.float64) < exact, np.nextafter(nearest, dtype(np.inf)), nearest)
    return below.astype(np.float64), above.astype(np.float64)


@NARROW
def test_sums_are_one_of_both_neighbours_and_right_on_average(dtype):
    dtype = np.dtype(dtype)
    rng, size = np.random.default_rng(0), 200_000
    param = (
        rng.choice([-1, 1], size) * rng.uniform(1, 10, size) * 10.0 ** rng.integers(*SPAN[dtype.name], size)
    ).astype(dtype)
    step = (param.astype(np.float32) * rng.uniform(-0.01, 0.01, size)).astype(dtype)
    exact = (param.astype(np.float32) + step.astype(np.float32)).astype(np.float64)
    result = np.asarray(jax.jit(rounded_sum)(param, step)).astype(np.float64)
    below, above = neighbours(exact, dtype.type)
    assert np.all((result == below) | (result == above))
    apart = above > below
    assert np.mean(apart) > 0.5  # of float16, every subnormal step that rounds to zero is none
    error, part = (x[apart] / (above - below)[apart] for x in (result - exact, exact - below))
    for quarter in range(4):  # of the way up, or rounding to nearest would be right on average too
        errors = error[np.floor(4 * part) == quarter]
        assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(len(errors))


def test_tiny_bfloat16_numbers_are_rounded_as_finely_as_float32_can_space_them():
    rng = np.random.default_rng(0)
    param, step = (jnp.asarray(rng.uniform(2**-124, 2**-120, 1000), jnp.bfloat16) for _ in range(2))
    exact = np.asarray(param, np.float64) + np.asarray(step, np.float64)
    assert np.max(np.abs(np.asarray(rounded_sum(param, step), np.float64) - exact)) <= 2**-126


@NARROW
def test_steps_of_zero_leave_params_as_they_are(monkeypatch, dtype):
    monkeypatch.setattr(_rounding, "_hash_uniform", lambda x, y: jnp.zeros_like(x))  # what would round anything up
    param = jnp.array([0.0, 1.0, -1.5, 6e-8, np.inf, -np.inf], dtype)
    np.testing.assert_array_equal(rounded_sum(param, jnp.zeros_like(param)), param)


@NARROW
def test_zeros_raise_no_nan(dtype):
    params = {"zero": jnp.zeros(4, dtype), "one": jnp.ones(4, dtype)}
    grads, link = jax.tree.map(lambda w: 0 * w, params), optax_sam.sam(0.1)
    update = lambda: link.update(grads, link.init(params), params, grad_fn=lambda w: w)[0]  # noqa: E731
    with jax.debug_nans(True):
        jax.block_until_ready(update())
        jax.block_until_ready(jax.jit(update)())
    error, _ = checkify.checkify(jax.jit(update), errors=checkify.float_checks)()
    assert error.get() is None


@NARROW
def test_derivatives_are_those_of_the_exact_sum(dtype):
    param, step = jnp.linspace(-2, 2, 7).astype(dtype), jnp.full(7, 1e-3, dtype)
    for argument in (0, 1):
        derivative = jax.grad(lambda *pair: jnp.sum(3 * rounded_sum(*pair).astype(jnp.float32)), argument)(param, step)
        assert derivative.dtype == dtype
        np.testing.assert_array_equal(derivative.astype(jnp.float32), 3.0)


def test_derivative_with_respect_to_rho_through_bfloat16_params():
    """Of s = ∇(Σ w⁴/4) at w + ρ g/‖g‖: ds/dρ = 3 w² g/‖g‖."""
    params = jnp.linspace(1.0, 2.0, 64, dtype=jnp.bfloat16)
    grad_fn = lambda w: w**3  # noqa: E731

    def total(rho):
        link = optax_sam.sam(rho)
        s, _ = link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn)
        return jnp.sum(s.astype(jnp.float32))

    w = np.asarray(params, np.float64)
    expected = np.sum(3 * w**2 * w**3 / np.linalg.norm(w**3))
    np.testing.assert_allclose(jax.jit(jax.grad(total))(0.05), expected, rtol=0.05)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"])
def test_params_of_eight_bits_are_refused(name):
    params = {"w": jnp.ones(4, getattr(ml_dtypes, name))}
    link = optax_sam.sam(0.1)
    with pytest.raises(TypeError, match=rf"16 bits or more; got {name}"):
        link.update(params, link.init(params), params, grad_fn=lambda w: w)
