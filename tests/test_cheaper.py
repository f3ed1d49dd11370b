"""Members of the family that have a state or spare a gradient: NumPy over many steps, and what they really evaluate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import measured, measurements
from tests.helpers import references
from tests.helpers.problems import assert_close, assert_identical, mlp_batch, mlp_loss, mlp_params

STEPS, RHO = 8, 0.2
METHODS = {  # the link, the reference, and how many vectors and scalars its state holds
    "gsam": (optax_sam.gsam(RHO, alpha=0.3), references.gsam, 0),
    "wsam": (optax_sam.wsam(RHO, gamma=0.7), references.wsam, 0),
    "friendly_sam": (optax_sam.friendly_sam(RHO, sigma=0.7), references.friendly_sam, 1),
    "vasso": (optax_sam.vasso(RHO), references.vasso, 1),
    "look_sam": (optax_sam.look_sam(RHO, period=2), references.look_sam, 1),
    "sam_every": (optax_sam.sam_every(RHO, period=2), references.sam_every, 0),
    "ae_sam": (optax_sam.ae_sam(RHO, lambda step: 1 - step / 4), references.ae_sam, 2),
    "momentum_sam": (optax_sam.momentum_sam(RHO), references.momentum_sam, 1),
    "lagged_sam": (optax_sam.lagged_sam(RHO), references.lagged_sam, 1),
}
STRATEGIES = ["scan", "vmap", "unroll", "lazy"]


def problem():
    """Batches of 12 examples, a new one for each step, and params."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(STEPS, 12, 7)), rng.normal(size=(STEPS, 12)), rng.normal(size=7)


def loss_fn(params, batch):
    w = jnp.concatenate([params["a"].ravel(), params["b"]])
    return jnp.mean((jnp.tanh(batch["x"] @ w) - batch["y"]) ** 2) + 0.025 * jnp.sum(w**4)


def gradient_of(x, y):
    def gradient(w):
        prediction = np.tanh(x @ w)
        return 2 / len(y) * x.T @ ((prediction - y) * (1 - prediction**2)) + 0.1 * w**3

    return gradient


def trees(x, y, w):
    batches = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    return batches, {"a": jnp.asarray(w[:4].reshape(2, 2)), "b": jnp.asarray(w[4:])}


def trajectory(estimator, params, batches):
    """What the estimator returns at fixed params for one batch after another."""

    @jax.jit
    def run(params, batches):
        def body(state, batch):
            _, grads, state = estimator.value_and_grad(params, state, batch)
            return state, jnp.concatenate([grads["a"].ravel(), grads["b"]])

        return jax.lax.scan(body, estimator.init(params), batches)[1]

    return run(params, batches)


def expected_of(name, num_micro_batches):
    x, y, w = problem()
    _, update, size = METHODS[name]
    state = tuple(0.0 if name == "ae_sam" else np.zeros(7) for _ in range(size))
    found = []
    for step in range(STEPS):
        parts = zip(np.split(x[step], num_micro_batches), np.split(y[step], num_micro_batches), strict=True)
        gradients = [gradient_of(*part) for part in parts]
        s, state = references.step_of(functools.partial(update, rho=RHO), gradients, w, state, step)
        found.append(s)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_numpy_agrees_on_micro_batches_by_every_strategy(name):
    with jax.enable_x64(True):
        batches, params = trees(*problem())
        for strategy in STRATEGIES:
            estimator = optax_sam.gradient_estimator(loss_fn, METHODS[name][0], num_micro_batches=4, strategy=strategy)
            actual = trajectory(estimator, params, batches)
            np.testing.assert_allclose(actual, expected_of(name, 4), rtol=1e-9, atol=1e-12, err_msg=strategy)
        accumulated = optax_sam.gradient_estimator(loss_fn, METHODS[name][0], num_micro_batches=4, ascent_per="batch")
        actual = trajectory(accumulated, params, batches)
        np.testing.assert_allclose(actual, expected_of(name, 1), rtol=1e-9, atol=1e-12)


CONTROL = optax_sam.random_sam(RHO, key=3)
ALONE = {"momentum_sam": optax_sam.momentum_sam(RHO), "random_sam": CONTROL}  # one gradient in all


def quadratic_loss(params, batch):
    """Its gradient is the point itself, of each micro-batch times what it holds."""
    return 0.5 * jnp.mean(batch) * jnp.sum(params**2)


def test_random_directions_are_new_in_each_step_and_micro_batch_and_of_length_rho():
    params = jnp.zeros(1000)
    found = []
    for column in range(4):  # the gradient of one micro-batch alone: the others have none
        estimator = optax_sam.gradient_estimator(quadratic_loss, CONTROL, num_micro_batches=4, strategy="scan")
        state = estimator.init(params)
        for _ in range(2):
            weights = jnp.zeros(8).at[2 * column : 2 * column + 2].set(4.0)
            _, grads, state = jax.jit(estimator.value_and_grad)(params, state, weights)
            found.append(np.asarray(grads))
    np.testing.assert_allclose([np.linalg.norm(point) for point in found], RHO, rtol=1e-5)
    cosines = np.array([[a @ b / RHO**2 for a in found] for b in found])
    assert np.max(np.abs(cosines - np.eye(8))) < 0.15  # of independent directions in 1,000 dimensions: 0.03 each


def test_random_directions_are_those_of_the_key_on_devices_and_shards_too():
    """Eight members: each its own direction with an average over them, one for all without, and one in each shard."""
    params, batch = jnp.zeros(1000), jnp.ones(8)
    grad_fn = jax.grad(quadratic_loss)

    def of_member(link, params):
        def update(x):
            return link.update(grad_fn(params, x), link.init(params), params, grad_fn=grad_fn, batch=x)[0]

        return jax.vmap(update, axis_name="data")(batch)

    same = of_member(CONTROL, params)
    assert_identical(same, jnp.stack([same[0]] * 8))
    mean = of_member(optax_sam.micro_batched(CONTROL, "data"), params)[0]
    assert abs(float(jnp.linalg.norm(mean)) / RHO - 8**-0.5) < 0.1  # of eight independent directions
    shards = of_member(optax_sam.sharded(CONTROL, "data", mask=True), params)
    assert abs(float(jnp.linalg.norm(shards)) / RHO - 1) < 1e-5  # over all shards
    cosines = np.array([[a @ b for a in shards] for b in shards]) / (RHO**2 / 8)
    assert np.max(np.abs(cosines - np.eye(8))) < 0.3


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("ascent_per", ["micro_batch", "batch"])
def test_loss_and_aux_of_one_gradient_are_those_where_it_is_taken(name, ascent_per):
    aux_loss = lambda params, batch: (mlp_loss(params, batch), params)  # noqa: E731
    estimator = optax_sam.gradient_estimator(
        aux_loss, measured(ALONE[name]), has_aux=True, num_micro_batches=4, ascent_per=ascent_per
    )
    params, state = mlp_params(), estimator.init(mlp_params())
    step = jax.jit(estimator.value_and_grad)
    for _ in range(2):
        (loss, point), grads, state = step(params, state, mlp_batch())
    found = measurements(state)
    assert_close(found.perturbed_loss, loss)
    assert np.isnan([found.clean_loss, found.clean_norm, found.cosine]).all()
    assert_close([found.perturbation_norm, found.active], [jnp.float32(RHO), jnp.float32(1)])
    if ascent_per == "batch":
        assert_close(loss, mlp_loss(point, mlp_batch()))
        assert_close(grads, jax.grad(mlp_loss)(point, mlp_batch()))
        moved = jax.tree.map(jnp.subtract, point, params)
        assert_close(optax.tree.norm(moved), jnp.float32(RHO))


def test_a_link_of_one_gradient_in_a_branch_has_no_loss_to_show():
    def update(updates, state, params=None, *, grad_fn, **_):
        return jax.lax.cond(True, lambda: grad_fn(params), lambda: updates), state

    link = optax_sam.one_gradient(optax.GradientTransformationExtraArgs(lambda params: (), update))
    with pytest.raises(ValueError, match="in a branch, a loop or a map"):
        jax.jit(optax_sam.value_and_grad(mlp_loss, link))(mlp_params(), mlp_batch())
    nothing = optax_sam.one_gradient(optax.identity())
    with pytest.raises(TypeError, match="evaluated no gradient"):
        optax_sam.value_and_grad(mlp_loss, nothing)(mlp_params(), mlp_batch())


def test_late_momentum_sam_is_sgd_first_and_has_the_clean_loss():
    estimator = optax_sam.gradient_estimator(mlp_loss, optax_sam.late(optax_sam.momentum_sam(RHO), 1))
    params, state = mlp_params(), estimator.init(mlp_params())
    step = jax.jit(estimator.value_and_grad)
    clean = jax.jit(jax.value_and_grad(mlp_loss))(params, mlp_batch())
    for active in (0, 0, 1):  # v is zero in its first step
        loss, grads, state = step(params, state, mlp_batch())
        assert_close(loss, clean[0])
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, grads, clean[1]))
        assert (difference > 1e-3) == active


def test_measurements_are_means_though_micro_batches_choose_for_themselves():
    link = measured(optax_sam.ae_sam(0.1, decay=0.1))
    estimator = optax_sam.gradient_estimator(mlp_loss, link, num_micro_batches=4)
    params, state, step = mlp_params(), estimator.init(mlp_params()), jax.jit(estimator.value_and_grad)
    parts = [jax.tree.map(lambda x, j=j: x[2 * j : 2 * j + 2], mlp_batch()) for j in range(4)]
    expected = jnp.mean(jnp.stack([optax.tree.norm(jax.grad(mlp_loss)(params, part)) for part in parts]))
    for _ in range(3):
        loss, _, state = step(params, state, mlp_batch())
        found = measurements(state)
        assert_close((found.clean_norm, found.clean_loss), (expected, loss))
    assert 0 < found.active < 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_look_sam_has_nothing_to_reuse_where_sam_adds_only_rounding(dtype):
    params, link = jnp.linspace(0.5, 1.5, 64, dtype=dtype), optax_sam.look_sam(0.05, period=2)
    grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w.astype(jnp.float32) ** 2))  # s and g are parallel
    state = link.init(params)
    for _ in range(2):
        updates, state = link.update(grad_fn(params), state, params, grad_fn=grad_fn)
    assert_identical(updates, grad_fn(params))


def test_a_first_batch_of_padding_alone_does_not_begin_an_average():
    options = {"num_micro_batches": 2, "weight_fn": lambda batch: jnp.sum(batch["valid"])}
    estimator = optax_sam.gradient_estimator(mlp_loss_of_valid, optax_sam.friendly_sam(0.1), **options)
    step, state = jax.jit(estimator.value_and_grad), estimator.init(mlp_params())
    _, _, padded = step(mlp_params(), state, mlp_batch() | {"valid": jnp.zeros(8)})
    batch = mlp_batch() | {"valid": jnp.ones(8)}
    assert_close(step(mlp_params(), padded, batch), step(mlp_params(), state, batch))


def mlp_loss_of_valid(params, batch):
    return mlp_loss(params, batch) * jnp.where(jnp.sum(batch["valid"]) > 0, 1, jnp.nan)


def test_rho_follows_the_learning_rate_between_its_bounds():
    learning_rate = optax.warmup_cosine_decay_schedule(0.0, 0.5, 10, 40, end_value=0.1)
    rho = optax_sam.rho_by_learning_rate(learning_rate, lr_min=0.1, lr_max=0.5, rho_min=0.02, rho_max=0.2)
    steps = np.array([0, 1, 4, 10, 20, 40])
    rates = np.array([learning_rate(step) for step in steps])
    expected = np.interp(rates, [0.1, 0.5], [0.02, 0.2])  # which is flat outside
    np.testing.assert_allclose([rho(step) for step in steps], expected, rtol=1e-5)
    assert (rates[:2] < 0.1).all()
    state = (link := optax_sam.gsam(rho, alpha=0.0)).init(jnp.ones(2))
    for step in range(2):
        seen = []
        _, state = link.update(jnp.ones(2), state, jnp.ones(2), grad_fn=lambda w, seen=seen: seen.append(w) or w)
        np.testing.assert_allclose(np.linalg.norm(seen[0] - 1), rho(step), rtol=1e-4)
