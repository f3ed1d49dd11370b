"""Weighted means over micro-batches and devices: padded batches accumulate exactly. And which arguments are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from tests.helpers import references
from tests.helpers.one_device import of_each_part, on_one_device, plain, three_calls
from tests.helpers.places import BATCH, DEVICES, MAPS, PARAMS, PLACES, RHO, every_map, together
from tests.helpers.problems import assert_close, assert_identical, mlp_loss

SIZE = 32
STRATEGIES = ("auto", "vmap", "scan", "unroll")


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
    means, exact = (jax.jit(f)(PARAMS, batch) for f in (estimate(), estimate(weight_fn=num_valid)))
    whole = on_one_device(plain, 1, padded_loss, batch=batch)
    assert_close(exact, whole)
    assert abs(means[0] / whole[0] - 1) > 0.05


def test_accumulation_of_padded_batches_is_exact():
    options = {"num_micro_batches": 8, "ascent_per": "batch", "weight_fn": num_valid}
    estimate = functools.partial(optax_sam.value_and_grad, padded_loss, optax_sam.usam(RHO), **options)
    actual = jax.jit(together({strategy: estimate(strategy=strategy) for strategy in STRATEGIES}))(PARAMS, RAGGED)
    whole = on_one_device(references.usam, 1, padded_loss, batch=RAGGED)
    assert_close(actual, dict.fromkeys(STRATEGIES, whole))
    assert_close(estimate()(PARAMS, RAGGED), whole)  # without jit


def test_msam_is_the_weighted_mean_of_the_micro_batches():
    ascent = optax.chain(optax.ema(0.9), optax_sam.normalized_ascent(RHO))
    links = {"late": optax_sam.late(optax_sam.stable_sam(RHO), 2), "ema": optax_sam.sharpness_aware(ascent)}

    def estimate(strategy, link):
        options = {"num_micro_batches": 8, "strategy": strategy, "weight_fn": num_valid}
        return optax_sam.gradient_estimator(padded_loss, link, **options).value_and_grad

    expected = jax.jit(three_calls(links, lambda link: of_each_part(link, padded_loss, 8, COUNTS)))(PARAMS, RAGGED)
    for strategy in ("vmap", "scan", "unroll"):
        actual = jax.jit(three_calls(links, functools.partial(estimate, strategy)))(PARAMS, RAGGED)
        assert_close(actual, expected)


@every_map
def test_weights_count_over_devices(run):
    """8 devices of 2 micro-batches of 2 examples; some devices hold padding alone."""
    valid = np.random.default_rng(0).random(SIZE) < np.repeat([1, 0.5, 0, 0.2, 1, 0, 0.7, 1], 4)
    late = optax_sam.late(optax_sam.stable_sam(RHO), 0)
    links = {"usam": (optax_sam.usam(RHO), references.usam), "late": (late, references.stable_sam)}
    ascents = {"micro_batch": 2 * DEVICES, "device": DEVICES, "batch": 1}
    cells = ("micro_batch", "late"), ("device", "usam"), ("device", "late"), ("batch", "usam")

    def estimate(ascent_per, name, params, batch):
        options = {"num_micro_batches": 2, "axis_name": "data", "weight_fn": num_valid}
        estimator = optax_sam.gradient_estimator(padded_loss, links[name][0], ascent_per=ascent_per, **options)
        return estimator.value_and_grad(params, estimator.init(params), batch)[:2]

    def expected(ascent_per, name):
        weights = np.sum(valid.reshape(ascents[ascent_per], -1), axis=1)
        return on_one_device(links[name][1], len(weights), padded_loss, batch=padded(valid), weights=weights)

    functions = together({cell: functools.partial(estimate, *cell) for cell in cells})
    actual = run(functions, PARAMS, batch=padded(valid))
    assert_close(actual, {cell: expected(*cell) for cell in cells})


def test_weights_on_an_explicit_mesh():
    function = optax_sam.value_and_grad(padded_loss, optax_sam.sam(RHO), axis_name="data", weight_fn=num_valid)
    expected = on_one_device(references.sam, 8, padded_loss, batch=RAGGED, weights=COUNTS)
    assert_close(PLACES["jit explicit"](function, PARAMS, batch=RAGGED), expected)


@pytest.mark.parametrize(("num_micro_batches", "strategy"), [(1, "auto"), (4, "vmap"), (4, "scan"), (4, "unroll")])
def test_padding_alone_is_no_step(num_micro_batches, strategy):
    options = {"num_micro_batches": num_micro_batches, "strategy": strategy, "weight_fn": num_valid}
    function = optax_sam.value_and_grad(padded_loss, optax_sam.sam(RHO), **options)
    loss, grads = jax.jit(function)(PARAMS, padded([0] * SIZE))
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
    with pytest.raises(ValueError, match=r"With weight_fn, loss_fn must not communicate over 'data'"):
        run(function, PARAMS, batch=padded([1] * SIZE))


STATES = {
    "injected": optax.inject_hyperparams(optax_sam.sam)(rho=0.1),
    "ema": optax_sam.sharpness_aware(optax.chain(optax.ema(0.9), optax_sam.normalized_ascent(0.1))),
    "measured": optax_sam.measured(optax_sam.sam(0.1)),
}


@pytest.mark.parametrize(("num_micro_batches", "ascent_per"), [(1, "micro_batch"), (4, "device")])
def test_padding_alone_leaves_the_floats_of_the_state_as_they_are(num_micro_batches, ascent_per):
    def next_states(**options):
        options |= {"num_micro_batches": num_micro_batches, "weight_fn": num_valid}
        estimate = functools.partial(optax_sam.gradient_estimator, padded_loss, **options)
        return lambda params, states, batch: {
            name: estimate(link).value_and_grad(params, states[name], batch)[2] for name, link in STATES.items()
        }

    def floats(states):
        return {k: [x for x in jax.tree.leaves(s) if jnp.issubdtype(x.dtype, jnp.inexact)] for k, s in states.items()}

    on_devices = next_states(ascent_per=ascent_per, axis_name="data")
    start = {name: link.init(PARAMS) for name, link in STATES.items()}
    before = MAPS["shard_map"](on_devices, PARAMS, start, batch=padded([1] * SIZE))
    assert all(any(map(np.any, values)) for values in floats(before).values())
    after = MAPS["shard_map"](on_devices, PARAMS, before, batch=padded([0] * SIZE))
    assert_identical(floats(after), floats(before))
    assert_identical(floats(jax.jit(next_states())(PARAMS, before, padded([0] * SIZE))), floats(before))


def test_equal_weights_of_any_type_are_no_weights():
    estimate = functools.partial(optax_sam.value_and_grad, mlp_loss, optax_sam.sam(RHO), num_micro_batches=4)
    weights = 3, 2.5, np.int32(7), jnp.int32(5), jnp.float16(1000), np.float64(1e-30)
    functions = {i: estimate(weight_fn=lambda batch, weight=weight: weight) for i, weight in enumerate(weights)}
    actual = jax.jit(together(functions))(PARAMS, BATCH)
    assert_close(actual, dict.fromkeys(actual, on_one_device(references.sam, 4)))


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


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll"])
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


@pytest.mark.parametrize("weight_fn", [None, lambda x, y: len(y)])
def test_labels_beside_the_batch_are_split_too(weight_fn):
    options = {"num_micro_batches": 4, "batch_argnums": (1, 2), "weight_fn": weight_fn}
    beside = optax_sam.value_and_grad(two_arguments, optax_sam.sam(RHO), **options)
    assert_close(jax.jit(beside)(PARAMS, BATCH["x"], BATCH["y"]), on_one_device(references.sam, 4))


def test_any_arguments_carry_the_batch():
    def loss_fn(params, scale, y, key, x):
        return scale * two_arguments(params, x, y) * jax.random.uniform(key)

    inside = lambda params, b, scale, key: loss_fn(params, scale, b["y"], key, b["x"])  # noqa: E731
    arguments = jnp.float32(2.0), BATCH["y"], jax.random.key(0), BATCH["x"]
    actual = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), num_micro_batches=4, batch_argnums=[4, 2])
    expected = optax_sam.value_and_grad(inside, optax_sam.sam(RHO), num_micro_batches=4)
    results = jax.jit(actual)(PARAMS, *arguments), jax.jit(expected)(PARAMS, BATCH, jnp.float32(2.0), arguments[2])
    assert_close(*results)
    whole = optax_sam.value_and_grad(loss_fn, optax.identity(), batch_argnums=(2, 4))
    assert_identical(jax.jit(whole)(PARAMS, *arguments), jax.jit(jax.value_and_grad(loss_fn))(PARAMS, *arguments))


@pytest.mark.parametrize("place", ["pmap", "shard_map"])
def test_labels_beside_the_batch_on_devices(place):
    function = optax_sam.value_and_grad(
        two_arguments, optax_sam.sam(RHO), num_micro_batches=2, axis_name="data", batch_argnums=(1, 2)
    )
    actual = MAPS[place](lambda params, b: function(params, b["x"], b["y"]), PARAMS)
    assert_close(actual, on_one_device(references.sam, 2 * DEVICES))


def test_labels_beside_the_batch_on_an_explicit_mesh():
    function = optax_sam.value_and_grad(two_arguments, optax_sam.sam(RHO), axis_name="data", batch_argnums=(1, 2))
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    x, y = jax.device_put((BATCH["x"], BATCH["y"]), NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(function).lower(PARAMS, x, y).compile()
    assert "all-gather" not in program.as_text()
    assert_close(jax.device_get(program(PARAMS, x, y)), on_one_device(references.sam, 8))


@pytest.mark.parametrize("labels", [BATCH["y"], np.asarray(BATCH["y"]), {"labels": [BATCH["y"]]}])
def test_labels_that_would_not_be_split_are_refused(labels):
    loss_fn = lambda params, x, y: jnp.mean(x) * jnp.mean(params["output"]) + 0 * jax.tree.leaves(y)[0][0]  # noqa: E731
    by_keyword = lambda params, x, *, labels: loss_fn(params, x, labels)  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), num_micro_batches=4)
    with pytest.raises(
        ValueError, match=r"Argument 2 of loss_fn is as long as the batch, 32.*in batch_argnums, now \(1,"
    ):
        function(PARAMS, BATCH["x"], labels)
    keyword = optax_sam.value_and_grad(by_keyword, optax_sam.sam(RHO), num_micro_batches=4)
    with pytest.raises(ValueError, match=r"Argument labels of loss_fn is as long as the batch, 32.*close over"):
        keyword(PARAMS, BATCH["x"], labels=labels)
    optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO))(PARAMS, BATCH["x"], labels)  # whole batches need no splitting


@jax.tree_util.register_pytree_node_class
class Images:
    """A batch that checks its rank."""

    def __init__(self, pixels):
        if jnp.ndim(pixels) != 2:
            raise ValueError(f"pixels must have two axes, got {jnp.ndim(pixels)}")
        self.pixels = pixels

    def tree_flatten(self):
        return (self.pixels,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def loss_of_images(w, batch):
    return jnp.mean((batch.pixels @ w - 1) ** 2)


PIXELS, W = jax.random.normal(jax.random.key(0), (8, 3)), jnp.ones(3)


def gradient_of_pixels():
    return on_one_device(references.sam, 8, lambda w, x: jnp.mean((x @ w - 1) ** 2), W, PIXELS)


def test_batches_that_check_their_ranks_are_split():
    estimate = functools.partial(optax_sam.value_and_grad, loss_of_images, optax_sam.sam(RHO), num_micro_batches=8)
    weight_fns = {"equal": None, "weighted": lambda batch: 1.0}
    functions = {
        (strategy, name): estimate(strategy=strategy, weight_fn=weight_fn)
        for strategy in STRATEGIES
        for name, weight_fn in weight_fns.items()
    }
    actual = jax.jit(together(functions))(W, Images(PIXELS))
    assert_close(actual, dict.fromkeys(actual, gradient_of_pixels()))


def test_batches_that_check_their_ranks_are_split_on_an_explicit_mesh():
    function = optax_sam.value_and_grad(loss_of_images, optax_sam.sam(RHO), axis_name="data")
    assert_close(PLACES["jit explicit"](function, W, batch=Images(PIXELS)), gradient_of_pixels())
