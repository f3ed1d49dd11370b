"""Lazy evaluation: outer products in place of gradients, with the numbers of a loop over micro-batches."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from optax_sam import _norms
from optax_sam._lazy import mean
from optax_sam._lazy.grams import rarely
from optax_sam._lazy.plan import multiply_adds, peak_bytes
from tests.helpers.lazy_networks import NETWORKS, mlp, with_dropout
from tests.helpers.places import PLACES
from tests.helpers.problems import assert_close
from tests.helpers.registry import MEMBERS

RHO = 0.1
MAPPED = [place for place in PLACES if not place.startswith("jit")]


@pytest.fixture
def interpreters(monkeypatch):
    """The interpreters that evaluated programs, as it happens."""
    found = []

    class Recorded(mean.Interpreter):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(mean, "Interpreter", Recorded)
    return found


def estimates(loss_fn, link, params, *args, strategies=("scan", "lazy"), steps=1, **options):
    """What the strategies return for some steps, compiled."""
    results = []
    for strategy in strategies:
        estimator = optax_sam.gradient_estimator(loss_fn, link, strategy=strategy, **options)
        state, outputs, run = estimator.init(params), [], jax.jit(estimator.value_and_grad)
        for _ in range(steps):
            value, gradient, state = run(params, state, *args)
            outputs.append((value, gradient, state))
        results.append(outputs)
    return results


def assert_exact(actual, desired):
    """To rounding in float64; what a link measures is float32."""

    def check(path, a, b):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return
        eps = jnp.finfo(a.dtype).eps if jnp.issubdtype(a.dtype, jnp.inexact) else 0
        np.testing.assert_allclose(a, b, rtol=5e3 * eps, atol=5e2 * eps, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, actual, desired)


def users_of(interpreter):
    return {user for user, _ in interpreter.multiplied_out}


def some_heavy(names, heavy):
    """The names, some of which are tried with the heavy tests: they take seconds each to compile."""
    return [pytest.param(name, marks=pytest.mark.heavy) if name in heavy else name for name in names]


@pytest.mark.parametrize("name", some_heavy(NETWORKS, heavy=("tied and checkpointed", "weight decay", "recurrent")))
def test_numbers_are_those_of_a_loop_and_rules_engage(name, interpreters):
    with jax.enable_x64(True):
        network = NETWORKS[name]()
        link = optax_sam.stable_sam(RHO)
        looped, lazy = estimates(network.loss_fn, link, network.params, network.batch, num_micro_batches=4)
    assert_exact(lazy, looped)
    [interpreter] = interpreters
    assert sum(interpreter.stays_lazy) == network.weights
    assert users_of(interpreter) == network.users


MADE = {member.name: member.make(RHO) for member in MEMBERS}
LINKS = {  # link, and for what its sums are multiplied out
    "usam": (optax_sam.usam(RHO), set()),
    "asam": (optax_sam.asam(RHO), {"mul"}),
    "schedule": (optax_sam.sam(lambda step: RHO / (1 + step)), set()),
    "late": (optax_sam.late(optax_sam.sam(RHO), 1), set()),
    "measured late": (optax_sam.measured(optax_sam.late(optax_sam.sam(RHO), 1)), set()),
    "clipped": (optax.chain(optax_sam.sam(RHO), optax.clip_by_global_norm(0.1)), set()),
    "clipped by element": (optax.chain(optax_sam.sam(RHO), optax.clip(0.01)), {"max"}),
    "sam-masked": (MADE["sam-masked"], set()),
    "multi-step": (MADE["multi-step"], set()),
    "momentum-ascent": (MADE["momentum-ascent"], set()),
    "switch_at": (MADE["switch_at"], set()),
    "stable_sam-truncated": (MADE["stable_sam-truncated"], set()),
    "gsam": (MADE["gsam"], set()),
    "look_sam": (MADE["look_sam"], {"add", "cond"}),
    "momentum_sam": (MADE["momentum_sam"], set()),
    "ae_sam": (MADE["ae_sam"], {"cond"}),
}


@pytest.mark.parametrize(
    "name", some_heavy(LINKS, heavy=("multi-step", "schedule", "gsam", "look_sam", "momentum_sam", "measured late"))
)
def test_links_need_no_change(name, interpreters):
    link, users = LINKS[name]
    with jax.enable_x64(True):
        network = mlp()
        arguments = network.loss_fn, link, network.params, network.batch
        looped, lazy = estimates(*arguments, num_micro_batches=4, steps=3)
    assert_exact(lazy, looped)
    assert sum(interpreters[0].stays_lazy) >= network.weights * (name not in ("clipped by element", "ae_sam"))
    assert users_of(interpreters[0]) == users


@pytest.mark.parametrize("way", ["branch", "line", "loop"])
def test_norms_are_of_outer_products_in_the_programs_of_all_backends(way, interpreters, monkeypatch):
    monkeypatch.setattr(_norms, "_way", lambda leaves, axes: way)
    network = mlp()
    looped, lazy = estimates(
        network.loss_fn, optax_sam.stable_sam(RHO), network.params, network.batch, num_micro_batches=4
    )
    assert_close(lazy, looped)
    assert users_of(interpreters[0]) == set()


def counting_loss(loss_fn):
    """With an aux of ints and floats, and labels that are an argument of their own."""

    def loss(params, x, labels, key=None):
        value = loss_fn(params, (x, labels)) if key is None else loss_fn(params, (x, labels), key)
        return value, {"first": labels[0], "mean": jnp.mean(x)}

    return loss


@pytest.mark.parametrize("ascent_per", ["micro_batch", "batch"])
def test_options_of_the_estimator_hold(ascent_per):
    with jax.enable_x64(True):
        network = with_dropout()
        options = {
            "has_aux": True,
            "batch_argnums": (1, 2),
            "weight_fn": lambda x, labels, key: jnp.sum(labels > 1).astype(float),  # 0 for the first micro-batch
            "num_micro_batches": 4,
            "ascent_per": ascent_per,
        }
        arguments = (
            counting_loss(network.loss_fn),
            optax_sam.sam(RHO),
            network.params,
            *network.batch,
            jax.random.key(5),
        )
        looped, lazy = estimates(*arguments, **options)
        [grouped] = estimates(*arguments, strategies=["lazy"], group_size=2, **options)
    assert_exact(lazy, looped)
    assert_exact(grouped, looped)


def test_what_has_no_weight_does_not_count_even_if_it_is_not_finite():
    network = mlp()
    batch = network.batch[0].at[:2].set(jnp.nan), network.batch[1]
    options = {"weight_fn": lambda batch: jnp.where(jnp.isnan(batch[0][0, 0]), 0.0, 1.0), "num_micro_batches": 4}
    looped, lazy = estimates(network.loss_fn, optax_sam.stable_sam(RHO), network.params, batch, **options)
    assert_close(lazy, looped)
    assert np.all(np.isfinite(lazy[0][1]["params"]["Dense_0"]["kernel"]))


@pytest.mark.parametrize("place", some_heavy(PLACES, heavy=("pmap", "vmap", "shard_map explicit")))
def test_devices_hold_micro_batches(place, interpreters):
    """Each by its own members' examples; where an Explicit mesh shards arrays, a loop."""
    network = mlp()
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x[::-1], 2 * x, x + 1]), network.batch)
    options = {"num_micro_batches": 2 if place in MAPPED else 4}
    options |= {"axis_name": "data"} if place in MAPPED else {}

    def function(strategy):
        estimate = optax_sam.value_and_grad(network.loss_fn, optax_sam.stable_sam(RHO), strategy=strategy, **options)
        return lambda params, batch: estimate(params, batch)

    looped, lazy = (PLACES[place](function(strategy), network.params, batch=batch) for strategy in ("scan", "lazy"))
    assert_close(lazy, looped)
    assert [sum(x.stays_lazy) for x in interpreters] == ([] if place == "jit explicit" else [network.weights])


def test_params_sharded_under_jit_are_those_of_one_device(interpreters):
    network = mlp()
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    shardings = jax.tree.map(
        lambda w: NamedSharding(mesh, PartitionSpec(None, "model") if w.ndim == 2 else PartitionSpec("model")),
        network.params,
    )
    options = {"num_micro_batches": 4, "strategy": "lazy"}
    function = jax.jit(optax_sam.value_and_grad(network.loss_fn, optax_sam.sam(RHO), **options))
    sharded = function(jax.device_put(network.params, shardings), network.batch)
    assert_close(jax.device_get(sharded), jax.device_get(function(network.params, network.batch)))
    assert [sum(x.stays_lazy) for x in interpreters] == [network.weights] * 2


@pytest.mark.parametrize("cancellation", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
def test_norms_of_what_nearly_cancels_are_as_accurate_as_in_a_loop(cancellation):
    """Examples in pairs whose gradients cancel but for a part: Gram matrices alone would be off by 1e-1."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4, 64)).astype(np.float32), rng.normal(size=(2, 4, 48)).astype(np.float32)
    y[1] = cancellation * y[1] - y[0]
    x[1] = x[0]
    batch = tuple(np.swapaxes(part, 0, 1).reshape(8, -1) for part in (x, y))  # two examples for each of 4 micro-batches
    loss_fn = lambda w, batch: jnp.sum((batch[0] @ w) * batch[1])  # noqa: E731
    results = estimates(
        loss_fn, optax_sam.measured(optax_sam.sam(RHO)), jnp.zeros((64, 48)), batch, num_micro_batches=4
    )
    gradients = np.einsum("jkp,jkq->jpq", *(part.astype(np.float64).reshape(4, 2, -1) for part in batch))
    expected = np.mean([np.linalg.norm(gradient) for gradient in gradients])
    looped, lazy = (abs(optax_sam.measurements(outputs[0][2]).clean_norm / expected - 1) for outputs in results)
    assert lazy <= 4 * looped + 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e25])
def test_gradients_far_from_one_are_those_of_a_loop(scale):
    network = mlp()
    loss_fn = lambda params, batch: scale * network.loss_fn(params, batch)  # noqa: E731
    looped, lazy = estimates(loss_fn, optax_sam.stable_sam(RHO), network.params, network.batch, num_micro_batches=4)
    looped, lazy = (jax.tree.map(lambda x: x / scale, outputs[0][1]) for outputs in (looped, lazy))
    assert_close(lazy, looped)


def test_a_link_acts_on_each_example_at_the_cost_of_the_batch(interpreters):
    """Clipping for each example, the core of differentially private SGD."""
    network = mlp()
    options = {"num_micro_batches": 8, "strategy": "lazy"}
    clipped = jax.jit(optax_sam.value_and_grad(network.loss_fn, optax.clip_by_global_norm(1.0), **options))
    _, actual = clipped(network.params, network.batch)

    def clipped_one(example):
        gradient = jax.grad(network.loss_fn)(network.params, jax.tree.map(lambda x: x[None], example))
        return optax.tree.scale(1 / jnp.maximum(1, optax.tree.norm(gradient)), gradient)

    assert_close(actual, jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(clipped_one)(network.batch)))
    assert users_of(interpreters[0]) == set()


def test_rows_that_are_not_there_are_dropped_and_twice_taken_rows_add_up():
    tokens = jnp.array([[1, 1, -1], [0, 19, 25], [3, 2, 1], [-30, 4, 4]])

    for mode in ("fill", "clip", "drop"):
        loss_fn = lambda w, x, mode=mode: jnp.nansum(jnp.tanh(w.at[x].get(mode=mode)) ** 2)  # noqa: E731
        table = jax.random.normal(jax.random.key(0), (20, 24))
        looped, lazy = estimates(loss_fn, optax_sam.sam(RHO), table, tokens, num_micro_batches=4)
        assert_close(lazy, looped)


def test_programs_do_not_grow_with_the_number_of_micro_batches():
    network = mlp()
    sizes = []
    for num_micro_batches in (2, 4):
        options = {"num_micro_batches": num_micro_batches, "strategy": "lazy"}
        function = optax_sam.value_and_grad(network.loss_fn, optax_sam.sam(RHO), **options)
        sizes.append(str(jax.make_jaxpr(function)(network.params, network.batch)).count("\n"))
    assert sizes[0] == sizes[1]


# --- what auto decides ---


def decision(caplog, loss_fn, link, params, batch, **options):
    """What the log says that auto decided."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="optax_sam"):
        jax.jit(optax_sam.value_and_grad(loss_fn, link, **options)).trace(params, batch)
    return caplog.messages


def wide():
    """A layer that is wider than a batch is large, and the batch."""
    w, x = jnp.ones((512, 512)), jnp.ones((64, 512))
    return lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2), w, x


def test_auto_takes_outer_products_where_that_is_cheaper(caplog):
    loss_fn, w, x = wide()
    [few] = decision(caplog, loss_fn, optax_sam.sam(RHO), w, jnp.tile(x, (8, 1)), num_micro_batches=2)
    [many] = decision(caplog, loss_fn, optax_sam.sam(RHO), w, x, num_micro_batches=32)
    assert few.startswith("2 micro-batches: a loop")
    assert many.startswith("32 micro-batches: lazy: lazily 0.")
    assert "outer products: [1]" in many


@pytest.mark.parametrize(
    ("link", "options", "messages"),
    [
        (optax_sam.asam(RHO), {}, ["32 micro-batches: a loop: lazily ", "multiplied out for: mul"]),
        (optax.identity(), {}, ["a loop: ", "no more than gradient accumulation"]),
        (optax_sam.sam(RHO), {"ascent_per": "batch"}, None),  # who accumulates saves memory
        (optax_sam.sam(RHO), {"strategy": "scan"}, None),
    ],
)
def test_auto_takes_a_loop_and_says_why(link, options, messages, caplog):
    loss_fn, w, x = wide()
    found = decision(caplog, loss_fn, link, w, x, num_micro_batches=32, **options)
    assert len(found) == (messages is not None)
    assert all(message in found[0] for message in messages or [])


@pytest.mark.parametrize(
    ("name", "reason"), [("cnn", "the shapes of its weights"), ("recurrent", "slow for all at once: scan")]
)
def test_auto_takes_a_loop_for_what_is_slow_for_all_micro_batches_at_once(name, reason, caplog):
    network = NETWORKS[name]()
    batch = jax.tree.map(lambda x: x[:8], network.batch)
    [message] = decision(caplog, network.loss_fn, optax_sam.sam(RHO), network.params, batch, num_micro_batches=8)
    assert message.startswith("8 micro-batches: a loop")
    assert reason in message


@pytest.mark.parametrize("strategy", ["scan", "lazy"])
def test_what_has_effects_sees_one_micro_batch_after_another(strategy, caplog):
    seen = []
    loss_fn, w, x = wide()

    def watched(w, x):
        jax.debug.callback(lambda first: seen.append(float(first)), x[0, 0], ordered=True)
        return loss_fn(w, x)

    x = x * jnp.arange(64.0)[:, None]
    [message] = decision(caplog, watched, optax_sam.sam(RHO), w, x, num_micro_batches=4, strategy="lazy")
    assert message == "4 micro-batches: a loop, for side effects"
    estimates(watched, optax.identity(), w, x, strategies=[strategy], num_micro_batches=4)
    jax.effects_barrier()
    assert seen == [0.0, 16.0, 32.0, 48.0]


def test_auto_takes_a_loop_for_memory_alone(caplog):
    w, x = jnp.ones((64, 64)), jnp.ones((4096, 64))
    loss_fn = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)  # noqa: E731
    [message] = decision(caplog, loss_fn, optax_sam.sam(RHO), w, x, num_micro_batches=2048)
    time, memory = (float(part.split()[-1]) for part in message.split(" ×")[:2])
    assert message.startswith("2048 micro-batches: a loop")
    assert time < 0.9
    assert memory > 1.35


@pytest.mark.parametrize(
    ("recipe", "products", "grams", "copies"), [(optax_sam.sam, 3, 2, 0), (optax_sam.asam, 6, 0, 4)]
)
def test_the_estimated_time_is_the_formula(recipe, products, grams, copies, monkeypatch):
    """For one layer of P × Q: products of KPQ, Gram matrices of K²(P + Q), and what is read and written of weights."""
    plans, plan = [], mean.plan
    monkeypatch.setattr(mean, "plan", lambda *args: plans.append(plan(*args)) or plans[-1])
    p, q, m, k = 48, 32, 16, 4
    loss_fn = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, recipe(RHO), num_micro_batches=m)
    jax.jit(function).trace(jnp.ones((p, q)), jnp.ones((m * k, p)))
    weights = 2 * p * q + 1  # the gradients of both passes, and the loss
    lazily = m * (products * k * p * q + grams * k**2 * (p + q)) + 80 * weights + 400 * m * (copies * p * q + 1)
    in_a_loop = m * (4 * k * p * q + 80 * weights)
    [found] = plans
    np.testing.assert_allclose(found.time, lazily / in_a_loop, rtol=1e-12)


@pytest.mark.parametrize(("k", "is_promising"), [(28, True), (29, False)])
def test_shapes_alone_rule_out_large_micro_batches(k, is_promising, caplog):
    """2.5 KPQ + 3 K²(P + Q) < 0.9 (3 KPQ + 80 PQ) up to K = 28.8 for P = Q = 64."""
    loss_fn = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)  # noqa: E731
    arguments = loss_fn, optax_sam.sam(RHO), jnp.ones((64, 64)), jnp.ones((2 * k, 64))
    [message] = decision(caplog, *arguments, num_micro_batches=2)
    assert ("the shapes of its weights" in message) != is_promising


def test_estimates_count_matrix_products_and_arrays():
    w, x = jnp.ones((8, 8)), jnp.ones((4, 8))

    def program(w, x):
        y = jax.lax.fori_loop(0, 3, lambda _, y: y @ w, x)  # 3 · 4 · 8 · 8
        y = jax.lax.cond(y[0, 0] > 0, lambda: y @ w, lambda: y @ w @ w)  # the longer branch, 2 · 4 · 8 · 8
        return jax.lax.cond(y[0, 0] > 0, rarely(lambda: y @ w @ w), lambda: y)  # 0

    jaxpr = jax.make_jaxpr(program)(w, x).jaxpr
    assert multiply_adds(jaxpr) == 5 * 4 * 8 * 8
    chain = jax.make_jaxpr(lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w @ w))(w, x).jaxpr
    assert peak_bytes(chain, lambda variable: variable.aval.size * 4) == 2 * 4 * 4 * 8  # two products at a time


# --- where a rule would be wrong, it declines ---

SQUARE = jax.random.normal(jax.random.key(1), (24, 24)) / 4
TABLE = jax.random.normal(jax.random.key(2), (20, 24))
ROWS = jax.random.normal(jax.random.key(3), (8, 24))
TOKENS = jnp.array([1, 1, 5, 0, 19, 3, 2, 7])[:, None]


def on_rows(function):
    return lambda w, x: jnp.mean(jnp.abs(jnp.tanh(x @ function(w))) ** 2)


def rows_in_part(w, tokens):
    numbers = jax.lax.GatherDimensionNumbers((1,), (0,), (0,))
    return jnp.mean(jnp.tanh(jax.lax.gather(w, tokens, numbers, (1, 12), mode="clip")) ** 2)


def skipping(updates, state, params=None):
    is_finite = jnp.isfinite(optax.tree.norm(updates))
    return jax.tree.map(lambda g: jnp.where(is_finite, g, 0), updates), state


@jax.custom_vjp
def straight_through(w):
    return jnp.sign(w)


straight_through.defvjp(lambda w: (jnp.sign(w), None), lambda _, cotangent: (cotangent,))
SUMMED = optax.stateless(lambda updates, params: updates + updates.T)
SKIPPING = optax.GradientTransformation(lambda params: optax.EmptyState(), skipping)
EVERY_SECOND = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
SAM = optax_sam.sam(RHO)
JOINTS = {
    "symmetric": (on_rows(lambda w: w + w.T), SAM, SQUARE, ROWS),
    "antisymmetric": (on_rows(lambda w: w - w.T), SAM, SQUARE, ROWS),
    "chosen": (lambda w, x: on_rows(lambda w: jnp.where(x[0, 0] > 0, w, 2 * w.T))(w, x), SAM, SQUARE, ROWS),
    "transposed in the link": (on_rows(lambda w: w), SUMMED, SQUARE, ROWS),
    "complex": (on_rows(lambda w: w * (1 + 2j)), SAM, SQUARE, ROWS),
    "reshaped": (on_rows(lambda w: w.reshape(12, 48).reshape(24, 24)), SAM, SQUARE, ROWS),
    "product of weights": (on_rows(lambda w: w @ w.T), SAM, SQUARE, ROWS),
    "product and decay": (lambda w, x: on_rows(lambda w: w @ w)(w, x) + jnp.sum(w**2), SAM, SQUARE, ROWS),
    "third power": (lambda w, x: on_rows(lambda w: w)(w, x) + jnp.sum(w**3), SAM, SQUARE, ROWS),
    "barrier": (on_rows(jax.lax.optimization_barrier), SAM, SQUARE, ROWS),
    "rows of twice a table": (lambda w, x: jnp.mean(jnp.tanh((w + w)[x]) ** 2), SAM, TABLE, TOKENS),
    "columns": (lambda w, x: jnp.mean(jnp.tanh(w[:, x]) ** 2), SAM, TABLE, TOKENS),
    "weights or rows": (
        lambda w, x: on_rows(lambda w: jax.lax.cond(w[0, 0] > 0, lambda: w, lambda: x.T @ x))(w, x),
        SAM,
        SQUARE,
        ROWS,
    ),
    "straight through": (on_rows(straight_through), SAM, SQUARE, ROWS),
    "fill value": (lambda w, x: jnp.mean(w.at[x + 15].get(mode="fill", fill_value=1) ** 3), SAM, TABLE, TOKENS),
    "rows in part": (rows_in_part, SAM, TABLE, TOKENS),
    "empty axis": (lambda w, x: on_rows(lambda w: w)(w, x) + jnp.sum(x[:, :0] @ w[:0]), SAM, SQUARE, ROWS),
    "not finite": (on_rows(lambda w: w), SKIPPING, SQUARE, ROWS.at[0].set(jnp.inf)),
    "every second step": (on_rows(lambda w: w), EVERY_SECOND, SQUARE, ROWS),
    "ragged": (lambda w, x: jnp.mean(jax.lax.ragged_dot(x, w[None], jnp.array([len(x)])) ** 2), SAM, SQUARE, ROWS),
    "weights far below one": (lambda w, x: on_rows(jnp.tanh)(w, x) * 1e-20 + jnp.sum(w**2), SAM, SQUARE * 1e-20, ROWS),
}


@pytest.mark.parametrize("name", JOINTS)
def test_rules_decline_where_they_would_be_wrong(name):
    loss_fn, link, params, batch = JOINTS[name]
    looped, lazy = estimates(loss_fn, link, params, batch, num_micro_batches=4, steps=2)
    assert_close([outputs[1] for outputs in lazy], [outputs[1] for outputs in looped])


@pytest.mark.parametrize(("dtype", "users"), [("bfloat16", set()), ("float16", {"convert_element_type"})])
def test_narrow_activations_are_as_accurate_as_in_a_loop(dtype, users, interpreters):
    def loss_fn(w, x, dtype=dtype):
        return jnp.mean(jnp.tanh(x.astype(dtype) @ w.astype(dtype)).astype(w.dtype) ** 2)

    looped, lazy = (outputs[0][1] for outputs in estimates(loss_fn, SAM, SQUARE, ROWS, num_micro_batches=4))
    assert users_of(interpreters[0]) == users
    with jax.enable_x64(True):
        wide = functools.partial(loss_fn, dtype=float)
        [exact] = estimates(
            wide, SAM, SQUARE.astype(float), ROWS.astype(float), strategies=["scan"], num_micro_batches=4
        )
    exact = np.asarray(exact[0][1])
    errors = [
        np.linalg.norm(np.asarray(gradient, float) - exact) / np.linalg.norm(exact) for gradient in (looped, lazy)
    ]
    assert errors[1] <= 2 * errors[0]


def test_a_callback_sees_one_micro_batch(caplog):
    loss_fn, w, x = wide()
    shape = jax.ShapeDtypeStruct((), x.dtype)

    def scaled(w, x):
        return loss_fn(w, x) * jax.pure_callback(lambda x: np.float32(len(x)), shape, jax.lax.stop_gradient(x))

    [message] = decision(caplog, scaled, SAM, w, x, num_micro_batches=4, strategy="lazy")
    assert message == "4 micro-batches: a loop, for callbacks"


def test_aux_of_whole_numbers_is_that_of_the_first_micro_batch():
    counts = lambda w, x: (jnp.mean(jnp.tanh(w[x]) ** 2), jnp.zeros((20, 24), int).at[x].add(1))  # noqa: E731
    looped, lazy = estimates(counts, SAM, TABLE, TOKENS, num_micro_batches=4, has_aux=True)
    assert_close(lazy, looped)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_draw_the_same_numbers(impl):
    def loss_fn(w, x, key):
        return jnp.mean(jnp.tanh(x @ w) ** 2 * jax.random.uniform(key, (len(x), 24)))

    looped, lazy = estimates(loss_fn, SAM, SQUARE, ROWS, jax.random.key(0, impl=impl), num_micro_batches=4)
    assert_close(lazy, looped)


def test_derivatives_through_the_estimator_are_those_of_a_loop():
    """One micro-batch has no gradient, and the link cuts the path through ε."""
    batch = ROWS.at[:2].set(0)

    def after(rho, w, link, strategy):
        function = optax_sam.value_and_grad(on_rows(lambda w: w), link(rho), num_micro_batches=4, strategy=strategy)
        return jnp.sum(jnp.sin(function(w, batch)[1]))

    cut = lambda rho: optax_sam.sharpness_aware(  # noqa: E731
        optax.chain(optax_sam.normalized_ascent(rho), optax.stateless(lambda g, _: jax.lax.stop_gradient(g)))
    )
    for link in (optax_sam.sam, cut):
        looped, lazy = (
            jax.jit(jax.grad(after, argnums=1), static_argnums=(2, 3))(RHO, SQUARE, link, s) for s in ("scan", "lazy")
        )
        assert_close(lazy, looped)
