"""Many devices: every way to spread a batch gives the numbers of one device on the concatenated batch, or an error."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from tests.helpers import references
from tests.helpers.one_device import on_one_device, plain
from tests.helpers.places import (
    BATCH,
    DEVICES,
    GRAD_FN,
    PARAMS,
    PLACES,
    RHO,
    SINCE_JAX_0_10_2,
    every_map,
    on_mesh,
    own,
    own_gradient,
    together,
)
from tests.helpers.problems import assert_close, cnn_batch, cnn_loss, cnn_params, mlp_loss, split

STEPS = 2
LEARNING_RATE, MOMENTUM = 0.1, 0.9
LINKS = {"stable_sam": optax_sam.stable_sam(RHO), "late": optax_sam.late(optax_sam.sam(RHO), 1)}
METHODS = {"stable_sam": (references.stable_sam,) * STEPS, "late": (plain, references.sam)}


class Setting(NamedTuple):
    """What is computed: ``num_micro_batches`` are those of one device."""

    ascent_per: str
    num_micro_batches: int
    link: str

    @property
    def ascents(self):
        return {"batch": 1, "device": DEVICES, "micro_batch": DEVICES * self.num_micro_batches}[self.ascent_per]


SETTINGS = [
    Setting("batch", 1, "stable_sam"),
    Setting("batch", 2, "late"),
    Setting("micro_batch", 1, "stable_sam"),
    Setting("micro_batch", 2, "late"),
]
SETTINGS_OF_DEVICES = [Setting("device", 1, "late"), Setting("device", 2, "stable_sam")]
SETTINGS_OF_A_CHAIN = [
    Setting("batch", 1, "late"),
    Setting("micro_batch", 1, "late"),
    Setting("micro_batch", 2, "stable_sam"),
]


def reference(setting):
    """Params after some steps of SGD with momentum on one device, by the formulas."""
    params, velocity = PARAMS, 0.0
    for method in METHODS[setting.link]:
        _, gradient = on_one_device(method, setting.ascents, params=params)
        w, tree_of = ravel_pytree(params)
        velocity = MOMENTUM * velocity + ravel_pytree(gradient)[0]
        params = tree_of(w - LEARNING_RATE * velocity)
    return params


def assert_equals_one_device(place, form, settings, axis_name):
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)

    def train(setting, params, batch):
        init, gradient_at = form(setting, axis_name)

        def step(carry, _):
            params, state, optimizer_state = carry
            gradients, state = gradient_at(params, state, batch)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state)
            return (optax.apply_updates(params, updates), state, optimizer_state), None

        start = params, init(params), optimizer.init(params)
        return jax.lax.scan(step, start, length=STEPS)[0][0]

    actual = place(together({setting: functools.partial(train, setting) for setting in settings}), PARAMS)
    assert_close(actual, {setting: reference(setting) for setting in settings})


def estimator_form(setting, axis_name):
    """The ``init`` of the link, and (params, state, batch) -> gradient, state."""
    factor = DEVICES if setting.ascent_per == "micro_batch" and axis_name is None else 1
    estimator = optax_sam.gradient_estimator(
        mlp_loss,
        LINKS[setting.link],
        num_micro_batches=setting.num_micro_batches * factor,
        ascent_per=setting.ascent_per,
        axis_name=axis_name,
    )
    return estimator.init, lambda params, state, batch: estimator.value_and_grad(params, state, batch)[1:]


def chain_form(setting, axis_name):
    link, grad_fn = LINKS[setting.link], GRAD_FN
    if setting.ascent_per == "batch":
        if axis_name is not None:
            grad_fn = lambda params, batch: jax.lax.pmean(GRAD_FN(own(params), batch), axis_name)  # noqa: E731
        return link.init, lambda params, state, batch: link.update(
            grad_fn(params, batch), state, params, grad_fn=grad_fn, batch=batch
        )
    micro_batches = setting.ascents if axis_name is None else setting.num_micro_batches
    link = optax_sam.micro_batched(link)
    link = link if axis_name is None else optax_sam.micro_batched(link, axis_name)

    def gradient(params, state, batch):
        stacked = stack(batch, micro_batches)
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


@every_map
def test_estimator_on_devices_equals_one_device(run):
    assert_equals_one_device(run, estimator_form, SETTINGS + SETTINGS_OF_DEVICES, "data")


@pytest.mark.parametrize("place", ["shard_map unchecked", "shard_map explicit"])
def test_estimator_in_other_maps_equals_one_device(place):
    assert_equals_one_device(PLACES[place], estimator_form, SETTINGS_OF_DEVICES, "data")


@every_map
def test_chain_on_devices_equals_one_device(run):
    assert_equals_one_device(run, chain_form, SETTINGS_OF_A_CHAIN, "data")


def test_estimator_under_jit_equals_one_device():
    assert_equals_one_device(PLACES["jit"], estimator_form, SETTINGS, None)


def test_chain_under_jit_equals_one_device():
    assert_equals_one_device(PLACES["jit"], chain_form, SETTINGS_OF_A_CHAIN, None)


def test_estimator_on_an_explicit_mesh_equals_one_device():
    assert_equals_one_device(PLACES["jit explicit"], estimator_form, SETTINGS + SETTINGS_OF_DEVICES, "data")


def test_micro_batches_that_are_spread_over_an_explicit_mesh_equal_one_device():
    assert_equals_one_device(PLACES["jit explicit"], estimator_form, SETTINGS[1:2], None)


@SINCE_JAX_0_10_2
def test_chain_on_an_explicit_mesh_equals_one_device():
    assert_equals_one_device(PLACES["jit explicit"], chain_form, SETTINGS_OF_A_CHAIN, None)


def test_one_ascent_per_device_needs_to_see_the_devices():
    with pytest.raises(ValueError, match=r'ascent_per="device" needs axis_name'):
        optax_sam.gradient_estimator(mlp_loss, optax_sam.sam(RHO), ascent_per="device")


def every_strategy(**options):
    """(params, batch) -> loss and gradient of mSAM by strategy."""
    estimate = functools.partial(optax_sam.value_and_grad, mlp_loss, LINKS["stable_sam"], **options)
    return together({strategy: estimate(strategy=strategy) for strategy in ("vmap", "scan", "unroll")})


def test_every_strategy_on_devices_equals_one_device():
    actual = PLACES["shard_map"](every_strategy(num_micro_batches=2, axis_name="data"), PARAMS)
    assert_close(actual, dict.fromkeys(actual, on_one_device(references.stable_sam, 2 * DEVICES)))


def test_every_strategy_on_an_explicit_mesh_equals_one_device():
    """Micro-batches that are spread over the devices."""
    actual = PLACES["jit explicit"](every_strategy(num_micro_batches=4), PARAMS)
    assert_close(actual, dict.fromkeys(actual, on_one_device(references.stable_sam, 4)))


def test_leaves_that_the_ascent_leaves_alone_have_the_gradient_of_one_device():
    """In the chain form; their gradient would be the sum over the devices."""
    mask = {"hidden": {"bias": True, "kernel": False}, "output": False}
    link = optax_sam.micro_batched(optax_sam.sam(RHO, mask=mask), "data")
    _, expected = on_one_device(references.sam_of_first_four, DEVICES)
    assert_close(PLACES["shard_map"](own_gradient(link), PARAMS, link.init(PARAMS))[0], expected)


def assert_convolutions_in_loops_and_branches_equal_one_device(place, **options):
    params, batch = cnn_params(), cnn_batch(size=32)
    link = optax_sam.switch_by(lambda step: step >= 0, [optax.identity(), optax_sam.sam(RHO)])
    estimator = optax_sam.gradient_estimator(cnn_loss, link, strategy="scan", **options)
    actual = PLACES[place](estimator.value_and_grad, params, estimator.init(params), batch=batch)
    assert_close(actual[:2], on_one_device(references.sam, 2 * DEVICES, cnn_loss, params, batch))


def test_convolutions_in_loops_and_branches_on_devices_equal_one_device():
    assert_convolutions_in_loops_and_branches_equal_one_device("shard_map", num_micro_batches=2, axis_name="data")


def test_convolutions_in_loops_and_branches_on_an_explicit_mesh_equal_one_device():
    assert_convolutions_in_loops_and_branches_equal_one_device("jit explicit", num_micro_batches=2, axis_name="data")


def test_several_axes_are_one():
    axes = ("host", "device")
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), axis_name=axes)
    link = optax_sam.msam(RHO, axes)

    def member(params, batch):
        point = jax.lax.pcast(params, axes, to="varying")
        grads = GRAD_FN(point, batch)
        chained, _ = link.update(grads, link.init(params), params, grad_fn=GRAD_FN, batch=batch)
        return function(params, batch), chained

    mapped = on_mesh(member, (PartitionSpec(), PartitionSpec(axes)), PartitionSpec(), host=2, device=4)
    loss, gradient = on_one_device(references.sam, DEVICES)
    assert_close(mapped(PARAMS, BATCH), ((loss, gradient), gradient))


def test_one_ascent_per_group_of_devices_is_an_average_in_the_loss():
    loss_fn = lambda params, batch: jax.lax.pmean(mlp_loss(params, batch), "device")  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(RHO), axis_name="host")
    specs = PartitionSpec(), PartitionSpec(("host", "device"))
    mapped = on_mesh(function, specs, PartitionSpec(), host=2, device=4)
    assert_close(mapped(PARAMS, BATCH), on_one_device(references.sam, 2))


# Programs around programs.


def test_pmap_inside_jit_equals_one_device():
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(RHO), axis_name="data")
    mapped = jax.jit(jax.pmap(function, axis_name="data", in_axes=(None, 0)))
    actual = jax.tree.map(lambda x: x[0], mapped(PARAMS, split(BATCH, DEVICES)))
    assert_close(actual, on_one_device(references.sam, DEVICES))


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
