"""The Hessian: against dense ones, prescribed spectra, closed forms and matfree."""

import functools

import jax
import jax.numpy as jnp
import matfree.decomp
import matfree.stochtrace
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from optax_sam.sharpness.lanczos import BLOCK, projections, random_vectors
from tests.helpers.problems import CountedPasses, mlp_batch, mlp_loss, mlp_params

EXAMPLES = mlp_batch(size=28)
BATCHES = [jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], EXAMPLES) for i in range(4)]  # the last one of 4
ONE = [jnp.ones(1)]
SPECTRA = {
    "spread": np.linspace(-1, 3, 60),
    "clustered": np.concatenate([np.linspace(0, 1, 57), 5 + 1e-3 * np.arange(3)]),
    "outliers": np.concatenate([np.linspace(-0.1, 0.1, 57), [4.0, 7.0, -2.0]]),
    "geometric": np.geomspace(1e-6, 1e2, 60),
    "repeated": np.repeat([-2.0, 0.0, 1.0, 5.0], 15),
    "low rank": np.concatenate([np.zeros(57), [1.0, 2.0, 3.0]]),
    "negative larger": np.concatenate([np.linspace(0, 1, 58), [3.0, -50.0]]),
    "identity": np.full(60, 2.0),
    "zero": np.zeros(60),
    "small": 1e-25 * np.linspace(-1, 3, 60),
    "large": 1e25 * np.linspace(-1, 3, 60),
}
FIVE_FOLD = np.concatenate([np.full(5, 10.0), [8.0, 6.0, 4.0, 3.0], np.linspace(-1, 1, 51)])
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)


@functools.partial(jax.jit, static_argnums=0)
def dense_hessian(loss_fn, params, batch):
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda w: loss_fn(unravel(w), batch))(flat)


def quadratic_loss(params, batch):
    """½·wᵀAw, where A is the mean of the batch."""
    w = jnp.concatenate([params["a"].ravel(), params["b"]])
    return w @ jnp.mean(batch, axis=0) @ w / 2


def quadratic(spectrum):
    """A quadratic loss whose Hessian has the spectrum, params of two leaves, and batches."""
    size, half = len(spectrum), len(spectrum) // 2
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    matrix = (basis @ np.diag(spectrum) @ basis.T).astype(np.float32)
    return quadratic_loss, {"a": jnp.zeros((1, half)), "b": jnp.zeros(size - half)}, [jnp.asarray(matrix)[None]]


def diagonal_loss(params, batch):
    """Its Hessian is diag(1, 2, 3, 4, 1, 2, …), of size 32."""
    return jnp.mean(batch) * jnp.sum(jnp.tile(jnp.arange(1.0, 5).reshape(2, 2), (8, 1)) * params["w"] ** 2) / 2


def assert_near_eigenvalues(found, spectrum):
    """Each value is within its residual of an eigenvalue, but for float32."""
    distances = np.min(np.abs(np.asarray(spectrum) - found.values[:, None]), axis=1)
    assert np.all(distances <= found.residuals + 1e-5 * np.max(np.abs(spectrum)))


def test_both_ends_are_those_of_the_dense_hessian():
    expected = np.linalg.eigvalsh(dense_hessian(mlp_loss, mlp_params(), EXAMPLES).astype(float))[::-1]
    found = optax_sam.hessian_eigenvalues(mlp_loss, mlp_params(), [EXAMPLES], k=3, num_smallest=2, rtol=1e-4)
    assert found.converged
    assert np.all(found.residuals <= 1e-4 * np.maximum(np.abs(found.values), 0.01 * np.max(np.abs(expected))))
    np.testing.assert_allclose(found.values, [*expected[:3], *expected[-2:]], atol=2e-5 * np.max(np.abs(expected)))


@every_spectrum
def test_largest_and_smallest_of_prescribed_spectra(spectrum):
    found = optax_sam.hessian_eigenvalues(*quadratic(spectrum), num_smallest=1)
    assert found.converged
    assert_near_eigenvalues(found, spectrum)
    np.testing.assert_allclose(found.values, [max(spectrum), min(spectrum)], atol=1e-3 * np.max(np.abs(spectrum)))


def test_the_larger_eigenvalues_are_found_in_order():
    found = optax_sam.hessian_eigenvalues(*quadratic(SPECTRA["geometric"]), k=8, rtol=1e-5)
    np.testing.assert_allclose(found.values, np.sort(SPECTRA["geometric"])[::-1][:8], atol=1e-3)


@pytest.mark.parametrize(
    ("spectrum", "k", "num_smallest"),
    [
        (FIVE_FOLD, 5, 0),
        (-FIVE_FOLD, 1, 5),
        (np.concatenate([[1e3], 1e-3 * np.linspace(1, 2, 59)]), 3, 1),
        (np.geomspace(1e-6, 1, 60), 30, 0),
        (np.concatenate([5 + 1e-4 * np.arange(10), np.linspace(0, 1, 50)]), 4, 0),
    ],
    ids=["five-fold", "five-fold smallest", "far below the largest", "six decades", "clustered"],
)
def test_converged_promises_residuals_within_the_tolerance_and_eigenvalues_within_residuals(spectrum, k, num_smallest):
    loss_fn, params, [matrix] = quadratic(spectrum)
    expected = np.linalg.eigvalsh(np.asarray(matrix[0], np.float64))
    found = optax_sam.hessian_eigenvalues(loss_fn, params, [matrix], k, num_smallest=num_smallest)
    assert found.converged
    largest = np.max(np.abs(expected)) * (1 + 1e-5)
    assert np.all(found.residuals <= 1e-3 * np.maximum(np.abs(found.values), 0.01 * largest))
    assert_near_eigenvalues(found, expected)


def test_repeated_eigenvalues_are_found_at_least_once_before_what_follows():
    found = optax_sam.hessian_eigenvalues(*quadratic(FIVE_FOLD), k=5)
    distinct = np.unique(FIVE_FOLD)[::-1]
    indices = np.argmin(np.abs(found.values[:, None] - distinct), axis=1)
    np.testing.assert_allclose(found.values, distinct[indices], rtol=1e-3)
    assert set(indices) == set(range(max(indices) + 1))


def test_tolerance_is_relative_to_each_value_beside_an_outlier():
    spectrum = np.concatenate([[100.0, 1.5], np.linspace(0, 1, 2_000)])
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(jnp.asarray(spectrum, jnp.float32) * w**2) / 2  # noqa: E731
    found = optax_sam.hessian_eigenvalues(loss_fn, jnp.zeros(len(spectrum)), ONE, k=3, rtol=1e-2)
    np.testing.assert_allclose(found.values, [100, 1.5, 1], rtol=1e-2)
    assert np.all(found.residuals <= 1e-2 * found.values)


@pytest.mark.parametrize("spectrum", [[2.0] * 5, [5.0, 5.0, 1.0, 1.0, -3.0], [0.0] * 5, [7.0]])
def test_small_hessians_are_exhausted_with_what_repeats(spectrum):
    found = optax_sam.hessian_eigenvalues(*quadratic(spectrum), k=len(spectrum))
    assert found.num_products == len(spectrum)
    np.testing.assert_allclose(found.values, np.sort(spectrum)[::-1], atol=1e-5)


def test_outlier_that_the_first_vector_hardly_holds_is_found():
    """At the first vector, the identity is all there seems to be: its residual is below the tolerance."""
    size = 100_000
    loss_fn = lambda w, x: jnp.mean(x) * (jnp.sum(w**2) + 1e-3 * w[0] ** 2 * 1e2) / 2  # noqa: E731
    found = optax_sam.hessian_eigenvalues(loss_fn, jnp.zeros(size), ONE)
    np.testing.assert_allclose(found.values, [1.1], rtol=1e-3)


def test_too_few_products_are_said_and_residuals_still_hold():
    spectrum = np.linspace(1, 2, 60)
    with pytest.warns(UserWarning, match=r"after 5 products.*Raise max_products"):
        found = optax_sam.hessian_eigenvalues(*quadratic(spectrum), max_products=5)
    assert not found.converged
    assert found.num_products == 5
    assert found.residuals[0] > 1e-2
    assert_near_eigenvalues(found, spectrum)


def test_exhausted_basis_says_that_the_rest_is_rounding():
    with pytest.warns(UserWarning, match=r"after 5 products.*Raise rtol: what is left is rounding"):
        optax_sam.hessian_eigenvalues(*quadratic([1.0, 2.0, 3.0, 4.0, 5.0]), rtol=0.0)


def test_residuals_include_the_errors_of_products():
    """An operator that is off by 1 % is not reported as known to 0.001 %."""
    matrix = np.diag(np.linspace(1, 2, 40)) + 0.01 * np.random.default_rng(0).normal(size=(40, 40)) / np.sqrt(40)
    *_, last = projections(lambda v: jnp.asarray(matrix, jnp.float32) @ v, jnp.ones(40), 40)
    _, _, residuals = last.eigenpairs()
    assert last.remainder < 1e-4
    assert 2e-3 < np.median(residuals) < 2e-2


def test_projections_agree_with_matfree():
    hessian = dense_hessian(mlp_loss, mlp_params(), EXAMPLES)
    _, unravel = ravel_pytree(mlp_params())
    start = random_vectors(jax.random.normal, mlp_params())(jax.random.key(5))
    *_, ours = projections(lambda v: unravel(hessian @ ravel_pytree(v)[0]), start, 8)
    theirs = matfree.decomp.tridiag_sym(8, reortho="full")(lambda v: hessian @ v, ravel_pytree(start)[0])
    np.testing.assert_allclose(ours.matrix, theirs.J_small, atol=1e-4 * np.max(ours.matrix))
    np.testing.assert_allclose(ours.remainder, np.linalg.norm(theirs.residual), rtol=1e-3)


def test_trace_and_its_error_agree_with_matfree():
    found = optax_sam.hessian_trace(mlp_loss, mlp_params(), BATCHES, num_probes=20, key=jax.random.key(3))
    draw = random_vectors(jax.random.rademacher, mlp_params())
    probes = jnp.stack([ravel_pytree(draw(key))[0] for key in jax.random.split(jax.random.key(3), 20)])
    hessian = dense_hessian(mlp_loss, mlp_params(), EXAMPLES)
    estimate = matfree.stochtrace.estimator_monte_carlo_mean_and_sem(
        matfree.stochtrace.monte_carlo_trace(), lambda key: probes
    )
    mean, error = estimate(lambda v: hessian @ v, None)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(found.standard_error, error * np.sqrt(20 / 19), rtol=1e-4)
    assert abs(found.mean - jnp.trace(hessian)) < 4 * found.standard_error


def test_spectral_density_agrees_with_matfree():
    loss_fn, params, [matrix] = quadratic(SPECTRA["outliers"])
    density = optax_sam.spectral_density(loss_fn, params, [matrix], num_probes=3, num_products=7, key=jax.random.key(1))
    draw = random_vectors(jax.random.normal, params)
    for key, nodes, weights in zip(jax.random.split(jax.random.key(1), 3), density.nodes, density.weights, strict=True):
        lanczos = matfree.decomp.tridiag_sym(7, reortho="full")
        theirs = lanczos(lambda v: matrix[0] @ v, ravel_pytree(draw(key))[0])
        values, vectors = np.linalg.eigh(np.asarray(theirs.J_small, np.float64))
        np.testing.assert_allclose(nodes, values, atol=1e-3)
        np.testing.assert_allclose(weights, vectors[0] ** 2, atol=1e-3)


def test_spectral_density_has_the_moments_of_the_spectrum():
    spectrum = np.concatenate([np.linspace(-1, 1, 58), [8.0, 10.0]])
    density = optax_sam.spectral_density(*quadratic(spectrum), num_probes=20, num_products=15)
    np.testing.assert_allclose(np.sum(density.weights, axis=1), 1, rtol=1e-5)
    for power in (1, 2):
        moments = np.sum(density.weights * density.nodes**power, axis=1)
        error = np.std(moments, ddof=1) / np.sqrt(20)
        assert abs(np.mean(moments) - np.mean(spectrum**power)) < 4 * error < np.mean(spectrum**2)
    positions = np.linspace(-3, 13, 2001)
    curve = density.smoothed(positions, width=0.1)
    np.testing.assert_allclose(np.trapezoid(curve, positions), 1, rtol=1e-3)
    bulk = (positions > -0.8) & (positions < 0.8)
    np.testing.assert_allclose(np.mean(curve[bulk]), 58 / 60 / 2, rtol=0.1)
    assert curve[np.argmin(abs(positions - 9))] < 1e-6


def test_density_of_degenerate_spectra():
    for spectrum in (SPECTRA["repeated"], SPECTRA["zero"]):
        density = optax_sam.spectral_density(*quadratic(spectrum), num_probes=2, num_products=20)
        np.testing.assert_allclose(np.sum(density.weights, axis=1), 1, rtol=1e-5)
        near = np.min(np.abs(density.nodes[..., None] - spectrum), axis=-1)
        assert np.sum(density.weights[near > 1e-4]) < 1e-6


def test_batches_are_streamed_and_weighted_by_their_examples():
    loader = CountedPasses([jnp.full(6, 1.0), jnp.full(2, 5.0)])
    trace = optax_sam.hessian_trace(lambda w, x: jnp.mean(x) * w**2, 1.0, loader, num_probes=3)
    assert trace.mean == pytest.approx(2 * (6 * 1.0 + 2 * 5.0) / 8)
    assert loader.passes == 3
    streamed = optax_sam.hessian_eigenvalues(mlp_loss, mlp_params(), BATCHES, k=2)
    whole = optax_sam.hessian_eigenvalues(mlp_loss, mlp_params(), [EXAMPLES], k=2)
    np.testing.assert_allclose(streamed.values, whole.values, rtol=1e-5)


def test_batch_without_arrays():
    found = optax_sam.hessian_eigenvalues(lambda w, batch: jnp.sum(3 * w**2), jnp.ones(4), [None])
    np.testing.assert_allclose(found.values, [6.0], rtol=1e-6)


@pytest.mark.parametrize(
    "measure",
    [
        optax_sam.hessian_eigenvalues,
        functools.partial(optax_sam.hessian_trace, num_probes=2),
        functools.partial(optax_sam.spectral_density, num_probes=1, num_products=3),
    ],
)
def test_compiled_once_for_a_loss_function(measure, compilations):
    traces = []

    def loss_fn(params, batch):
        traces.append(batch)
        return mlp_loss(params, batch)

    measure(loss_fn, mlp_params(), BATCHES[:3])
    assert len(traces) == 1
    for function, expected in ((loss_fn, 0), (lambda params, batch: loss_fn(params, batch), 1)):
        traces.clear()
        compilations.clear()
        measure(function, mlp_params(), BATCHES[:3])
        assert (len(traces), len(compilations)) == (expected, expected)


def test_loss_with_its_own_backward_pass():
    square = jax.custom_vjp(lambda w: w**2)
    square.defvjp(lambda w: (w**2, w), lambda w, cotangent: (2 * w * cotangent,))
    found = optax_sam.hessian_eigenvalues(lambda w, x: jnp.sum(square(w)) * jnp.mean(x), jnp.ones(12), ONE)
    np.testing.assert_allclose(found.values, [2.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_params_are_widened(dtype):
    params = jax.tree.map(lambda w: w.astype(dtype), mlp_params())
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    found = optax_sam.hessian_eigenvalues(mlp_loss, params, BATCHES, num_smallest=1, rtol=1e-5)
    expected = jnp.linalg.eigvalsh(dense_hessian(mlp_loss, wide, EXAMPLES))
    np.testing.assert_allclose(found.values, [expected[-1], expected[0]], rtol=1e-4)
    assert optax_sam.hessian_trace(mlp_loss, params, BATCHES) == optax_sam.hessian_trace(mlp_loss, wide, BATCHES)


def test_float64_params_are_kept():
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (mlp_params(), EXAMPLES))
        expected = np.linalg.eigvalsh(dense_hessian(mlp_loss, params, batch))
        batches = [jax.tree.map(lambda x, i=i: x[7 * i : 7 * i + 7], batch) for i in range(4)]
        found = optax_sam.hessian_eigenvalues(mlp_loss, params, batches, num_smallest=1, rtol=1e-12)
        np.testing.assert_allclose(found.values, expected[[-1, 0]], rtol=1e-11)
        mixed = params | {"output": params["output"].astype(jnp.float32)}
        found = optax_sam.hessian_eigenvalues(mlp_loss, mixed, batches, num_smallest=1, rtol=1e-4)
        np.testing.assert_allclose(found.values, expected[[-1, 0]], rtol=1e-4)


def test_none_and_scalar_and_empty_leaves():
    params = {"a": jnp.ones(3), "none": None, "scalar": 2.0, "empty": jnp.zeros((0, 2))}

    def loss_fn(params, batch):
        return jnp.mean(batch) * (jnp.sum(params["a"] ** 2) + 5 * params["scalar"] ** 2) + jnp.sum(params["empty"])

    found = optax_sam.hessian_eigenvalues(loss_fn, params, ONE, num_smallest=1)
    np.testing.assert_allclose(found.values, [10, 2], rtol=1e-5)
    assert optax_sam.hessian_trace(loss_fn, params, ONE).mean == pytest.approx(16)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_vectors_and_their_basis_stay_sharded(kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    params = jax.device_put({"w": jnp.ones((16, 2))}, sharding)
    seen = []

    def product(vector):
        seen.append(vector["w"].sharding)
        seen.extend(x.addressable_shards[0].data.shape for x in jax.live_arrays() if x.shape == (BLOCK, 16, 2))
        return jax.tree.map(lambda v: jax.device_put(3 * v, jax.devices()[0]), vector)

    start = random_vectors(jax.random.normal, params)(jax.random.key(0))
    assert start["w"].sharding == sharding
    if kind == AxisType.Auto:
        list(projections(product, start, BLOCK + 1))
        assert set(seen[:-3]) == {sharding, (BLOCK, 8, 2)}
    with jax.set_mesh(mesh):
        batches = [jax.device_put(jnp.ones(8), sharding)]
        found = optax_sam.hessian_eigenvalues(diagonal_loss, params, batches, num_smallest=1, rtol=1e-5)
        trace = optax_sam.hessian_trace(diagonal_loss, params, batches, num_probes=2)
    np.testing.assert_allclose(found.values, [4, 1], rtol=1e-4)
    assert trace.mean == pytest.approx(8 * (1 + 2 + 3 + 4))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batches_on_a_mesh(kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
    batches = [jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("data")))] * 2
    params = {"w": jnp.ones((16, 2))}
    found = optax_sam.hessian_eigenvalues(diagonal_loss, params, batches, num_smallest=1)
    np.testing.assert_allclose(found.values, [4, 1], rtol=1e-4)
    constant = optax_sam.hessian_eigenvalues(lambda w, x: jnp.mean(x) * jnp.sum(w["w"] ** 2), params, batches)
    np.testing.assert_allclose(constant.values, [2], rtol=1e-4)  # the basis goes on in random directions


def test_basis_grows_as_it_is_needed():
    loss_fn, params, matrices = quadratic(SPECTRA["outliers"])
    blocks = []

    def batches():
        blocks.append(sum(x.shape == (BLOCK, 30) for x in jax.live_arrays()))
        return iter(matrices)

    class Batches:
        __iter__ = staticmethod(batches)

    optax_sam.hessian_eigenvalues(loss_fn, params, Batches(), k=5, rtol=1e-5, max_products=60)
    assert blocks[: BLOCK + 2] == [0] + [1] * BLOCK + [2]


def test_progress_is_shown(capsys):
    optax_sam.hessian_eigenvalues(mlp_loss, mlp_params(), BATCHES, max_products=15, progress=True)
    optax_sam.hessian_trace(mlp_loss, mlp_params(), BATCHES, num_probes=4, progress=True)
    optax_sam.spectral_density(mlp_loss, mlp_params(), BATCHES, num_probes=2, num_products=3, progress=True)
    shown = capsys.readouterr().err
    assert all(f"/{total} [" in shown for total in (15, 4, 6))


def test_only_progress_needs_tqdm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match="tqdm"):
        optax_sam.hessian_eigenvalues(mlp_loss, mlp_params(), BATCHES, progress=True)
    optax_sam.hessian_eigenvalues(mlp_loss, mlp_params(), BATCHES)
