"""Mapped axes: what is refused because it cannot be right, and whose state, aux and random numbers are returned."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from optax_sam.single_pass import OneGradient
from tests.helpers import references
from tests.helpers.measuring import assert_measured, mean_of_what_happens
from tests.helpers.one_device import of_each_part, on_one_device, plain, three_calls
from tests.helpers.places import (
    BATCH,
    DEVICES,
    GRAD_FN,
    MAPS,
    PARAMS,
    PLACES,
    RHO,
    every_map,
    own,
    own_gradient,
    together,
)
from tests.helpers.problems import assert_close, assert_identical, mlp_batch, mlp_loss, split
from tests.helpers.registry import MEMBERS

# What cannot be right is refused.


def test_gradient_that_shard_map_already_summed_is_refused():
    link = optax_sam.msam(RHO, axis_name="data")

    def member(params, batch):
        return link.update(GRAD_FN(params, batch), link.init(params), params, grad_fn=GRAD_FN, batch=batch)[0]

    with pytest.raises(ValueError, match=r"does not vary over 'data'.*pcast\(params, 'data', to='varying'\)"):
        MAPS["shard_map"](member, PARAMS)


def test_estimator_that_was_not_told_the_axis_refuses_the_sum():
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO))
    with pytest.raises(ValueError, match=r"over the mapped axis 'data', the loss is a member's own .*axis_name='data'"):
        MAPS["shard_map"](function, PARAMS)


def test_value_fn_whose_gradient_is_summed_is_refused():
    link = optax_sam.sam(RHO)

    def member(params, batch):
        grads = jax.grad(lambda w: jax.lax.pmean(mlp_loss(w, batch), "data"))(params)
        return link.update(grads, link.init(params), params, value_fn=mlp_loss, batch=batch)[0]

    with pytest.raises(
        ValueError, match=r"over the mapped axis 'data', the loss is a member's own .*Average both or neither"
    ):
        MAPS["shard_map"](member, PARAMS)


def test_loss_that_is_averaged_over_devices_needs_no_axis_name():
    function = optax_sam.value_and_grad(lambda p, b: jax.lax.pmean(mlp_loss(p, b), "data"), optax_sam.sam(RHO))
    assert_close(MAPS["shard_map"](function, PARAMS), on_one_device(references.sam, 1))


# Losses that average over the axis themselves, the habit of pmap: the same numbers in every place.

LOSSES = {
    "averaged": lambda w, b: jax.lax.pmean(mlp_loss(w, b), "data"),
    "averaged, with a penalty": lambda w, b: jax.lax.pmean(mlp_loss(w, b), "data") + 0.1 * optax_sam.norm(w) ** 2,
    "summed": lambda w, b: jax.lax.psum(mlp_loss(w, b), "data"),
}
OWN_LOSSES = {
    "averaged": mlp_loss,
    "averaged, with a penalty": lambda w, b: mlp_loss(w, b) + 0.1 * optax_sam.norm(w) ** 2,
    "summed": lambda w, b: DEVICES * mlp_loss(w, b),
}


@every_map
@pytest.mark.parametrize(("ascent_per", "ascents"), [("micro_batch", 2 * DEVICES), ("batch", 1)])
def test_losses_that_average_themselves_are_right_in_the_estimator(run, ascent_per, ascents):
    # USAM, whose ε is wrong too where the gradient is too small.
    options = {"num_micro_batches": 2, "ascent_per": ascent_per, "axis_name": "data"}
    estimate = functools.partial(optax_sam.value_and_grad, link=optax_sam.usam(RHO), **options)
    actual = run(together({kind: estimate(loss_fn) for kind, loss_fn in LOSSES.items()}), PARAMS)
    expected = {kind: on_one_device(references.usam, ascents, loss_fn) for kind, loss_fn in OWN_LOSSES.items()}
    assert_close(actual, expected)


CHOOSING = ("ae_sam",)  # by a member's own gradient between links that communicate: an error, below
ALONE = {member.name: member.make(RHO) for member in MEMBERS if not member.stacked and member.name not in CHOOSING}
SOME = {name: ALONE[name] for name in ("stable_sam", "late-momentum-ascent")}  # a norm; a branch and floats in a state


@pytest.mark.parametrize(
    ("place", "links"), [("pmap", SOME), ("vmap", SOME), ("shard_map", ALONE)], ids=["pmap", "vmap", "shard_map"]
)
def test_losses_that_average_themselves_are_right_for_every_recipe(place, links):
    """Only ``shard_map`` shows a recipe, in the types, what varies over the devices."""

    def estimate_of(link):
        return optax_sam.gradient_estimator(LOSSES["averaged"], link, axis_name="data").value_and_grad

    expected = jax.jit(three_calls(links, lambda link: of_each_part(link, mlp_loss, DEVICES)))(PARAMS, BATCH)
    actual = MAPS[place](three_calls(links, estimate_of), PARAMS)
    for name, link in links.items():  # without a clean gradient there is no clean loss
        compared = slice(1 if isinstance(link, OneGradient) else 0, None)
        assert_close(actual[name][compared], expected[name][compared])


@pytest.mark.parametrize("place", [pytest.param("pmap", marks=pytest.mark.heavy), "shard_map"])
def test_a_rule_that_sees_the_gradient_is_refused_where_members_would_wait_for_each_other(place):
    link = optax_sam.ae_sam(RHO)
    options = {"link": link, "axis_name": "data", "num_micro_batches": 2}
    averaged = optax_sam.gradient_estimator(LOSSES["averaged"], **options)
    with pytest.raises(ValueError, match=r"axis 'data' choose for themselves .*Leave averages in the loss"):
        MAPS[place](averaged.value_and_grad, PARAMS, averaged.init(PARAMS))
    synchronized = optax_sam.gradient_estimator(LOSSES["averaged"], ascent_per="batch", **options)
    actual = MAPS[place](synchronized.value_and_grad, PARAMS, synchronized.init(PARAMS))
    expected = optax_sam.gradient_estimator(mlp_loss, link).value_and_grad(PARAMS, link.init(PARAMS), BATCH)
    assert_close(actual, expected)
    own = optax_sam.gradient_estimator(mlp_loss, strategy="vmap", **options)  # which runs a loop here
    everywhere = optax_sam.gradient_estimator(mlp_loss, link, num_micro_batches=2 * DEVICES)
    actual = MAPS[place](own.value_and_grad, PARAMS, own.init(PARAMS))
    assert_close(actual, everywhere.value_and_grad(PARAMS, link.init(PARAMS), BATCH))


IS_LONG = optax.stateless(lambda updates, _: optax_sam.norm(updates) ** 2 > 20)  # on some members, not on the first
CHOOSING_LINKS = {
    "schedule": optax_sam.switch_on(IS_LONG, [optax.identity(), optax_sam.sam(lambda step: RHO * (1 + step))]),
    "ae_sam": optax_sam.ae_sam(RHO, decay=0.1),
    "late": optax_sam.late(optax_sam.ae_sam(RHO, decay=0.1), 0),
    "measured": optax_sam.measured(optax_sam.ae_sam(RHO, decay=0.1)),
}


@pytest.mark.parametrize("place", [pytest.param("pmap", marks=pytest.mark.heavy), "shard_map"])
def test_members_that_choose_for_themselves_keep_one_state(place):
    """Integers in it too: of a schedule in a link that some members have run and others have not."""

    def estimate_of(link):
        return optax_sam.gradient_estimator(mlp_loss, link, axis_name="data").value_and_grad

    def expected_of(link):
        options = {"num_micro_batches": DEVICES, "strategy": "unroll"}
        return optax_sam.gradient_estimator(mlp_loss, link, **options).value_and_grad

    expected = jax.jit(three_calls(CHOOSING_LINKS, expected_of))(PARAMS, BATCH)
    assert_close(MAPS[place](three_calls(CHOOSING_LINKS, estimate_of), PARAMS), expected)
    _, _, state = expected["measured"]
    assert 0 < optax_sam.measurements(jax.tree.map(lambda x: x[-1], state)).active < 1


@every_map
def test_measurements_of_losses_that_average_themselves_are_those_of_each_member(run):
    link = optax_sam.measured(optax_sam.usam(RHO))
    estimator = optax_sam.gradient_estimator(LOSSES["averaged"], link, axis_name="data")
    _, _, state = run(estimator.value_and_grad, PARAMS, link.init(PARAMS))
    # Each member's perturbed loss is the average over all members, each at its own ε.
    assert_measured(optax_sam.measurements(state), mean_of_what_happens(optax_sam.usam(RHO), DEVICES))


@pytest.mark.parametrize(
    "link", [optax_sam.msam(RHO, "data"), optax_sam.micro_batched(optax_sam.measured(optax_sam.sam(RHO)), "data")]
)
def test_value_fn_that_averages_is_refused_where_the_gradient_is_a_members_own(link):
    def member(params, state, batch):
        loss, grads = jax.value_and_grad(mlp_loss)(own(params), batch)
        return link.update(grads, state, params, value=loss, value_fn=LOSSES["averaged"], batch=batch)[0]

    with pytest.raises(
        ValueError, match=r"over the mapped axis 'data', the gradient is a member's own .*both or neither"
    ):
        MAPS["shard_map"](member, PARAMS, link.init(PARAMS))


@pytest.mark.parametrize("name", ["value", "value_fn", "value_and_grad_fn"])
def test_measured_refuses_an_averaged_loss_beside_a_members_own_gradient(name):
    link = optax_sam.micro_batched(optax_sam.measured(optax_sam.sam(RHO)), "data")
    averaged, right = LOSSES["averaged"], {"value_fn": mlp_loss, "grad_fn": GRAD_FN}

    def member(params, state, batch):
        loss, grads = jax.value_and_grad(mlp_loss)(own(params), batch)
        wrong = {
            "value": jax.lax.pmean(loss, "data"),
            "value_fn": averaged,
            "value_and_grad_fn": jax.value_and_grad(averaged),
        }
        keywords = right | {"value": loss, name: wrong[name]}
        return link.update(grads, state, params, batch=batch, **keywords)[0]

    with pytest.raises(ValueError, match=r"value.*: over the mapped axis 'data', the gradient is a member's own"):
        MAPS["shard_map"](member, PARAMS, link.init(PARAMS))


@every_map
def test_value_fn_with_each_members_own_loss_is_right(run):
    link = optax_sam.msam(RHO, "data")
    update = lambda w, state, b: link.update(GRAD_FN(own(w), b), state, w, value_fn=mlp_loss, batch=b)  # noqa: E731
    actual, _ = run(update, PARAMS, link.init(PARAMS))
    assert_close(actual, on_one_device(references.sam, DEVICES)[1])


@every_map
def test_switch_between_an_average_and_none_is_refused(run):
    link = optax_sam.late(optax_sam.msam(RHO, "data"), 1)
    with pytest.raises(
        ValueError, match=r"phase from step 1 averages over \['data'\], the phase from step 0 over nothing"
    ):
        run(own_gradient(link), PARAMS, link.init(PARAMS))


@every_map
def test_switch_between_averages_is_right(run):
    inner = {0: optax_sam.micro_batched(optax.identity(), "data"), 1: optax_sam.msam(RHO, "data")}
    link = optax_sam.switch_at(inner)
    gradient = own_gradient(link)
    first, state = run(gradient, PARAMS, link.init(PARAMS))
    second, _ = run(gradient, PARAMS, state)
    assert_close((first, second), (on_one_device(plain, 1)[1], on_one_device(references.sam, DEVICES)[1]))


def test_switch_between_averages_over_different_axes_is_refused():
    both = {0: optax_sam.micro_batched(optax.identity(), "data"), 1: optax_sam.msam(RHO, ("data", "model"))}
    link = optax.chain(optax_sam.switch_at(both), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"averages over \['data', 'model'\], the phase from step 0 over \['data'\]"):
        link.update(PARAMS, link.init(PARAMS), PARAMS)


@every_map
@pytest.mark.parametrize("inner", [optax_sam.msam(RHO, "data"), optax_sam.late(optax_sam.msam(RHO, "data"), 0)])
def test_renormalization_around_an_average_is_refused(run, inner):
    link = optax_sam.renormalized(inner)
    with pytest.raises(ValueError, match=r"this one averages|Average around it"):
        run(own_gradient(link), PARAMS, link.init(PARAMS))


@pytest.mark.parametrize("place", ["pmap", "shard_map"])
def test_branches_that_differ_between_devices_are_refused(place):
    inner = optax_sam.switch_by(lambda step: jax.lax.axis_index("data") % 2, [optax.identity(), optax_sam.sam(RHO)])
    link = optax_sam.micro_batched(inner, "data")
    with pytest.raises(ValueError, match="index_fn reads its place on a mapped axis"):
        MAPS[place](own_gradient(link), PARAMS, link.init(PARAMS))


@every_map
def test_index_that_is_the_same_on_all_members_is_accepted(run):
    inner = optax_sam.switch_by(lambda step: step >= 0, [optax.identity(), optax_sam.sam(RHO)])
    link = optax_sam.micro_batched(inner, "data")
    actual, _ = run(own_gradient(link), PARAMS, link.init(PARAMS))
    assert_close(actual, on_one_device(references.sam, DEVICES)[1])


def test_index_that_reads_the_axis_and_is_the_same_on_all_members_is_accepted():
    everywhere = lambda step: jax.lax.psum(jax.lax.axis_index("data"), "data") > 3  # noqa: E731
    link = optax_sam.micro_batched(optax_sam.switch_by(everywhere, [optax.identity(), optax_sam.sam(RHO)]), "data")
    actual, _ = MAPS["shard_map"](own_gradient(link), PARAMS, link.init(PARAMS))
    assert_close(actual, on_one_device(references.sam, DEVICES)[1])


def test_params_that_were_marked_as_varying_are_refused():
    averaged, alone = optax_sam.msam(RHO, "data"), optax_sam.sam(RHO)
    estimator = optax_sam.gradient_estimator(mlp_loss, alone, axis_name="data")

    def chain(link):
        return lambda params, state, batch: link.update(
            GRAD_FN(own(params), batch), state, own(params), grad_fn=GRAD_FN, batch=batch
        )

    def estimate(params, state, batch):
        return estimator.value_and_grad(own(params), state, batch)

    for function, link, message in (
        (chain(averaged), averaged, "pass them without pcast"),
        (chain(alone), alone, r"`sharded\(link, 'data'\)`"),
        (estimate, alone, "The params vary over the mapped axis 'data'"),
    ):
        with pytest.raises(ValueError, match=message):
            MAPS["shard_map"](function, PARAMS, link.init(PARAMS))


@every_map
def test_batch_that_does_not_divide_is_refused_with_both_numbers(run):
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=3, axis_name="data")
    with pytest.raises(ValueError, match=r"batch_size=4 must be divisible by num_micro_batches=3\."):
        run(function, PARAMS)


def test_batch_on_an_explicit_mesh_that_does_not_divide_is_refused_with_all_three_numbers():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    batch = jax.device_put(mlp_batch(size=16), NamedSharding(mesh, PartitionSpec("data")))
    for axis_name, message in (
        ("data", "batch_size=2 must be divisible by num_micro_batches=4"),
        (None, "batch_size=16 must be divisible by num_micro_batches=4 × 8 devices"),
    ):
        function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=4, axis_name=axis_name)
        with pytest.raises(ValueError, match=message):
            jax.jit(function)(PARAMS, batch)


@every_map
def test_axis_that_is_not_mapped_is_named(run):
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), axis_name="model")
    with pytest.raises(ValueError, match="axis_name='model' must be a mapped axis"):
        run(function, PARAMS)


def test_what_the_map_of_an_explicit_mesh_would_get_wrong_is_refused():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))
    function = optax_sam.value_and_grad(lambda w, x, *y: jnp.mean(x) * jnp.sum(w), optax_sam.sam(RHO), axis_name="data")
    for labels in (np.arange(8.0), jnp.arange(8.0), x):  # each device would see those of all, or a part unasked
        with pytest.raises(ValueError, match="as long as the batch, 8, and is not split"):
            function(jnp.ones(8), x, labels)
    with pytest.raises(ValueError, match="shards the examples and nothing else"):
        function(x, x)


@pytest.mark.parametrize("reason", ["out_sharding", "closure"])
def test_losses_that_do_not_fit_whole_micro_batches_on_each_device_are_explained(reason):
    with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))):
        batch = jax.device_put(BATCH, PartitionSpec("data"))
        scale = jax.device_put(jnp.ones([]), PartitionSpec())

        def loss_fn(w, batch, scale):
            sharding = PartitionSpec("data", None) if reason == "out_sharding" else None
            return scale * jnp.mean(jnp.matmul(batch["x"], w, out_sharding=sharding) ** 2)

        @jax.jit
        def function(w, batch, scale):
            closed = lambda w, batch: loss_fn(w, batch, scale if reason == "closure" else 1)  # noqa: E731
            return optax_sam.value_and_grad(closed, optax_sam.sam(RHO), axis_name="data")(w, batch)

        with pytest.raises((ValueError, RuntimeError)) as raised:
            function(jnp.ones((3, 2)), batch, scale)
    assert any("must not name that in out_sharding, nor close over" in note for note in raised.value.__notes__)


# State, aux and randomness.


@every_map
def test_large_float16_gradients_do_not_overflow(run):
    params = jnp.ones(3, jnp.float16)

    def loss_fn(w, batch):
        outputs = (w[None] * jnp.float16(20_000)).astype(jnp.float32)
        return jnp.mean(jnp.sum(outputs, axis=1)) + 0 * jnp.sum(batch["y"])

    estimate = functools.partial(optax_sam.value_and_grad, loss_fn, optax_sam.sam(RHO), axis_name="data")
    actual = run(together({per: estimate(ascent_per=per) for per in ("micro_batch", "batch")}), params)
    for _, gradient in actual.values():
        assert_close(gradient, jnp.full(3, 20_000, jnp.float16))


@every_map
def test_float_states_are_averaged_over_devices_and_counters_shared(run):
    ascent = optax.chain(optax.ema(0.5, debias=False), optax_sam.normalized_ascent(optax.constant_schedule(0.1)))
    link = optax_sam.late(optax_sam.sharpness_aware(ascent), 1)
    estimate = functools.partial(optax_sam.gradient_estimator, mlp_loss, link, axis_name="data")
    estimators = [estimate(ascent_per=per).value_and_grad for per in ("micro_batch", "batch")]
    forms = [*estimators, own_gradient(optax_sam.micro_batched(link, "data"))]

    def update(params, states, batch):
        return [form(params, state, batch)[-2:] for form, state in zip(forms, states, strict=True)]

    clean, start = on_one_device(plain, 1)[1], link.init(PARAMS)
    averaged = optax_sam.micro_batched(link, "data").init(PARAMS)
    first = run(update, PARAMS, [start, start, averaged])
    second = run(update, PARAMS, [state for _, state in first])
    for (gradient, _), (_, state) in zip(first, second, strict=True):
        assert_close(gradient, clean)
        state = getattr(state, "link_state", state)
        assert_identical(state.switch_step, jnp.int32(2))
        ema, schedule = state.link_states[1].ascent_state
        assert_identical(schedule.ascent_step, jnp.int32(1))
        assert_close(ema.ema, jax.tree.map(lambda g: g / 2, clean))


@pytest.mark.parametrize("place", [*MAPS, "one device"])
def test_states_that_differ_between_micro_batches_and_are_not_float_are_those_of_the_first(place):
    class Seen(NamedTuple):
        positive: jax.Array
        count: jax.Array
        key: jax.Array

    def update(updates, state, params=None, **extra_args):
        first = jax.tree.leaves(updates)[0].ravel()[0]
        count = jnp.int32(1e6 * first)
        return updates, Seen(first > 0, count, jax.random.fold_in(state.key, count))

    seeing = optax.GradientTransformationExtraArgs(
        lambda params: Seen(jnp.zeros([], bool), jnp.int32(0), jax.random.key(0)), update
    )
    if place == "one device":
        link, stacked = optax_sam.micro_batched(seeing), split(BATCH, DEVICES)
        grads = jax.vmap(GRAD_FN, in_axes=(None, 0))(PARAMS, stacked)
        _, state = link.update(grads, link.init(PARAMS), PARAMS, batch=stacked)
    else:
        link = optax_sam.micro_batched(seeing, "data")
        _, state = MAPS[place](own_gradient(link), PARAMS, link.init(PARAMS))
    first = GRAD_FN(PARAMS, jax.tree.map(lambda x: x[: 32 // DEVICES], BATCH))
    state, (_, expected) = state.link_state, update(first, seeing.init(PARAMS))
    assert bool(state.positive) == bool(expected.positive)
    assert state.positive.dtype == bool
    np.testing.assert_allclose(int(state.count), int(expected.count), rtol=1e-5)
    reference_key = jax.random.fold_in(jax.random.key(0), jnp.int32(state.count))
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(reference_key))


@every_map
def test_aux_is_averaged_or_the_first(run):
    def loss_fn(params, batch):
        return mlp_loss(params, batch), {"mean": jnp.mean(batch["y"]), "sign": batch["y"][0] > 0, "size": 4}

    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), has_aux=True, axis_name="data")
    (_, aux), _ = run(function, PARAMS)
    np.testing.assert_allclose(float(aux["mean"]), float(jnp.mean(BATCH["y"])), rtol=1e-6)
    assert bool(aux["sign"]) == bool(BATCH["y"][0] > 0)
    assert int(aux["size"]) == 4


class Normalized(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, axis_name=self.axis_name)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.tanh(x))[:, 0]


def normalized_loss(axis_name):
    def loss_fn(params, batch, stats):
        outputs, updated = Normalized(axis_name).apply(
            {"params": params, "batch_stats": stats}, batch["x"], mutable=["batch_stats"]
        )
        return jnp.mean((outputs - batch["y"]) ** 2), updated["batch_stats"]

    return loss_fn


@functools.cache
def normalized_variables():
    variables = jax.jit(Normalized().init)(jax.random.key(0), BATCH["x"])
    return variables["params"], variables["batch_stats"]


@functools.cache
def normalized_on_one_device(parts):
    params, stats = normalized_variables()
    loss_fn = lambda params, part: normalized_loss(None)(params, part, stats)  # noqa: E731
    loss, gradient = on_one_device(references.sam, parts, lambda *args: loss_fn(*args)[0], params)
    updated = jax.jit(jax.vmap(loss_fn, in_axes=(None, 0)))(params, split(BATCH, parts))[1]
    return (loss, jax.tree.map(lambda x: jnp.mean(x, axis=0), updated)), gradient


@pytest.mark.parametrize("place", ["pmap", "shard_map"])
def test_batch_norm_has_the_statistics_of_all_devices_or_of_each(place):
    options = {"has_aux": True, "axis_name": "data"}
    across = optax_sam.value_and_grad(normalized_loss("data"), optax_sam.sam(RHO), ascent_per="batch", **options)
    on_each = optax_sam.value_and_grad(normalized_loss(None), optax_sam.sam(RHO), **options)
    both = lambda params, stats, batch: (across(params, batch, stats), on_each(params, batch, stats))  # noqa: E731
    actual = MAPS[place](both, *normalized_variables())
    assert_close(actual, (normalized_on_one_device(1), normalized_on_one_device(DEVICES)))


def draw_loss(params, batch, key):
    return jnp.sum(params**2), jax.random.uniform(key) * jnp.sum(batch["y"])


def mean_draw(num_micro_batches):
    draws = [jax.random.uniform(jax.random.fold_in(jax.random.key(0), index)) for index in range(num_micro_batches)]
    return np.mean(np.multiply(draws, np.sum(np.reshape(BATCH["y"], (num_micro_batches, -1)), axis=1)))


@every_map
def test_each_micro_batch_of_each_device_draws_its_own_random_numbers(run):
    options = {"has_aux": True, "num_micro_batches": 2, "axis_name": "data"}
    function = optax_sam.value_and_grad(draw_loss, optax_sam.sam(RHO), **options)
    (_, mean), _ = run(lambda params, batch: function(params, batch, jax.random.key(0)), jnp.ones(2))
    np.testing.assert_allclose(float(mean), mean_draw(2 * DEVICES), rtol=1e-5)


def test_devices_of_an_explicit_mesh_draw_the_numbers_of_one_device():
    function = optax_sam.value_and_grad(
        draw_loss, optax_sam.sam(RHO), has_aux=True, num_micro_batches=2, axis_name="data"
    )
    draw = lambda params, batch: function(params, batch, jax.random.key(0))  # noqa: E731
    (_, mean), _ = PLACES["jit explicit"](draw, jnp.ones(2))
    np.testing.assert_allclose(float(mean), mean_draw(2 * DEVICES), rtol=1e-5)


def test_arguments_that_are_not_arrays_reach_the_loss_on_an_explicit_mesh():
    def loss_fn(params, batch, scale, *, kind, train):
        assert kind == "text"
        return mlp_loss(params, batch) * (scale if train else 0)

    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), axis_name="data")
    with_arguments = lambda params, batch: function(params, batch, jnp.float32(3), kind="text", train=True)  # noqa: E731
    expected = on_one_device(references.sam, DEVICES, lambda params, batch: 3 * mlp_loss(params, batch))
    assert_close(PLACES["jit explicit"](with_arguments, PARAMS), expected)


@pytest.mark.parametrize("batch", [(), (3.0,)], ids=["none", "scalar"])
def test_loss_of_one_micro_batch_on_each_member_may_have_any_arguments(batch):
    loss_fn = lambda w, scale=1.0: scale * w**2 * (1 + jax.lax.axis_index("data"))  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax.identity(), axis_name="data")
    found = jax.vmap(lambda _: function(jnp.float32(2), *batch)[1], axis_name="data")(jnp.zeros(2))
    assert_close(found, jnp.full(2, 6.0 * (batch or (1.0,))[0]))


def test_key_on_the_only_device_is_unchanged():
    loss_fn = lambda w, batch, key: w * jnp.sum(batch) * jax.random.uniform(key)  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax.identity(), axis_name="data")
    arguments = jnp.ones([]), jnp.ones(4), jax.random.key(3)
    alone = jax.vmap(function, in_axes=(None, 0, None), axis_name="data")(arguments[0], jnp.ones((1, 4)), arguments[2])
    assert_close(jax.tree.map(lambda x: x[0], alone), jax.value_and_grad(loss_fn)(*arguments))
