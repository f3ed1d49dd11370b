"""Many devices: every way to spread a batch gives the numbers of one device on the concatenated batch, or an error."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from tests.helpers.places import BATCH, DEVICES, GRAD_FN, PARAMS, PLACES, RHO, every_map, own, own_gradient
from tests.helpers.problems import assert_close, cnn_batch, cnn_loss, cnn_params, mlp_loss, split

STEPS = 2
LEARNING_RATE, MOMENTUM = 0.1, 0.9


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


def stack(batch, num_micro_batches):
    """Micro-batches whose leading axis stays where the examples were."""

    def reshape(x):
        front, *rest = jax.typeof(x).sharding.spec
        sharding = PartitionSpec(front, None, *rest) if front else None
        return jnp.reshape(x, (num_micro_batches, -1, *x.shape[1:]), out_sharding=sharding)

    return jax.tree.map(reshape, batch)


FORMS = {"estimator": estimator_form, "chain": chain_form}


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

    def steps(*everything):
        *carry, batch = everything
        return jax.lax.scan(lambda carry, _: (step(*carry, batch), None), tuple(carry), length=STEPS)[0]

    params, _, _ = PLACES[place](steps, PARAMS, init(PARAMS), optimizer.init(PARAMS))
    assert_close(params, reference(setting))


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
def test_convolutions_in_loops_and_branches_equal_one_device(place):
    params, batch = cnn_params(), cnn_batch(size=32)
    jit = place.startswith("jit")
    link = optax_sam.switch_by(lambda step: step >= 0, [optax.identity(), optax_sam.sam(RHO)])
    options = {"num_micro_batches": 2 * DEVICES} if jit else {"num_micro_batches": 2, "axis_name": "data"}
    estimator = optax_sam.gradient_estimator(cnn_loss, link, strategy="scan", **options)
    single = optax_sam.gradient_estimator(cnn_loss, optax_sam.sam(RHO), num_micro_batches=16, strategy="unroll")
    actual = PLACES[place](estimator.value_and_grad, params, estimator.init(params), batch=batch)
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
