"""The estimator: loss, clean gradient and link in one call, at two gradients per example."""

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
    cnn_batch,
    cnn_loss,
    cnn_params,
    mlp_batch,
    mlp_loss,
    mlp_params,
    split,
)

PARAMS, BATCH = mlp_params(), mlp_batch()
# The three ways to average; "auto" chooses between the last two.
every_strategy = pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll"])


def estimate(link, params=PARAMS, batch=BATCH, loss_fn=mlp_loss, **options):
    return jax.jit(optax_sam.value_and_grad(loss_fn, link, **options))(params, batch)


def test_identity_is_jax_value_and_grad_bit_for_bit():
    assert_identical(estimate(optax.identity()), jax.jit(jax.value_and_grad(mlp_loss))(PARAMS, BATCH))


@pytest.mark.parametrize(("num_micro_batches", "strategy"), [(4, "scan"), (2, "unroll")])
def test_msam_at_rho_zero_is_gradient_accumulation_bit_for_bit(num_micro_batches, strategy):
    options = {"num_micro_batches": num_micro_batches, "strategy": strategy}
    assert_identical(estimate(optax_sam.sam(0.0), **options), estimate(optax.identity(), **options))


def test_calls_and_results_are_those_of_jax_value_and_grad():
    loss_fn = lambda w, x, scale=1.0, *, shift: (jnp.sum((w * x * scale - shift) ** 2), {"shift": shift})  # noqa: E731
    ours = optax_sam.value_and_grad(loss_fn, optax.identity(), has_aux=True)
    theirs = jax.value_and_grad(loss_fn, has_aux=True)
    assert_identical(ours(jnp.ones(2), jnp.ones(2), 3.0, shift=2.0), theirs(jnp.ones(2), jnp.ones(2), 3.0, shift=2.0))
    no_batch = optax_sam.value_and_grad(lambda w: jnp.sum(w**2), optax_sam.sam(0.5))
    assert_close(no_batch(jnp.array([3.0, 4.0]))[1], 2 * 1.1 * jnp.array([3.0, 4.0]))


@every_strategy
def test_complex_gradients_are_averaged_as_they_are(strategy):
    loss_fn = lambda z, x: jnp.mean(jnp.abs(z * x - 1j) ** 2)  # noqa: E731
    z, batch = jnp.complex64(2 - 1j), jnp.arange(4.0)
    _, actual = estimate(optax.identity(), z, batch, loss_fn, num_micro_batches=4, strategy=strategy)
    assert actual.dtype == z.dtype
    np.testing.assert_allclose(actual, jax.grad(loss_fn)(z, batch), rtol=1e-6)


@functools.cache
def by_the_chain(link, loss_fn, num_micro_batches):
    """The loss of a batch, and what a link that averages over micro-batches makes of it."""
    params, batch = (PARAMS, BATCH) if loss_fn is mlp_loss else (cnn_params(), cnn_batch())

    @jax.jit
    def run(params, batch):
        micro_batches, grad_fn = split(batch, num_micro_batches), jax.grad(loss_fn)
        stacked = jax.vmap(grad_fn, in_axes=(None, 0))(params, micro_batches)
        grads, _ = link.update(stacked, link.init(params), params, grad_fn=grad_fn, batch=micro_batches)
        return loss_fn(params, batch), grads

    return run(params, batch)


MSAM = optax_sam.msam(0.2)


@pytest.mark.parametrize(
    ("num_micro_batches", "strategy"), [(1, "auto"), (2, "vmap"), (2, "unroll"), (8, "scan"), (8, "auto")]
)
def test_micro_batches_are_those_of_the_chain(num_micro_batches, strategy):
    found = estimate(optax_sam.sam(0.2), num_micro_batches=num_micro_batches, strategy=strategy)
    assert_close(found, by_the_chain(MSAM, mlp_loss, num_micro_batches))


@pytest.mark.parametrize("strategy", ["vmap", "auto"])
def test_micro_batches_of_convolutions_are_those_of_the_chain(strategy):
    options = {"num_micro_batches": 4, "strategy": strategy}
    found = estimate(optax_sam.sam(0.2), cnn_params(), cnn_batch(), cnn_loss, **options)
    assert_close(found, by_the_chain(MSAM, cnn_loss, 4))


@pytest.mark.parametrize(
    ("link", "strategy"),
    [
        (optax_sam.sam(0.2), "vmap"),
        (optax_sam.stable_sam(0.2), "unroll"),
        (optax_sam.late(optax_sam.sam(0.2), 0), "scan"),
    ],
)
def test_gradient_accumulation_is_the_link_on_the_whole_batch(link, strategy):
    options = {"num_micro_batches": 4, "strategy": strategy, "ascent_per": "batch"}
    estimator = optax_sam.gradient_estimator(mlp_loss, link, **options)
    loss, grads, _ = jax.jit(estimator.value_and_grad)(PARAMS, estimator.init(PARAMS), BATCH)
    assert_close((loss, grads), by_the_chain(optax_sam.micro_batched(link), mlp_loss, 1))


ALTERNATING = optax_sam.switch_by(lambda step: step % 2, [optax.identity(), optax_sam.sam(0.1)])
THREE_PHASES = optax_sam.switch_at({0: optax_sam.stable_sam(0.1), 1: optax.identity(), 2: optax_sam.usam(0.1)})
THREE_ASCENTS = optax_sam.sharpness_aware(optax_sam.normalized_ascent(0.1), steps=3)
LATE = optax_sam.late(optax_sam.sam(0.1), 1)


@pytest.mark.parametrize(
    ("link", "executed", "num_micro_batches", "ascent_per", "strategy"),
    [
        *[(LATE, [1, 2, 2], 4, "micro_batch", strategy) for strategy in ("vmap", "scan", "unroll", "auto")],
        *[(LATE, [1, 2, 2], 4, "batch", strategy) for strategy in ("vmap", "scan")],
        (LATE, [1, 2, 2], 1, "micro_batch", "auto"),
        (THREE_ASCENTS, [4, 4], 4, "micro_batch", "scan"),
        (ALTERNATING, [1, 2, 1], 4, "batch", "auto"),
        (THREE_PHASES, [2, 1, 2], 4, "micro_batch", "vmap"),
    ],
)
def test_gradients_per_example_are_those_of_the_active_link(link, executed, num_micro_batches, ascent_per, strategy):
    counter, options = GradientCounter(), {"ascent_per": ascent_per, "strategy": strategy}
    loss_fn = counter.counted(mlp_loss, num_examples=len(BATCH["y"]) // num_micro_batches)
    estimator = optax_sam.gradient_estimator(loss_fn, link, num_micro_batches=num_micro_batches, **options)
    run, state, counts = jax.jit(estimator.value_and_grad), estimator.init(PARAMS), []
    for _ in executed:
        _, _, state = run(PARAMS, state, BATCH)
        counts.append(counter.take() / len(BATCH["y"]))
    assert counts == executed
    assert run._cache_size() == 1


@every_strategy
def test_aux_is_that_of_the_clean_pass_averaged_or_from_the_first(strategy):
    def loss_fn(w, batch):
        aux = {
            "mean": jnp.mean(batch) * w,
            "first": batch[0].astype(jnp.int32),
            "flag": batch[0] > 0,
            "none": None,
            "number": 3,
        }
        return jnp.mean(w * batch) ** 2, aux

    batch = jnp.array([1.0, 2.0, 5.0, 10.0])
    (loss, aux), _ = estimate(
        optax_sam.sam(5.0), jnp.ones([]), batch, loss_fn, has_aux=True, num_micro_batches=2, strategy=strategy
    )
    assert float(loss) == (1.5**2 + 7.5**2) / 2
    assert aux == {"mean": 4.5, "first": 1, "flag": True, "none": None, "number": 3}
    assert aux["first"].dtype == jnp.int32


@pytest.mark.parametrize(
    ("ascent_per", "strategy"), [("micro_batch", "vmap"), ("micro_batch", "scan"), ("batch", "unroll")]
)
def test_keys_are_folded_per_micro_batch_and_the_same_in_both_passes(ascent_per, strategy):
    drawn = []

    def loss_fn(w, batch, key, not_a_key, *, also):
        noise = jax.random.uniform(key)
        jax.debug.callback(lambda *x: drawn.append(tuple(float(value) for value in x)), noise, batch[0])
        assert not_a_key == "text"
        return jnp.mean(w * batch) * noise * also[0]

    function = optax_sam.value_and_grad(
        loss_fn, optax_sam.sam(0.1), num_micro_batches=4, strategy=strategy, ascent_per=ascent_per
    )
    key = jax.random.key(7)
    jax.jit(lambda w, b, k: function(w, b, k, "text", also=[jnp.ones([])]))(jnp.ones([]), jnp.arange(1.0, 9.0), key)
    jax.effects_barrier()
    expected = [(float(jax.random.uniform(jax.random.fold_in(key, j))), 2.0 * j + 1) for j in range(4)]
    assert sorted(set(drawn), key=lambda pair: pair[1]) == expected
    assert len(drawn) == 8


def test_key_of_a_whole_batch_is_unchanged():
    loss_fn = lambda w, batch, key: jnp.sum(w * batch) * jax.random.uniform(key)  # noqa: E731
    arguments = jnp.ones([]), jnp.ones(4), jax.random.key(3)
    ours = optax_sam.value_and_grad(loss_fn, optax.identity())(*arguments)
    assert_identical(ours, jax.value_and_grad(loss_fn)(*arguments))


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_keys_are_those_of_their_number_over_all_members(num_micro_batches):
    loss_fn = lambda w, batch, key: jnp.sum(w * batch) * jax.random.uniform(key)  # noqa: E731
    function = optax_sam.value_and_grad(
        loss_fn, optax.identity(), num_micro_batches=num_micro_batches, axis_name="data"
    )
    key, batch = jax.random.key(7), jnp.ones((2, 4))
    _, gradient = jax.vmap(function, in_axes=(None, 0, None), axis_name="data")(jnp.ones([]), batch, key)
    drawn = [jax.random.uniform(jax.random.fold_in(key, number)) for number in range(2 * num_micro_batches)]
    np.testing.assert_allclose(gradient, np.mean(drawn) * 4 / num_micro_batches, rtol=1e-6)


@every_strategy
def test_batches_of_keys_and_numpy_arrays_are_split(strategy):
    loss_fn = lambda w, batch: w * jnp.mean(jax.vmap(jax.random.uniform)(batch["keys"]) * batch["x"])  # noqa: E731
    batch = {"keys": jax.random.split(jax.random.key(0), 4), "x": np.arange(4, dtype=np.float32), "none": None}
    function = optax_sam.value_and_grad(loss_fn, optax.identity(), num_micro_batches=2, strategy=strategy)
    assert_close(function(jnp.float32(2.0), batch), jax.value_and_grad(loss_fn)(jnp.float32(2.0), batch))


@pytest.mark.parametrize("strategy", ["vmap", "scan"])
def test_state_is_shared_with_averaged_floats(strategy):
    ascent = optax.chain(optax.ema(0.5, debias=False), optax_sam.normalized_ascent(optax.constant_schedule(0.1)))
    estimator = optax_sam.gradient_estimator(
        mlp_loss, optax_sam.sharpness_aware(ascent), num_micro_batches=4, strategy=strategy
    )
    state = estimator.init(PARAMS)
    _, _, after = jax.jit(estimator.value_and_grad)(PARAMS, state, BATCH)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    ema, schedule = after.ascent_state
    assert int(schedule.ascent_step) == 1
    assert_close(ema.ema, jax.tree.map(lambda g: g / 2, jax.jit(jax.grad(mlp_loss))(PARAMS, BATCH)))


@every_strategy
def test_narrow_gradients_are_accumulated_in_float32(strategy):
    loss_fn = lambda w, batch: jnp.sum(w * jnp.mean(batch).astype(jnp.bfloat16))  # noqa: E731
    batch = jnp.array([256.0] + 15 * [1.0])  # in bfloat16, 256 + 1 = 256
    _, grads = estimate(
        optax.identity(), jnp.ones(2, jnp.bfloat16), batch, loss_fn, num_micro_batches=16, strategy=strategy
    )
    assert_identical(grads, jnp.full(2, (256 + 15) / 16, jnp.bfloat16))


def test_batchnorm_statistics_never_see_the_perturbed_params():
    def loss_fn(w, batch):
        activations = batch * w
        return jnp.mean((activations - 1.0) ** 2), {"mean": jnp.mean(activations)}

    (_, aux), _ = estimate(optax_sam.sam(3.0), jnp.ones([]), jnp.arange(4.0), loss_fn, has_aux=True)
    assert float(aux["mean"]) == 1.5


@pytest.mark.parametrize(
    ("num_micro_batches", "strategy", "jit"),
    [
        *[(3, strategy, True) for strategy in ("vmap", "scan", "unroll")],
        *[(number, "auto", True) for number in (2, 3, 4, 6)],
        *[(3, strategy, False) for strategy in ("vmap", "auto")],
    ],
)
def test_any_number_of_micro_batches_with_aux_that_is_not_float(num_micro_batches, strategy, jit):
    def loss_fn(w, x):
        return jnp.mean((x @ w) ** 2), {"first": jnp.int32(60 * x[0, 0]), "mean": jnp.mean(x).astype(jnp.bfloat16)}

    options = {"num_micro_batches": num_micro_batches, "strategy": strategy, "has_aux": True}
    function = optax_sam.value_and_grad(loss_fn, optax.identity(), **options)
    x = np.arange(1, 61, dtype=np.float32)[:, None] / 60
    (loss, aux), gradient = (jax.jit(function) if jit else function)(jnp.ones(1), x)
    np.testing.assert_allclose([loss, *gradient], [np.mean(x**2), 2 * np.mean(x**2)], rtol=1e-6)
    assert int(aux["first"]) == 1
    assert aux["mean"].dtype == jnp.bfloat16
    np.testing.assert_allclose(float(aux["mean"]), np.mean(x), rtol=2**-8)


@pytest.mark.parametrize("strategy", ["auto", "unroll"])
def test_narrow_outputs_under_strict_promotion(strategy):
    loss_fn = lambda w, x: (jnp.mean((x @ w).astype(jnp.float32)), w.astype(jnp.float8_e4m3fn))  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax.identity(), has_aux=True, num_micro_batches=4, strategy=strategy)
    with jax.numpy_dtype_promotion("strict"):
        (_, aux), gradient = jax.jit(function)(jnp.ones(2, jnp.bfloat16), jnp.ones((8, 2), jnp.bfloat16))
    assert aux.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), 1)


def test_without_jit_losses_may_read_their_batch():
    loss_fn = lambda w, x: jnp.mean(x * w) if float(x.sum()) > 0 else 0 * jnp.sum(w)  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax.identity(), num_micro_batches=2)
    np.testing.assert_allclose(function(jnp.ones([]), jnp.ones(4))[1], 1)


@pytest.mark.parametrize("strategy", ["scan", "auto"])
def test_aux_that_is_not_float_is_not_kept_for_every_micro_batch(strategy):
    def temporary(num_micro_batches):
        loss_fn = lambda w, x: (jnp.mean(x @ w), jnp.int32(x[0, 0] * w[0]) + jnp.arange(1 << 16))  # noqa: E731
        function = optax_sam.value_and_grad(
            loss_fn, optax.identity(), has_aux=True, num_micro_batches=num_micro_batches, strategy=strategy
        )
        program = jax.jit(function).lower(jnp.ones(2), jnp.ones((64, 2))).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(64) < temporary(4) + (1 << 18)


LARGEST_PAIRED = (1 << 20) - 2  # float32 elements, with loss and aux 4 MiB


@pytest.mark.parametrize(
    ("strategy", "num_micro_batches", "size", "aux", "loops"),
    [
        ("scan", 4, 1, 1.0, ["length=4 unroll=1"]),
        ("auto", 4, LARGEST_PAIRED, 1.0, ["length=4 unroll=2"]),
        ("auto", 4, LARGEST_PAIRED + 1, 1.0, ["length=4 unroll=1"]),
        ("auto", 3, 1, 1.0, ["length=3 unroll=1"]),
        ("auto", 2, 1, 1.0, ["length=2 unroll=1"]),
        ("auto", 4, 1, 1, ["length=4 unroll=2"]),  # an aux that is not float goes round the loop too
        ("auto", 5, 1, 1, ["length=5 unroll=1"]),
        ("unroll", 4, 1, 1.0, []),
        ("vmap", 4, 1, 1.0, []),
    ],
)
def test_loops_take_two_micro_batches_at_a_time_where_that_pays(strategy, num_micro_batches, size, aux, loops):
    loss_fn = lambda w, x: (jnp.mean(x) * jnp.sum(w), aux)  # noqa: E731
    options = {"num_micro_batches": num_micro_batches, "strategy": strategy, "has_aux": True}
    function = optax_sam.value_and_grad(loss_fn, optax.identity(), **options)
    program = jax.make_jaxpr(function)(jnp.zeros(size), jnp.ones(60))
    found = [eqn.params for eqn in program.eqns if eqn.primitive.name == "scan"]
    assert [f"length={params['length']} unroll={params['unroll']}" for params in found] == loops
