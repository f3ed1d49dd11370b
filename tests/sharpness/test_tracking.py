"""The tracked eigenvalue: against Lanczos that converged, through a training, and where eigenvalues cross."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from tests.helpers.problems import CountedPasses, mlp_batch, mlp_loss, mlp_params

BATCH = mlp_batch(size=24)
BATCHES = [jax.tree.map(lambda x: x[:16], BATCH), jax.tree.map(lambda x: x[16:], BATCH)]


def test_follows_a_training_with_four_products_each_time():
    params, found, counted, errors = mlp_params(), None, CountedPasses(BATCHES), []
    optimizer = optax.sgd(0.05, 0.9)
    state = optimizer.init(params)
    for call in range(12):
        before = counted.passes
        found = optax_sam.track_eigenvalue(mlp_loss, params, counted, found)
        assert counted.passes - before == (4 if call else 10)
        exact = optax_sam.hessian_eigenvalues(mlp_loss, params, BATCHES, rtol=1e-5).values[0]
        assert abs(found.value - exact) <= found.residual + 1e-4
        errors.append(abs(found.value / exact - 1))
        for _ in range(10):
            updates, state = optimizer.update(jax.grad(mlp_loss)(params, BATCH), state)
            params = optax.apply_updates(params, updates)
    assert found.num_updates == 12
    assert np.median(errors) < 0.001
    assert np.max(errors) < 0.05  # right after the start, when the network changes as never again


def crossing(w, x):
    """Its Hessian is diag(2 − x, 1 + x, 0, …): the eigenvectors never turn, so that the last one knows nothing."""
    return ((2 - jnp.mean(x)) * w[0] ** 2 + (1 + jnp.mean(x)) * w[1] ** 2 + 0.1 * jnp.sum(w[2:] ** 2)) / 2


def test_another_eigenvector_that_becomes_the_first_is_found():
    w, found = jnp.ones(1_000), None
    for shift in (0.0, 0.2, 0.4):
        found = optax_sam.track_eigenvalue(crossing, w, [jnp.full(1, shift)], found)
        assert found.value == pytest.approx(2 - shift, rel=1e-3)
    for _ in range(4):
        found = optax_sam.track_eigenvalue(crossing, w, [jnp.full(1, 1.0)], found)
    assert found.value == pytest.approx(2, rel=1e-3)
    assert jnp.abs(found.vector[1]) > 0.999


def test_residual_says_when_the_products_were_too_few():
    spectrum = jnp.linspace(0, 1, 500)
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(spectrum * w**2) / 2  # noqa: E731
    found = optax_sam.track_eigenvalue(loss_fn, jnp.ones(500), [jnp.ones(1)])
    assert 1 - found.value > 1e-3
    assert found.residual > 1e-2
    for _ in range(40):
        found = optax_sam.track_eigenvalue(loss_fn, jnp.ones(500), [jnp.ones(1)], found)
    assert found.value == pytest.approx(1, abs=1e-3)


def test_of_a_layer_and_of_few_params():
    mask = {"hidden": {"kernel": False, "bias": False}, "output": True}
    exact = optax_sam.hessian_eigenvalues(mlp_loss, mlp_params(), BATCHES, scale=mask, rtol=1e-5).values[0]
    found = None
    for _ in range(2):
        found = optax_sam.track_eigenvalue(mlp_loss, mlp_params(), BATCHES, found, scale=mask)
    assert found.value == pytest.approx(exact, rel=1e-4)
    assert not jnp.any(found.vector["hidden"]["kernel"])
    one = optax_sam.track_eigenvalue(lambda w, x: jnp.mean(x) * 3 * w**2 / 2, jnp.float32(1), [jnp.ones(1)])
    assert (one.value, one.residual) == (3, 0)


@pytest.mark.parametrize("name", ["signs", "weights"])
def test_stays_at_the_eigenvalue_in_other_units(name):
    """What was found is an eigenvector of D·H·D already: scaled once more it would point elsewhere."""
    size = 40
    factors = jax.random.normal(jax.random.key(1), (size, size)) / size**0.5
    scale = jax.random.normal(jax.random.key(2), (size,))
    scale = jnp.sign(scale) if name == "signs" else jnp.abs(scale) + 0.01
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum((factors @ w) ** 2) / 2  # noqa: E731
    exact = np.linalg.eigvalsh(np.outer(scale, scale) * np.asarray(factors.T @ factors, np.float64))[-1]
    found = None
    for call in range(12):
        found = optax_sam.track_eigenvalue(loss_fn, jnp.ones(size), [jnp.ones(1)], found, scale=scale)
        assert found.value == pytest.approx(exact, rel=0.2 if call < 4 else 1e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_vector_is_sharded_as_params_are(kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    curvatures = jax.device_put(jnp.arange(1.0, 17), sharding)
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(curvatures * w**2) / 2  # noqa: E731
    w, found = jax.device_put(jnp.ones(16), sharding), None
    with jax.set_mesh(mesh):
        for _ in range(4):
            found = optax_sam.track_eigenvalue(loss_fn, w, [jnp.ones(2)], found)
            assert found.vector.sharding == sharding
    assert found.value == pytest.approx(16, rel=1e-3)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="num_products must be an int"):
        optax_sam.track_eigenvalue(mlp_loss, mlp_params(), BATCHES, num_products=2.0)
    with pytest.raises(ValueError, match="num_products must be at least 2"):
        optax_sam.track_eigenvalue(mlp_loss, mlp_params(), BATCHES, num_products=1)
    with pytest.raises(ValueError, match="The Hessian is not finite"):
        optax_sam.track_eigenvalue(lambda w, x: jnp.mean(x) * jnp.sqrt(w), jnp.float32(0), [jnp.ones(1)])
