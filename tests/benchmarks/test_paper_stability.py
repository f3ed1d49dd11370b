"""The toys of Kim et al. 2023 against golden numbers and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from benchmarks.papers import stability_toys as toys

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (optax.identity(), (-2.94, -0.0102)),
        (optax_sam.sam(0.5), (-2.9300000556, -0.0101666669)),
        (optax_sam.usam(0.4), (-2.892, -0.01004)),
    ],
)
def test_first_step_on_the_saddle(link, expected):
    path = toys.path_from(toys.SADDLE_START, toys.saddle, link, optax.sgd(toys.SADDLE_RATE), 1)
    np.testing.assert_allclose(path[1], expected, atol=1e-10)


@pytest.mark.parametrize(
    ("link", "expected"),
    [(optax.identity(), (0.997859375, 1.996525)), (optax_sam.sam(0.5), (0.9924245230, 1.9878129849))],
)
def test_first_step_on_beale(link, expected):
    path = toys.path_from(toys.BEALE_START, toys.beale, link, optax.sgd(toys.BEALE_RATE), 1)
    np.testing.assert_allclose(path[1], expected, atol=1e-10)


def test_critical_points_of_beale():
    with jax.enable_x64(True):
        saddle, minimum = jnp.array(toys.BEALE_SADDLE), jnp.array(toys.BEALE_MINIMUM)
        np.testing.assert_allclose(jax.grad(toys.beale)(saddle), 0, atol=1e-12)
        np.testing.assert_allclose(jnp.linalg.eigvalsh(jax.hessian(toys.beale)(saddle)), (-27.75, 27.75), rtol=1e-12)
        assert toys.beale(saddle) == pytest.approx(14.203125, abs=1e-12)
        assert toys.beale(minimum) == pytest.approx(0, abs=1e-12)


def test_who_is_trapped():
    saddles, beales = toys.saddle_paths(), toys.beale_paths()
    assert saddles["critical_rho"] == pytest.approx(0.5, abs=1e-3)
    assert [claim.verdict for claim in toys.path_claims(saddles, beales)] == ["holds"] * 3
    assert {name for name, run in beales.items() if run["to_saddle"] < toys.NEAR} == set(toys.TRAPPED)
    assert all(run["to_minimum"] < 0.6 for name, run in beales.items() if name not in toys.TRAPPED)


def test_variance_of_sgd_at_a_minimum_is_that_of_the_ornstein_uhlenbeck_process():
    times = np.array([0.5, 50.0])
    expected = toys.DIFFUSION_RATE / (2 * 32) * (1 - np.exp(-2 * times))
    np.testing.assert_allclose(toys.variance_by_formula(1.0, 0.0, 32, times), expected)


@pytest.mark.parametrize(("differentiated", "power"), [(False, 1), (True, 2)])
def test_the_square_belongs_to_the_differentiated_perturbation(differentiated, power):
    rho, batch_size, particles = 0.5, 32, 1_000
    variances = toys.diffusion(rho, batch_size, jax.random.key(0), particles, differentiated)
    times = np.linspace(0, toys.DIFFUSION_TIME, toys.NUM_TIMES + 1)[1:]
    for axis, curvature in enumerate(toys.CURVATURES):
        expected = toys.variance_by_formula(curvature, rho, batch_size, times, power)
        np.testing.assert_allclose(variances[:, axis], expected, rtol=4 * np.sqrt(2 / particles))
        other = toys.variance_by_formula(curvature, rho, batch_size, times, 3 - power)
        assert abs(variances[-1, axis] / other[-1] - 1) > 0.3
