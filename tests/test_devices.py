"""Many devices: every way to spread a batch gives the numbers of one device on the concatenated batch, or an error."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import (
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

import optax_sam

DEVICES = 8
STEPS = 2
RHO, LEARNING_RATE, MOMENTUM = 0.2, 0.1, 0.9
PARAMS, BATCH = mlp_params(), mlp_batch(size=32)
GRAD_FN = jax.grad(mlp_loss)


class Setting(NamedTuple):
    """What is computed: ``num_micro_batches`` are those of one device."""

    ascent_per: str = "micro_batch"
    num_micro_batches: int = 1
    variant: str = "sam"

    @property
    def ascents(self):
        return {"batch": 1, "device": DEVICES, "micro_batch": DEVICES * self.num_micro_batches}[self.ascent_per]

    @property
    def link(self):
        links = {
            "sam": optax_sam.sam,
            "stable_sam": optax_sam.stable_sam,
            "late": lambda rho: optax_sam.late(optax_sam.sam(rho), 1),
        }
        return links[self.variant](RHO)


SETTINGS = {
    "batch": Setting("batch"),
    "batch, 2 micro-batches": Setting("batch", 2),
    "device": Setting("device"),
    "device, 2 micro-batches": Setting("device", 2),
    "micro_batch": Setting(),
    "2 micro-batches": Setting(num_micro_batches=2),
    "stable_sam": Setting(variant="stable_sam"),
    "stable_sam, batch": Setting("batch", variant="stable_sam"),
    "late": Setting(num_micro_batches=2, variant="late"),
    "late, batch": Setting("batch", variant="late"),
}


@functools.cache
def reference(setting):
    """Params after some steps of SGD with momentum on one device, written out from the formulas."""
    params, velocity = PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))  # noqa: E731
    for step in range(STEPS):
        gradients = []
        for index in range(setting.ascents):
            micro_batch = jax.tree.map(lambda x, i=index: x[i], split(BATCH, setting.ascents))
            clean = GRAD_FN(params, micro_batch)
            if setting.variant == "late" and step < 1:
                gradients.append(clean)
                continue
            ascent = optax.tree.scale(RHO / norm(clean), clean)
            point = optax.tree.add(params, ascent)
            gradient = GRAD_FN(point, micro_batch)
            scale = norm(clean) / norm(gradient) if setting.variant == "stable_sam" else 1.0
            gradients.append(optax.tree.scale(scale, gradient))
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, mean)
        params = jax.tree.map(lambda w, v: w - LEARNING_RATE * v, params, velocity)
    return params


# A form is a function of a setting and of the name of the mapped axis, or None under jit alone, and returns the
# transformation and (params, state, batch) -> gradient, state.


def estimator_form(setting, axis_name):
    mapped = axis_name is not None
    factor = DEVICES if setting.ascent_per == "micro_batch" and not mapped else 1
    estimator = optax_sam.gradient_estimator(
        mlp_loss,
        setting.link,
        num_micro_batches=setting.num_micro_batches * factor,
        ascent_per=setting.ascent_per,
        axis_name=axis_name,
    )
    return estimator.init, lambda params, state, batch: estimator.value_and_grad(params, state, batch)[1:]


def chain_form(setting, axis_name):
    link, grad_fn = setting.link, GRAD_FN
    if setting.ascent_per == "batch":
        if axis_name is not None:
            grad_fn = lambda params, batch: jax.lax.pmean(GRAD_FN(own(params), batch), axis_name)  # noqa: E731
        return link.init, lambda params, state, batch: link.update(
            grad_fn(params, batch), state, params, grad_fn=grad_fn, batch=batch
        )
    if axis_name is not None:
        shards = setting.num_micro_batches if setting.ascent_per == "micro_batch" else 1
        link = optax_sam.micro_batched(optax_sam.micro_batched(link), axis_name)
    else:
        shards = setting.ascents
        link = optax_sam.micro_batched(link)

    def gradient(params, state, batch):
        stacked = stack(batch, shards)
        grads = jax.vmap(GRAD_FN, in_axes=(None, 0))(own(params) if axis_name else params, stacked)
        return link.update(grads, state, params, grad_fn=GRAD_FN, batch=stacked)

    return link.init, gradient


def own(params):
    """The params, marked as this member's own where shard_map would otherwise sum their gradient."""
    checked = "data" in jax.typeof(jax.lax.axis_index("data")).mat.varying
    return jax.lax.pcast(params, "data", to="varying") if checked else params


def stack(batch, num_micro_batches):
    """Micro-batches whose leading axis stays where the examples were."""

    def reshape(x):
        front, *rest = jax.typeof(x).sharding.spec
        sharding = PartitionSpec(front, None, *rest) if front else None
        return jnp.reshape(x, (num_micro_batches, -1, *x.shape[1:]), out_sharding=sharding)

    return jax.tree.map(reshape, batch)


FORMS = {"estimator": estimator_form, "chain": chain_form}


# A place runs a function of replicated arguments and the batch on all devices and returns what one of them returns.


def with_pmap(function, *replicated):
    mapped = jax.pmap(function, axis_name="data", in_axes=(*[None] * len(replicated), 0))
    return jax.tree.map(lambda x: x[0], mapped(*replicated, split(BATCH, DEVICES)))


def with_vmap(function, *replicated):
    mapped = jax.jit(jax.vmap(function, axis_name="data", in_axes=(*[None] * len(replicated), 0)))
    return jax.tree.map(lambda x: x[0], mapped(*replicated, split(BATCH, DEVICES)))


def with_shard_map(check_vma, axis_type=AxisType.Auto):
    def run(function, *replicated):
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
        data, everywhere = PartitionSpec("data"), PartitionSpec()
        specs = (*[everywhere] * len(replicated), data)
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=check_vma)
        with jax.set_mesh(mesh):
            return jax.device_get(jax.jit(mapped)(*replicated, jax.device_put(BATCH, NamedSharding(mesh, data))))

    return run


def with_jit(axis_type):
    def run(function, *replicated):
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            replicated = jax.device_put(replicated, NamedSharding(mesh, PartitionSpec()))
            batch = jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec("data")))
            return jax.device_get(jax.jit(function)(*replicated, batch))

    return run


MAPS = {
    "pmap": with_pmap,
    "vmap": with_vmap,
    "shard_map": with_shard_map(check_vma=True),
    "shard_map unchecked": with_shard_map(check_vma=False),
    "shard_map explicit": with_shard_map(check_vma=True, axis_type=AxisType.Explicit),
}
PLACES = MAPS | {"jit": with_jit(AxisType.Auto), "jit explicit": with_jit(AxisType.Explicit)}
every_map = pytest.mark.parametrize("run", MAPS.values(), ids=MAPS)


def own_gradient(link):
    """``link`` in the chain form, fed with this member's own gradient."""
    return lambda params, state, batch: link.update(
        GRAD_FN(own(params), batch), state, params, grad_fn=GRAD_FN, batch=batch
    )


def combinations():
    """All of them, but for those whose program in the chain form is that of another setting."""
    for place in PLACES:
        for form in FORMS:
            for name, setting in SETTINGS.items():
                if form == "estimator" or name not in ("batch, 2 micro-batches", "device, 2 micro-batches", "device"):
                    yield pytest.param(place, form, setting, id=f"{place}-{form}-{name}")


@pytest.mark.parametrize(("place", "form", "setting"), list(combinations()))
def test_equals_one_device(place, form, setting):
    axis_name = None if place.startswith("jit") else "data"
    if axis_name is None and form == "estimator" and setting.ascent_per == "device":
        with pytest.raises(ValueError, match=r'ascent_per="device" needs axis_name.*num_micro_batches = the number of'):
            FORMS[form](setting, axis_name)
        return
    init, gradient = FORMS[form](setting, axis_name)
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)

    def step(params, state, optimizer_state, batch):
        gradients, state = gradient(params, state, batch)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(params, updates), state, optimizer_state

    everything = PARAMS, init(PARAMS), optimizer.init(PARAMS)
    for _ in range(STEPS):
        everything = PLACES[place](step, *everything)
    assert_close(everything[0], reference(setting))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("strategy", ["vmap", "unroll"])
def test_every_strategy_equals_one_device(place, strategy):
    jit = place.startswith("jit")
    options = {"num_micro_batches": 2 * DEVICES} if jit else {"num_micro_batches": 2, "axis_name": "data"}
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), strategy=strategy, **options)
    single = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=2 * DEVICES)
    assert_close(PLACES[place](function, PARAMS), single(PARAMS, BATCH))


@every_map
@pytest.mark.parametrize(
    "link",
    [
        optax_sam.sam(RHO, mask={"hidden": True, "output": False}),
        optax_sam.asam(0.5),
        optax_sam.sharpness_aware(optax_sam.normalized_ascent(RHO), steps=2),
    ],
    ids=["masked", "asam", "two steps"],
)
def test_other_links_equal_one_device(run, link):
    single = optax_sam.value_and_grad(mlp_loss, link, num_micro_batches=DEVICES)
    mapped = optax_sam.value_and_grad(mlp_loss, link, axis_name="data")
    assert_close(run(mapped, PARAMS), single(PARAMS, BATCH))
    chained, _ = run(own_gradient(optax_sam.micro_batched(link, "data")), PARAMS, link.init(PARAMS))
    assert_close(chained, single(PARAMS, BATCH)[1])


@pytest.mark.parametrize("place", ["pmap", "shard_map", "jit explicit"])
def test_convolutions_in_loops_and_branches_equal_one_device(place, monkeypatch):
    params, batch = cnn_params(), cnn_batch(size=32)
    monkeypatch.setitem(globals(), "BATCH", batch)
    jit = place.startswith("jit")
    link = optax_sam.switch_by(lambda step: step >= 0, [optax.identity(), optax_sam.sam(RHO)])
    options = {"num_micro_batches": 2 * DEVICES} if jit else {"num_micro_batches": 2, "axis_name": "data"}
    estimator = optax_sam.gradient_estimator(cnn_loss, link, strategy="scan", **options)
    single = optax_sam.gradient_estimator(cnn_loss, optax_sam.sam(RHO), num_micro_batches=16, strategy="unroll")
    actual = PLACES[place](estimator.value_and_grad, params, estimator.init(params))
    assert_close(actual[:2], jax.jit(single.value_and_grad)(params, single.init(params), batch)[:2])


def test_several_axes_are_one():
    mesh = jax.make_mesh((2, 4), ("host", "device"), axis_types=(AxisType.Auto,) * 2)
    axes = ("host", "device")
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), axis_name=axes)
    specs = PartitionSpec(), PartitionSpec(axes)
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))
    single = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=DEVICES)
    assert_close(mapped(PARAMS, BATCH), single(PARAMS, BATCH))

    link = optax_sam.msam(RHO, axes)

    def member(params, batch):
        point = jax.lax.pcast(params, axes, to="varying")
        return link.update(GRAD_FN(point, batch), link.init(params), params, grad_fn=GRAD_FN, batch=batch)[0]

    mapped = jax.jit(jax.shard_map(member, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))
    assert_close(mapped(PARAMS, BATCH), single(PARAMS, BATCH)[1])


def test_one_ascent_per_group_of_devices_is_an_average_in_the_loss():
    mesh = jax.make_mesh((2, 4), ("host", "device"), axis_types=(AxisType.Auto,) * 2)
    loss_fn = lambda params, batch: jax.lax.pmean(mlp_loss(params, batch), "device")  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), axis_name="host")
    specs = PartitionSpec(), PartitionSpec(("host", "device"))
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))
    single = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=2)
    assert_close(mapped(PARAMS, BATCH), single(PARAMS, BATCH))


# What cannot be right is refused.


def test_gradient_that_shard_map_already_summed_is_refused():
    link = optax_sam.msam(RHO, axis_name="data")

    def member(params, batch):
        return link.update(GRAD_FN(params, batch), link.init(params), params, grad_fn=GRAD_FN, batch=batch)[0]

    with pytest.raises(ValueError, match=r"does not vary over 'data'.*pcast\(params, 'data', to='varying'\)"):
        MAPS["shard_map"](member, PARAMS)


def test_estimator_that_was_not_told_the_axis_refuses_the_sum():
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO))
    with pytest.raises(ValueError, match=r"loss_fn returns varies over the mapped axis 'data'.*axis_name='data'"):
        MAPS["shard_map"](function, PARAMS)


def test_value_fn_whose_gradient_is_summed_is_refused():
    link = optax_sam.sam(RHO)

    def member(params, batch):
        grads = jax.grad(lambda w: jax.lax.pmean(mlp_loss(w, batch), "data"))(params)
        return link.update(grads, link.init(params), params, value_fn=mlp_loss, batch=batch)[0]

    with pytest.raises(ValueError, match=r"value_fn returns varies over the mapped axis 'data'.*jax.lax.pmean\(loss"):
        MAPS["shard_map"](member, PARAMS)


def test_loss_that_is_averaged_over_devices_needs_no_axis_name():
    function = optax_sam.value_and_grad(lambda p, b: jax.lax.pmean(mlp_loss(p, b), "data"), optax_sam.sam(RHO))
    single = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO))
    assert_close(MAPS["shard_map"](function, PARAMS), single(PARAMS, BATCH))


@every_map
def test_switch_between_an_average_and_none_is_refused(run):
    link = optax_sam.late(optax_sam.msam(RHO, "data"), 1)
    with pytest.raises(ValueError, match=r"phase from step 1 averages over the mapped axis 'data' and .* 0 does not"):
        run(own_gradient(link), PARAMS, link.init(PARAMS))


@every_map
def test_switch_between_averages_is_right(run):
    inner = {0: optax_sam.micro_batched(optax.identity(), "data"), 1: optax_sam.msam(RHO, "data")}
    link = optax_sam.switch_at(inner)
    first, state = run(own_gradient(link), PARAMS, link.init(PARAMS))
    second, _ = run(own_gradient(link), PARAMS, state)
    single = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=DEVICES)
    assert_close((first, second), (GRAD_FN(PARAMS, BATCH), single(PARAMS, BATCH)[1]))


@every_map
@pytest.mark.parametrize("inner", [optax_sam.msam(RHO, "data"), optax_sam.late(optax_sam.msam(RHO, "data"), 0)])
def test_renormalization_around_an_average_is_refused(run, inner):
    link = optax_sam.renormalized(inner)
    with pytest.raises(ValueError, match=r"averages over the mapped axis 'data'|Averaging belongs around the switch"):
        run(own_gradient(link), PARAMS, link.init(PARAMS))


@pytest.mark.parametrize("place", [place for place in MAPS if place != "vmap"])
def test_branches_that_differ_between_devices_are_refused(place):
    inner = optax_sam.switch_by(lambda step: jax.lax.axis_index("data") % 2, [optax.identity(), optax_sam.sam(RHO)])
    link = optax_sam.micro_batched(inner, "data")
    with pytest.raises(ValueError, match="index_fn must return the same on all members"):
        MAPS[place](own_gradient(link), PARAMS, link.init(PARAMS))


@every_map
def test_index_that_is_the_same_on_all_members_is_accepted(run):
    inner = optax_sam.switch_by(lambda step: step >= 0, [optax.identity(), optax_sam.sam(RHO)])
    link = optax_sam.micro_batched(inner, "data")
    single = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=DEVICES)
    actual, _ = run(own_gradient(link), PARAMS, link.init(PARAMS))
    assert_close(actual, single(PARAMS, BATCH)[1])


def test_index_that_reads_the_axis_and_is_the_same_on_all_members_is_accepted():
    everywhere = lambda step: jax.lax.psum(jax.lax.axis_index("data"), "data") > 3  # noqa: E731
    link = optax_sam.micro_batched(optax_sam.switch_by(everywhere, [optax.identity(), optax_sam.sam(RHO)]), "data")
    single = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=DEVICES)
    actual, _ = MAPS["shard_map"](own_gradient(link), PARAMS, link.init(PARAMS))
    assert_close(actual, single(PARAMS, BATCH)[1])


@pytest.mark.parametrize("place", ["shard_map", "shard_map explicit"])
def test_params_that_were_marked_as_varying_are_refused(place):
    averaged, plain = optax_sam.msam(RHO, "data"), optax_sam.sam(RHO)
    estimator = optax_sam.gradient_estimator(mlp_loss, plain, axis_name="data")

    def chain(link):
        return lambda params, state, batch: link.update(
            GRAD_FN(own(params), batch), state, own(params), grad_fn=GRAD_FN, batch=batch
        )

    for link, message in ((averaged, "pass the unmarked params"), (plain, r"`sharded\(link, 'data'\)`")):
        with pytest.raises(ValueError, match=message):
            MAPS[place](chain(link), PARAMS, link.init(PARAMS))
    with pytest.raises(ValueError, match="The params vary over 'data'"):
        MAPS[place](lambda w, state, batch: estimator.value_and_grad(own(w), state, batch), PARAMS, plain.init(PARAMS))


@every_map
def test_batch_that_does_not_divide_is_refused_with_all_three_numbers(run):
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=3, axis_name="data")
    with pytest.raises(
        ValueError, match="got 32 examples, 8 members of the mapped axis 'data' and num_micro_batches=3"
    ):
        run(function, PARAMS)


def test_batch_on_an_explicit_mesh_that_does_not_divide_is_refused_with_all_three_numbers():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    batch = jax.device_put(mlp_batch(size=16), NamedSharding(mesh, PartitionSpec("data")))
    for num_micro_batches, message in (
        (24, r"batch_size=16 must be divisible by num_micro_batches=24 \(on 8 devices\)"),
        (4, "got 16 examples, 8 devices and num_micro_batches=4"),
    ):
        function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=num_micro_batches)
        with pytest.raises(ValueError, match=message):
            jax.jit(function)(PARAMS, batch)


@every_map
def test_axis_that_is_not_mapped_is_named(run):
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), axis_name="model")
    with pytest.raises(ValueError, match="axis_name='model' is not a mapped axis here"):
        run(function, PARAMS)


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
            return optax_sam.value_and_grad(closed, optax_sam.sam(RHO), num_micro_batches=8)(w, batch)

        with pytest.raises((ValueError, NotImplementedError)) as raised:
            function(jnp.ones((3, 2)), batch, scale)
    assert "loss_fn must not name ('data',) in out_sharding there, and arrays on the" in raised.value.__notes__[0]


# State, aux and randomness.


@every_map
@pytest.mark.parametrize("ascent_per", ["micro_batch", "batch"])
def test_large_float16_gradients_do_not_overflow(run, ascent_per):
    params = jnp.ones(3, jnp.float16)

    def loss_fn(w, batch):
        outputs = (w[None] * jnp.float16(20_000)).astype(jnp.float32)
        return jnp.mean(jnp.sum(outputs, axis=1)) + 0 * jnp.sum(batch["y"])

    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), axis_name="data", ascent_per=ascent_per)
    _, grads = run(function, params)
    assert_close(jnp.asarray(grads), jnp.full(3, 20_000, jnp.float16))


@every_map
def test_float_states_are_averaged_over_devices_and_counters_shared(run):
    ascent = optax.chain(optax.ema(0.5, debias=False), optax_sam.normalized_ascent(optax.constant_schedule(0.1)))
    estimator = optax_sam.gradient_estimator(mlp_loss, optax_sam.sharpness_aware(ascent), axis_name="data")
    _, _, state = run(estimator.value_and_grad, PARAMS, estimator.init(PARAMS))
    ema, schedule = state.ascent_state
    assert int(schedule.ascent_step) == 1
    assert_close(ema.ema, jax.tree.map(lambda g: g / 2, GRAD_FN(PARAMS, BATCH)))


@every_map
@pytest.mark.parametrize("form", ["micro_batch", "batch", "chain"])
def test_late_link_with_a_float_state(run, form):
    ascent = optax.chain(optax.ema(0.5, debias=False), optax_sam.normalized_ascent(0.1))
    link = optax_sam.late(optax_sam.sharpness_aware(ascent), 1)
    if form == "chain":
        function = own_gradient(optax_sam.micro_batched(link, "data"))
    else:
        estimator = optax_sam.gradient_estimator(mlp_loss, link, ascent_per=form, axis_name="data")
        function = lambda *args: estimator.value_and_grad(*args)[1:]  # noqa: E731
    grads, state = run(function, PARAMS, link.init(PARAMS))
    assert_close(grads, GRAD_FN(PARAMS, BATCH))
    _, state = run(function, PARAMS, state)
    assert_identical(state.switch_step, jnp.int32(2))
    assert_close(state.link_states[1].ascent_state[0].ema, jax.tree.map(lambda g: g / 2, GRAD_FN(PARAMS, BATCH)))


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
    expected, _ = update(first, link.init(PARAMS))[1], None
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


@every_map
def test_batch_norm_across_devices_equals_one_device(run):
    variables = Normalized().init(jax.random.key(0), BATCH["x"])
    params, stats = variables["params"], variables["batch_stats"]
    options = {"has_aux": True, "ascent_per": "batch"}
    mapped = optax_sam.value_and_grad(normalized_loss("data"), optax_sam.sam(RHO), axis_name="data", **options)
    single = optax_sam.value_and_grad(normalized_loss(None), optax_sam.sam(RHO), **options)
    assert_close(
        run(lambda params, stats, batch: mapped(params, batch, stats), params, stats), single(params, BATCH, stats)
    )


@every_map
def test_batch_norm_per_device_has_the_statistics_of_micro_batches(run):
    variables = Normalized().init(jax.random.key(0), BATCH["x"])
    params, stats = variables["params"], variables["batch_stats"]
    mapped = optax_sam.value_and_grad(normalized_loss(None), optax_sam.sam(RHO), has_aux=True, axis_name="data")
    single = optax_sam.value_and_grad(
        normalized_loss(None), optax_sam.sam(RHO), has_aux=True, num_micro_batches=DEVICES, strategy="unroll"
    )
    assert_close(
        run(lambda params, stats, batch: mapped(params, batch, stats), params, stats), single(params, BATCH, stats)
    )


def draw_loss(params, batch, key):
    return jnp.sum(params**2), jax.random.uniform(key)


@every_map
def test_devices_draw_different_random_numbers(run):
    function = optax_sam.value_and_grad(
        draw_loss, optax_sam.sam(RHO), has_aux=True, num_micro_batches=2, axis_name="data", strategy="unroll"
    )
    key = jax.random.key(0)
    (_, mean), _ = run(lambda params, batch: function(params, batch, key), jnp.ones(2))
    draws = [float(jax.random.uniform(jax.random.fold_in(key, index))) for index in range(2 * DEVICES)]
    np.testing.assert_allclose(float(mean), np.mean(draws), rtol=1e-6)


def test_devices_of_an_explicit_mesh_draw_the_numbers_of_one_device():
    function = optax_sam.value_and_grad(draw_loss, optax_sam.sam(RHO), has_aux=True, num_micro_batches=2 * DEVICES)
    key = jax.random.key(0)
    (_, mean), _ = PLACES["jit explicit"](lambda params, batch: function(params, batch, key), jnp.ones(2))
    (_, expected), _ = function(jnp.ones(2), BATCH, key)
    np.testing.assert_allclose(float(mean), float(expected), rtol=1e-6)


def test_arguments_that_are_not_arrays_reach_the_loss_on_an_explicit_mesh():
    def loss_fn(params, batch, scale, *, kind, train):
        assert kind == "text"
        return mlp_loss(params, batch) * (scale if train else 0)

    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), num_micro_batches=DEVICES)
    with_arguments = lambda params, batch: function(params, batch, jnp.float32(3), kind="text", train=True)  # noqa: E731
    assert_close(PLACES["jit explicit"](with_arguments, PARAMS), with_arguments(PARAMS, BATCH))


def test_key_on_the_only_device_is_unchanged():
    loss_fn = lambda w, batch, key: w * jnp.sum(batch) * jax.random.uniform(key)  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax.identity(), axis_name="data")
    arguments = jnp.ones([]), jnp.ones(4), jax.random.key(3)
    alone = jax.vmap(function, in_axes=(None, 0, None), axis_name="data")(arguments[0], jnp.ones((1, 4)), arguments[2])
    assert_close(jax.tree.map(lambda x: x[0], alone), jax.value_and_grad(loss_fn)(*arguments))


# Programs around programs.


def test_pmap_inside_jit_equals_one_device():
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), axis_name="data")
    mapped = jax.jit(jax.pmap(function, axis_name="data", in_axes=(None, 0)))
    single = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), num_micro_batches=DEVICES)
    assert_close(jax.tree.map(lambda x: x[0], mapped(PARAMS, split(BATCH, DEVICES))), single(PARAMS, BATCH))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda axis_type: axis_type.name)
def test_sharded_buffers_are_donated(axis_type):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
    params = {"w": jnp.ones((16, 3))}
    tx = optax.chain(optax_sam.late(optax_sam.sam(RHO), 1), optax.adam(0.1))
    grad_fn = jax.grad(lambda params, batch: jnp.mean(jnp.sum(params["w"], 0) * batch))

    def step(params, state, batch):
        updates, state = tx.update(grad_fn(params, batch), state, params, grad_fn=grad_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec("data")))
        state = jax.jit(tx.init)(params)
        step = jax.jit(step, donate_argnums=(0, 1))
        new_params, new_state = step(params, state, jnp.ones(3))
    assert params["w"].is_deleted()
    assert new_params["w"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), ndim=2)
    assert int(new_state[0].switch_step) == 1
