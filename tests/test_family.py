"""The laws of the family, over the registry of all its members."""

import functools

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
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
    training_step,
)
from registry import (
    MEMBERS,
    MICRO_BATCHES,
    RHO,
    STEPS,
    batch_for,
    every_member,
    gradients_by_step,
    optimizer,
    plain_gradients_by_step,
)

import optax_sam


def mean_over_micro_batches(stacked):
    return optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.mean(x, 0), g) if stacked else g)


@functools.cache
def trajectory(link_of, argument, stacked, model):
    """Params after some steps of the optimizer behind ``link_of(argument)``."""
    loss_fn, params, batch = {
        "mlp": (mlp_loss, mlp_params(), mlp_batch()),
        "cnn": (cnn_loss, cnn_params(), cnn_batch()),
    }[model]
    batch = split(batch, MICRO_BATCHES) if stacked else batch
    tx = optax.with_extra_args_support(optimizer(link_of(argument)))
    step, state = jax.jit(training_step(tx, loss_fn, stacked)), tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, batch)
    return params


@every_member
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_rho_zero_is_the_base_optimizer_bit_for_bit(member, model):
    expected = trajectory(mean_over_micro_batches, member.stacked, member.stacked, model)
    actual = trajectory(member.make, 0.0, member.stacked, model)
    if member.stacked or member.renormalizes or "stable" in member.name or member.name == "switch_at":
        # vmap has other kernels for batched params; the two norms of one gradient may be summed in different orders.
        assert_close(actual, expected)
    else:
        assert_identical(actual, expected)


@every_member
def test_rho_makes_a_difference_when_active(member):
    grads, moved = plain_gradients_by_step(member, 0.0), plain_gradients_by_step(member)
    for step, extra in enumerate(member.extra_gradients):
        differs = any(
            not np.allclose(a[step], b[step], rtol=1e-4)
            for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(grads), strict=True)
        )
        assert differs == (extra > 0)


@every_member
def test_executed_gradients(member):
    counter = GradientCounter()
    batch = batch_for(member)
    size = len(mlp_batch()["y"]) // (MICRO_BATCHES if member.stacked else 1)
    tx = optimizer(member.make(RHO))
    step = jax.jit(training_step(tx, counter.counted(mlp_loss, size), member.stacked))
    params = mlp_params()
    state, counts = tx.init(params), []
    for _ in range(STEPS):
        params, state = step(params, state, batch)
        counts.append(counter.take() / len(mlp_batch()["y"]))
    assert tuple(counts) == tuple(1 + extra for extra in member.extra_gradients)
    assert step._cache_size() == 1


@every_member
def test_norm_is_global_and_none_leaves_and_containers_are_kept(member):
    def joined_loss(params, batch):
        joined = {"hidden": {"kernel": jnp.concatenate([params["top"], params["bottom"][0]]), "bias": params["bias"]}}
        return mlp_loss(joined | {"output": params["output"]}, batch)

    whole = mlp_params()
    kernel = whole["hidden"]["kernel"]
    rest = {"bias": whole["hidden"]["bias"], "output": whole["output"], "nothing": None}
    parts = flax.core.freeze({"top": kernel[:1], "bottom": (kernel[1:], None), **rest})
    expected, actual = plain_gradients_by_step(member), gradients_by_step(member, RHO, joined_loss, parts)
    assert jax.tree.structure(actual) == jax.tree.structure(parts)
    assert_close(jnp.concatenate([actual["top"], actual["bottom"][0]], axis=1), expected["hidden"]["kernel"])
    assert_close(actual["bias"], expected["hidden"]["bias"])


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.scale_free], ids=lambda m: m.name)
def test_scaling_the_loss_scales_the_gradient(member):
    scaled = gradients_by_step(member, RHO, lambda params, batch: 8.0 * mlp_loss(params, batch))
    assert_close(jax.tree.map(lambda g: g / 8, scaled), plain_gradients_by_step(member))


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.renormalizes], ids=lambda m: m.name)
def test_renormalized_gradients_have_the_norm_of_the_clean_one(member):
    outputs = jax.tree.map(lambda x: x[0], plain_gradients_by_step(member))
    clean = jax.grad(mlp_loss)(mlp_params(), mlp_batch())
    np.testing.assert_allclose(float(optax.tree.norm(outputs)), float(optax.tree.norm(clean)), rtol=1e-6)


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.stacked], ids=lambda m: m.name)
def test_one_micro_batch_is_the_inner_link(member):
    inner = {"msam": "sam", "micro_batched-stable": "stable_sam", "late-msam": "late-sam"}[member.name]
    [single] = [m for m in MEMBERS if m.name == inner]
    assert_close(gradients_by_step(member, RHO, batch=split(mlp_batch(), 1)), plain_gradients_by_step(single))


@pytest.mark.parametrize("member", [m for m in MEMBERS if not m.stacked], ids=lambda m: m.name)
def test_estimator_is_the_chain_and_its_loss_and_aux_are_those_of_the_params(member):
    estimator = optax_sam.gradient_estimator(
        lambda params, batch: (mlp_loss(params, batch), params),
        member.make(RHO),
        has_aux=True,
        num_micro_batches=MICRO_BATCHES,
    )

    @jax.jit
    def run(params, batch):
        def body(state, _):
            value, grads, state = estimator.value_and_grad(params, state, batch)
            return state, (value, grads)

        return jax.lax.scan(body, estimator.init(params), length=STEPS)[1]

    (losses, seen), grads = run(mlp_params(), mlp_batch())
    micro_batched = member._replace(make=lambda rho: optax_sam.micro_batched(member.make(rho)), stacked=True)
    assert_close(grads, gradients_by_step(micro_batched, RHO))
    assert_close(losses, jnp.full(STEPS, mlp_loss(mlp_params(), mlp_batch())))
    assert_identical(seen, jax.tree.map(lambda w: jnp.stack([w] * STEPS), mlp_params()))


@every_member
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_extreme_gradients_stay_finite_and_keep_their_dtype(member, dtype):
    params = {"a": jnp.zeros(3, dtype), "b": {"c": jnp.ones((2, 2), dtype), "none": None}}
    link = member.make(RHO)

    @jax.jit
    def update(size, state):
        grads = jax.tree.map(lambda w: jnp.full_like(w, size), params)
        given = jax.tree.map(lambda g: jnp.stack([g] * 2), grads) if member.stacked else grads
        grad_fn = lambda p, _: jax.tree.map(lambda g, w: jnp.where(jnp.isfinite(w), g, jnp.nan), grads, p)  # noqa: E731
        return link.update(given, state, params, grad_fn=grad_fn, batch=jnp.zeros(2))

    tiny, huge = (1e-7, 6e4) if dtype == jnp.float16 else (1e-30, 1e30)
    for size in (0.0, tiny, 1.0, huge):
        state = link.init(params)
        for _ in range(3):
            outputs, state = update(jnp.asarray(size, dtype), state)
        assert jax.tree.structure(outputs) == jax.tree.structure(params)
        for leaf in jax.tree.leaves(outputs):
            assert leaf.dtype == dtype
            np.testing.assert_allclose(np.asarray(leaf, np.float64), float(jnp.asarray(size, dtype)), rtol=0.01)


@every_member
def test_non_finite_gradients_stay_visible(member):
    batch = batch_for(member)
    broken = batch | {"y": batch["y"].at[..., 0].set(jnp.nan)}
    outputs = gradients_by_step(member, RHO, batch=broken)
    assert not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(outputs))


def numpy_reference(method, gradient, w, velocity, rho, learning_rate=0.05, momentum=0.9, decay=0.01):
    """One step of a method with momentum and decoupled weight decay, in float64."""
    g = gradient(w)
    norm = np.linalg.norm
    if method == "sgd":
        s = g
    elif method == "usam":
        s = gradient(w + rho * g)
    elif method == "asam":
        t = np.abs(w) + 0.01
        s = gradient(w + rho * t**2 * g / norm(t * g))
    else:
        s = gradient(w + rho * g / norm(g))
        s = s * norm(g) / norm(s) if method == "stable_sam" else s
    velocity = momentum * velocity + s + decay * w
    return w - learning_rate * velocity, velocity


@pytest.mark.parametrize("method", ["sam", "usam", "asam", "stable_sam"])
def test_numpy_agrees_over_fifty_steps_with_a_switch(method):
    rng = np.random.default_rng(0)
    factor, targets = rng.normal(size=(6, 4)), rng.normal(size=6)
    gradient = lambda w: factor.T @ (np.tanh(factor @ w) - targets) + 0.1 * w**3  # noqa: E731
    w, velocity = rng.normal(size=4), np.zeros(4)
    with jax.enable_x64(True):
        grad_fn = lambda w: jnp.asarray(factor).T @ (jnp.tanh(factor @ w) - targets) + 0.1 * w**3  # noqa: E731
        tx = optax.chain(
            optax_sam.late(getattr(optax_sam, method)(0.05), 25),
            optax.add_decayed_weights(0.01),
            optax.sgd(0.05, momentum=0.9),
        )
        params, state = jnp.asarray(w), tx.init(jnp.asarray(w))
        step = jax.jit(lambda p, s: tx.update(grad_fn(p), s, p, grad_fn=grad_fn))
        for index in range(50):
            w, velocity = numpy_reference(method if index >= 25 else "sgd", gradient, w, velocity, 0.05)
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params, w, rtol=1e-9, atol=1e-12)


def test_numpy_agrees_on_late_msam_over_twenty_steps():
    rng = np.random.default_rng(1)
    x, y, w = rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 2)), rng.normal(size=3)
    velocity, rho, switch = np.zeros(3), 0.2, 10

    def gradient(w, shard):
        prediction = np.tanh(x[shard] @ w)
        return x[shard].T @ ((prediction - y[shard]) * (1 - prediction**2))

    with jax.enable_x64(True):
        batch, params = {"x": jnp.asarray(x.reshape(8, 3)), "y": jnp.asarray(y.reshape(8))}, jnp.asarray(w)
        estimator = optax_sam.gradient_estimator(
            lambda w, batch: jnp.mean((jnp.tanh(batch["x"] @ w) - batch["y"]) ** 2),
            optax_sam.late(optax_sam.sam(rho), switch),
            num_micro_batches=4,
        )
        tx = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9))
        states, run = (estimator.init(params), tx.init(params)), jax.jit(estimator.value_and_grad)
        for step in range(20):
            points = [w] * 4
            if step >= switch:
                points = [w + rho * g / np.linalg.norm(g) for g in (gradient(w, shard) for shard in range(4))]
            s = np.mean([gradient(point, shard) for shard, point in enumerate(points)], axis=0)
            velocity = 0.9 * velocity + s + 0.01 * w
            w = w - 0.05 * velocity
            _, grads, link_state = run(params, states[0], batch)
            updates, sgd_state = tx.update(grads, states[1], params)
            params, states = optax.apply_updates(params, updates), (link_state, sgd_state)
            np.testing.assert_allclose(params, w, rtol=1e-9, atol=1e-12)
