"""The link: from the clean gradient to the SAM gradient, alone and in Optax chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from tests.helpers.problems import (
    GradientCounter,
    assert_close,
    assert_identical,
    mlp_batch,
    mlp_loss,
    mlp_params,
    training_step,
)

PROJECTION = functools.partial(optax.projections.projection_l2_ball, scale=0.25)


def quadratic(w):
    return jnp.sum(jnp.arange(1.0, 1.0 + w.size) * w**2) / 2


def sam_gradient(link, params, grad_fn, **extra_args):
    return link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn, **extra_args)[0]


@pytest.mark.parametrize("projection", [None, PROJECTION], ids=["free", "projected"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_of_ascent_add_up_and_are_projected(steps, projection):
    w = np.array([1.0, -2.0, 0.5])
    point = w.copy()
    for _ in range(steps):
        gradient = np.array([1.0, 2.0, 3.0]) * point
        perturbation = point + 0.1 * gradient / np.linalg.norm(gradient) - w
        length = np.linalg.norm(perturbation)
        point = w + (perturbation * min(1.0, 0.25 / length) if projection else perturbation)
    link = optax_sam.sharpness_aware(optax_sam.normalized_ascent(0.1), steps=steps, projection=projection)
    s = sam_gradient(link, jnp.asarray(w, jnp.float32), jax.grad(quadratic))
    np.testing.assert_allclose(s, np.array([1.0, 2.0, 3.0]) * point, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_each_step_evaluates_one_more_gradient(steps):
    counter = GradientCounter()
    loss_fn = counter.counted(mlp_loss, num_examples=1)
    tx = optax.chain(optax_sam.sharpness_aware(optax_sam.normalized_ascent(0.1), steps=steps), optax.sgd(0.1))
    params = mlp_params()
    jax.block_until_ready(jax.jit(training_step(tx, loss_fn))(params, tx.init(params), mlp_batch()))
    assert counter.take() == 1 + steps


def test_schedule_of_rho_counts_training_steps_whatever_the_steps_of_ascent():
    schedule = optax.linear_schedule(0.1, 0.4, 3)
    link = optax_sam.sharpness_aware(optax_sam.unnormalized_ascent(schedule), steps=2)
    state, w = link.init(jnp.ones([])), jnp.ones([])
    for rho in (0.1, 0.2, 0.3):
        s, state = link.update(w, state, w, grad_fn=lambda w: w)
        np.testing.assert_allclose(float(s), 1 + rho + rho * (1 + rho), rtol=1e-6)


def test_batch_value_fn_and_closures_are_the_same():
    params, batch = mlp_params(), mlp_batch()
    link = optax_sam.sam(0.2)
    grads, state = jax.grad(mlp_loss)(params, batch), link.init(params)
    calls = [
        {"grad_fn": jax.grad(mlp_loss), "batch": batch},
        {"grad_fn": lambda params: jax.grad(mlp_loss)(params, batch)},
        {"value_fn": mlp_loss, "batch": batch},
        {"value_fn": lambda params: mlp_loss(params, batch), "an_argument_of_somebody_else": 3},
    ]
    first, *others = [jax.jit(lambda k=k: link.update(grads, state, params, **k)[0])() for k in calls]
    for other in others:
        assert_identical(other, first)


def displaced(params, grads, rho):
    """Where SAM asks for the gradient at params, given a clean one."""
    seen, link = [], optax_sam.sam(rho)
    s, _ = link.update(grads, link.init(params), params, grad_fn=lambda point: seen.append(point) or grads)
    assert jax.tree.map(jnp.result_type, s) == jax.tree.map(jnp.result_type, params)
    return seen[0]


displaced = jax.jit(displaced)
every_narrow_dtype = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)


@every_narrow_dtype
def test_length_of_what_is_added_to_narrow_params_is_that_of_unbiased_rounding(dtype):
    """Each of n elements moves by ρ/√n on average, in steps of the spacing of numbers from 1 to 2."""
    rho, size, spacing = 0.05, 1_000_000, float(jnp.finfo(dtype).eps)
    point = displaced(jnp.full(size, 1.5, dtype), jnp.ones(size, dtype), rho)
    step, share = rho / size**0.5, rho / size**0.5 / spacing % 1
    expected = (size * (step**2 + share * (1 - share) * spacing**2)) ** 0.5
    np.testing.assert_allclose(np.linalg.norm(np.asarray(point, np.float64) - 1.5), expected, rtol=0.02)


@pytest.mark.parametrize("mask", ["tree", "prefix", "function"])
def test_masked_leaves_stay_where_they_are_and_out_of_the_norm(mask):
    params = {"a": {"x": jnp.array([1.0, 2.0]), "y": jnp.array([3.0])}, "b": jnp.array([4.0, 5.0])}
    masks = {
        "tree": {"a": {"x": True, "y": True}, "b": False},
        "prefix": {"a": True, "b": False},
        "function": lambda params: {"a": jax.tree.map(lambda _: True, params["a"]), "b": False},
    }
    seen = []
    loss_fn = lambda p: quadratic(p["a"]["x"]) + quadratic(p["a"]["y"]) + quadratic(p["b"])  # noqa: E731

    def grad_fn(point):
        seen.append(point)
        return jax.grad(loss_fn)(point)

    sam_gradient(optax_sam.sam(0.1, mask=masks[mask]), params, grad_fn)
    grads = jax.grad(loss_fn)(params)
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads["a"])))
    assert_close(seen[-1]["a"], jax.tree.map(lambda w, g: w + 0.1 * g / np.float32(length), params["a"], grads["a"]))
    assert_identical(seen[-1]["b"], params["b"])


@pytest.mark.parametrize("elements", ["random", "equal"])
@every_narrow_dtype
def test_narrow_params_really_move(dtype, elements):
    w_key, g_key = jax.random.split(jax.random.key(0))
    w, g = 0.05 * jax.random.normal(w_key, (200_000,)), jax.random.normal(g_key, (200_000,))
    if elements == "equal":
        w, g = jnp.full_like(w, 0.05), jnp.ones_like(g)
    params = {"w": w.astype(dtype), "rest": jnp.arange(3, dtype=dtype)}
    grads = {"w": g.astype(dtype), "rest": jnp.zeros(3, dtype)}
    point = displaced(params, grads, 0.05)
    assert_identical(point["rest"], params["rest"])
    moved, direction = (np.asarray(x, np.float64) for x in (point["w"], grads["w"]))
    moved = moved - np.asarray(params["w"], np.float64)
    along = moved @ direction / np.linalg.norm(direction)
    assert abs(along / 0.05 - 1) < 0.05, "unbiased up to the noise of 200,000 roundings"
    assert np.mean(moved != 0) > 0.05
    assert_identical(displaced(params, grads, 0.0), params)


def test_wide_params_move_by_exactly_epsilon():
    params, seen = jnp.array([1.0, 2.0]), []
    grad_fn = lambda point: seen.append(point) or point  # noqa: E731
    sam_gradient(optax_sam.sharpness_aware(optax.scale(0.5)), params, grad_fn)
    assert_identical(seen[-1], params + 0.5 * params)


def test_params_outside_are_never_the_perturbed_ones():
    params = mlp_params()
    before = jax.tree.map(np.array, params)
    tx = optax.chain(optax_sam.sam(10.0), optax.set_to_zero())
    after, _ = training_step(tx)(params, tx.init(params), mlp_batch())
    assert_identical(params, before)
    assert_identical(after, before)


def train(tx, steps=40, **extra):
    """The losses of a jitted loop with donated params and state."""
    batch = mlp_batch()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        value_fn = lambda params: mlp_loss(params, batch)  # noqa: E731
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, **{k: f(value, grads, value_fn) for k, f in extra.items()})
        return optax.apply_updates(params, updates), state, value

    params = mlp_params()
    state = jax.tree.map(jnp.array, tx.init(params))
    losses = []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses


BY_GRAD_FN = {"grad_fn": lambda value, grads, value_fn: jax.grad(value_fn)}


@pytest.mark.parametrize(
    ("behind", "extra"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True)), BY_GRAD_FN),
        (optax.adamw(0.03), BY_GRAD_FN),
        (optax.apply_if_finite(optax.adam(0.03), 3), BY_GRAD_FN),
        (
            optax.chain(optax.adam(0.03), optax.contrib.reduce_on_plateau(patience=5)),
            BY_GRAD_FN | {"value": lambda value, grads, value_fn: value},
        ),
        (
            optax.chain(optax.scale(-1.0), optax.scale_by_backtracking_linesearch(10)),
            {
                "value": lambda value, grads, value_fn: value,
                "grad": lambda value, grads, value_fn: grads,
                "value_fn": lambda value, grads, value_fn: value_fn,
            },
        ),
    ],
    ids=["clip-nesterov", "adamw", "apply_if_finite", "reduce_on_plateau", "line search"],
)
def test_chains_train(behind, extra):
    losses = train(optax.chain(optax_sam.sam(0.01), behind), **extra)
    assert losses[-1] < 0.3 * losses[0]


def test_clipping_behind_the_link_bounds_the_step():
    tx = optax.chain(optax_sam.sam(0.5), optax.clip_by_global_norm(0.1))
    w = jnp.array([3.0, 4.0])
    updates, _ = tx.update(w, tx.init(w), w, grad_fn=lambda point: 2 * point)
    np.testing.assert_allclose(updates, [0.06, 0.08], rtol=1e-5)


def test_multi_steps_behind_the_link_is_msam_over_the_mini_steps():
    every = 4
    tx = optax.chain(optax_sam.sam(0.1), optax.MultiSteps(optax.sgd(0.1), every).gradient_transformation())
    params = start = mlp_params()
    state = tx.init(params)
    batches, step = [mlp_batch(seed) for seed in range(every)], jax.jit(training_step(tx))
    for batch in batches:
        params, state = step(params, state, batch)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    tx = optax.chain(optax_sam.msam(0.1), optax.sgd(0.1))
    expected, _ = jax.jit(training_step(tx, stacked=True))(start, tx.init(start), stacked)
    assert_close(params, expected)


@pytest.mark.parametrize("bad_pass", ["clean", "perturbed"])
def test_apply_if_finite_behind_the_link_skips_the_whole_step(bad_pass):
    tx = optax.chain(optax_sam.sam(0.1), optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 5))
    params = jnp.ones(3)
    state = tx.init(params)
    updates, state = tx.update(params, state, params, grad_fn=lambda w: w)
    bad = jnp.full(3, jnp.nan)
    clean, perturbed = (bad, params) if bad_pass == "clean" else (params, bad)
    grad_fn = lambda w: jnp.where(jnp.isnan(w), w, perturbed)  # noqa: E731
    skipped, after = tx.update(clean, state, params, grad_fn=grad_fn)
    assert not np.any(skipped)
    assert np.any(updates)
    assert_identical(after[1].inner_state, state[1].inner_state)


@pytest.mark.parametrize("rho", [0.1, optax.linear_schedule(0.1, 0.3, 2)], ids=["constant", "schedule"])
def test_inject_hyperparams(rho):
    injected = optax.inject_hyperparams(optax_sam.sam)(rho=rho)
    plain, params, batch = optax_sam.sam(rho), mlp_params(), mlp_batch()
    states = injected.init(params), plain.init(params)
    assert float(states[0].hyperparams["rho"]) == pytest.approx(0.1)
    for _ in range(3):
        grads = jax.grad(mlp_loss)(params, batch)
        update = lambda link, state: link.update(grads, state, params, grad_fn=jax.grad(mlp_loss), batch=batch)  # noqa: B023, E731
        outputs, states = zip(
            *[update(link, s) for link, s in zip((injected, plain), states, strict=True)], strict=True
        )
        assert_close(outputs[0], outputs[1])
