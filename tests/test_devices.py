"""Mapped axes: pmap, shard_map and vmap give the numbers of one device on the concatenated batch."""

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

DEVICES = 4
PARAMS, BATCH = mlp_params(), mlp_batch(size=16)
GRAD_FN = jax.grad(mlp_loss)
LINKS = {
    "sam": optax_sam.sam(0.2),
    "masked": optax_sam.sam(0.2, mask={"hidden": True, "output": False}),
    "asam": optax_sam.asam(0.5),
    "stable_sam": optax_sam.stable_sam(0.2),
    "two steps": optax_sam.sharpness_aware(optax_sam.normalized_ascent(0.1), steps=2),
    "late": optax_sam.switch_by(lambda step: step >= 0, [optax.identity(), optax_sam.sam(0.2)]),
}


def with_pmap(function, *replicated):
    out = jax.pmap(function, axis_name="data", in_axes=(*[None] * len(replicated), 0))(
        *replicated, split(BATCH, DEVICES)
    )
    return jax.tree.map(lambda x: x[0], out)


def with_vmap(function, *replicated):
    out = jax.vmap(function, axis_name="data", in_axes=(*[None] * len(replicated), 0))(
        *replicated, split(BATCH, DEVICES)
    )
    return jax.tree.map(lambda x: x[0], out)


def with_shard_map(check_vma, axis_type=AxisType.Auto):
    def run(function, *replicated):
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
        data, nothing = PartitionSpec("data"), PartitionSpec()
        specs = (*[nothing] * len(replicated), data)
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=nothing, check_vma=check_vma)
        with jax.set_mesh(mesh):
            return jax.jit(mapped)(*replicated, jax.device_put(BATCH, NamedSharding(mesh, data)))

    return run


MAPS = {
    "pmap": with_pmap,
    "vmap": with_vmap,
    "shard_map": with_shard_map(check_vma=True),
    "shard_map unchecked": with_shard_map(check_vma=False),
    "shard_map explicit": with_shard_map(check_vma=True, axis_type=AxisType.Explicit),
}
every_map = pytest.mark.parametrize("run", MAPS.values(), ids=MAPS)
every_link = pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
DISTINCT = ["sam", "masked", "late"]
every_distinct_link = pytest.mark.parametrize("link", [LINKS[name] for name in DISTINCT], ids=DISTINCT)


def reference(link, num_micro_batches):
    """Loss and mSAM gradient of the whole batch on one device."""
    micro_batches = split(BATCH, num_micro_batches)
    micro_batched = optax_sam.micro_batched(link)
    grads = jax.vmap(GRAD_FN, in_axes=(None, 0))(PARAMS, micro_batches)
    mean, _ = micro_batched.update(grads, link.init(PARAMS), PARAMS, grad_fn=GRAD_FN, batch=micro_batches)
    return mlp_loss(PARAMS, BATCH), mean


@every_map
@every_distinct_link
@pytest.mark.parametrize(
    ("ascent_per", "num_micro_batches", "ascents"),
    [("micro_batch", 1, 4), ("micro_batch", 2, 8), ("device", 2, 4), ("batch", 1, 1), ("batch", 2, 1)],
)
def test_estimator_equals_one_device(run, link, ascent_per, num_micro_batches, ascents):
    estimator = optax_sam.gradient_estimator(
        mlp_loss, link, num_micro_batches=num_micro_batches, ascent_per=ascent_per, axis_name="data", strategy="scan"
    )
    loss, grads, state = run(estimator.value_and_grad, PARAMS, estimator.init(PARAMS))
    assert_close((loss, grads), reference(link, ascents))
    assert jax.tree.structure(state) == jax.tree.structure(estimator.init(PARAMS))


@every_link
@pytest.mark.parametrize("ascent_per", ["micro_batch", "device"])
def test_every_link_equals_one_device(link, ascent_per):
    function = optax_sam.gradient_estimator(mlp_loss, link, ascent_per=ascent_per, axis_name="data").value_and_grad
    loss, grads, _ = MAPS["shard_map"](function, PARAMS, link.init(PARAMS))
    assert_close((loss, grads), reference(link, DEVICES))


@every_map
@pytest.mark.parametrize("strategy", ["vmap", "unroll"])
def test_other_strategies_equal_one_device(run, strategy):
    function = optax_sam.value_and_grad(
        mlp_loss, LINKS["sam"], num_micro_batches=2, axis_name="data", strategy=strategy
    )
    assert_close(run(function, PARAMS), reference(LINKS["sam"], 8))


@every_map
@every_distinct_link
def test_chain_of_unsummed_gradients_equals_one_device(run, link):
    micro_batched = optax_sam.micro_batched(link, axis_name="data")

    def member(params, batch):
        local = params
        if "data" in jax.typeof(jax.lax.axis_index("data")).mat.varying:
            local = jax.lax.pcast(params, "data", to="varying")
        grads = GRAD_FN(local, batch)
        return micro_batched.update(grads, link.init(params), params, grad_fn=GRAD_FN, batch=batch)[0]

    assert_close(run(member, PARAMS), reference(link, DEVICES)[1])


def test_gradient_that_shard_map_already_summed_is_refused():
    link = optax_sam.msam(0.2, axis_name="data")

    def member(params, batch):
        return link.update(GRAD_FN(params, batch), link.init(params), params, grad_fn=GRAD_FN, batch=batch)[0]

    with pytest.raises(ValueError, match=r"does not vary over 'data'.*pcast\(params, 'data', to='varying'\)"):
        MAPS["shard_map"](member, PARAMS)


def test_estimator_that_was_not_told_the_axis_refuses_the_sum():
    function = optax_sam.value_and_grad(mlp_loss, LINKS["sam"])
    with pytest.raises(ValueError, match=r"loss varies over the mapped axis 'data'.*Pass axis_name='data'"):
        MAPS["shard_map"](function, PARAMS)


def test_loss_that_is_averaged_over_devices_needs_no_axis_name():
    function = optax_sam.value_and_grad(lambda p, b: jax.lax.pmean(mlp_loss(p, b), "data"), LINKS["sam"])
    assert_close(MAPS["shard_map"](function, PARAMS), reference(LINKS["sam"], 1))


@every_map
def test_float_states_are_averaged_over_devices_and_counters_shared(run):
    ascent = optax.chain(optax.ema(0.5, debias=False), optax_sam.normalized_ascent(optax.constant_schedule(0.1)))
    estimator = optax_sam.gradient_estimator(mlp_loss, optax_sam.sharpness_aware(ascent), axis_name="data")
    _, _, state = run(estimator.value_and_grad, PARAMS, estimator.init(PARAMS))
    ema, schedule = state.ascent_state
    assert int(schedule.ascent_step) == 1
    assert_close(ema.ema, jax.tree.map(lambda g: g / 2, GRAD_FN(PARAMS, BATCH)))


@every_map
def test_late_chain_with_a_float_state(run):
    momentum = optax_sam.sharpness_aware(optax.chain(optax.ema(0.9), optax_sam.normalized_ascent(0.2)))
    link = optax_sam.micro_batched(optax_sam.late(momentum, 1), axis_name="data")

    def member(params, state, batch):
        local = params
        if "data" in jax.typeof(jax.lax.axis_index("data")).mat.varying:
            local = jax.lax.pcast(params, "data", to="varying")
        return link.update(GRAD_FN(local, batch), state, params, grad_fn=GRAD_FN, batch=batch)

    first, state = run(member, PARAMS, link.init(PARAMS))
    second, _ = run(member, PARAMS, state)
    assert_close(first, GRAD_FN(PARAMS, BATCH))
    assert_close(second, reference(LINKS["sam"], DEVICES)[1])


def test_convolutions_in_loops_and_branches_equal_one_device():
    link, params, batch = LINKS["late"], cnn_params(), cnn_batch(size=16)
    options = {"num_micro_batches": 2, "strategy": "scan", "axis_name": "data"}
    sharded = optax_sam.gradient_estimator(cnn_loss, link, **options)
    single = optax_sam.gradient_estimator(cnn_loss, LINKS["sam"], num_micro_batches=8, strategy="unroll")
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec(), PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(sharded.value_and_grad, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    actual = jax.jit(mapped)(params, sharded.init(params), batch)[:2]
    assert_close(actual, jax.jit(single.value_and_grad)(params, single.init(params), batch)[:2])


def test_key_on_the_only_device_is_unchanged():
    loss_fn = lambda w, batch, key: w * jnp.sum(batch) * jax.random.uniform(key)  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax.identity(), axis_name="data")
    arguments = jnp.ones([]), jnp.ones(4), jax.random.key(3)
    alone = jax.vmap(function, in_axes=(None, 0, None), axis_name="data")(arguments[0], jnp.ones((1, 4)), arguments[2])
    assert_close(jax.tree.map(lambda x: x[0], alone), jax.value_and_grad(loss_fn)(*arguments))


@every_map
@pytest.mark.parametrize("ascent_per", ["micro_batch", "batch"])
def test_late_link_with_a_float_state(run, ascent_per):
    ascent = optax.chain(optax.ema(0.5, debias=False), optax_sam.normalized_ascent(0.1))
    link = optax_sam.late(optax_sam.sharpness_aware(ascent), 1)
    estimator = optax_sam.gradient_estimator(mlp_loss, link, ascent_per=ascent_per, axis_name="data")
    _, grads, state = run(estimator.value_and_grad, PARAMS, estimator.init(PARAMS))
    assert_close(grads, GRAD_FN(PARAMS, BATCH))
    _, _, state = run(estimator.value_and_grad, PARAMS, state)
    assert_close(state.link_states[1].ascent_state[0].ema, jax.tree.map(lambda g: g / 2, GRAD_FN(PARAMS, BATCH)))


@every_map
def test_devices_draw_different_random_numbers(run):
    loss_fn = lambda w, batch, key: (jnp.sum(w**2), jax.random.uniform(key))  # noqa: E731
    function = optax_sam.value_and_grad(
        loss_fn, LINKS["sam"], has_aux=True, num_micro_batches=2, axis_name="data", strategy="unroll"
    )
    key = jax.random.key(0)
    (_, mean), _ = run(lambda params, batch: function(params, batch, key), jnp.ones(2))
    draws = [float(jax.random.uniform(jax.random.fold_in(key, index))) for index in range(2 * DEVICES)]
    np.testing.assert_allclose(float(mean), np.mean(draws), rtol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda axis_type: axis_type.name)
@pytest.mark.parametrize(
    ("link", "options"),
    [
        (LINKS["sam"], {}),
        (LINKS["stable_sam"], {}),
        (LINKS["late"], {}),
        (LINKS["sam"], {"num_micro_batches": 2, "strategy": "vmap"}),
        (LINKS["sam"], {"num_micro_batches": 2, "strategy": "scan"}),
        (LINKS["sam"], {"num_micro_batches": 2, "strategy": "unroll", "ascent_per": "batch"}),
    ],
    ids=["sam", "stable_sam", "late", "msam-vmap", "msam-scan", "accumulated"],
)
def test_jit_on_sharded_arrays_equals_one_device(axis_type, link, options):
    """No mapped axis: one global batch, global micro-batches, and XLA does the communication."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
    loss_fn = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)  # noqa: E731
    x_key, w_key = jax.random.split(jax.random.key(0))
    w, x = jax.random.normal(w_key, (3,)), jax.random.normal(x_key, (16, 3))
    estimator = optax_sam.gradient_estimator(loss_fn, link, **options)
    expected = jax.jit(estimator.value_and_grad)(w, estimator.init(w), x)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        replicated = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
        actual = jax.jit(estimator.value_and_grad)(replicated, estimator.init(replicated), sharded)
    assert_close(jax.device_get(actual), jax.device_get(expected))


def test_one_all_reduce_of_the_params_per_step():
    def all_reduces(ascent_per):
        function = optax_sam.value_and_grad(mlp_loss, LINKS["sam"], axis_name="data", ascent_per=ascent_per)
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
        specs = PartitionSpec(), PartitionSpec("data")
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
        program = jax.jit(mapped).lower(PARAMS, BATCH).as_text()
        return program.count("stablehlo.all_reduce")

    leaves = len(jax.tree.leaves(PARAMS)) + 1
    assert all_reduces("micro_batch") == leaves
    assert all_reduces("batch") == 2 * leaves - 1


def test_switch_state_is_the_same_on_all_devices():
    estimator = optax_sam.gradient_estimator(mlp_loss, optax_sam.late(LINKS["sam"], 1), axis_name="data")
    state = estimator.init(PARAMS)
    _, first, state = MAPS["shard_map"](estimator.value_and_grad, PARAMS, state)
    _, second, state = MAPS["shard_map"](estimator.value_and_grad, PARAMS, state)
    assert_close(first, GRAD_FN(PARAMS, BATCH))
    assert_close(second, reference(LINKS["sam"], DEVICES)[1])
    assert_identical(state.switch_step, jnp.int32(2))
