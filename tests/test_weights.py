"""Weighted means over micro-batches and devices: padded batches accumulate exactly. And which arguments are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from tests.helpers.places import DEVICES, MAPS, every_map
from tests.helpers.problems import assert_close, assert_identical, mlp_batch, mlp_loss, mlp_params
from tests.helpers.registry import every_member

RHO, SIZE = 0.2, 32
PARAMS, BATCH = mlp_params(), mlp_batch(size=SIZE)
every_strategy = pytest.mark.parametrize("strategy", ["auto", "vmap", "scan", "unroll"])


def residuals(params, batch):
    def residual(x, y):
        return params["output"] @ jnp.tanh(params["hidden"]["kernel"] @ x + params["hidden"]["bias"]) - y

    return jax.vmap(residual)(batch["x"], batch["y"]) ** 2


def padded_loss(params, batch):
    """The mean over the valid examples; 0/0 where there are none."""
    return jnp.sum(residuals(params, batch) * batch["valid"]) / jnp.sum(batch["valid"])


def num_valid(batch):
    return jnp.sum(batch["valid"])


def padded(valid):
    return BATCH | {"valid": jnp.asarray(valid, jnp.float32)}


# Valid examples in each of 8 micro-batches of 4: all, some, one, and in two of them none.
COUNTS = (4, 1, 0, 3, 4, 0, 2, 4)
RAGGED = padded([position < count for count in COUNTS for position in range(4)])


def test_the_mean_of_means_is_not_the_mean():
    estimate = functools.partial(optax_sam.value_and_grad, padded_loss, optax.identity(), num_micro_batches=2)
    batch = padded([1] * 16 + [0] * 15 + [1])
    plain, exact = estimate()(PARAMS, batch), estimate(weight_fn=num_valid)(PARAMS, batch)
    whole = jax.value_and_grad(padded_loss)(PARAMS, batch)
    assert_close(exact, whole)
    assert abs(plain[0] / whole[0] - 1) > 0.05


@every_strategy
@pytest.mark.parametrize("link", [optax.identity(), optax_sam.sam(RHO), optax_sam.usam(RHO), optax_sam.stable_sam(RHO)])
def test_accumulation_of_padded_batches_is_exact(strategy, link):
    options = {"num_micro_batches": 8, "strategy": strategy, "weight_fn": num_valid}
    function = optax_sam.value_and_grad(padded_loss, link, ascent_per="batch", **options)
    whole = optax_sam.value_and_grad(padded_loss, link)(PARAMS, RAGGED)
    assert_close(jax.jit(function)(PARAMS, RAGGED), whole)
    assert_close(function(PARAMS, RAGGED), whole)


@every_member
@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll"])
def test_msam_is_the_weighted_mean_of_the_micro_batches(member, strategy):
    if member.stacked:
        pytest.skip("the estimator averages")
    link = member.make(RHO)
    options = {"num_micro_batches": 8, "strategy": strategy, "weight_fn": num_valid}
    weighted = optax_sam.gradient_estimator(padded_loss, link, **options)
    single = optax_sam.gradient_estimator(padded_loss, link)
    state = states = link.init(PARAMS)
    for _ in range(3):
        loss, grads, state = jax.jit(weighted.value_and_grad)(PARAMS, state, RAGGED)
        parts = [jax.tree.map(lambda x, j=j: x[4 * j : 4 * j + 4], RAGGED) for j in range(8)]
        results = [jax.jit(single.value_and_grad)(PARAMS, states, p) for p, n in zip(parts, COUNTS, strict=True) if n]
        weights = np.array([n for n in COUNTS if n]) / sum(COUNTS)

        def mean(*xs, weights=weights):
            if not jnp.issubdtype(xs[0].dtype, jnp.inexact):
                return xs[0]
            return jnp.asarray(
                sum(w * np.asarray(x, np.float64) for w, x in zip(weights, xs, strict=True)), xs[0].dtype
            )

        expected_loss, expected, states = jax.tree.map(mean, *results)
        assert_close((loss, grads, state), (expected_loss, expected, states))


@every_map
@pytest.mark.parametrize("ascent_per", ["micro_batch", "device", "batch"])
@pytest.mark.parametrize(
    "link", [optax_sam.usam(RHO), optax_sam.late(optax_sam.stable_sam(RHO), 0)], ids=["usam", "late"]
)
def test_weights_count_over_devices(run, ascent_per, link):
    """8 devices of 2 micro-batches of 2 examples; some devices hold padding alone."""
    batch = padded(np.random.default_rng(0).random(SIZE) < np.repeat([1, 0.5, 0, 0.2, 1, 0, 0.7, 1], 4))

    def estimate(num_micro_batches, **options):
        estimator = optax_sam.gradient_estimator(
            padded_loss, link, num_micro_batches=num_micro_batches, weight_fn=num_valid, **options
        )
        return lambda params, batch: estimator.value_and_grad(params, link.init(params), batch)[:2]

    actual = run(estimate(2, ascent_per=ascent_per, axis_name="data"), PARAMS, batch=batch)
    shards = {"micro_batch": 2 * DEVICES, "device": DEVICES, "batch": 1}[ascent_per]
    assert_close(actual, estimate(shards)(PARAMS, batch))


def test_weights_on_an_explicit_mesh():
    function = optax_sam.value_and_grad(padded_loss, optax_sam.sam(RHO), num_micro_batches=8, weight_fn=num_valid)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    batch = jax.device_put(RAGGED, NamedSharding(mesh, PartitionSpec("data")))
    assert_close(jax.device_get(jax.jit(function)(PARAMS, batch)), jax.device_get(function(PARAMS, RAGGED)))


@every_strategy
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_padding_alone_is_no_step(strategy, num_micro_batches):
    options = {"num_micro_batches": num_micro_batches, "strategy": strategy, "weight_fn": num_valid}
    function = optax_sam.value_and_grad(padded_loss, optax_sam.sam(RHO), **options)
    loss, grads = function(PARAMS, padded([0] * SIZE))
    assert float(loss) == 0
    assert_identical(grads, jax.tree.map(jnp.zeros_like, PARAMS))


COMMUNICATING = {
    "averaged": lambda w, b: jax.lax.pmean(padded_loss(w, b), "data"),
    "normalized": lambda w, b: jax.lax.psum(padded_loss(w, b), "data") / jax.lax.psum(num_valid(b), "data"),
    "statistics": lambda w, b: (
        padded_loss(w, b) * jax.jit(lambda x: jax.lax.pmean(jnp.mean(x), "data"))(b["x"] * w["output"][0])
    ),
    "gathered": lambda w, b: padded_loss(w, b) + jnp.mean(jax.lax.all_gather(b["x"] * w["output"][0], "data")),
}


@every_map
@pytest.mark.parametrize("kind", COMMUNICATING)
def test_losses_that_communicate_have_no_weight_of_their_own(run, kind):
    function = optax_sam.value_and_grad(COMMUNICATING[kind], optax_sam.sam(RHO), axis_name="data", weight_fn=num_valid)
    with pytest.raises(ValueError, match=r"With weight_fn, loss_fn must not communicate over \('data',\)"):
        run(function, PARAMS, batch=padded([1] * SIZE))


STATES = {
    "injected": optax.inject_hyperparams(optax_sam.sam)(rho=0.1),
    "ema": optax_sam.sharpness_aware(optax.chain(optax.ema(0.9), optax_sam.normalized_ascent(0.1))),
    "measured": optax_sam.measured(optax_sam.sam(0.1)),
}


@pytest.mark.parametrize("link", STATES.values(), ids=STATES)
@pytest.mark.parametrize(("num_micro_batches", "ascent_per"), [(1, "micro_batch"), (4, "micro_batch"), (4, "device")])
def test_padding_alone_leaves_the_floats_of_the_state_as_they_are(link, num_micro_batches, ascent_per):
    options = {"num_micro_batches": num_micro_batches, "weight_fn": num_valid, "axis_name": "data"}
    estimator = optax_sam.gradient_estimator(padded_loss, link, ascent_per=ascent_per, **options)
    step = lambda params, state, batch: estimator.value_and_grad(params, state, batch)[2]  # noqa: E731
    state = MAPS["shard_map"](step, PARAMS, link.init(PARAMS), batch=padded([1] * SIZE))
    after = MAPS["shard_map"](step, PARAMS, state, batch=padded([0] * SIZE))
    floats = [[x for x in jax.tree.leaves(s) if jnp.issubdtype(x.dtype, jnp.inexact)] for s in (state, after)]
    assert any(np.any(x) for x in floats[0])
    assert_identical(*floats)
    alone = optax_sam.gradient_estimator(padded_loss, link, num_micro_batches=num_micro_batches, weight_fn=num_valid)
    _, _, after = alone.value_and_grad(PARAMS, state, padded([0] * SIZE))
    assert_identical([x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.inexact)], floats[0])


@every_strategy
def test_equal_weights_of_any_type_are_no_weights(strategy):
    def estimate(**options):
        return optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=4, strategy=strategy, **options)

    for weight in (3, 2.5, np.int32(7), jnp.int32(5), jnp.float16(1000), np.float64(1e-30)):
        assert_close(estimate(weight_fn=lambda batch, weight=weight: weight)(PARAMS, BATCH), estimate()(PARAMS, BATCH))


def test_weights_see_the_arguments_of_the_loss_and_aux_is_weighted():
    def loss_fn(w, x, threshold, *, scale):
        return scale * jnp.mean(x) * w, {"mean": jnp.mean(x).astype(jnp.bfloat16), "first": x[0].astype(jnp.int32)}

    weight_fn = lambda x, threshold, *, scale: jnp.sum(x > threshold) * scale  # noqa: E731
    function = optax_sam.value_and_grad(
        loss_fn, optax.identity(), has_aux=True, num_micro_batches=2, weight_fn=weight_fn
    )
    (loss, aux), gradient = jax.jit(function)(2.0, jnp.array([1.0, 3.0, 4.0, 6.0]), 2.0, scale=10.0)
    assert (float(loss), float(gradient)) == (
        pytest.approx(80.0),
        pytest.approx(40.0),
    )  # means 2 and 5, weights 1 and 2
    assert (float(aux["mean"]), int(aux["first"]), aux["mean"].dtype) == (4.0, 1, jnp.bfloat16)


@every_strategy
def test_weighted_means_of_narrow_gradients_are_taken_in_float32(strategy):
    loss_fn = lambda w, x: (jnp.sum(w * jnp.mean(x).astype(w.dtype)), 1.0)  # noqa: E731
    batch = jnp.concatenate([jnp.full(1, 256.0), jnp.ones(63)])
    options = {"num_micro_batches": 64, "strategy": strategy, "weight_fn": lambda x: jnp.where(x[0] > 1, 1.0, 2.0)}
    function = optax_sam.value_and_grad(loss_fn, optax.identity(), has_aux=True, **options)
    (_, aux), grads = jax.jit(function)(jnp.ones(2, jnp.bfloat16), batch)
    assert_identical(grads, jnp.full(2, (256 + 2 * 63) / 127, jnp.bfloat16))
    assert float(aux) == pytest.approx(1)
    whole = optax_sam.value_and_grad(loss_fn, optax.identity(), has_aux=True, weight_fn=lambda x: 3.0)
    assert whole(jnp.ones(2, jnp.bfloat16), batch)[1].dtype == jnp.bfloat16


# Which arguments are split.


def two_arguments(params, x, y):
    return mlp_loss(params, {"x": x, "y": y})


@every_strategy
@pytest.mark.parametrize("weight_fn", [None, lambda x, y: len(y)])
def test_labels_beside_the_batch_are_split_too(strategy, weight_fn):
    options = {"num_micro_batches": 4, "strategy": strategy}
    beside = optax_sam.value_and_grad(
        two_arguments, optax_sam.sam(RHO), batch_argnums=(1, 2), weight_fn=weight_fn, **options
    )
    inside = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), **options)
    assert_close(beside(PARAMS, BATCH["x"], BATCH["y"]), inside(PARAMS, BATCH))


def test_any_arguments_carry_the_batch():
    def loss_fn(params, scale, y, key, x):
        return scale * two_arguments(params, x, y) * jax.random.uniform(key)

    inside = lambda params, b, scale, key: loss_fn(params, scale, b["y"], key, b["x"])  # noqa: E731
    arguments = jnp.float32(2.0), BATCH["y"], jax.random.key(0), BATCH["x"]
    actual = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), num_micro_batches=4, batch_argnums=[4, 2])
    expected = optax_sam.value_and_grad(inside, optax_sam.sam(RHO), num_micro_batches=4)
    assert_close(actual(PARAMS, *arguments), expected(PARAMS, BATCH, jnp.float32(2.0), jax.random.key(0)))
    assert_identical(
        optax_sam.value_and_grad(loss_fn, optax.identity(), batch_argnums=(2, 4))(PARAMS, *arguments),
        jax.value_and_grad(loss_fn)(PARAMS, *arguments),
    )


@pytest.mark.parametrize("place", ["pmap", "shard_map"])
def test_labels_beside_the_batch_on_devices(place):
    function = optax_sam.value_and_grad(
        two_arguments, optax_sam.sam(RHO), num_micro_batches=2, axis_name="data", batch_argnums=(1, 2)
    )
    inside = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=2 * DEVICES)
    actual = MAPS[place](lambda params, b: function(params, b["x"], b["y"]), PARAMS, batch=BATCH)
    assert_close(actual, inside(PARAMS, BATCH))


def test_labels_beside_the_batch_on_an_explicit_mesh():
    function = optax_sam.value_and_grad(two_arguments, optax_sam.sam(RHO), num_micro_batches=8, batch_argnums=(1, 2))
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    x, y = jax.device_put((BATCH["x"], BATCH["y"]), NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(function).lower(PARAMS, x, y).compile()
    assert "all-gather" not in program.as_text()
    assert_close(jax.device_get(program(PARAMS, x, y)), jax.device_get(function(PARAMS, BATCH["x"], BATCH["y"])))


@pytest.mark.parametrize("labels", [BATCH["y"], np.asarray(BATCH["y"]), {"labels": [BATCH["y"]]}])
def test_labels_that_would_not_be_split_are_refused(labels):
    loss_fn = lambda params, x, y: jnp.mean(x) * jnp.mean(params["output"]) + 0 * jax.tree.leaves(y)[0][0]  # noqa: E731
    by_keyword = lambda params, x, *, labels: loss_fn(params, x, labels)  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), num_micro_batches=4)
    with pytest.raises(
        ValueError, match=r"argument 2 of loss_fn has a leading axis of 32.*pass batch_argnums=\(1, 2\)"
    ):
        function(PARAMS, BATCH["x"], labels)
    keyword = optax_sam.value_and_grad(by_keyword, optax_sam.sam(RHO), num_micro_batches=4)
    with pytest.raises(ValueError, match=r"keyword labels of loss_fn has a leading axis of 32.*close over it"):
        keyword(PARAMS, BATCH["x"], labels=labels)
    optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO))(PARAMS, BATCH["x"], labels)  # whole batches need no splitting


def test_batches_that_check_their_ranks_are_split():
    @jax.tree_util.register_pytree_node_class
    class Images:
        def __init__(self, pixels):
            if jnp.ndim(pixels) != 2:
                raise ValueError(f"pixels must have two axes, got {jnp.ndim(pixels)}")
            self.pixels = pixels

        def tree_flatten(self):
            return (self.pixels,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    loss_fn = lambda w, batch: jnp.mean((batch.pixels @ w - 1) ** 2)  # noqa: E731
    images, w = jax.random.normal(jax.random.key(0), (8, 3)), jnp.ones(3)
    arrays = lambda w, x: jnp.mean((x @ w - 1) ** 2)  # noqa: E731
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    for strategy in ("auto", "vmap", "scan", "unroll"):
        for weight_fn in (None, lambda batch: 1.0):
            options = {"num_micro_batches": 8, "strategy": strategy, "weight_fn": weight_fn}
            actual = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), **options)
            expected = optax_sam.value_and_grad(arrays, optax_sam.sam(RHO), **options)(w, images)
            assert_close(jax.jit(actual)(w, Images(images)), expected)
    placed = Images(jax.device_put(images, NamedSharding(mesh, PartitionSpec("data"))))
    assert_close(jax.device_get(jax.jit(actual)(w, placed)), jax.device_get(expected))
