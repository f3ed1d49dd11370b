"""Sharded params: the numbers of one device, norms over all shards, and shardings kept."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from benchmarks.communication import collectives
from tests.helpers import references
from tests.helpers.one_device import of_each_part, on_one_device
from tests.helpers.places import DEVICES, RHO, SINCE_JAX_0_10_2, on_mesh, together
from tests.helpers.problems import assert_close, training_step

WIDTH = 64
LINKS = {
    "sam": optax_sam.sam(RHO),
    "asam": optax_sam.asam(RHO),
    "masked": optax_sam.sam(RHO, mask={"first": True, "bias": False, "second": True}),
    "stable_sam": optax_sam.stable_sam(RHO),
    "late": optax_sam.late(optax_sam.stable_sam(RHO), 1),
    "two steps": optax_sam.sharpness_aware(optax_sam.normalized_ascent(RHO), steps=2),
}
ACTIVE = LINKS | {"late": optax_sam.late(optax_sam.stable_sam(RHO), 0)}


def make_params(width=WIDTH):
    first, second = jax.random.split(jax.random.key(0))
    return {
        "first": jax.random.normal(first, (3, width)) / 2,
        "bias": jnp.full(3, 0.1, jnp.float32),
        "second": jax.random.normal(second, (width, 2)) / width**0.5,
    }


BATCH = jax.random.normal(jax.random.key(1), (16, 3))


def loss_fn(params, x, out_sharding=None):
    hidden = jnp.tanh((x + params["bias"][None]) @ params["first"])
    return jnp.mean((jnp.dot(hidden, params["second"], out_sharding=out_sharding) - 1) ** 2)


EXPLICIT_LOSS = functools.partial(loss_fn, out_sharding=PartitionSpec(None, None))


def two_steps(links, params, batch, loss_fn=loss_fn):
    """By link, the params and the state after two steps of Adam behind it."""
    txs = {name: optax.chain(link, optax.adam(0.1)) for name, link in links.items()}
    step = jax.jit(lambda all, batch: {name: training_step(tx, loss_fn)(*all[name], batch) for name, tx in txs.items()})
    start = jax.jit(lambda params: {name: (params, tx.init(params)) for name, tx in txs.items()})(params)
    return step(step(start, batch), batch)


@functools.cache
def expected_steps():
    """The same on one device."""
    return two_steps(LINKS, make_params(), BATCH)


@functools.cache
def expected_gradients(num_micro_batches=1):
    """By link, the mean of its gradients of the micro-batches on one device."""

    def gradient(link, params):
        return of_each_part(link, loss_fn, num_micro_batches)(params, link.init(params), BATCH)[1]

    functions = {name: functools.partial(gradient, link) for name, link in ACTIVE.items()}
    return jax.jit(together(functions))(make_params())


def gradient_of(link, grad_fn):
    """What a link makes of the gradient at the params."""
    return lambda params: link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn)[0]


# Under jit, arrays are global.

SPECS = {
    "fsdp": {"first": PartitionSpec(None, "data"), "bias": PartitionSpec(), "second": PartitionSpec("data")},
    "tensor parallel": {
        "first": PartitionSpec(None, "model"),
        "bias": PartitionSpec(None),
        "second": PartitionSpec("model", None),
    },
}
SPEC = SPECS["tensor parallel"]


@pytest.mark.parametrize("kind", SPECS)
def test_jit_on_sharded_params_equals_one_device_and_keeps_shardings(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS[kind].items()}
    params = jax.device_put(make_params(), shardings)
    batch = jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec("data")))
    actual = two_steps({"late": LINKS["late"]}, params, batch)["late"]  # arrays are global, for every link the same
    assert_close(jax.device_get(actual), expected_steps()["late"])
    params, state = actual
    for tree in (params, optax.tree.get(state, "mu"), optax.tree.get(state, "nu")):
        for name, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), (name, leaf.sharding)


def test_explicit_mesh_with_sharded_params_equals_one_device():
    with jax.set_mesh(jax.make_mesh((DEVICES,), ("model",), axis_types=(AxisType.Explicit,))):
        params = jax.tree.map(jax.device_put, make_params(), SPEC)
        actual = two_steps(LINKS, params, jax.device_put(BATCH, PartitionSpec(None, None)), EXPLICIT_LOSS)
    for params, _ in actual.values():
        assert {name: leaf.sharding.spec for name, leaf in params.items()} == SPEC
    assert_close(jax.device_get(actual), expected_steps())


@pytest.mark.heavy
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda axis_type: axis_type.name)
def test_memory_of_a_device_is_that_of_its_shard(axis_type):
    """Replicating the params anywhere would show: they are all but everything here."""
    width = 1 << 16
    sharded_loss = EXPLICIT_LOSS if axis_type == AxisType.Explicit else loss_fn
    with jax.set_mesh(jax.make_mesh((DEVICES,), ("model",), axis_types=(axis_type,))):
        params = jax.tree.map(jax.device_put, make_params(width), SPEC)
        batch = jax.device_put(BATCH[:1], PartitionSpec(None, None))
        shard = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / DEVICES
        for link in LINKS.values():
            tx = optax.adam(0.1)
            estimator = optax_sam.gradient_estimator(sharded_loss, link)

            def step(state, batch, tx=tx, estimator=estimator):
                params, link_state, optimizer_state = state
                _, grads, link_state = estimator.value_and_grad(params, link_state, batch)
                updates, optimizer_state = tx.update(grads, optimizer_state, params)
                return optax.apply_updates(params, updates), link_state, optimizer_state

            state = params, estimator.init(params), tx.init(params)
            program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
            memory = program.memory_analysis()
            assert memory.argument_size_in_bytes < 3.1 * shard
            assert memory.output_size_in_bytes < 3.1 * shard
            # XLA copies what a branch reads: of two norms, of late in a switch.
            assert memory.temp_size_in_bytes < 5 * shard
            moved = sum(collective.num_bytes for collective in collectives(program.as_text(), branch=1))
            assert moved < 0.01 * shard, "params were gathered or reduced"


# Under shard_map and pmap, each member sees its shard.

SHARDED = {"first": True, "bias": False, "second": True}


def sharded_gradient(link, axis_name, average=None):
    """The link's gradient of the loss, for a shard of the hidden layer on each member of ``axis_name``."""

    def member(params, batch):
        def partial_loss(params, x):
            hidden = jnp.tanh((x + params["bias"][None]) @ params["first"])
            outputs = jax.lax.psum(hidden @ params["second"], axis_name)
            return jnp.mean((outputs - 1) ** 2)

        if average is not None:
            estimator = optax_sam.gradient_estimator(partial_loss, link, axis_name=average)
            return estimator.value_and_grad(params, estimator.init(params), batch)[1]
        grad_fn = jax.grad(partial_loss)
        return link.update(grad_fn(params, batch), link.init(params), params, grad_fn=grad_fn, batch=batch)[0]

    return member


def sharded_gradients(names, average=None, **axes):
    """By link, the gradient of the loss with params sharded over "model", and the batch over the axis to average."""
    members = {name: sharded_gradient(optax_sam.sharded(ACTIVE[name], "model"), "model", average) for name in names}
    in_specs, out_specs = (SPEC, PartitionSpec(average)), dict.fromkeys(names, SPEC)
    return on_mesh(together(members), in_specs, out_specs, **axes)(make_params(), BATCH)


def test_shard_map_with_sharded_params_equals_one_device():
    assert_close(sharded_gradients(ACTIVE, model=DEVICES), expected_gradients())


def test_links_with_a_state_over_shards_equal_one_device():
    """Two updates at the same params on two batches: what the second makes of the state of the first."""
    links = {
        "gsam": optax_sam.gsam(RHO, alpha=0.3),
        "friendly_sam": optax_sam.friendly_sam(RHO),
        "look_sam": optax_sam.look_sam(RHO, period=2),
        "ae_sam": optax_sam.ae_sam(RHO, threshold=1.0),
        "momentum_sam": optax_sam.momentum_sam(RHO),
    }

    def second_update(link, loss_fn, params, batch):
        grad_fn, state = jax.grad(loss_fn), link.init(params)
        for x in (batch, 2 * batch):
            outputs, state = link.update(grad_fn(params, x), state, params, grad_fn=grad_fn, batch=x)
        return outputs

    def partial_loss(params, x):
        hidden = jnp.tanh((x + params["bias"][None]) @ params["first"])
        return jnp.mean((jax.lax.psum(hidden @ params["second"], "model") - 1) ** 2)

    whole = {name: functools.partial(second_update, link, loss_fn) for name, link in links.items()}
    shards = {
        name: functools.partial(second_update, optax_sam.sharded(link, "model"), partial_loss)
        for name, link in links.items()
    }
    mapped = on_mesh(together(shards), (SPEC, PartitionSpec()), dict.fromkeys(links, SPEC), model=DEVICES)
    expected = jax.jit(together(whole))(make_params(), BATCH)
    assert_close(mapped(make_params(), BATCH), expected)
    clean = jax.grad(loss_fn)(make_params(), 2 * BATCH)
    norms = {name: optax.tree.norm(jax.tree.map(jnp.subtract, g, clean)) for name, g in expected.items()}
    assert min(norms.values()) > 1e-3, norms  # each does something


def test_msam_over_one_axis_with_params_sharded_over_another_equals_one_device():
    actual = sharded_gradients(("late", "masked"), average="data", data=2, model=4)
    assert_close(actual, {name: expected_gradients(2)[name] for name in actual})


def test_manual_axis_beside_an_automatic_one_equals_one_device_and_keeps_shardings():
    """mSAM over the devices of "data"; the params of each stay sharded over "model" by XLA."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    function = optax_sam.value_and_grad(loss_fn, LINKS["stable_sam"], axis_name="data")
    specs = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), axis_names={"data"})
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPEC.items()}
    params = jax.device_put(make_params(), shardings)
    _, actual = jax.jit(mapped)(params, jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec("data"))))
    assert_close(jax.device_get(actual), expected_gradients(2)["stable_sam"])
    for name, leaf in actual.items():
        assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), (name, leaf.sharding)


def test_fsdp_by_hand_equals_one_device():
    """Params sharded over the axis that holds the batch, gathered in the loss, which is averaged over it."""

    def gathered_loss(params, x):
        first = jax.lax.all_gather(params["first"], "data", axis=1, tiled=True)
        second = jax.lax.all_gather(params["second"], "data", axis=0, tiled=True)
        whole = {"first": first, "bias": params["bias"], "second": second}
        return jax.lax.pmean(loss_fn(whole, x), "data")

    def gradient(link, params, x):
        estimator = optax_sam.gradient_estimator(gathered_loss, optax_sam.sharded(link, "data"))
        return estimator.value_and_grad(params, estimator.init(params), x)[1]

    names, spec = ("late", "masked"), SPECS["fsdp"]
    members = together({name: functools.partial(gradient, ACTIVE[name]) for name in names})
    mapped = on_mesh(members, (spec, PartitionSpec("data")), dict.fromkeys(names, spec), data=DEVICES)
    assert_close(mapped(make_params(), BATCH), {name: expected_gradients()[name] for name in names})


@pytest.mark.parametrize("place", ["shard_map unchecked", "vmap"])
def test_norms_with_a_mask_where_nothing_is_known(place):
    """Quadratic loss, so that no gradient communicates: its gradient is the shard itself."""
    params = make_params()
    grad_fn = jax.grad(lambda params: sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(params)))
    expected = jax.jit(gradient_of(LINKS["stable_sam"], grad_fn))(params)
    member = gradient_of(optax_sam.sharded(LINKS["stable_sam"], "model", mask=SHARDED), grad_fn)
    if place == "vmap":
        axes = {"first": 1, "bias": None, "second": 0}
        stacked = {
            "first": params["first"].reshape(3, DEVICES, -1),
            "bias": params["bias"],
            "second": params["second"].reshape(DEVICES, -1, 2),
        }
        mapped = jax.vmap(member, in_axes=(axes,), out_axes=axes | {"bias": 0}, axis_name="model")
        actual = jax.jit(mapped)(stacked)
        actual = {
            "first": actual["first"].reshape(3, -1),
            "bias": actual["bias"][0],
            "second": actual["second"].reshape(-1, 2),
        }
    else:
        actual = on_mesh(member, (SPEC,), SPEC, check_vma=False, model=DEVICES)(params)
    assert_close(actual, expected)


@pytest.mark.parametrize("mask", [None, False])
def test_states_inside_a_switch_vary_as_the_params_do(mask):
    """Shards of the params where they are sharded; one for each member that has a network of its own."""
    climb = optax.chain(optax.ema(0.9, debias=False), optax_sam.normalized_ascent(RHO))
    link = optax_sam.sharded(optax_sam.late(optax_sam.sharpness_aware(climb), 0), "model", mask=mask)
    grad_fn = jax.grad(lambda params: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)))
    params, rest = {"own": jnp.arange(8.0), "rest": jnp.ones(16)}, None if mask is None else "model"
    spec = {"own": PartitionSpec("model"), "rest": PartitionSpec(rest)}

    def member(params):
        _, state = link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn)
        return state.link_states[0].ascent_state[0].ema

    actual = on_mesh(member, (spec,), spec, model=DEVICES)(params)
    gradients = 2 * params["own"], 2 * params["rest"] * (DEVICES if mask is None else 1)  # replicated: their sum
    assert_close(actual, dict(zip(spec, optax.tree.scale(0.1, gradients), strict=True)))


def test_shards_of_a_gradient_without_params():
    link = optax_sam.sharded(optax_sam.renormalized(optax.stateless(lambda g, _: jnp.ones_like(g))), "model", mask=True)
    update = lambda g: link.update(g, optax.EmptyState())[0]  # noqa: E731
    actual = jax.vmap(update, axis_name="model")(jnp.array([3.0, 4.0]))
    assert_close(actual, jnp.full(2, 12.5**0.5))


def test_axes_with_a_mask_each_are_declared_one_around_the_other():
    """A matrix sharded over two axes, and a vector over one of them."""
    params = {"matrix": jnp.arange(1.0, 33.0).reshape(4, 8), "vector": jnp.arange(1.0, 9.0)}
    grad_fn = jax.grad(lambda params: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)))
    inner = optax_sam.sharded(LINKS["stable_sam"], "x", mask={"matrix": True, "vector": False})
    link = optax_sam.sharded(inner, "y", mask=True)
    spec = {"matrix": PartitionSpec("x", "y"), "vector": PartitionSpec("y")}
    expected = jax.jit(gradient_of(LINKS["stable_sam"], grad_fn))(params)
    mapped = on_mesh(gradient_of(link, grad_fn), (spec,), spec, check_vma=False, x=2, y=4)
    assert_close(mapped(params), expected)


def test_axis_of_micro_batches_cannot_hold_shards_too():
    link = optax_sam.sharded(LINKS["sam"], ("data", "model"))
    member = sharded_gradient(link, "model", average="data")
    mapped = on_mesh(member, (SPEC, PartitionSpec("data")), SPEC, data=2, model=4)
    with pytest.raises(ValueError, match="An axis holds shards of the params or micro-batches, not both"):
        mapped(make_params(), BATCH)


def assert_micro_batches_with_sharded_params_equal_one_device(axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type, AxisType.Auto))
    function = optax_sam.value_and_grad(loss_fn, LINKS["stable_sam"], num_micro_batches=4)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPEC.items()}
    with jax.set_mesh(mesh):
        params = jax.device_put(make_params(), shardings)
        actual = jax.jit(function)(params, jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec("data"))))
    for name, leaf in actual[1].items():
        assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), (name, leaf.sharding)
    assert_close(jax.device_get(actual[1]), expected_gradients(4)["stable_sam"])


def test_micro_batches_with_sharded_params_under_jit_equal_one_device():
    assert_micro_batches_with_sharded_params_equal_one_device(AxisType.Auto)


def test_micro_batches_on_an_explicit_axis_with_params_sharded_by_xla_equal_one_device():
    assert_micro_batches_with_sharded_params_equal_one_device(AxisType.Explicit)


@SINCE_JAX_0_10_2
@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("model")], ids=["replicated", "sharded"])
def test_stacked_micro_batches_spread_over_an_explicit_mesh_equal_one_device(spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params, batch = jnp.linspace(-1.0, 1.0, 6), jnp.sin(jnp.arange(72.0)).reshape(4, 3, 6)
    loss_fn = lambda w, x: jnp.mean(jnp.sum((x - w[None]) ** 4, axis=-1))  # noqa: E731
    methods = {"sam": references.sam, "late": references.stable_sam}

    def gradient(link, params, batch):
        link = optax_sam.micro_batched(link)
        grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)
        return link.update(grads, link.init(params), params, grad_fn=jax.grad(loss_fn), batch=batch)[0]

    batch_sharding = NamedSharding(mesh, PartitionSpec("data", None, *spec))
    placed = jax.device_put(params, NamedSharding(mesh, spec)), jax.device_put(batch, batch_sharding)
    actual = jax.jit(together({name: functools.partial(gradient, ACTIVE[name]) for name in methods}))(*placed)
    for name, leaf in actual.items():
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), 1)
        expected = on_one_device(methods[name], 4, loss_fn, params, batch.reshape(12, 6))[1]
        assert_close(jax.device_get(leaf), expected)


def test_batch_of_which_some_leaves_are_not_spread_equals_one_device():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    loss_fn = lambda w, batch: jnp.mean(jnp.sum(batch["x"] * w[None], axis=-1) ** 2 * batch["weight"])  # noqa: E731
    params, batch = jnp.array([1.0, 2.0, 3.0]), {"x": BATCH, "weight": jnp.linspace(0.0, 1.0, 16)}
    function = optax_sam.value_and_grad(loss_fn, LINKS["stable_sam"], num_micro_batches=4)
    specs = {"x": PartitionSpec("data"), "weight": PartitionSpec()}
    placed = jax.device_put(batch, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
    with jax.set_mesh(mesh):
        actual = jax.jit(function)(params, placed)
    assert_close(jax.device_get(actual), on_one_device(references.stable_sam, 4, loss_fn, params, batch))


def test_network_of_its_own_on_each_member():
    grad_fn = jax.grad(lambda w: jnp.sum(w**4))
    member = gradient_of(optax_sam.sharded(LINKS["stable_sam"], "member", mask=False), grad_fn)
    stack = jnp.arange(1.0, DEVICES + 1)[:, None] * jnp.array([[1.0, 2.0]])
    spec = PartitionSpec("member")
    alone = jax.jit(gradient_of(LINKS["stable_sam"], grad_fn))
    actual = on_mesh(lambda w: member(w[0])[None], spec, spec, member=DEVICES)(stack)
    assert_close(actual, jnp.stack([alone(w) for w in stack]))


def test_shards_that_nobody_declared_are_refused():
    for link in (LINKS["sam"], LINKS["stable_sam"], optax_sam.renormalized(optax.identity())):
        mapped = on_mesh(sharded_gradient(link, "model"), (SPEC, PartitionSpec()), SPEC, model=DEVICES)
        with pytest.raises(ValueError, match=r"params vary over the mapped axis 'model'.*`sharded\(link, 'model'\)`"):
            mapped(make_params(), BATCH)


def test_unchecked_maps_must_be_told_which_leaves_are_sharded():
    member = sharded_gradient(optax_sam.sharded(LINKS["sam"], "model"), "model")
    mapped = on_mesh(member, (SPEC, PartitionSpec()), SPEC, check_vma=False, model=DEVICES)
    with pytest.raises(ValueError, match=r"sharded\(link, 'model'\) needs a `mask`"):
        mapped(make_params(), BATCH)
