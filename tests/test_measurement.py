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
    every_link,
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


@every_link
def test_chain_records_what_happens(link):
    tx, step = chain_step(measured(link))
    _, state = jax.jit(step)(PARAMS, tx.init(PARAMS), BATCH)
    assert_measured(measurements(state), what_happens(link))


def test_without_jit_too():
    tx, step = chain_step(measured(LINKS["sam"]))
    _, state = step(PARAMS, tx.init(PARAMS), BATCH)
    assert_measured(measurements(state), what_happens(LINKS["sam"]))


@pytest.mark.parametrize("name", ["plain", "stable_sam", "three steps"])
def test_estimator_records_what_happens(name):
    estimator, step = estimator_step(measured(LINKS[name]))
    _, state = jax.jit(step)(PARAMS, estimator.init(PARAMS), BATCH)
    assert_measured(measurements(state), what_happens(LINKS[name]))


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll", "auto"])
@pytest.mark.parametrize("name", ["plain", "sam", "scheduled"])
def test_micro_batches_record_the_means_of_what_happens_to_each(name, strategy):
    link, options = LINKS[name], {"num_micro_batches": 4, "strategy": strategy}
    estimator, step = estimator_step(measured(link), **options)
    _, state = jax.jit(step)(PARAMS, estimator.init(PARAMS), BATCH)
    assert_measured(measurements(state), mean_of_what_happens(link, 4))


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll", "auto"])
def test_accumulated_gradients_record_what_happens_to_the_batch(strategy):
    estimator, step = estimator_step(measured(LINKS["sam"]), num_micro_batches=4, strategy=strategy, ascent_per="batch")
    _, state = jax.jit(step)(PARAMS, estimator.init(PARAMS), BATCH)
    assert_measured(measurements(state), what_happens(LINKS["sam"]))


def test_micro_batches_of_a_chain_record_the_means_of_what_happens_to_each():
    link = optax_sam.micro_batched(measured(LINKS["stable_sam"]))

    @jax.jit
    def update(state, micro_batches):
        losses, grads = jax.vmap(jax.value_and_grad(mlp_loss), in_axes=(None, 0))(PARAMS, micro_batches)
        extra_args = {"value": jnp.mean(losses), "value_fn": mlp_loss, "batch": micro_batches}
        return link.update(grads, state, PARAMS, **extra_args)[1]

    actual = measurements(update(link.init(PARAMS), split(BATCH, 4)))
    assert_measured(actual, mean_of_what_happens(LINKS["stable_sam"], 4))


def test_aux_stays_with_the_clean_pass():
    loss_fn = lambda params, batch: (mlp_loss(params, batch), {"norm": optax.tree.norm(params)})  # noqa: E731
    estimator = optax_sam.gradient_estimator(loss_fn, measured(LINKS["sam"]), has_aux=True, num_micro_batches=2)
    (_, aux), _, state = jax.jit(estimator.value_and_grad)(PARAMS, estimator.init(PARAMS), BATCH)
    assert_close(aux, {"norm": optax.tree.norm(PARAMS)})
    assert_measured(measurements(state), mean_of_what_happens(LINKS["sam"], 2))


# Nothing else happens for it.


def trained(make, link, loss_fn=mlp_loss, params=PARAMS, batch=BATCH):
    transformation, step = make(link, loss_fn)
    step, carry = jax.jit(step), (params, transformation.init(params))
    for _ in range(3):
        carry = step(*carry, batch)
    return carry[0]


accumulated_step = functools.partial(estimator_step, num_micro_batches=4, ascent_per="batch")
every_form = pytest.mark.parametrize(
    "make", [chain_step, estimator_step, accumulated_step], ids=["chain", "estimator", "accumulated"]
)


@every_link
def test_training_is_the_same_bit_for_bit(link):
    assert_identical(trained(chain_step, measured(link)), trained(chain_step, link))


@every_form
@pytest.mark.parametrize(
    "setting", [(mlp_loss, PARAMS, BATCH), (cnn_loss, cnn_params(), cnn_batch())], ids=["mlp", "cnn"]
)
def test_training_is_the_same_bit_for_bit_in_every_form(make, setting):
    link = LINKS["stable_sam"]
    assert_identical(trained(make, measured(link), *setting), trained(make, link, *setting))


def test_training_over_micro_batches_is_the_same_to_rounding():
    """Where gradients are added up in a loop, XLA may contract the addition with the last operation of the gradient."""
    make = functools.partial(estimator_step, num_micro_batches=4)
    assert_close(trained(make, measured(LINKS["sam"])), trained(make, LINKS["sam"]))


@pytest.mark.parametrize(
    "make",
    [chain_step, estimator_step]
    + [
        functools.partial(estimator_step, num_micro_batches=4, ascent_per=ascent_per)
        for ascent_per in ("micro_batch", "batch")
    ],
    ids=["chain", "estimator", "micro_batch", "batch"],
)
@pytest.mark.parametrize(("name", "gradients"), [("plain", 1), ("sam", 2), ("three steps", 4)])
def test_the_same_gradients_are_executed(make, name, gradients):
    counter, examples = GradientCounter(), 32
    size = examples // make.keywords["num_micro_batches"] if isinstance(make, functools.partial) else examples
    transformation, step = make(measured(LINKS[name]), counter.counted(mlp_loss, num_examples=size))
    jax.block_until_ready(jax.jit(step)(PARAMS, transformation.init(PARAMS), BATCH))
    assert counter.take() == gradients * examples


def test_losses_come_with_the_gradients_and_need_no_matrix_product():
    def products(link):
        tx, step = chain_step(link)
        program = jax.jit(step).lower(PARAMS, tx.init(PARAMS), BATCH).compile().as_text()
        return program.count(" dot(")

    assert products(measured(LINKS["sam"])) == products(LINKS["sam"]) > 0


@pytest.mark.parametrize("ascent_per", ["micro_batch", "batch"])
def test_estimator_hands_its_link_the_loss_and_how_to_get_others(ascent_per):
    def update(updates, state, params=None, *, grad_fn, value, value_and_grad_fn):
        point = optax.tree.scale(0.5, params)
        loss, gradient = value_and_grad_fn(point)
        return jax.tree.map(lambda g, a, b: g + a - b, updates, gradient, grad_fn(point)), state + value + 10 * loss

    link = optax.GradientTransformationExtraArgs(lambda params: jnp.float32(0), update)
    loss_fn = lambda params, batch: (mlp_loss(params, batch), 1)  # noqa: E731
    estimator = optax_sam.gradient_estimator(loss_fn, link, has_aux=True, num_micro_batches=4, ascent_per=ascent_per)
    (loss, _), grads, state = estimator.value_and_grad(PARAMS, estimator.init(PARAMS), BATCH)
    assert_close(grads, jax.grad(mlp_loss)(PARAMS, BATCH))
    assert_close(state, loss + 10 * mlp_loss(optax.tree.scale(0.5, PARAMS), BATCH))


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
    loss, grads = jax.value_and_grad(mlp_loss)(PARAMS, BATCH)
    doubled = lambda *args: optax.tree.scale(2.0, jax.grad(mlp_loss)(*args))  # noqa: E731
    both = lambda *args: (3 * mlp_loss(*args), doubled(*args))  # noqa: E731
    link = measured(LINKS["sam"])
    state, expected = link.init(PARAMS), what_happens(LINKS["sam"])
    _, state = link.update(grads, state, PARAMS, value=loss, value_fn=mlp_loss, grad_fn=doubled, batch=BATCH)
    assert_measured(measurements(state), expected._replace(sam_norm=2 * expected.sam_norm))
    _, state = link.update(
        grads, state, PARAMS, value=loss, value_fn=None, value_and_grad_fn=both, grad_fn=jax.grad(mlp_loss), batch=BATCH
    )
    expected = expected._replace(sam_norm=2 * expected.sam_norm, perturbed_loss=3 * expected.perturbed_loss)
    assert_measured(measurements(state), expected)


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


# Devices.


@pytest.mark.parametrize("make", [chain_step, estimator_step], ids=["chain", "estimator"])
def test_phase_of_the_last_update_is_read_before_at_and_after_the_switch(make):
    phases = {0: LINKS["plain"], 2: LINKS["sam"], 3: LINKS["stable_sam"]}
    link = optax_sam.switch_at({start: measured(phase) for start, phase in phases.items()})
    transformation, step = make(link)

    @jax.jit
    def logging_step(params, state, batch):
        params, state = step(params, state, batch)
        return params, state, measurements(state)

    params, state = PARAMS, transformation.init(PARAMS)
    assert_measured(measurements(state), [0] * len(Measurements._fields))
    for index, name in enumerate(["plain", "plain", "sam", "stable_sam", "stable_sam"]):
        batch = mlp_batch(seed=index)
        expected = what_happens(LINKS[name], params, batch)
        params, state, logged = logging_step(params, state, batch)
        assert_measured(logged, expected)
        assert_identical(measurements(state), logged)
    assert logging_step._cache_size() == 1


@pytest.mark.parametrize("make", [chain_step, estimator_step], ids=["chain", "estimator"])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_measuring_a_switch_measures_each_of_its_links(make, jit):
    switches = {
        "late": (optax_sam.late(LINKS["sam"], 2), ["plain", "plain", "sam", "sam"]),
        "every other": (optax_sam.switch_by(lambda step: step % 2, [LINKS["plain"], LINKS["usam"]]), ["plain", "usam"]),
        "nested": (
            optax_sam.late(optax_sam.switch_by(lambda step: step, [LINKS["sam"], LINKS["usam"]]), 1),
            ["plain", "sam", "usam"],
        ),
    }
    for link, names in switches.values():
        transformation, step = make(measured(link))
        step = jax.jit(step) if jit else step
        params, state = PARAMS, transformation.init(PARAMS)
        for name in names:
            expected = what_happens(LINKS[name], params)
            params, state = step(params, state, BATCH)
            assert_measured(measurements(state), expected)


def test_measured_switch_in_micro_batches_records_their_means():
    link = measured(optax_sam.late(LINKS["sam"], 1))
    by_hand = optax_sam.switch_at({0: measured(optax.identity()), 1: measured(LINKS["sam"])})
    results = []
    for one in (link, by_hand):
        estimator = optax_sam.gradient_estimator(mlp_loss, one, num_micro_batches=4)
        run, state = jax.jit(estimator.value_and_grad), estimator.init(PARAMS)
        for _ in range(2):
            _, _, state = run(PARAMS, state, BATCH)
        results.append(measurements(state))
    assert float(results[0].active) == 1
    assert_identical(*results)


def test_switches_in_phases_of_switches_are_read():
    inner = optax_sam.switch_by(lambda step: step % 2, [measured(LINKS["sam"]), measured(LINKS["usam"])])
    tx, step = chain_step(optax_sam.switch_at({0: measured(LINKS["plain"]), 1: inner}))
    step, state = jax.jit(step), tx.init(PARAMS)
    for name in ("plain", "sam", "usam", "sam"):
        _, state = step(PARAMS, state, BATCH)
        assert_measured(measurements(state), what_happens(LINKS[name]))


# Extremes.


def measured_at(link, gradient, dtype=jnp.float32):
    """The measurements for a loss with the same gradient everywhere."""
    link = measured(link)

    @jax.jit
    def update(gradient):
        params, loss = jnp.ones_like(gradient), jnp.float32(1)
        value_and_grad_fn = lambda _: (loss, gradient)  # noqa: E731
        extra_args = {"value": loss, "value_and_grad_fn": value_and_grad_fn}
        return measurements(link.update(gradient, link.init(params), params, **extra_args)[1])

    with jax.debug_nans(True):
        return update(jnp.asarray(gradient, dtype))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(dtype, size) for dtype in ("float32", "bfloat16") for size in (2.0**-100, 1.0, 2.0**100)]
    + [("float16", size) for size in (2.0**-12, 1.0, 2.0**13)],
)
def test_extreme_gradients(dtype, size):
    found = measured_at(optax_sam.usam(0.5 / size), [3 * size, 0, 4 * size], dtype)
    assert_measured(found._replace(perturbation_norm=jnp.float32(0)), (5 * size, 0, 5 * size, 1, 1, 1, 1))
    assert_close(found.clean_norm / size, jnp.float32(5))
    assert_close(found.perturbation_norm, jnp.float32(2.5))


def rotating(angle):
    """A link that turns a gradient in two dimensions."""
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)
    return optax.stateless(lambda g, _: jnp.asarray(matrix) @ g)


@pytest.mark.parametrize(
    ("angle", "size"), [(0.0, 1.0), (1e-3, 1e30), (1.0, 1e-30), (np.pi / 2, 1.0), (3.0, 1e30), (np.pi, 1e-30)]
)
def test_cosine_of_an_angle(angle, size):
    cosine = measured_at(rotating(angle), [3 * size, 4 * size]).cosine
    np.testing.assert_allclose(float(cosine), np.cos(angle), rtol=0, atol=4 * float(jnp.finfo(jnp.float32).eps))
    assert abs(cosine) <= 1


def test_cosine_of_small_angles_is_right_to_the_last_bit():
    """A sum of products of elements is not, for one of these."""
    for seed in range(8):
        gradient, other = jax.random.normal(jax.random.key(seed), (2, 10_000))
        g, s = flat(gradient), flat(gradient + 1e-3 * other)
        expected = g @ s / np.linalg.norm(g) / np.linalg.norm(s)
        actual = measured_at(optax.stateless(lambda g, _, other=other: g + 1e-3 * other), gradient).cosine
        assert abs(float(actual) - expected) < 0.5 * float(jnp.finfo(jnp.float32).eps)


def test_cosine_with_zero():
    assert float(measured_at(optax.scale(0.0), [3.0, 4.0]).cosine) == 0
    assert float(measured_at(optax.scale(0.0), [0.0, 0.0]).cosine) == 1


@pytest.mark.parametrize(
    ("params", "rho"),
    [(jax.random.normal(jax.random.key(0), (1000,), jnp.bfloat16), 0.05), (jnp.array([0.01], jnp.bfloat16), 1.0)],
    ids=["further than asked", "from small to large"],
)
def test_perturbation_is_that_which_narrow_params_make(params, rho):
    """Rounded to bfloat16, the params move further than asked; and a difference in bfloat16 would be rounded again."""
    points, link = [], measured(optax_sam.sam(rho))
    loss_fn = lambda w: jnp.sum(w.astype(jnp.float32) ** 2)  # noqa: E731

    def grad_fn(point):
        points.append(point)
        return jax.grad(loss_fn)(point)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    _, state = link.update(grads, link.init(params), params, value=loss, value_fn=loss_fn, grad_fn=grad_fn)
    moved = np.linalg.norm(flat(points[0]) - flat(params))
    assert abs(moved - rho) > 0.004
    assert_close(measurements(state).perturbation_norm, jnp.float32(moved))


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
