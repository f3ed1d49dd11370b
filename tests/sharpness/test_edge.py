"""The edge of stability and the curvature along a step: closed forms, simulated dynamics, and the dense Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_sam
from tests.helpers.problems import CountedPasses, mlp_batch, mlp_loss, mlp_params

ONE = [jnp.ones(1)]
SCALES = jnp.array([1.0, 2.0, 10.0])
POINT = jnp.array([1.0, -1.0, 0.3])


def quadratic(w, x):
    return jnp.mean(x) * jnp.sum(SCALES * w**2) / 2


@pytest.mark.parametrize("gradient_norm", [1e-12, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("rho", [1e-9, 0.05, 3.0])
def test_at_the_edge_a_step_of_sam_neither_grows_nor_shrinks(gradient_norm, rho):
    edge = np.float64(optax_sam.sam_edge(gradient_norm, 0.1, rho))
    np.testing.assert_allclose(0.1 * edge * (1 + rho * edge / gradient_norm), 2, rtol=1e-5)


def test_edge_without_perturbation_and_without_gradient():
    assert optax_sam.sam_edge(0.3, 0.1, 0.0) == pytest.approx(20)
    assert optax_sam.sam_edge(0.0, 0.1, 0.0) == pytest.approx(20)
    assert optax_sam.sam_edge(0.0, 0.1, 0.1) == 0
    np.testing.assert_allclose(jax.jit(optax_sam.sam_edge)(jnp.array([0.2, 0.4]), 0.1, 0.1), [5.403, 7.165], rtol=1e-3)


@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("beyond", [False, True])
def test_steps_grow_beyond_the_edge_and_shrink_below(rho, momentum, beyond):
    """Along a slope that keeps ‖g‖ near 1, the valley across it is stable up to the edge."""
    edge = optax_sam.sam_edge(1.0, 0.1 / (1 + momentum), rho)
    curvature = (1.02 if beyond else 0.98) * edge
    loss_fn = lambda w: w[0] + curvature * w[1] ** 2 / 2  # noqa: E731
    tx = optax.chain(optax_sam.sam(rho), optax.sgd(0.1, momentum))

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(w), state, w, grad_fn=jax.grad(loss_fn))
        return (optax.apply_updates(w, updates), state), jnp.abs(w[1])

    start = jnp.array([0.0, 1e-6])
    _, distances = jax.lax.scan(step, (start, tx.init(start)), length=400)
    assert (jnp.max(distances[-20:]) > jnp.max(distances[:20])) == beyond


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((-1.0, 0.1, 0.1), "gradient_norm"), ((1.0, 0.0, 0.1), "learning_rate"), ((1.0, 0.1, float("nan")), "rho")],
)
def test_numbers_that_have_no_edge_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        optax_sam.sam_edge(*arguments)


def test_directional_sharpness_is_that_of_the_dense_hessian_over_batches():
    batch, params = mlp_batch(size=12), mlp_params()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.hessian(lambda w: mlp_loss(unravel(w), batch))(flat)
    direction = jax.random.normal(jax.random.key(5), flat.shape)
    expected = direction @ hessian @ direction / (direction @ direction)
    parts = [jax.tree.map(lambda x: x[:8], batch), jax.tree.map(lambda x: x[8:], batch)]
    found = optax_sam.directional_sharpness(mlp_loss, params, unravel(1e-20 * direction), parts)
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("length", [0.0, float("nan")])
def test_a_direction_without_length_is_refused(length):
    with pytest.raises(ValueError, match="direction has length"):
        optax_sam.directional_sharpness(quadratic, POINT, length * POINT, ONE)


@pytest.mark.parametrize("rate", [1.0, 1e-6, 1e6])
def test_critical_sharpness_along_the_gradient_of_a_quadratic(rate):
    g = SCALES * POINT
    found = optax_sam.critical_sharpness(quadratic, POINT, -rate * g, [jnp.ones(4), jnp.ones(2)], rtol=1e-3) / rate
    np.testing.assert_allclose(found, g @ (SCALES * g) / (g @ g), rtol=2e-3)
    along = optax_sam.directional_sharpness(quadratic, POINT, g, ONE)
    np.testing.assert_allclose(along, g @ (SCALES * g) / (g @ g), rtol=1e-6)


def test_critical_sharpness_of_adam_is_where_its_step_first_raises_the_loss():
    batch, params = mlp_batch(size=12), mlp_params()
    tx = optax.adam(0.01)
    updates, _ = tx.update(jax.grad(mlp_loss)(params, batch), tx.init(params), params)
    found = optax_sam.critical_sharpness(mlp_loss, params, updates, [batch], rtol=1e-3)
    factors = jnp.linspace(0, 4 / found, 4_001)[1:]
    losses = jax.vmap(lambda c: mlp_loss(optax.tree.add_scale(params, c, updates), batch))(factors)
    first = factors[jnp.argmax(losses > mlp_loss(params, batch))]
    assert found == pytest.approx(2 / float(first), rel=3e-3)


def test_steps_that_only_lower_or_only_raise_the_loss():
    slope = lambda w, x: jnp.mean(x) * jnp.sum(w)  # noqa: E731
    assert optax_sam.critical_sharpness(slope, POINT, -jnp.ones(3), ONE) == 0
    assert optax_sam.critical_sharpness(slope, POINT, jnp.zeros(3), ONE) == 0
    assert optax_sam.critical_sharpness(slope, POINT, jnp.ones(3), ONE) == np.inf
    wall = lambda w, x: jnp.mean(x) * jnp.sum(jnp.where(w > -1.5, w, jnp.nan))  # noqa: E731
    assert optax_sam.critical_sharpness(wall, POINT, -jnp.ones(3), ONE) == pytest.approx(2 / 0.5, rel=0.01)
    with pytest.raises(ValueError, match="loss at params is nan"):
        optax_sam.critical_sharpness(wall, 2 * POINT, -jnp.ones(3), ONE)


@pytest.mark.parametrize("length", [1e-8, 1.0])
def test_steps_up_the_gradient_all_raise_the_loss_however_it_rounds(length):
    for seed in range(6):
        batch = mlp_batch(size=12)
        params = jax.tree.map(lambda w, seed=seed: w + 0.1 * seed, mlp_params())
        ascent = optax.tree.scale(length, jax.grad(mlp_loss)(params, batch))
        batches = [jax.tree.map(lambda x: x[:7], batch), jax.tree.map(lambda x: x[7:], batch)]
        assert optax_sam.critical_sharpness(mlp_loss, params, ascent, batches) == np.inf


def test_bisection_ends_at_any_tolerance():
    fine, finest = (optax_sam.critical_sharpness(quadratic, POINT, -SCALES * POINT, ONE, rtol=r) for r in (1e-6, 1e-17))
    assert finest == pytest.approx(fine, rel=1e-5)


def test_batches_that_are_gone_after_a_pass_are_refused():
    class Spent:
        def __init__(self):
            self.batches = iter(ONE)

        def __iter__(self):
            return self.batches

    for measure in (optax_sam.critical_sharpness, optax_sam.directional_sharpness):
        spent = Spent()
        list(spent)
        with pytest.raises(ValueError, match="batches must be a list of batches, not empty"):
            measure(quadratic, POINT, -POINT, spent)
    with pytest.raises(ValueError, match="batches must be a list of batches, not empty"):
        optax_sam.critical_sharpness(quadratic, POINT, -POINT, Spent())


def test_arguments_that_are_not_finite_or_of_another_precision():
    with pytest.raises(ValueError, match="its slope along updates nan"):
        optax_sam.critical_sharpness(quadratic, POINT, jnp.full(3, jnp.inf), ONE)
    with pytest.raises(ValueError, match="direction has length inf"):
        optax_sam.directional_sharpness(quadratic, POINT, jnp.full(3, jnp.inf), ONE)
    with jax.enable_x64():
        wide = np.asarray(POINT, np.float64)
        assert optax_sam.directional_sharpness(quadratic, POINT, wide, ONE) == pytest.approx(
            optax_sam.directional_sharpness(quadratic, POINT, POINT, ONE), rel=1e-6
        )


def test_critical_sharpness_takes_few_passes():
    batches = CountedPasses(ONE)
    optax_sam.critical_sharpness(quadratic, POINT, -SCALES * POINT, batches)
    assert batches.passes <= 16  # one of them a gradient


def test_params_and_directions_may_be_sharded():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec("model")))  # noqa: E731
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(jnp.arange(1.0, 5) * w**2) / 2  # noqa: E731
    w = jnp.ones(4)
    for measure in (optax_sam.directional_sharpness, optax_sam.critical_sharpness):
        whole = measure(loss_fn, w, -jnp.arange(1.0, 5), ONE)
        assert measure(loss_fn, place(w), place(-jnp.arange(1.0, 5)), ONE) == pytest.approx(whole, rel=1e-6)
