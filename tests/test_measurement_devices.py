"""Measurement on devices and of sharded params: what is recorded is what happens on one device."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

import optax_sam
from optax_sam import measured, measurements
from tests.helpers.measuring import BATCH, LINKS, PARAMS, assert_measured, mean_of_what_happens, what_happens
from tests.helpers.places import DEVICES, MAPS, PLACES, every_map, on_mesh, own, together
from tests.helpers.problems import assert_close, mlp_loss


@every_map
def test_estimator_on_devices_records_what_happens_on_one(run):
    link, ascents = LINKS["stable_sam"], {"micro_batch": 2 * DEVICES, "device": DEVICES, "batch": 1}

    def state_after(ascent_per, params, batch):
        options = {"num_micro_batches": 2, "ascent_per": ascent_per, "axis_name": "data"}
        estimator = optax_sam.gradient_estimator(mlp_loss, measured(link), **options)
        return estimator.value_and_grad(params, estimator.init(params), batch)[2]

    states = run(together({ascent_per: functools.partial(state_after, ascent_per) for ascent_per in ascents}), PARAMS)
    for ascent_per, number in ascents.items():
        assert_measured(measurements(states[ascent_per]), mean_of_what_happens(link, number))


def assert_mesh_records_what_happens_on_one_device(place, **options):
    estimator = optax_sam.gradient_estimator(mlp_loss, measured(LINKS["sam"]), **options)
    _, _, state = PLACES[place](estimator.value_and_grad, PARAMS, estimator.init(PARAMS))
    assert_measured(measurements(state), mean_of_what_happens(LINKS["sam"], 2 * DEVICES))


def test_estimator_under_jit_records_what_happens_on_one_device():
    assert_mesh_records_what_happens_on_one_device("jit", num_micro_batches=2 * DEVICES)


def test_estimator_on_an_explicit_mesh_records_what_happens_on_one_device():
    assert_mesh_records_what_happens_on_one_device("jit explicit", num_micro_batches=2, axis_name="data")


@every_map
def test_msam_in_a_chain_on_devices_records_what_happens_on_one(run):
    plain, active = measured(optax.identity()), measured(LINKS["sam"])
    link = optax_sam.micro_batched(optax_sam.switch_at({0: plain, 1: active}), "data")

    def two_updates(params, state, batch):
        loss, grads = jax.value_and_grad(mlp_loss)(own(params), batch)
        extra_args = {"value": loss, "value_fn": mlp_loss, "batch": batch}
        body = lambda state, _: (link.update(grads, state, params, **extra_args)[1], None)  # noqa: E731
        return jax.lax.scan(body, state, length=2)[0]

    state = run(two_updates, PARAMS, link.init(PARAMS))
    assert_measured(measurements(state), mean_of_what_happens(LINKS["sam"], DEVICES))


@every_map
def test_synchronized_sam_in_a_chain_on_devices_records_what_happens_on_one(run):
    link = measured(LINKS["sam"])

    def value_and_grad_fn(params, batch):
        return jax.lax.pmean(jax.value_and_grad(mlp_loss)(own(params), batch), "data")

    def update(params, state, batch):
        loss, grads = value_and_grad_fn(params, batch)
        extra_args = {"value": loss, "value_and_grad_fn": value_and_grad_fn, "batch": batch}
        return link.update(grads, state, params, **extra_args)[1]

    assert_measured(measurements(run(update, PARAMS, link.init(PARAMS))), what_happens(LINKS["sam"]))


def test_losses_that_are_not_averaged_as_the_gradient_is_are_refused():
    link = measured(LINKS["sam"])
    grads = jax.jit(jax.grad(mlp_loss))(PARAMS, BATCH)

    def update(value_fn, extra_args, params, state, batch):
        value = jnp.float32(1.0) if value_fn else mlp_loss(params, batch)
        value_fn = value_fn or mlp_loss
        return link.update(grads, state, params, value=value, value_fn=value_fn, batch=batch, **extra_args)[1]

    both, alone = jax.value_and_grad(mlp_loss), lambda params, batch: grads
    for value_fn, extra_args, name in (
        (None, {}, "value"),
        (mlp_loss, {}, "what value_fn or value_and_grad_fn returns"),
        (mlp_loss, {"grad_fn": alone}, "what value_fn or value_and_grad_fn returns"),
        (None, {"value_and_grad_fn": both}, "value"),
        (mlp_loss, {"value_and_grad_fn": both}, "what value_fn or value_and_grad_fn returns"),
    ):
        message = f"^{name}: over the mapped axis 'data', the loss is a member's own and the gradient that of all"
        with pytest.raises(ValueError, match=message):
            MAPS["shard_map"](functools.partial(update, value_fn, extra_args), PARAMS, link.init(PARAMS))


SHARDED_PARAMS = {"first": jnp.arange(24.0).reshape(3, 8) / 24, "bias": jnp.full(3, 0.1, jnp.float32)}
SPEC = {"first": PartitionSpec(None, "model"), "bias": PartitionSpec()}
INPUTS = jax.random.normal(jax.random.key(1), (16, 3))


def sharded_loss(params, x, total=lambda x: x):
    return jnp.mean((total(jnp.sum(jnp.tanh((x + params["bias"][None]) @ params["first"]), 1)) - 1) ** 2)


def test_sharded_params_record_what_happens_on_one_device():
    partial_loss = functools.partial(sharded_loss, total=lambda x: jax.lax.psum(x, "model"))
    switched = optax_sam.switch_at({0: measured(optax.identity()), 1: measured(LINKS["stable_sam"])})
    links = {"plain": measured(optax.identity()), "sam": measured(LINKS["sam"]), "stable_sam": switched}

    def two_updates(link, params, x):
        estimator = optax_sam.gradient_estimator(partial_loss, optax_sam.sharded(link, "model"))
        body = lambda state, _: (estimator.value_and_grad(params, state, x)[2], None)  # noqa: E731
        return jax.lax.scan(body, estimator.init(params), length=2)[0]

    update_all = together({name: functools.partial(two_updates, link) for name, link in links.items()})
    mapped = on_mesh(update_all, (SPEC, PartitionSpec()), PartitionSpec(), model=DEVICES)
    states = mapped(SHARDED_PARAMS, INPUTS)
    for name, state in states.items():
        assert_measured(measurements(state), what_happens(LINKS[name], SHARDED_PARAMS, INPUTS, sharded_loss))


def test_norms_with_a_mask_where_nothing_is_known():
    loss_fn = lambda params, _: sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(params))  # noqa: E731
    link = optax_sam.sharded(measured(LINKS["sam"]), "model", mask={"first": True, "bias": False})

    def member(params):
        loss, grads = jax.value_and_grad(loss_fn)(params, None)
        value_fn = functools.partial(loss_fn, _=None)
        return measurements(link.update(grads, link.init(params), params, value=loss, value_fn=value_fn)[1])

    actual = on_mesh(member, (SPEC,), PartitionSpec(), check_vma=False, model=DEVICES)(SHARDED_PARAMS)
    expected = what_happens(LINKS["sam"], SHARDED_PARAMS, None, loss_fn)
    for name in ("clean_norm", "perturbation_norm", "sam_norm", "cosine"):
        assert_close(getattr(actual, name), jnp.float32(getattr(expected, name)))


def test_shards_that_nobody_declared_are_refused():
    estimator = optax_sam.gradient_estimator(
        functools.partial(sharded_loss, total=lambda x: jax.lax.psum(x, "model")), measured(optax.identity())
    )
    update = lambda params, x: estimator.value_and_grad(params, estimator.init(params), x)[2]  # noqa: E731
    mapped = on_mesh(update, (SPEC, PartitionSpec()), PartitionSpec(), model=DEVICES)
    with pytest.raises(ValueError, match=r"params vary over the mapped axis 'model'.*`sharded\(link, 'model'\)`"):
        mapped(SHARDED_PARAMS, INPUTS)
