"""Flax NNX: what NNX itself does at rho = 0, one dropout mask for all passes, statistics of the clean one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import optax_sam
from tests.helpers.problems import assert_close, assert_identical

pytest.importorskip("optax_sam.nnx", reason="Flax is too old", exc_type=ImportError)

BATCH = {"x": jax.random.normal(jax.random.key(0), (16, 3)), "y": jnp.linspace(-1, 1, 16)[:, None]}


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("allow"):  # Flax needs it
        yield


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout, self.output = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


class Shared(nnx.Module):
    """One layer used twice, and once more under another name."""

    def __init__(self, rngs):
        self.first, self.layer = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.same, self.output = self.layer, nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(jnp.tanh(self.same(jnp.tanh(self.layer(self.first(x))))))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(jnp.tanh(self.norm(self.linear(x))))


class Stacked(nnx.Module):
    """Three layers in a scan, each with its own keys."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}),)))
        self.first, self.layers, self.output = nnx.Linear(3, 4, rngs=rngs), make(rngs), nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(
            nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(self.first(x), self.layers)
        )


class Checkpointed(nnx.Module):
    def __init__(self, rngs):
        self.first, self.block = nnx.Linear(3, 4, rngs=rngs), Block(rngs)
        self.output = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.remat(lambda block, x: block(x))(self.block, self.first(x)))


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.lora = nnx.LoRA(3, 2, 4, base_module=nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
        self.lora.lora_b[...] = 0.1 * jnp.ones((2, 4))
        self.norm, self.output = nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(self.norm(self.lora(x)))


ADAPTERS = nnx.DiffState(0, nnx.LoRAParam)
MODELS = {
    "batch norm and dropout": (Network, 0),
    "shared weights": (Shared, 0),
    "layers in a scan": (Stacked, 0),
    "checkpointed": (Checkpointed, 0),
    "adapters": (Adapted, ADAPTERS),
}


def loss_of(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def arrays(tree):
    """The arrays of a model or a state, keys as numbers."""
    leaves = jax.tree.leaves(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]


def stepped(function, make=Network, steps=2):
    """What a jitted function of a model returns in two calls in a row, and the state of the model after."""
    model, compiled = make(nnx.Rngs(0)), nnx.jit(function)
    results = [compiled(model, BATCH) for _ in range(steps)]
    return jax.tree.map(jnp.asarray, arrays(results)), arrays(model)


@pytest.mark.parametrize("name", MODELS)
def test_at_rho_zero_all_is_as_nnx_makes_it_bit_for_bit(name):
    make, argnums = MODELS[name]
    expected = stepped(nnx.value_and_grad(loss_of, argnums=argnums), make)
    actual = stepped(optax_sam.nnx.value_and_grad(loss_of, optax_sam.sam(0.0), argnums=argnums), make)
    assert_identical(actual, expected)


@pytest.mark.parametrize("name", ["shared weights", "layers in a scan", "adapters"])
def test_structure_of_the_result_is_that_of_nnx(name):
    make, argnums = MODELS[name]
    aux_loss = lambda model, batch: (loss_of(model, batch), {"mean": jnp.mean(batch["x"])})  # noqa: E731
    (expected_value, expected), (value, grads) = (
        function(aux_loss, argnums=argnums, has_aux=True)(make(nnx.Rngs(0)), BATCH)
        for function in (nnx.value_and_grad, functools.partial(optax_sam.nnx.value_and_grad, link=optax_sam.sam(0.1)))
    )
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    assert_close(value, expected_value)


LINKS = {
    "three ascents": optax_sam.sharpness_aware(optax_sam.normalized_ascent(0.2), steps=3),
    "late": optax_sam.measured(optax_sam.late(optax_sam.sam(0.5), 1)),
}


@pytest.mark.parametrize("name", LINKS)
def test_statistics_and_counters_never_see_the_perturbed_params(name):
    estimator = optax_sam.nnx.gradient_estimator(loss_of, LINKS[name])
    model, plain = Network(nnx.Rngs(0)), Network(nnx.Rngs(0))
    state, step, plain_step = (
        estimator.init(model),
        nnx.jit(estimator.value_and_grad),
        nnx.jit(nnx.value_and_grad(loss_of)),
    )
    for _ in range(2):
        loss, _, state = step(model, state, BATCH)
        assert_close((loss, arrays(model)), (plain_step(plain, BATCH)[0], arrays(plain)))
    assert int(model.dropout.rngs.count[...]) == 2


def test_sam_is_the_gradient_of_nnx_at_the_perturbed_params_with_the_same_mask():
    plain, moved, model = (Network(nnx.Rngs(0)) for _ in range(3))
    _, clean = nnx.value_and_grad(loss_of)(plain, BATCH)
    length = optax.tree.norm(clean)
    point = jax.tree.map(lambda w, g: w + 0.5 * g / length, nnx.state(moved, nnx.Param), clean)
    nnx.update(moved, point)
    _, expected = nnx.value_and_grad(loss_of)(moved, BATCH)
    _, grads = optax_sam.nnx.value_and_grad(loss_of, optax_sam.sam(0.5))(model, BATCH)
    assert_close(arrays(grads), arrays(expected))
    assert_close(arrays(nnx.state(model, nnx.BatchStat)), arrays(nnx.state(plain, nnx.BatchStat)))


def masks_of(num_micro_batches, steps, **options):
    """The masks of all passes in the order of the passes, of ``steps`` calls."""
    masks = []

    def loss_fn(model, batch):
        kept = nnx.clone(model).dropout(jnp.ones((4, 8)))
        jax.debug.callback(lambda mask: masks.append(np.asarray(mask)), kept)
        return loss_of(model, batch)

    function = optax_sam.nnx.value_and_grad(loss_fn, optax_sam.sam(0.1), num_micro_batches=num_micro_batches, **options)
    model, compiled = Network(nnx.Rngs(0)), nnx.jit(function)
    for _ in range(steps):
        compiled(model, BATCH)
        jax.effects_barrier()
    return masks


def test_all_passes_draw_the_same_mask_and_the_next_step_another():
    first, second, third, fourth = masks_of(1, steps=2)
    assert set(np.unique(first)) == {0.0, 2.0}
    assert np.array_equal(first, second)
    assert np.array_equal(third, fourth)
    assert not np.array_equal(first, third)


def test_micro_batches_draw_different_masks_the_same_in_both_passes():
    masks = masks_of(4, steps=1, strategy="scan")
    assert sorted(sum(np.array_equal(a, b) for b in masks) for a in masks) == [2] * 8


def test_statistics_are_the_mean_over_micro_batches_and_counters_advance_once():
    parts = [jax.tree.map(lambda x, j=j: x[4 * j : 4 * j + 4], BATCH) for j in range(4)]
    alone = [Network(nnx.Rngs(0)) for _ in parts]
    for model, part in zip(alone, parts, strict=True):
        loss_of(model, part)
    model = Network(nnx.Rngs(0))
    nnx.jit(optax_sam.nnx.value_and_grad(loss_of, optax_sam.sam(0.1), num_micro_batches=4))(model, BATCH)
    means = [one.norm.mean[...] for one in alone]
    assert_close(model.norm.mean[...], jnp.mean(jnp.stack(means), axis=0))
    assert int(model.dropout.rngs.count[...]) == 1


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param("layers in a scan", "vmap", marks=pytest.mark.heavy),
        pytest.param("batch norm and dropout", "unroll", marks=pytest.mark.heavy),
        ("layers in a scan", "lazy"),
    ],
)
def test_strategies_give_the_same_numbers_statistics_and_masks(name, strategy):
    def run(strategy):
        link, options = optax_sam.stable_sam(0.2), {"num_micro_batches": 4, "strategy": strategy}
        return stepped(optax_sam.nnx.value_and_grad(loss_of, link, **options), MODELS[name][0])

    assert_close(run(strategy), run("scan"))


def test_accumulation_with_padding_is_the_whole_batch():
    """Without batch norm and dropout; the last examples do not count, and weight_fn gets what loss_fn gets."""
    valid = jnp.arange(16) < 11

    def loss_fn(model, batch, valid):
        errors = jnp.sum((model(batch["x"]) - batch["y"]) ** 2, axis=1)
        return jnp.sum(valid * errors) / jnp.maximum(jnp.sum(valid), 1)

    options = {
        "num_micro_batches": 4,
        "ascent_per": "batch",
        "batch_argnums": (1, 2),
        "weight_fn": lambda batch, valid: jnp.sum(valid),
    }
    whole = optax_sam.nnx.value_and_grad(loss_fn, optax_sam.sam(0.2))(Shared(nnx.Rngs(0)), BATCH, valid)
    parts = optax_sam.nnx.value_and_grad(loss_fn, optax_sam.sam(0.2), **options)(Shared(nnx.Rngs(0)), BATCH, valid)
    assert_close(arrays(parts), arrays(whole))


def test_devices_hold_micro_batches():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    function = optax_sam.nnx.value_and_grad(loss_of, optax_sam.sam(0.2), axis_name="data")
    model, everywhere = Network(nnx.Rngs(0)), PartitionSpec()
    mapped = nnx.shard_map(function, mesh=mesh, in_specs=(everywhere, PartitionSpec("data")), out_specs=everywhere)
    actual = nnx.jit(mapped)(model, BATCH)
    same = Network(nnx.Rngs(0))
    expected = nnx.jit(optax_sam.nnx.value_and_grad(loss_of, optax_sam.sam(0.2), num_micro_batches=4))(same, BATCH)
    assert_close((arrays(actual), arrays(model)), (arrays(expected), arrays(same)))


def test_padding_alone_leaves_the_statistics_as_they_were():
    def loss_fn(model, batch, valid):
        return jnp.sum(valid * (model(batch["x"]) - batch["y"])[:, 0] ** 2) / jnp.maximum(jnp.sum(valid), 1)

    options = {"batch_argnums": (1, 2), "weight_fn": lambda batch, valid: jnp.sum(valid), "num_micro_batches": 2}
    model = Network(nnx.Rngs(0))
    before = arrays(nnx.state(model, nnx.BatchStat))
    step = nnx.jit(optax_sam.nnx.value_and_grad(loss_fn, optax_sam.sam(0.1), **options))
    step(model, BATCH, jnp.zeros(16))
    assert_identical(arrays(nnx.state(model, nnx.BatchStat)), before)
    step(model, BATCH, jnp.ones(16))
    assert not np.allclose(arrays(nnx.state(model, nnx.BatchStat))[0], before[0])


@pytest.mark.heavy
def test_training_on_the_devices_of_an_explicit_mesh():
    """After the first step the whole model is on the mesh."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Explicit,))
    batch = jax.device_put(BATCH, jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
    results = []
    for examples, options in ((batch, {"axis_name": "data"}), (BATCH, {"num_micro_batches": 4})):
        model = Network(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        value_and_grad = optax_sam.nnx.value_and_grad(loss_of, optax_sam.sam(0.1), **options)
        for _ in range(2):
            loss, grads = value_and_grad(model, examples)
            optimizer.update(model, grads)
        results.append(jax.device_get((loss, arrays(model))))
    assert_close(*results)


def test_what_is_frozen_stays_bit_for_bit_and_does_not_move_in_the_ascent():
    model, seen = Adapted(nnx.Rngs(0)), []
    before = arrays(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))

    def loss_fn(model, batch):
        seen.append(model.lora.base_module.kernel[...])
        return loss_of(model, batch)

    function = optax_sam.nnx.value_and_grad(loss_fn, optax_sam.sam(0.5), argnums=ADAPTERS, num_micro_batches=2)
    _, grads = function(model, BATCH)
    assert {path[-1] for path in nnx.to_flat_state(grads).paths} == {"lora_a", "lora_b"}
    assert_identical(arrays(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))), before)
    assert len(seen) == 4  # two passes of two micro-batches
    for kernel in seen:
        assert_identical(kernel, model.lora.base_module.kernel[...])


def test_training_with_an_optimizer_of_nnx_and_a_late_switch():
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
    link = optax_sam.measured(optax_sam.late(optax_sam.sam(0.05), start=10))
    estimator = optax_sam.nnx.gradient_estimator(loss_of, link)

    @nnx.jit
    def step(model, optimizer, state, batch):
        loss, grads, state = estimator.value_and_grad(model, state, batch)
        optimizer.update(model, grads)
        return loss, state

    state, losses, active = estimator.init(model), [], []
    for _ in range(20):
        loss, state = step(model, optimizer, state, BATCH)
        losses.append(float(loss))
        active.append(float(optax_sam.measurements(state).active))
    assert active == [0.0] * 10 + [1.0] * 10
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def adding(model, batch):
    model.seen = nnx.Variable(batch["x"])
    return loss_of(model, batch)


WRONG = {
    "rngs": (lambda f: f(loss_of)(Network(nnx.Rngs(0)), BATCH, nnx.Rngs(1)), TypeError, "argument 2.*pass a key"),
    "argnums": (lambda f: f(loss_of, argnums=1), ValueError, "must be the first argument of loss_fn.*argnums=1"),
    "filter": (
        lambda f: f(loss_of, argnums=ADAPTERS)(Network(nnx.Rngs(0)), BATCH),
        ValueError,
        "LoRAParam.* chooses no variable of the model, a Network",
    ),
    "variables": (lambda f: f(adding)(Network(nnx.Rngs(0)), BATCH), ValueError, "adds variables to the model.*as aux"),
    "state": (
        lambda f: f(loss_of, link=optax_sam.late(optax_sam.sam(0.1), 1))(Network(nnx.Rngs(0)), BATCH),
        ValueError,
        "Use `optax_sam.nnx.gradient_estimator`",
    ),
    "loss": (
        lambda f: f(lambda model, batch: model(batch["x"]))(Network(nnx.Rngs(0)), BATCH),
        TypeError,
        "what loss_fn returns must be the loss",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_refused_with_the_cure(name):
    use, error, words = WRONG[name]
    with pytest.raises(error, match=f"(?i){words}"):
        use(functools.partial(optax_sam.nnx.value_and_grad, link=optax_sam.sam(0.1)))


def test_without_the_copy_the_second_pass_draws_another_mask():
    """Why the module is as it is."""
    model = Network(nnx.Rngs(0))
    kernels = [nnx.grad(loss_of)(model, BATCH)["hidden"]["kernel"][...] for _ in range(2)]
    assert not np.allclose(*kernels)
