"""Communication between devices, read out of compiled programs."""

import collections

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from benchmarks.communication import METHODS, Collective, collectives, compiled, make_params, reduced_bytes
from tests.helpers.problems import mlp_batch, mlp_loss, mlp_params

pytestmark = pytest.mark.heavy

DEVICES, WIDTH = 8, 33
SIZE = sum(leaf.size for leaf in make_params(WIDTH).values())
LOSS, PARAMS = 4, 4 * SIZE
EXPECTED = {
    "plain": [LOSS + PARAMS],
    "mSAM, M = 1 a device": [LOSS + PARAMS],
    "mSAM, M = 4 a device": [LOSS + PARAMS],
    "mSAM, M = 16 a device": [LOSS + PARAMS],
    "StableSAM per device": [LOSS + PARAMS],
    "one ascent per device, M = 4": [LOSS + PARAMS],
    "synchronized SAM": [LOSS + PARAMS, PARAMS],
    "synchronized SAM, M = 4": [LOSS + PARAMS, PARAMS],
    "synchronized late SAM, before": [LOSS + PARAMS],
    "synchronized late SAM, after": [LOSS + PARAMS, PARAMS],
    "late mSAM, before": [LOSS + PARAMS],
    "late mSAM, after": [LOSS + PARAMS],
}


@pytest.mark.parametrize("method", METHODS)
def test_reductions_of_a_step(method):
    """As many parameter-sized reductions as the method needs, the loss along with the first, and nothing else."""
    found = collectives(compiled(METHODS[method], DEVICES, WIDTH).as_text(), METHODS[method].branch)
    assert {collective.kind for collective in found} == {"all-reduce"}
    total, most = sum(c.num_bytes for c in found), len(found)
    assert total == sum(EXPECTED[method])
    assert most == len(EXPECTED[method])
    assert reduced_bytes(method, SIZE) == total


def test_every_method_has_an_expectation():
    assert set(EXPECTED) == set(METHODS)


@pytest.mark.parametrize(
    ("axis_type", "options", "reductions"),
    [
        (AxisType.Auto, {"ascent_per": "batch"}, 2),
        (AxisType.Auto, {"num_micro_batches": DEVICES, "strategy": "vmap"}, 1),
        (AxisType.Auto, {"num_micro_batches": 2 * DEVICES, "strategy": "vmap"}, 1),
        (AxisType.Auto, {"num_micro_batches": 2 * DEVICES, "strategy": "vmap", "ascent_per": "batch"}, 2),
        (AxisType.Explicit, {"ascent_per": "batch"}, 2),
        (AxisType.Explicit, {"axis_name": "data"}, 1),
        (AxisType.Explicit, {"axis_name": "data", "num_micro_batches": 2}, 1),
        (AxisType.Explicit, {"axis_name": "data", "num_micro_batches": 2, "ascent_per": "batch"}, 2),
    ],
)
def test_reductions_under_jit(axis_type, options, reductions):
    """Synchronized SAM, and mSAM with whole micro-batches on each device, on a batch that is sharded."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
    function = optax_sam.value_and_grad(mlp_loss, optax_sam.sam(0.1), **options)
    with jax.set_mesh(mesh):
        params = jax.device_put(mlp_params(), NamedSharding(mesh, PartitionSpec()))
        batch = jax.device_put(mlp_batch(size=4 * DEVICES), NamedSharding(mesh, PartitionSpec("data")))
        found = collectives(jax.jit(function).lower(params, batch).compile().as_text())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(collective.num_bytes for collective in found) == LOSS + reductions * size
    assert {collective.kind for collective in found} == {"all-reduce"}


def test_norms_of_sharded_params_cost_scalars():
    mesh = jax.make_mesh((DEVICES,), ("model",), axis_types=(AxisType.Auto,))
    grad_fn = jax.grad(lambda w: jnp.sum(w**4))
    link = optax_sam.sharded(optax_sam.stable_sam(0.1), "model")
    member = lambda w: link.update(grad_fn(w), link.init(w), w, grad_fn=grad_fn)[0]  # noqa: E731
    spec = PartitionSpec("model")
    mapped = jax.jit(jax.shard_map(member, mesh=mesh, in_specs=spec, out_specs=spec))
    found = collectives(mapped.lower(jnp.ones(DEVICES * WIDTH)).compile().as_text())
    assert {collective.kind for collective in found} == {"all-reduce"}
    assert sum(collective.num_bytes for collective in found) <= 6 * LOSS


def test_collectives_in_loops_and_branches_are_counted_as_often_as_they_run():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    def program(x, index):
        for_loop = jax.lax.fori_loop(0, 7, lambda _, y: jax.lax.psum(y, "data") / 2, x)
        branches = [lambda y: y, lambda y: jax.lax.psum(y, "data"), lambda y: jax.lax.all_gather(y, "data").sum(0)]
        return jax.lax.switch(index, branches, for_loop)

    spec = PartitionSpec("data")
    mapped = jax.shard_map(program, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones(DEVICES), jnp.int32(0)).compile().as_text()
    counts = [collections.Counter(collectives(text, branch)) for branch in range(3)]
    reduced, gathered = Collective("all-reduce", 4), Collective("all-gather", 4 * DEVICES)
    assert counts == [{reduced: 7}, {reduced: 8}, {reduced: 7, gathered: 1}]
