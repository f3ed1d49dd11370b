"""The contract with JAX and Optax: states, containers, strict modes and chains, over every recipe and combinator."""

import dataclasses
import inspect
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optax_sam
from tests.helpers.problems import (
    assert_close,
    assert_identical,
    clean_gradient,
    mlp_batch,
    mlp_loss,
    mlp_params,
    training_step,
)
from tests.helpers.registry import (
    COMBINATORS,
    MEMBERS,
    MICRO_BATCHES,
    RHO,
    SWITCH,
    batch_for,
    every_member,
    gradients_by_step,
    optimizer,
    plain_gradients_by_step,
)

every_combinator = pytest.mark.parametrize("combine", COMBINATORS.values(), ids=COMBINATORS)
SCHEDULE = optax.linear_schedule(0.1, 0.2, 3)


def kinds(tree):
    """Shapes, dtypes, weak types and shardings."""
    return jax.tree.map(lambda x: (jax.typeof(x), x.weak_type), tree)


def update(link, state, params, batch, loss_fn, stacked=False):
    grads = clean_gradient(loss_fn, params, batch, stacked)
    return link.update(grads, state, params, grad_fn=jax.grad(loss_fn), batch=batch)


def active_output(link, params, batch, loss_fn, stacked=False):
    """What the link returns, without compilation, in the first update in which every member is active."""
    state = link.init(params)
    with jax.disable_jit():
        for _ in range(SWITCH + 2):
            outputs, state = update(link, state, params, batch, loss_fn, stacked)
    return outputs


def test_registry_has_every_public_link():
    factories = [
        name
        for name in optax_sam.__all__
        if callable(getattr(optax_sam, name))
        and "GradientTransformationExtraArgs" in str(inspect.signature(getattr(optax_sam, name)).return_annotation)
    ]
    made = inspect.getsource(inspect.getmodule(type(MEMBERS[0])))
    elsewhere = {"unnormalized_ascent", "adaptive_ascent"}  # inside of usam and asam
    assert {name for name in factories if f"optax_sam.{name}" not in made} == elsewhere
    assert len(factories) >= 10


@every_member
def test_state_is_stable_in_loops_branches_and_shapes(member):
    tx = optimizer(member.make(SCHEDULE))
    step, batch, params = training_step(tx, stacked=member.stacked), batch_for(member), mlp_params()
    state = tx.init(params)
    assert kinds(jax.eval_shape(tx.init, params)) == kinds(state)

    @jax.jit
    def run(params, state):
        carry, _ = jax.lax.scan(lambda carry, _: (step(*carry, batch), None), (params, state), length=2)
        return jax.lax.cond(True, lambda carry: step(*carry, batch), lambda carry: carry, carry)

    after, looped = run(params, state)
    assert kinds(looped) == kinds(state)
    donating = jax.jit(step, donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.array, (params, state))
    for _ in range(3):
        params, state = donating(params, state, batch)
    assert_close((params, state), (after, looped))


@every_member
def test_state_and_params_keep_their_shardings(member):
    mesh = jax.make_mesh((4,), ("model",), devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    params = jax.device_put({"a": jnp.arange(8.0) + 1, "b": jnp.ones((4, 2))}, sharding)
    batch = jnp.ones((MICRO_BATCHES, 2)) if member.stacked else jnp.ones(2)
    tx = optimizer(member.make(SCHEDULE))

    def loss_fn(params, batch):
        return jnp.mean(batch) * sum(jnp.sum(jnp.cos(w)) for w in jax.tree.leaves(params))

    step = jax.jit(training_step(tx, loss_fn, member.stacked))
    carry = step(params, tx.init(params), batch)  # puts counters on the mesh too
    after = step(*carry, batch)
    assert kinds(after) == kinds(carry)
    assert kinds(after[0]) == kinds(params)


@every_member
def test_optax_finds_the_leaves_that_are_like_params(member):
    tx = optimizer(member.make(SCHEDULE))
    state = tx.init(mlp_params())
    shifted = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    assert_identical(shifted, jax.tree.map(lambda leaf: leaf + 1 if is_float(leaf) else leaf, state))


@every_member
def test_state_survives_orbax_and_flax_bit_for_bit(member, tmp_path):
    tx = optimizer(member.make(SCHEDULE))
    step, batch = jax.jit(training_step(tx, stacked=member.stacked)), batch_for(member)
    fresh = carry = mlp_params(), tx.init(mlp_params())
    for _ in range(2):
        carry = step(*carry, batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh))
    from_bytes = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(carry))
    expected = step(*carry, batch)
    assert_identical(step(*restored, batch), expected)
    assert_identical(step(*from_bytes, batch), expected)


@every_member
def test_rho_can_be_an_injected_hyperparameter(member):
    injected = member._replace(make=lambda rho: optax.inject_hyperparams(member.make)(rho=rho))
    assert_close(gradients_by_step(injected, RHO), plain_gradients_by_step(member))


@every_member
def test_any_place_in_a_chain(member):
    batch, params = batch_for(member), mlp_params()
    link, rest = member.make(RHO), [optax.clip_by_global_norm(1.0), optax.sgd(0.1)]
    nested = optax.chain(optax.chain(optax.identity(), link), optax.chain(*rest))
    named = optax.named_chain(("sam", link), ("clip", rest[0]), ("sgd", rest[1]))
    assert_identical(*(active_output(tx, params, batch, mlp_loss, member.stacked) for tx in (nested, named)))


@every_combinator
def test_extra_arguments_reach_what_is_inside(combine):
    seen = {}

    def note(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    probe = optax.GradientTransformationExtraArgs(lambda params: {"inner": jnp.ones([])}, note)
    link, params = combine(probe), jnp.ones((2, 3))
    state = link.init(params)
    assert "inner" in str(state)
    stacked = "micro" in link.update.__qualname__
    updates, batch = (jnp.ones((4, 2, 3)), jnp.ones((4, 1))) if stacked else (jnp.ones((2, 3)), jnp.ones(1))
    loss_fn = lambda params, batch: jnp.sum(params) * jnp.mean(batch)  # noqa: E731
    extra_args = {"value": jnp.float32(6.0), "value_fn": loss_fn, "batch": batch}
    link.update(updates, state, params, unknown=7, grad_fn=jax.grad(loss_fn), **extra_args)
    assert seen["unknown"] == 7


@pytest.mark.parametrize(
    "member",
    [m for m in MEMBERS if "momentum" not in m.name],
    ids=lambda m: m.name,  # optax.ema itself promotes
)
def test_strict_modes_are_enough(member):
    params, batch, link = mlp_params(), batch_for(member), member.make(jnp.float32(RHO))

    @jax.jit
    def run(params, batch):
        state = link.init(params)
        for _ in range(SWITCH + 1):
            outputs, state = update(link, state, params, batch, mlp_loss, member.stacked)
        return outputs

    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.enable_checks(True),
        jax.check_tracer_leaks(True),
    ):
        run(params, batch)


class Layers(NamedTuple):
    a: Any
    b: Any
    c: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    a: Any
    b: Any
    c: Any


class Module(eqx.Module):
    a: Any
    b: Any
    c: Any
    nothing: None = None
    activation: str = eqx.field(default="tanh", static=True)


class Network(nnx.Module):
    def __init__(self, a, b, c):
        self.a, self.b, self.c = map(nnx.Param, (a, b, c))


# From the three arrays of a network to containers that hold them in this order.
CONTAINERS = {
    "dict": lambda *arrays: dict(zip("abc", arrays, strict=True)),
    "list": lambda *arrays: list(arrays),
    "tuple": lambda *arrays: arrays,
    "nested, with None": lambda a, b, c: ([a, None], {"b": (b, {}), "c": c}),
    "NamedTuple": Layers,
    "dataclass": Record,
    "FrozenDict": lambda *arrays: flax.core.freeze(dict(zip("abc", arrays, strict=True))),
    "NNX State": lambda *arrays: nnx.state(Network(*arrays)),
    "Equinox module": Module,
}


def in_container_loss(params, batch):
    kernel, bias, output = jax.tree.leaves(params)
    return mlp_loss({"hidden": {"kernel": kernel, "bias": bias}, "output": output}, batch)


@every_member
def test_containers_make_no_difference_and_are_kept(member):
    arrays = [mlp_params()["hidden"]["kernel"], mlp_params()["hidden"]["bias"], mlp_params()["output"]]
    batch, link = batch_for(member), member.make(RHO)
    expected = active_output(link, CONTAINERS["dict"](*arrays), batch, in_container_loss, member.stacked)
    for pack in CONTAINERS.values():
        params = pack(*arrays)
        outputs = active_output(link, params, batch, in_container_loss, member.stacked)
        assert jax.tree.structure(outputs) == jax.tree.structure(params)
        assert_identical(jax.tree.leaves(outputs), jax.tree.leaves(expected))


@pytest.mark.parametrize("pack", CONTAINERS.values(), ids=CONTAINERS)
def test_the_estimator_takes_any_container(pack):
    arrays = [mlp_params()["hidden"]["kernel"], mlp_params()["hidden"]["bias"], mlp_params()["output"]]
    value_and_grad = optax_sam.value_and_grad(in_container_loss, optax_sam.sam(RHO), num_micro_batches=MICRO_BATCHES)
    params = pack(*arrays)
    with jax.disable_jit():
        _, expected = value_and_grad(arrays, mlp_batch())
        _, grads = value_and_grad(params, mlp_batch())
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(expected))


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.name != "sam-masked"], ids=lambda m: m.name)
def test_a_single_array_is_a_tree(member):
    tree = {"a": jnp.arange(6.0).reshape(2, 3) / 6, "b": jnp.ones(2)}
    flat = jnp.concatenate([tree["a"].ravel(), tree["b"]])
    batch = jnp.linspace(1.0, 2.0, 2 * MICRO_BATCHES).reshape((MICRO_BATCHES, 2) if member.stacked else (-1,))

    def loss_fn(params, batch):
        return jnp.mean(batch) * jnp.sum(jnp.sin(params) ** 2)

    def tree_loss(params, batch):
        return loss_fn(jnp.concatenate([params["a"].ravel(), params["b"]]), batch)

    link = member.make(RHO)
    expected = active_output(link, tree, batch, tree_loss, member.stacked)
    actual = active_output(link, flat, batch, loss_fn, member.stacked)
    assert_close(actual, jnp.concatenate([expected["a"].ravel(), expected["b"]]))


@every_member
def test_empty_trees_pass(member):
    link = member.make(RHO)
    outputs, _ = link.update({}, link.init({}), {}, grad_fn=lambda p, _: p, batch=jnp.zeros(2))
    assert outputs == {}
