"""The loss on lines and planes: against closed forms, and against points evaluated one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from tests.helpers.problems import CountedPasses, mlp_batch, mlp_loss, mlp_params

ONE = [jnp.ones(1)]
EXAMPLES = mlp_batch(size=32)
BATCHES = [jax.tree.map(lambda x, s=s: x[s], EXAMPLES) for s in (slice(0, 20), slice(20, 32))]


loss_of_all = jax.jit(lambda params: mlp_loss(params, EXAMPLES))


def test_line_on_a_quartic_in_closed_form():
    loss_fn = lambda w, x: jnp.mean(x) * w["w"] ** 4  # noqa: E731
    positions = np.linspace(-0.5, 1.5, 9)
    line = optax_sam.loss_along(loss_fn, {"w": -1.0}, {"w": 1.0}, [jnp.ones(2), jnp.ones(6)], positions)
    points, step = 2 * positions - 1, 0.2  # h = 0.1 in units of the line
    np.testing.assert_array_equal(line.positions, positions)
    np.testing.assert_allclose(line.losses, points**4, rtol=1e-5, atol=1e-6)
    expected = ((points + step) ** 4 + (points - step) ** 4 - 2 * points**4) / 0.2**2
    np.testing.assert_allclose(line.second_differences, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("h", [0.1, 0.05, 0.03])
def test_second_difference_on_a_parabola_is_a_quarter_of_the_second_derivative(h):
    line = optax_sam.loss_along(lambda w, x: 3 * jnp.sum(w**2) * jnp.mean(x), jnp.zeros(2), jnp.ones(2), ONE, h=h)
    np.testing.assert_allclose(line.positions, np.linspace(-0.2, 1.2, 29))
    np.testing.assert_allclose(line.second_differences, 12 / 4, rtol=1e-2)


def test_line_of_a_network_in_one_pass_and_without_an_evaluation_twice(capsys):
    first, second = mlp_params(), mlp_params(seed=1)
    batches = CountedPasses(BATCHES)
    line = optax_sam.loss_along(mlp_loss, first, second, batches, progress=True)
    assert batches.passes == 1
    assert f"/{2 * 33} [" in capsys.readouterr().err  # 29 positions and 2 more at each end, for 2 batches
    for index in (0, 4, 17):
        x = line.positions[index]
        point = jax.tree.map(lambda a, b, x=x: (1 - x) * np.asarray(a) + x * np.asarray(b), first, second)
        np.testing.assert_allclose(line.losses[index], loss_of_all(point), rtol=1e-5)
    ends = optax_sam.loss_along(mlp_loss, first, second, BATCHES, [0, 1]).losses
    np.testing.assert_allclose(ends, [loss_of_all(first), loss_of_all(second)], rtol=1e-6)


def test_surface_moves_along_filter_normalized_directions():
    params = {"kernel": jax.random.normal(jax.random.key(0), (2, 3, 4)), "bias": jnp.ones(4), "scale": 2.0}
    params["kernel"] = params["kernel"].at[..., 2].set(0)
    moves = []

    def read_out(point, batch):
        jax.debug.callback(lambda p: moves.append(jax.tree.map(np.asarray, p)), point)
        return jnp.sum(batch)

    optax_sam.loss_surface(read_out, params, ONE, [0.0, 1.0])
    jax.effects_barrier()
    still, second, first, both = moves
    for moved in moves:
        assert np.array_equal(moved["bias"], params["bias"])
        assert moved["scale"] == 2.0
    assert np.array_equal(still["kernel"], params["kernel"])
    a, b = first["kernel"] - still["kernel"], second["kernel"] - still["kernel"]
    norms = np.linalg.norm(params["kernel"], axis=(0, 1))
    np.testing.assert_allclose(np.linalg.norm(a, axis=(0, 1)), norms, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(b, axis=(0, 1)), norms, rtol=1e-5)
    np.testing.assert_allclose(both["kernel"], still["kernel"] + a + b, rtol=1e-4, atol=1e-5)
    assert abs(np.sum(a * b)) < 0.9 * np.sum(norms**2)
    assert not np.allclose(a[..., 0] / norms[0], a[..., 1] / norms[1])


def test_surface_of_a_network():
    surface = optax_sam.loss_surface(mlp_loss, mlp_params(), BATCHES, [-0.5, 0.0, 0.5], key=jax.random.key(1))
    assert surface.losses.shape == (3, 3)
    np.testing.assert_allclose(surface.losses[1, 1], loss_of_all(mlp_params()), rtol=1e-6)
    assert len(np.unique(surface.losses)) == 9
    other = optax_sam.loss_surface(mlp_loss, mlp_params(), BATCHES, [-0.5, 0.0, 0.5])
    assert np.sum(surface.losses == other.losses) == 1


def test_surface_is_the_same_for_a_rescaled_network():
    """Filters of a ReLU network that are scaled up before and down behind a layer: what the normalization is for."""

    def loss_fn(params, x):
        return jnp.mean((jax.nn.relu(x @ params["in"]) @ params["out"]) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"in": jax.random.normal(keys[0], (5, 6)), "out": jax.random.normal(keys[1], (6, 1))}
    rescaled = {"in": 4 * params["in"], "out": params["out"] / 4}
    batches = [jax.random.normal(keys[2], (10, 5))]
    surfaces = [optax_sam.loss_surface(loss_fn, w, batches, [-1, -0.5, 0, 0.5, 1]) for w in (params, rescaled)]
    np.testing.assert_allclose(surfaces[0].losses, surfaces[1].losses, rtol=1e-4)


def test_surface_in_one_pass_with_a_bar_of_all_points(capsys):
    batches = CountedPasses(BATCHES)
    surface = optax_sam.loss_surface(mlp_loss, mlp_params(), batches, progress=True)
    assert batches.passes == 1
    assert surface.losses.shape == (21, 21)
    np.testing.assert_allclose(surface.positions, np.linspace(-1, 1, 21))
    assert f"/{2 * 21 * 21} [" in capsys.readouterr().err
    np.testing.assert_allclose(surface.losses[10, 10], loss_of_all(mlp_params()), rtol=1e-6)


def test_narrow_params_are_widened():
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), mlp_params())
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    surfaces = [optax_sam.loss_surface(mlp_loss, w, BATCHES, [0.0, 1e-3]) for w in (narrow, wide)]
    assert np.array_equal(surfaces[0].losses, surfaces[1].losses)
    assert len(np.unique(surfaces[0].losses)) == 4


def cosines(params, x):
    return jnp.mean(x) * jnp.sum(jnp.cos(params["w"])) + jnp.sum(params["b"])


MODEL = PartitionSpec("model")


@pytest.mark.parametrize(
    ("kind", "spec"),
    [(AxisType.Auto, MODEL), (AxisType.Explicit, MODEL), (AxisType.Explicit, PartitionSpec(None, "model"))],
)
def test_sharded_params_give_the_same(kind, spec):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,), devices=jax.devices()[:2])
    params = {"w": jnp.linspace(0, 1, 128).reshape(16, 8), "b": jnp.ones(8)}
    line = lambda w, batches: optax_sam.loss_along(cosines, w, jax.tree.map(jnp.zeros_like, w), batches, [0, 1])  # noqa: E731
    surface = functools.partial(optax_sam.loss_surface, cosines, positions=[-1.0, 0.5])
    with jax.set_mesh(mesh):
        shardings = {"w": NamedSharding(mesh, spec), "b": NamedSharding(mesh, PartitionSpec())}
        sharded = jax.device_put(params, shardings)
        batches = [jax.device_put(jnp.ones(8), NamedSharding(mesh, MODEL))]
        lines, surfaces = line(sharded, batches), surface(sharded, batches=batches)
    np.testing.assert_allclose(lines.losses, line(params, ONE).losses, rtol=1e-5)
    np.testing.assert_allclose(surfaces.losses, surface(params, batches=ONE).losses, rtol=1e-5)
