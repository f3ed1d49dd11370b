"""Sharpness in the worst case and on average: against closed forms and formulas written out."""

import functools
import gc
import re
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from optax_sam.sharpness.rise import _worst_rise
from tests.helpers.problems import cnn_batch, cnn_loss, cnn_params, mlp_batch, mlp_loss, mlp_params

ONE = [jnp.ones(1)]
EXAMPLES, SHARDS = mlp_batch(size=32), 4
BATCHES = [jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], EXAMPLES) for i in range(SHARDS)]

SIX = {"w": jnp.ones((3, 2))}
# One instrument for each of the programs that are compiled for a loss function.
OVER_BATCHES = {
    "hessian_trace": functools.partial(optax_sam.hessian_trace, params=SIX, num_probes=2),
    "loss_along": functools.partial(optax_sam.loss_along, first=SIX, second=SIX, positions=[0.5]),
}
INSTRUMENTS = {name: functools.partial(measure, batches=ONE) for name, measure in OVER_BATCHES.items()}
INSTRUMENTS["m_sharpness"] = functools.partial(optax_sam.m_sharpness, params=SIX, batch=jnp.ones(4), rho=0.1, steps=2)
every_instrument = pytest.mark.parametrize("measure", INSTRUMENTS.values(), ids=INSTRUMENTS)


class Model:
    def __init__(self, scales):
        self.scales = scales

    def loss(self, w, x):
        return jnp.mean(x) * jnp.sum(self.scales * w["w"] ** 2)


class Module(eqx.Module):
    """Not hashable, and neither are its bound methods."""

    scales: jax.Array
    loss = Model.loss
    __call__ = Model.loss


class Slotted:
    """Not weakly referenced."""

    __slots__ = ()

    def __call__(self, w, x):
        return jnp.mean(x) * jnp.sum(w["w"] ** 2)


def bowl(w, x):
    """w₁² + 4·w₂² around the mean of x, and a constant."""
    return jnp.mean(((w[None] - x) ** 2) @ jnp.array([1.0, 4.0]))


def test_a_whole_batch_may_hold_scalars():
    loss_fn = lambda w, batch: batch["scale"] * jnp.sum(w**2)  # noqa: E731
    rise = optax_sam.m_sharpness(loss_fn, jnp.array([3.0, 4.0]), {"scale": jnp.float32(2.0)}, rho=5.0)
    np.testing.assert_allclose(rise, 2 * (100 - 25), rtol=1e-6)


def test_one_step_is_the_ascent_of_sam():
    @jax.jit
    def rise(params, batch):
        gradient = jax.grad(mlp_loss)(params, batch)
        point = optax.tree.add_scale(params, 0.1 / optax.tree.norm(gradient), gradient)
        return mlp_loss(point, batch) - mlp_loss(params, batch)

    found = optax_sam.m_sharpness(mlp_loss, mlp_params(), EXAMPLES, 0.1, SHARDS)
    np.testing.assert_allclose(found, np.mean([rise(mlp_params(), batch) for batch in BATCHES]), rtol=1e-5)


def test_each_example_may_be_a_micro_batch_of_its_own(caplog):
    w, x = jax.random.normal(jax.random.key(0), (64, 64)) / 8, jax.random.normal(jax.random.key(1), (32, 64))
    loss_fn = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)  # noqa: E731

    def rise(example):
        gradient = jax.grad(loss_fn)(w, example)
        return loss_fn(w + 0.1 * gradient / jnp.linalg.norm(gradient), example) - loss_fn(w, example)

    with caplog.at_level("INFO", logger="optax_sam"):
        found = optax_sam.m_sharpness(loss_fn, w, x, 0.1, num_micro_batches=32)
    np.testing.assert_allclose(found, np.mean([rise(example[None]) for example in x]), rtol=1e-5)
    assert caplog.messages[-1].startswith("32 micro-batches: lazy")


def test_worst_case_on_a_quadratic_in_closed_form():
    points = jnp.zeros((4, 2))
    along = optax_sam.m_sharpness(bowl, jnp.array([1.0, 0.0]), points, rho=0.1)
    np.testing.assert_allclose(along, 1.1**2 - 1, rtol=1e-5)
    # The worst direction is the second; the gradient has a thousandth of it, and the path must turn.
    start = jnp.array([1e-3, 1e-3])
    worst = optax_sam.m_sharpness(bowl, start, points, rho=0.1, steps=20)
    angles = np.linspace(0, 2 * np.pi, 100_001)
    sphere = 1e-3 + 0.1 * np.stack([np.cos(angles), np.sin(angles)])
    best = np.max(sphere[0] ** 2 + 4 * sphere[1] ** 2) - 5e-6
    np.testing.assert_allclose(worst, best, rtol=1e-3)
    assert optax_sam.m_sharpness(bowl, start, points, rho=0.1) < 0.99 * best


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_ascent_is_projected_and_the_largest_loss_counts(steps):
    """On a loss that is larger on the way than at the end, against the algorithm in NumPy."""
    rho, start = 0.6, np.array([0.1, 0.1, 0.2])
    value = lambda w: np.sin(3 * w[0]) + np.sum(w[1:] ** 3)  # noqa: E731
    delta, losses, projected = np.zeros(3), [], False
    for _ in range(steps):
        w = start + delta
        gradient = np.array([3 * np.cos(3 * w[0]), *(3 * w[1:] ** 2)])
        delta = delta + 2 * rho / steps * gradient / np.linalg.norm(gradient)
        projected |= np.linalg.norm(delta) > rho
        delta *= min(1, rho / np.linalg.norm(delta))
        losses.append(value(start + delta))
    assert projected
    assert max(losses) > losses[-1] + 0.01
    loss_fn = lambda w, x: jnp.mean(x) * (jnp.sin(3 * w["a"]) + jnp.sum(w["b"] ** 3))  # noqa: E731
    found = optax_sam.m_sharpness(loss_fn, {"a": 0.1, "b": jnp.array([0.1, 0.2])}, jnp.ones(1), rho, steps=steps)
    np.testing.assert_allclose(found, max(losses) - value(start), rtol=1e-4)


def test_smaller_micro_batches_are_sharper():
    sharpness = functools.partial(optax_sam.m_sharpness, mlp_loss, mlp_params(), EXAMPLES, 0.1)
    parts = sharpness(SHARDS, steps=3)
    assert sharpness(1, steps=3) < 0.9 * parts
    assert parts > sharpness(SHARDS)


def test_no_radius_no_gradient_and_not_finite():
    assert optax_sam.m_sharpness(mlp_loss, mlp_params(), EXAMPLES, 0.0, SHARDS) == 0.0
    assert optax_sam.m_sharpness(bowl, jnp.zeros(2), jnp.zeros((4, 2)), 0.1) == 0.0
    falls = lambda w, x: jnp.mean(x) * jnp.sin(w)  # noqa: E731
    assert optax_sam.m_sharpness(falls, 1.5, jnp.ones(1), rho=3.0) == 0.0  # the step leads beyond the maximum
    assert np.isnan(optax_sam.m_sharpness(bowl, jnp.array([1.0, jnp.nan]), jnp.zeros((4, 2)), 0.1))


def test_worst_case_inside_of_a_jitted_step():
    inside = jax.jit(lambda params, rho: optax_sam.m_sharpness(mlp_loss, params, EXAMPLES, rho, SHARDS, steps=3))
    outside = optax_sam.m_sharpness(mlp_loss, mlp_params(), EXAMPLES, 0.1, SHARDS, steps=3)
    np.testing.assert_allclose(inside(mlp_params(), 0.1), outside, rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_worst_case_of_each_member_and_of_all_in_shard_map(check_vma):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def run(sharpness):
        specs = PartitionSpec(), PartitionSpec("data")
        mean = lambda params, batch: jax.lax.pmean(sharpness(params, batch), "data")  # noqa: E731
        mapped = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma)
        return jax.jit(mapped)(mlp_params(), EXAMPLES)

    def mean_loss(params, batch):
        return jax.lax.pmean(mlp_loss(params, batch), "data")

    one = lambda w, x: optax_sam.m_sharpness(mlp_loss, w, x, 0.1, steps=3)  # noqa: E731
    marked = lambda w, x: one(jax.lax.pcast(w, "data", to="varying"), x)  # noqa: E731
    outside = functools.partial(optax_sam.m_sharpness, mlp_loss, mlp_params(), EXAMPLES, 0.1, steps=3)
    np.testing.assert_allclose(run(marked if check_vma else one), outside(4), rtol=1e-5)
    if check_vma:
        of_all = run(lambda w, x: optax_sam.m_sharpness(mean_loss, w, x, 0.1, steps=3))
        np.testing.assert_allclose(of_all, outside(1), rtol=1e-5)
        with pytest.raises(ValueError, match="the loss is a member's own and the gradient that of all"):
            run(one)
        with pytest.raises(ValueError, match="The params vary over the mapped axis"):
            run(lambda w, x: optax_sam.m_sharpness(mean_loss, jax.lax.pcast(w, "data", to="varying"), x, 0.1))


def test_convolutions_in_the_loop_are_right_and_in_the_fast_layout():
    params, batch, rho, steps = cnn_params(), cnn_batch(), 0.1, 2

    @jax.jit
    def climb(delta):
        gradient = jax.grad(cnn_loss)(optax.tree.add(params, delta), batch)
        delta = optax.tree.add_scale(delta, 2 * rho / steps / optax.tree.norm(gradient), gradient)
        delta = optax.tree.scale(jnp.minimum(1, rho / optax.tree.norm(delta)), delta)
        return delta, cnn_loss(optax.tree.add(params, delta), batch)

    delta, losses = optax.tree.zeros_like(params), [jax.jit(cnn_loss)(params, batch)]
    for _ in range(steps):
        delta, loss = climb(delta)
        losses.append(loss)
    program = _worst_rise(cnn_loss, 1, steps).lower(params, None, rho, batch).compile()
    np.testing.assert_allclose(program(params, None, rho, batch), max(losses) - losses[0], rtol=1e-4)
    assert set(re.findall(r"dim_labels=(\S+?)[,\s]", program.as_text() or "")) == {"b01f_01io->b01f"}


def cosines(params, x):
    return jnp.mean(x) * jnp.sum(jnp.cos(params["w"]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_params_give_the_same(kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,), devices=jax.devices()[:2])
    params = {"w": jnp.linspace(0, 1, 32).reshape(16, 2)}
    sharded = jax.device_put(params, NamedSharding(mesh, PartitionSpec("model")))
    worst, average = optax_sam.m_sharpness, optax_sam.average_sharpness
    with jax.set_mesh(mesh):
        batch = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("model")))
        found = worst(cosines, sharded, batch, 0.1), average(cosines, sharded, [batch], 0.1).mean
    expected = worst(cosines, params, jnp.ones(1), 0.1), average(cosines, params, ONE, 0.1).mean
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_average_is_half_the_trace_times_the_variance():
    scales = jnp.array([1.0, 2.0, 5.0])
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(scales * w**2) / 2  # noqa: E731
    found = optax_sam.average_sharpness(loss_fn, jnp.zeros(3), ONE, sigma=0.1, num_samples=300)
    assert abs(found.mean - 0.5 * 0.01 * 8) < 4 * found.standard_error
    # The variance of σ²/2 · Σ hᵢ zᵢ² is σ⁴/2 · Σ hᵢ².
    np.testing.assert_allclose(found.standard_error, np.sqrt(1e-4 / 2 * 30 / 300), rtol=0.15)
    other = optax_sam.average_sharpness(loss_fn, jnp.zeros(3), ONE, 0.1, num_samples=5, key=jax.random.key(7))
    assert other != optax_sam.average_sharpness(loss_fn, jnp.zeros(3), ONE, 0.1)


def test_average_is_over_examples_at_the_same_points():
    parts = [jax.tree.map(lambda x, s=s: x[s], mlp_batch(size=32)) for s in (slice(0, 20), slice(20, 32))]
    found = optax_sam.average_sharpness(mlp_loss, mlp_params(), parts, 0.1)
    whole = optax_sam.average_sharpness(mlp_loss, mlp_params(), [mlp_batch(size=32)], 0.1)
    np.testing.assert_allclose(found, whole, rtol=1e-4)
    assert found.mean > 0
    assert optax_sam.average_sharpness(mlp_loss, mlp_params(), parts, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    "measure",
    [
        lambda *args: optax_sam.m_sharpness(*args, EXAMPLES, 0.1, SHARDS, steps=3),
        lambda *args: optax_sam.average_sharpness(*args, BATCHES, sigma=0.1).mean,
    ],
)
def test_dtypes_and_compilations(measure):
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), mlp_params())
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    traces = []

    def loss_fn(params, batch):
        traces.append(jax.tree.map(jnp.result_type, params))
        return mlp_loss(params, batch)

    assert measure(loss_fn, narrow) == measure(loss_fn, wide)
    count = len(traces)
    assert measure(loss_fn, wide) != 0
    assert len(traces) == count <= 6  # of one compilation: the loop, its types and the last loss
    with jax.enable_x64(True):
        double = jax.tree.map(lambda w: jnp.asarray(np.asarray(w), jnp.float64), wide)
        traces.clear()
        measure(loss_fn, double)
        assert set(jax.tree.leaves(traces[0])) == {jnp.dtype("float64")}


@every_instrument
def test_what_a_loss_closes_over_dies_with_it(measure):
    def make_loss():
        on_device, on_host = jnp.ones((3, 2)), np.ones((3, 2), np.float32)
        loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(on_device * on_host * w["w"] ** 2)  # noqa: E731
        return loss_fn, weakref.ref(on_device), weakref.ref(on_host)

    loss_fn, *captured = make_loss()
    measure(loss_fn)
    assert all(reference() is not None for reference in captured)
    del loss_fn
    gc.collect()
    assert all(reference() is None for reference in captured)


@pytest.mark.parametrize(("name", "kind"), [("hessian_trace", Model), ("loss_along", Module), ("m_sharpness", Module)])
def test_bound_method_compiles_once_and_dies_with_its_owner(name, kind, compilations):
    measure, model = INSTRUMENTS[name], kind(jnp.ones((3, 2)))
    measure(model.loss)
    compilations.clear()
    measure(model.loss)
    assert not compilations
    captured = weakref.ref(model.scales)
    measure(kind(model.scales).loss)
    assert compilations
    del model
    gc.collect()
    assert captured() is None


@every_instrument
def test_callable_objects_need_neither_hash_nor_weak_reference(measure, compilations):
    module, slotted = Module(jnp.ones((3, 2))), Slotted()
    found = measure(module)
    compilations.clear()
    measure(module)
    assert not compilations
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(measure(slotted)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6)


def test_loss_that_closes_over_tracers_leaves_none_behind():
    w, x, tracers = jnp.ones(2), jnp.zeros((4, 2)), []
    once = optax_sam.m_sharpness(bowl, w, x, 0.1)

    def scaled(factor):
        tracers.append(weakref.ref(factor))
        return optax_sam.m_sharpness(lambda w, x: factor * bowl(w, x), w, x, 0.1)

    for factor in (2.0, 3.0):
        np.testing.assert_allclose(jax.jit(lambda factor: scaled(factor))(factor), factor * once, rtol=1e-5)
    gc.collect()
    assert [tracer() for tracer in tracers] == [None, None]


def test_owner_that_changes_within_a_trace_is_read_each_time():
    @jax.jit
    def both(first, second):
        model = Model(first)
        found = INSTRUMENTS["m_sharpness"](model.loss)
        model.scales = second
        return found, INSTRUMENTS["m_sharpness"](model.loss)

    once, twice = both(jnp.ones((3, 2)), jnp.full((3, 2), 2.0))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)


@pytest.mark.parametrize("measure", OVER_BATCHES.values(), ids=OVER_BATCHES)
def test_tuples_of_trees_are_several_batches(measure):
    def loss_fn(w, batch):
        return jnp.mean(jax.tree.leaves(batch)[0]) * jnp.sum(w["w"] ** 2)

    first, second = jnp.ones(2), jnp.full(4, 3.0)
    expected = jax.tree.leaves(measure(loss_fn, batches=[first, second]))
    for batches in (({"x": first}, {"x": second}), ((first, first), (second, second)), ([first], [second])):
        for leaf, other in zip(jax.tree.leaves(measure(loss_fn, batches=batches)), expected, strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-6)


def test_order_of_the_examples_does_not_matter_in_float64():
    with jax.enable_x64(True):
        double = jax.tree.map(lambda w: jnp.asarray(np.asarray(w), jnp.float64), mlp_params())
        backwards = jax.tree.map(lambda x: x[::-1], EXAMPLES)
        found, again = (optax_sam.m_sharpness(mlp_loss, double, x, 0.1, SHARDS, steps=5) for x in (EXAMPLES, backwards))
        np.testing.assert_allclose(found, again, rtol=1e-13)
        assert found.dtype == jnp.float64


def test_average_shows_its_progress(capsys):
    optax_sam.average_sharpness(mlp_loss, mlp_params(), BATCHES, 0.1, progress=True)
    assert "0/24" in capsys.readouterr().err
