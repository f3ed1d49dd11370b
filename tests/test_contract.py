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
    STEPS,
    batch_for,
    every_combination,
    every_member,
    gradients_by_step,
    members,
    optimizer,
    plain_gradients_by_step,
)

every_combinator = pytest.mark.parametrize("combine", COMBINATORS.values(), ids=COMBINATORS)
SCHEDULE = optax.linear_schedule(0.1, 0.2, 3)


def kinds(tree):
    """Shapes, dtypes, weak types and shardings."""
    return jax.tree.map(lambda x: (jax.typeof(x), x.weak_type), tree)


def first_update(tx, stacked, loss_fn=mlp_loss):
    """From params and batch to what tx makes of their gradient, and its state."""

    def update(params, batch):
        state, grads = tx.init(params), clean_gradient(loss_fn, params, batch, stacked)
        return tx.update(grads, state, params, grad_fn=jax.grad(loss_fn), batch=batch)

    return update


def program(function, params, batch):
    """The text of the program from the leaves of the params to those that the function returns, first a like tree."""
    structure = jax.tree.structure(params)

    def from_leaves(leaves, batch):
        outputs, others = function(jax.tree.unflatten(structure, leaves), batch)
        assert jax.tree.structure(outputs) == structure
        return jax.tree.leaves((outputs, others))

    return str(jax.make_jaxpr(from_leaves)(jax.tree.leaves(params), batch))


def test_registry_has_every_public_link():
    factories = [
        name
        for name in optax_sam.__all__
        if callable(getattr(optax_sam, name))
        and "GradientTransformationExtraArgs" in str(inspect.signature(getattr(optax_sam, name)).return_annotation)
    ]
    made = inspect.getsource(inspect.getmodule(type(MEMBERS[0])))
    elsewhere = {"unnormalized_ascent", "adaptive_ascent", "random_direction"}  # inside of usam, asam and random_sam
    assert {name for name in factories if f"optax_sam.{name}" not in made} == elsewhere
    assert len(factories) >= 10


def in_a_loop_and_a_branch(step, carry, batch):
    """Three steps in one loop, each in a branch."""

    def branch(carry, _):
        return jax.lax.cond(True, lambda carry: step(*carry, batch), lambda carry: carry, carry), None

    return jax.lax.scan(branch, carry, length=3)[0]


@every_member
def test_state_keeps_its_kind_in_init_loops_and_branches(member):
    tx, params = optimizer(member.make(SCHEDULE)), mlp_params()
    step, state = training_step(tx, stacked=member.stacked), tx.init(params)
    assert kinds(jax.eval_shape(tx.init, params)) == kinds(state)
    looped = jax.eval_shape(lambda *args: in_a_loop_and_a_branch(step, *args), (params, state), batch_for(member))
    assert kinds(looped) == kinds((params, state))


@every_combination
def test_loops_and_donated_buffers_make_no_difference(member):
    tx = optimizer(member.make(SCHEDULE))
    step, batch = training_step(tx, stacked=member.stacked), batch_for(member)
    carry = mlp_params(), tx.init(mlp_params())
    looped = jax.jit(lambda *args: in_a_loop_and_a_branch(step, *args))(carry, batch)
    donating = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        carry = donating(*carry, batch)
    assert_close(carry, looped)


@every_combination
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
    is_like = lambda leaf: leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    assert_identical(shifted, jax.tree.map(lambda leaf: leaf + 1 if is_like(leaf) else leaf, state))


@members("sam-masked", "late-momentum-ascent", "switch_at", "ae_sam")  # hold every kind of state
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


@every_combination
def test_rho_can_be_an_injected_hyperparameter(member):
    injected = member._replace(make=lambda rho: optax.inject_hyperparams(member.make)(rho=rho))
    assert_close(gradients_by_step(injected, RHO), plain_gradients_by_step(member))


@every_member
def test_any_place_in_a_chain(member):
    link, clip, sgd = member.make(RHO), optax.clip_by_global_norm(1.0), optax.sgd(0.1)

    def update(updates, states, params, **extra_args):
        updates, first = link.update(updates, states[0], params, **extra_args)
        updates, second = clip.update(updates, states[1], params)
        updates, third = sgd.update(updates, states[2], params)
        return updates, (first, second, third)

    by_hand = optax.GradientTransformationExtraArgs(lambda w: (link.init(w), clip.init(w), sgd.init(w)), update)
    nested = optax.chain(optax.chain(optax.identity(), link), optax.chain(clip, sgd))
    named = optax.named_chain(("sam", link), ("clip", clip), ("sgd", sgd))
    updates = (first_update(tx, member.stacked) for tx in (by_hand, nested, named))
    expected, *chained = (program(update, mlp_params(), batch_for(member)) for update in updates)
    assert chained == [expected, expected]


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


@members("sam-masked", "multi-step", "stable_sam-truncated", "renormalized-asam", "late-msam", "switch_at")
def test_strict_modes_are_enough(member):
    rho, params, batch = jnp.float32(RHO), mlp_params(), batch_for(member)
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.enable_checks(True),
    ):
        gradients_by_step(member, rho, params=params, batch=batch)
    with jax.check_tracer_leaks(True):
        program(first_update(member.make(rho), member.stacked), params, batch)


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


ARRAYS = [mlp_params()["hidden"]["kernel"], mlp_params()["hidden"]["bias"], mlp_params()["output"]]
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


ARRAYS = [mlp_params()["hidden"]["kernel"], mlp_params()["hidden"]["bias"], mlp_params()["output"]]


@members("sam-masked", "asam", "multi-step", "late-msam", "late-momentum-ascent", "switch_at")
def test_containers_make_no_difference_and_are_kept(member):
    update = first_update(member.make(RHO), member.stacked, in_container_loss)
    expected = program(update, ARRAYS, batch_for(member))
    for pack in CONTAINERS.values():
        assert program(update, pack(*ARRAYS), batch_for(member)) == expected


@pytest.mark.parametrize("pack", CONTAINERS.values(), ids=CONTAINERS)
def test_the_estimator_takes_any_container(pack):
    value_and_grad = optax_sam.value_and_grad(in_container_loss, optax_sam.sam(RHO), num_micro_batches=MICRO_BATCHES)
    estimate = lambda params, batch: value_and_grad(params, batch)[::-1]  # noqa: E731
    assert program(estimate, pack(*ARRAYS), mlp_batch()) == program(estimate, ARRAYS, mlp_batch())


@members("asam", "multi-step", "momentum-ascent", "micro_batched-stable", "switch_at")
def test_a_single_array_is_a_tree(member):
    tree = {"a": jnp.arange(6.0).reshape(2, 3) / 6, "b": jnp.ones(2)}
    flat = jnp.concatenate([tree["a"].ravel(), tree["b"]])
    batch = jnp.linspace(1.0, 2.0, 2 * MICRO_BATCHES).reshape((MICRO_BATCHES, 2) if member.stacked else (-1,))

    def loss_fn(params, batch):
        return jnp.mean(batch) * jnp.sum(jnp.sin(params) ** 2)

    def tree_loss(params, batch):
        return loss_fn(jnp.concatenate([params["a"].ravel(), params["b"]]), batch)

    expected = gradients_by_step(member, RHO, tree_loss, tree, batch)
    expected = jnp.concatenate([expected["a"].reshape(STEPS, -1), expected["b"]], axis=1)
    assert_close(gradients_by_step(member, RHO, loss_fn, flat, batch), expected)


@every_member
def test_empty_trees_pass(member):
    link = member.make(RHO)
    outputs, _ = link.update({}, link.init({}), {}, grad_fn=lambda p, _: p, batch=jnp.zeros(2))
    assert outputs == {}
