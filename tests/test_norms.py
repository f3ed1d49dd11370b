"""Norms and inner products, against NumPy in float64 and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import optax_sam
from optax_sam import _norms
from tests.helpers.problems import assert_close

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "gpu"], indirect=True)


@pytest.fixture
def traced_anew():
    """For patches of what is read when a norm is traced."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def backend(request, monkeypatch, traced_anew):
    """The backend that the norms believe in."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


def exact(tree):
    return [np.asarray(leaf).astype(np.complex128).ravel() for leaf in jax.tree.leaves(tree)]


def exact_norm(tree):
    return np.linalg.norm(np.concatenate(exact(tree)))


@BACKENDS
@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_norm_of_any_size_is_that_of_numpy(backend, jit):
    norm, parts = jit(optax_sam.norm), np.random.default_rng(0).normal(size=(3, 2))
    for scale in (1e-36, 1e-18, 1e-9, 1e-8, 1.0, 1e4, 1e9, 1e18, 1e19, 1e37):
        tree = {"a": jnp.asarray(scale * parts, jnp.float32), "b": jnp.float32(scale), "none": None}
        np.testing.assert_allclose(float(norm(tree)), exact_norm(tree), rtol=1e-6, err_msg=f"{scale=}")


@BACKENDS
def test_norm_of_a_million_elements_beside_one(backend):
    changes_of_scale = (3.3e18, 9.2e18, 9.3e18, 1e-9, 9.3e-10, 9.4e-10)
    for largest in (1e-18, 1.0, 1e18, *changes_of_scale):
        tree = [jnp.full(1_000_000, largest / 3e3, jnp.float32), jnp.float32(largest)]
        np.testing.assert_allclose(float(optax_sam.norm(tree)), exact_norm(tree), rtol=1e-6, err_msg=f"{largest=}")


@BACKENDS
def test_norm_at_the_limits_of_float32_is_no_nan(backend):
    derivative = jax.grad(optax_sam.norm)
    for scale in (0.0, 1e-45, 1e-38, 1e-37, 1e38, 3e38):
        tree = jnp.full(4, scale, jnp.float32)
        assert not np.isnan(float(optax_sam.norm(tree))), scale
        assert np.all(np.isfinite(derivative(tree))), scale
        assert not np.isnan(float(optax_sam.vdot(tree, tree))), scale


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_stays_visible(bad):
    assert not np.isfinite(float(optax_sam.norm([jnp.ones(2), jnp.array(bad)])))


@pytest.mark.parametrize(("backend", "loop"), [("cpu", "cond"), ("gpu", "scan")], indirect=["backend"])
def test_only_a_cpu_leaves_the_second_pass_out(backend, loop):
    program = str(jax.make_jaxpr(lambda tree: optax_sam.norm(tree))(jnp.ones(3)))
    assert [kind for kind in ("cond[", "scan[") if kind in program] == [f"{loop}["]


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_norms_of_the_usual_size_are_taken_in_one_pass(monkeypatch, traced_anew, scale):
    monkeypatch.setattr(_norms, "_sum_of_squares", lambda leaves, scale, axes: scale * np.nan)
    np.testing.assert_allclose(optax_sam.norm(scale * jnp.array([3.0, 4.0])), 5.0 * scale, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "scale"), [(jnp.float16, 1e-5), (jnp.float16, 1e4), (jnp.bfloat16, 1.0)])
def test_sums_of_narrow_dtypes_are_taken_in_float32(dtype, scale):
    tree = {"a": jnp.full(500_000, scale, dtype), "b": jnp.full(500_000, scale, dtype)}
    norm, square = optax_sam.norm(tree), optax_sam.vdot(tree, tree)
    assert norm.dtype == square.dtype == jnp.float32
    np.testing.assert_allclose(float(norm), exact_norm(tree), rtol=1e-5)
    np.testing.assert_allclose(float(square), exact_norm(tree) ** 2, rtol=1e-5)


def test_norms_of_complex_leaves_of_nothing_and_of_mixtures():
    assert_close(optax_sam.norm({"z": jnp.array([3 + 4j]), "r": jnp.array([12.0])}), jnp.float32(13.0))
    assert float(optax_sam.norm({})) == float(optax_sam.vdot({}, {})) == 0.0
    assert float(optax_sam.norm({"empty": jnp.zeros((0, 3))})) == 0.0
    with jax.enable_x64(True):
        tree = [jnp.array([3.0, 0.0], jnp.float32), jnp.array([4e-8, 4.0]), jnp.array([12j], jnp.complex64)]
        assert_close(optax_sam.norm(tree), jnp.float64(13.0))
    with pytest.raises(TypeError, match="floating-point leaves; got one of dtype int32"):
        optax_sam.norm(jnp.arange(3))


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_inner_products_are_those_of_numpy(scale, dtype):
    rng = np.random.default_rng(1)

    def tree():
        parts = [rng.normal(size=shape) + 1j * rng.normal(size=shape) for shape in [(3, 2), (5,)]]
        return [jnp.asarray(part if dtype == "complex64" else part.real, dtype) for part in parts]

    a, b = tree(), tree()
    expected = sum(np.vdot(x, y).real for x, y in zip(exact(a), exact(b), strict=True))
    larger, smaller = ([leaf * np.float32(factor) for leaf in t] for t, factor in ((a, scale), (b, 1 / scale)))
    np.testing.assert_allclose(float(optax_sam.vdot(larger, smaller)), expected, rtol=1e-5)


def test_inner_products_of_real_and_complex_leaves_are_real():
    real, complex_ = [jnp.array([1.0, 2.0])], [jnp.array([1 + 2j, 3 - 1j])]
    assert_close(optax_sam.vdot(real, complex_), jnp.float32(7.0))
    assert_close(optax_sam.vdot(complex_, real), jnp.float32(7.0))


def test_inner_products_of_trees_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"a must have the shapes of b; got \(2,\) instead of \(3,\)"):
        optax_sam.vdot(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="a must have the tree structure of b"):
        optax_sam.vdot([jnp.ones(2)], jnp.ones(2))


def test_derivatives_are_the_closed_form():
    x, direction = jnp.array([3.0, 4.0, 12.0]), jnp.array([1.0, -2.0, 0.5])
    unit = np.asarray(x) / 13
    for scale in (1e-18, 1.0, 1e18):
        np.testing.assert_allclose(jax.grad(optax_sam.norm)(scale * x), unit, rtol=1e-6)
        tangent = jax.jvp(optax_sam.norm, (scale * x,), (direction,))[1]
        np.testing.assert_allclose(tangent, np.dot(unit, direction), rtol=1e-6)
    hessian = (np.eye(3) - np.outer(unit, unit)) / 13
    np.testing.assert_allclose(jax.hessian(optax_sam.norm)(x), hessian, atol=1e-6)
    np.testing.assert_allclose(jax.grad(optax_sam.vdot)(x, direction), direction, rtol=1e-5)


def test_norm_of_each_row_under_vmap():
    rows = jnp.array([[3.0, 4.0], [0.0, 0.0], [3e18, 4e18], [3e-18, 4e-18]])
    expected = [5.0, 0.0, 5e18, 5e-18]
    np.testing.assert_allclose(jax.jit(jax.vmap(optax_sam.norm))(rows), expected, rtol=1e-6)
    derivative = jax.vmap(jax.grad(optax_sam.norm))(rows)
    np.testing.assert_allclose(derivative, [[0.6, 0.8], [0.0, 0.0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)


def renormalized_by_hand(inner):
    """A link that somebody writes: StableSAM, times the cosine of the angle between both gradients."""

    def update(updates, state, params=None, *, shards=(), **extra_args):
        outputs, state = inner.update(updates, state, params, shards=shards, **extra_args)
        clean, sam = optax_sam.norm(updates, shards), optax_sam.norm(outputs, shards)
        cosine = optax_sam.vdot(updates, outputs, shards) / (clean * sam)
        return jax.tree.map(lambda s: s * clean / sam * cosine, outputs), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


@pytest.mark.parametrize("check_vma", [True, False])
def test_own_links_are_global_over_shards(check_vma):
    params = {"sharded": jnp.arange(1.0, 17.0), "replicated": jnp.array([2.0, -1.0])}
    mask = {"sharded": True, "replicated": False}
    grad_fn = lambda w: jax.tree.map(lambda leaf: leaf**3 / 25, w)  # noqa: E731
    link = renormalized_by_hand(optax_sam.sam(0.5))

    def update(link):
        return lambda w: link.update(grad_fn(w), link.init(w), w, grad_fn=grad_fn)[0]

    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    specs = {"sharded": PartitionSpec("model"), "replicated": PartitionSpec()}
    over_shards = update(optax_sam.sharded(link, "model", mask=None if check_vma else mask))
    mapped = jax.shard_map(over_shards, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=check_vma)
    assert_close(jax.device_get(jax.jit(mapped)(params)), jax.device_get(update(link)(params)))
    local = jax.shard_map(update(link), mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)
    assert not np.allclose(jax.jit(local)(params)["sharded"], update(link)(params)["sharded"], rtol=1e-2)
