"""Measurement: what was recorded is what happened, and nothing else happens for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_sam
from optax_sam import Measurements, measured, measurements
from tests.helpers.measuring import (
    BATCH,
    LINKS,
    PARAMS,
    RHO,
    assert_measured,
    chain_step,
    estimator_step,
    flat,
    mean_of_what_happens,
    what_happens,
)
from tests.helpers.problems import (
    GradientCounter,
    assert_close,
    assert_identical,
    cnn_batch,
    cnn_loss,
    cnn_params,
    mlp_batch,
    mlp_loss,
    mlp_params,
    split,
)


def test_sam_on_a_quadratic_by_hand():
    loss_fn = lambda w: 0.5 * (w[0] ** 2 + 3 * w[1] ** 2)  # noqa: E731
    params, link = jnp.array([4.0, 1.0]), measured(optax_sam.sam(1.0))
    loss, grads = jax.value_and_grad(loss_fn)(params)
    _, state = link.update(grads, link.init(params), params, value=loss, value_fn=loss_fn)
    assert_measured(measurements(state), (5, 1, (4.8**2 + 4.8**2) ** 0.5, 7 / 50**0.5, 9.5, 0.5 * (4.8**2 + 7.68), 1))


accumulated_step = functools.partial(estimator_step, num_micro_batches=4, ascent_per="batch")
micro_batched_step = functools.partial(estimator_step, num_micro_batches=4)


def trained(make, link, loss_fn=mlp_loss, params=PARAMS, batch=BATCH):
    """(params, state) after each of three steps."""
    transformation, step = make(link, loss_fn)
    step, carries = jax.jit(step), [(params, transformation.init(params))]
    for _ in range(3):
        carries.append(step(*carries[-1], batch))
    return carries[1:]


@pytest.mark.parametrize(
    ("make", "name"),
    [(chain_step, name) for name in ("plain", "three steps", "chain")]
    + [(estimator_step, "three steps"), (accumulated_step, "sam")],
)
def test_what_happens_is_recorded_and_training_is_the_same_bit_for_bit(make, name):
    (_, state), *_, (params, _) = trained(make, measured(LINKS[name]))
    assert_measured(measurements(state), what_happens(LINKS[name]))
    assert_identical(params, trained(make, LINKS[name])[-1][0])


def test_training_of_convolutions_is_the_same_bit_for_bit():
    link, setting = LINKS["stable_sam"], (cnn_loss, cnn_params(), cnn_batch())
    measuring, plain = (trained(accumulated_step, one, *setting) for one in (measured(link), link))
    assert_identical(measuring[-1][0], plain[-1][0])


def test_training_over_micro_batches_is_the_same_to_rounding():
    """Where gradients are added up in a loop, XLA may contract the addition with the last operation of the gradient."""
    measuring, plain = (trained(micro_batched_step, link) for link in (measured(LINKS["sam"]), LINKS["sam"]))
    assert_close(measuring[-1][0], plain[-1][0])


@pytest.mark.parametrize(
    ("make", "name", "gradients"),
    [
        (chain_step, "three steps", 4),
        (estimator_step, "sam", 2),
        (micro_batched_step, "plain", 1),
        (accumulated_step, "sam", 2),
    ],
)
def test_the_same_gradients_are_executed(make, name, gradients):
    counter, examples = GradientCounter(), len(BATCH["y"])
    size = examples // make.keywords["num_micro_batches"] if isinstance(make, functools.partial) else examples
    transformation, step = make(measured(LINKS[name]), counter.counted(mlp_loss, num_examples=size))
    jax.block_until_ready(jax.jit(step)(PARAMS, transformation.init(PARAMS), BATCH))
    assert counter.take() == gradients * examples


# Micro-batches.


@pytest.mark.parametrize(
    ("name", "strategy"), [("plain", "auto"), ("scheduled", "vmap"), ("scheduled", "scan"), ("scheduled", "unroll")]
)
def test_micro_batches_record_the_means_of_what_happens_to_each(name, strategy):
    estimator, step = estimator_step(measured(LINKS[name]), num_micro_batches=4, strategy=strategy)
    _, state = jax.jit(step)(PARAMS, estimator.init(PARAMS), BATCH)
    assert_measured(measurements(state), mean_of_what_happens(LINKS[name], 4))


def test_micro_batches_of_a_chain_record_the_means_of_what_happens_to_each():
    link = optax_sam.micro_batched(measured(LINKS["scheduled"]))

    @jax.jit
    def update(state, micro_batches):
        losses, grads = jax.vmap(jax.value_and_grad(mlp_loss), in_axes=(None, 0))(PARAMS, micro_batches)
        extra_args = {"value": jnp.mean(losses), "value_fn": mlp_loss, "batch": micro_batches}
        return link.update(grads, state, PARAMS, **extra_args)[1]

    actual = measurements(update(link.init(PARAMS), split(BATCH, 4)))
    assert_measured(actual, mean_of_what_happens(LINKS["scheduled"], 4))


def test_aux_stays_with_the_clean_pass():
    loss_fn = lambda params, batch: (mlp_loss(params, batch), {"norm": optax.tree.norm(params)})  # noqa: E731
    link = LINKS["scheduled"]
    estimator = optax_sam.gradient_estimator(loss_fn, measured(link), has_aux=True, num_micro_batches=4)
    (_, aux), _, state = jax.jit(estimator.value_and_grad)(PARAMS, estimator.init(PARAMS), BATCH)
    assert_close(aux, {"norm": jnp.float32(np.linalg.norm(flat(PARAMS)))})
    assert_measured(measurements(state), mean_of_what_happens(link, 4))


# How updates and gradients get there.


def test_losses_come_with_the_gradients_and_need_no_matrix_product():
    def products(link):
        tx, step = chain_step(link)
        return str(jax.make_jaxpr(step)(PARAMS, tx.init(PARAMS), BATCH)).count("dot_general[")

    assert products(measured(LINKS["sam"])) == products(LINKS["sam"]) > 0


@pytest.mark.parametrize("ascent_per", ["micro_batch", "batch"])
def test_estimator_hands_its_link_the_loss_and_how_to_get_others(ascent_per):
    def update(updates, state, params=None, *, grad_fn, value, value_and_grad_fn, micro_batch):
        assert len(micro_batch) == (ascent_per == "micro_batch")
        point = optax.tree.scale(0.5, params)
        loss, gradient = value_and_grad_fn(point)
        return jax.tree.map(lambda g, a, b: g + a - b, updates, gradient, grad_fn(point)), state + value + 10 * loss

    link = optax.GradientTransformationExtraArgs(lambda params: jnp.float32(0), update)
    loss_fn = lambda params, batch: (mlp_loss(params, batch), 1)  # noqa: E731
    estimator = optax_sam.gradient_estimator(loss_fn, link, has_aux=True, num_micro_batches=4, ascent_per=ascent_per)
    (loss, _), grads, state = jax.jit(estimator.value_and_grad)(PARAMS, estimator.init(PARAMS), BATCH)
    assert_close(grads, jax.jit(jax.grad(mlp_loss))(PARAMS, BATCH))
    assert_close(state, loss + 10 * jax.jit(mlp_loss)(optax.tree.scale(0.5, PARAMS), BATCH))


def test_transformations_that_follow_the_loss_work_inside_an_estimator():
    """The loss does not fall, so the plateau halves what the link returns."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    estimator = optax_sam.gradient_estimator(
        lambda w, batch: jnp.sum(w * batch), measured(optax.chain(optax_sam.sam(RHO), plateau))
    )
    params, state = jnp.ones(2), estimator.init(jnp.ones(2))
    for norm in (2.0, 1.0, 0.5):
        _, _, state = estimator.value_and_grad(params, state, jnp.full(2, 2**0.5))
        assert_close(measurements(state).sam_norm, jnp.float32(norm))


# What update is called with.


def test_grad_fn_keeps_precedence_and_value_and_grad_fn_replaces_both():
    """As where gradients are averaged by the caller: here they are doubled."""
    doubled = lambda *args: optax.tree.scale(2.0, jax.grad(mlp_loss)(*args))  # noqa: E731
    both = lambda *args: (3 * mlp_loss(*args), doubled(*args))  # noqa: E731
    link, expected = measured(LINKS["sam"]), what_happens(LINKS["sam"])

    def found(**functions):
        def update(params, batch):
            loss, grads = jax.value_and_grad(mlp_loss)(params, batch)
            return link.update(grads, link.init(params), params, value=loss, batch=batch, **functions)[1]

        return measurements(jax.jit(update)(PARAMS, BATCH))

    expected = expected._replace(sam_norm=2 * expected.sam_norm)
    assert_measured(found(value_fn=mlp_loss, grad_fn=doubled), expected)
    expected = expected._replace(perturbed_loss=3 * expected.perturbed_loss)
    assert_measured(found(value_and_grad_fn=both, grad_fn=jax.grad(mlp_loss)), expected)


def test_line_searches_take_the_same_call():
    tx = optax.chain(measured(LINKS["sam"]), optax.lbfgs())

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(mlp_loss)(params, BATCH)
        updates, state = tx.update(grads, state, params, value=loss, grad=grads, value_fn=mlp_loss, batch=BATCH)
        return optax.apply_updates(params, updates), state

    params, state = step(PARAMS, tx.init(PARAMS))
    assert_measured(measurements(state), what_happens(LINKS["sam"]))
    assert mlp_loss(params, BATCH) < mlp_loss(PARAMS, BATCH)


# Switches.


def test_phase_of_the_last_update_is_read_before_at_and_after_the_switch():
    phases = {0: LINKS["plain"], 2: LINKS["sam"], 3: LINKS["stable_sam"]}
    tx, step = chain_step(optax_sam.switch_at({start: measured(phase) for start, phase in phases.items()}))

    @jax.jit
    def logging_step(params, state, batch):
        params, state = step(params, state, batch)
        return params, state, measurements(state)

    params, state = PARAMS, tx.init(PARAMS)
    assert_measured(measurements(state), [0] * len(Measurements._fields))
    for index, name in enumerate(["plain", "plain", "sam", "stable_sam", "stable_sam"]):
        batch = mlp_batch(seed=index, size=32)
        expected = what_happens(LINKS[name], params, batch)
        params, state, logged = logging_step(params, state, batch)
        assert_measured(logged, expected)
        assert_identical(measurements(state), logged)
    assert logging_step._cache_size() == 1


@pytest.mark.parametrize(("make", "jit"), [(chain_step, True), (estimator_step, False)], ids=["jit", "eager"])
def test_measuring_a_switch_measures_each_of_its_links(make, jit):
    inner = optax_sam.switch_by(lambda step: step % 2, [LINKS["sam"], LINKS["usam"]])
    transformation, step = make(measured(optax_sam.late(inner, 1)))
    step = jax.jit(step) if jit else step
    params, state = PARAMS, transformation.init(PARAMS)
    for name in ("plain", "sam", "usam", "sam"):
        expected = what_happens(LINKS[name], params)
        params, state = step(params, state, BATCH)
        assert_measured(measurements(state), expected)


def test_measured_switch_in_micro_batches_records_their_means():
    link = measured(optax_sam.late(LINKS["scheduled"], 1))
    estimator = optax_sam.gradient_estimator(mlp_loss, link, num_micro_batches=4)
    run, state = jax.jit(estimator.value_and_grad), estimator.init(PARAMS)
    for name in ("plain", "scheduled"):
        _, _, state = run(PARAMS, state, BATCH)
        assert_measured(measurements(state), mean_of_what_happens(LINKS[name], 4))


# Extremes.


@functools.partial(jax.jit, static_argnums=0)
def measured_at(make_link, argument, gradient):
    """The measurements of ``make_link(argument)`` for a loss with the same gradient everywhere."""
    link, params, loss = measured(make_link(argument)), jnp.ones_like(gradient), jnp.float32(1)
    value_and_grad_fn = lambda _: (loss, gradient)  # noqa: E731
    _, state = link.update(gradient, link.init(params), params, value=loss, value_and_grad_fn=value_and_grad_fn)
    return measurements(state)


@pytest.fixture
def no_nans():
    with jax.debug_nans(True):
        yield


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(dtype, size) for dtype in ("float32", "bfloat16") for size in (2.0**-100, 1.0, 2.0**100)]
    + [("float16", size) for size in (2.0**-12, 1.0, 2.0**13)],
)
@pytest.mark.usefixtures("no_nans")
def test_extreme_gradients(dtype, size):
    found = measured_at(optax_sam.usam, 0.5 / size, jnp.asarray([3 * size, 0, 4 * size], dtype))
    assert_measured(found._replace(perturbation_norm=jnp.float32(0)), (5 * size, 0, 5 * size, 1, 1, 1, 1))
    assert_close(found.clean_norm / size, jnp.float32(5))
    assert_close(found.perturbation_norm, jnp.float32(2.5))


def multiplied_by(matrix):
    return optax.stateless(lambda g, _: matrix @ g)


@pytest.mark.parametrize(
    ("angle", "size"), [(0.0, 1.0), (1e-3, 1e30), (1.0, 1e-30), (np.pi / 2, 1.0), (3.0, 1e30), (np.pi, 1e-30)]
)
@pytest.mark.usefixtures("no_nans")
def test_cosine_of_an_angle(angle, size):
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)
    cosine = measured_at(multiplied_by, rotation, jnp.array([3 * size, 4 * size])).cosine
    np.testing.assert_allclose(float(cosine), np.cos(angle), rtol=0, atol=4 * float(jnp.finfo(jnp.float32).eps))
    assert abs(cosine) <= 1


def leaning_to(other):
    return optax.stateless(lambda g, _: g + 1e-3 * other)


@pytest.mark.usefixtures("no_nans")
def test_cosine_of_small_angles_is_right_to_the_last_bit():
    """A sum of products of elements is not, for one of these."""
    for seed in range(8):
        gradient, other = jax.random.normal(jax.random.key(seed), (2, 10_000))
        g, s = flat(gradient), flat(gradient + 1e-3 * other)
        expected = g @ s / np.linalg.norm(g) / np.linalg.norm(s)
        actual = measured_at(leaning_to, other, gradient).cosine
        assert abs(float(actual) - expected) < 0.5 * float(jnp.finfo(jnp.float32).eps)


@pytest.mark.usefixtures("no_nans")
def test_cosine_with_zero():
    assert float(measured_at(optax.scale, 0.0, jnp.array([3.0, 4.0])).cosine) == 0
    assert float(measured_at(optax.scale, 0.0, jnp.array([0.0, 0.0])).cosine) == 1


@pytest.mark.parametrize(
    ("params", "rho"),
    [(jax.random.normal(jax.random.key(0), (1000,), jnp.bfloat16), 0.05), (jnp.array([0.01], jnp.bfloat16), 1.0)],
    ids=["further than asked", "from small to large"],
)
def test_perturbation_is_that_which_narrow_params_make(params, rho):
    """Rounded to bfloat16, the params move further than asked; and a difference in bfloat16 would be rounded again."""
    link, loss_fn = measured(optax_sam.sam(rho)), lambda w: jnp.sum(w.astype(jnp.float32) ** 2)

    @jax.jit
    def update(params):
        points = []

        def grad_fn(point):
            points.append(point)
            return jax.grad(loss_fn)(point)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        _, state = link.update(grads, link.init(params), params, value=loss, value_fn=loss_fn, grad_fn=grad_fn)
        return points[0], measurements(state).perturbation_norm

    point, found = update(params)
    moved = np.linalg.norm(flat(point) - flat(params))
    assert abs(moved - rho) > 0.004
    assert_close(found, jnp.float32(moved))


def test_empty_trees_and_none():
    link = measured(optax_sam.sam(RHO))
    for params in ({}, {"a": None, "b": jnp.zeros(0)}):
        _, state = link.update(params, link.init(params), params, value=1.0, value_fn=lambda w: jnp.float32(2))
        assert_measured(measurements(state), (0, 0, 0, 1, 1, 2, 1))


# States.


def test_state_is_stable_in_scans_and_donated():
    tx, step = chain_step(optax_sam.switch_at({0: measured(LINKS["plain"]), 2: measured(LINKS["scheduled"])}))
    state = tx.init(PARAMS)
    assert jax.tree.map(jnp.shape, jax.eval_shape(tx.init, PARAMS)) == jax.tree.map(jnp.shape, state)
    scanned = jax.jit(lambda *carry: jax.lax.scan(lambda c, _: (step(*c, BATCH), None), carry, length=4)[0])
    expected = scanned(PARAMS, state)
    donating = jax.jit(step, donate_argnums=(0, 1))
    carry = jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)
    for _ in range(4):
        carry = donating(*carry, BATCH)
    assert_close(carry, expected)


@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "eager"])
@pytest.mark.parametrize("name", ["plain", "sam"])
def test_state_shares_no_buffer_with_the_loss_of_the_caller(name, jit):
    link, loss, grads = measured(LINKS[name]), jnp.float32(2.0), jnp.ones(2)
    update = jit(
        lambda state, loss: link.update(grads, state, grads, value=loss, value_fn=lambda w: 0 * jnp.sum(w) + loss)[1]
    )
    state = update(link.init(grads), loss)
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert float(loss) == 2


def test_resumed_run_equals_the_unbroken_run_bit_for_bit(tmp_path):
    tx, step = chain_step(optax_sam.switch_at({0: measured(LINKS["plain"]), 2: measured(LINKS["sam"])}))
    step = jax.jit(step)
    start = PARAMS, tx.init(PARAMS)
    middle = step(*step(*start, BATCH), BATCH)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", middle)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.tree.map(ocp.utils.to_shape_dtype_struct, start))
    assert_identical(measurements(restored), measurements(middle))
    assert_identical(step(*restored, BATCH), step(*middle, BATCH))


def test_networks_in_a_vmap_are_measured_each():
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[mlp_params(seed) for seed in range(3)])
    link = optax_sam.switch_at({0: measured(LINKS["sam"]), 1: measured(LINKS["plain"])})
    tx, step = chain_step(link)
    _, state = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))(stack, jax.vmap(tx.init)(stack), BATCH)
    for seed in range(3):
        expected = what_happens(LINKS["sam"], mlp_params(seed))
        assert_measured(jax.tree.map(lambda x, i=seed: x[i], measurements(state)), expected)


def test_states_of_flax_are_read():
    tx = optax.chain(measured(LINKS["sam"]), optax.adam(0.1))
    train_state = TrainState.create(apply_fn=mlp_loss, params=PARAMS, tx=tx)
    assert_measured(measurements(train_state), [0] * len(Measurements._fields))

    class Net(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.array([3.0, 4.0]))

    net = Net()
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    loss_fn = lambda net: 0.5 * jnp.sum(net.w[...] ** 2)  # noqa: E731
    loss, grads = nnx.value_and_grad(loss_fn)(net)
    graphdef, rest = nnx.split(net)
    del rest
    optimizer.update(net, grads, value=loss, value_fn=lambda params: loss_fn(nnx.merge(graphdef, params)))
    before = measurements(optimizer)
    assert_measured(before, (5, RHO, 5 + RHO, 1, 12.5, 0.5 * (5 + RHO) ** 2, 1))
    loss, grads = nnx.value_and_grad(loss_fn)(net)
    optimizer.update(net, grads, value=loss, value_fn=lambda params: loss_fn(nnx.merge(graphdef, params)))
    assert measurements(optimizer).clean_norm < before.clean_norm


def test_switches_without_measured_links_are_passed_over():
    tx = optax.chain(measured(optax_sam.sam(0.1)), optax_sam.late(optax.scale(2.0), 3))
    assert_measured(measurements(tx.init(PARAMS)), [0] * len(Measurements._fields))
