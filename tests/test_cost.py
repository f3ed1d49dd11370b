"""Cost, in deterministic figures: FLOPs, memory, compilations and transfers. Times are in ``benchmarks``."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam
from benchmarks import networks, overhead, step_cost

TASK = networks.Task(networks.Transformer(width=256, layers=2), (32, 8))
OPTIMIZER = optax.adamw(1e-3)
SAM = optax_sam.sam(0.05)


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


PARAMS = num_bytes(jax.eval_shape(TASK.init))


@functools.cache
def compiled(link, **options):
    """A training step of a transformer whose params outweigh its activations, with donated state."""
    state, step = step_cost.make_step(TASK, link, OPTIMIZER, **options)
    return jax.jit(step, donate_argnums=0).lower(state, TASK.batch()).compile()


def temporary(link, **options):
    """Temporary memory in units of the params."""
    return compiled(link, **options).memory_analysis().temp_size_in_bytes / PARAMS


PLAIN = optax.identity()


@pytest.mark.heavy
@pytest.mark.parametrize("link", [SAM, optax_sam.asam(0.5), optax_sam.stable_sam(0.05)], ids=["sam", "asam", "stable"])
def test_sam_needs_one_more_copy_of_the_params_and_twice_the_flops(link):
    assert temporary(link) <= temporary(PLAIN) + 1.1
    ratio = compiled(link).cost_analysis()["flops"] / compiled(PLAIN).cost_analysis()["flops"]
    assert 1.9 < ratio < 2.02


@pytest.mark.heavy
def test_renormalization_costs_norms():
    flops = compiled(optax_sam.stable_sam(0.05)).cost_analysis()["flops"] / compiled(SAM).cost_analysis()["flops"]
    assert 1 < flops < 1.03


@pytest.mark.heavy
@pytest.mark.parametrize("num_micro_batches", [4, 8, 32])
@pytest.mark.parametrize("ascent_per", ["micro_batch", "batch"])
@pytest.mark.parametrize("strategy", ["scan", "auto"])
def test_memory_of_a_loop_does_not_grow_with_micro_batches(monkeypatch, strategy, ascent_per, num_micro_batches):
    monkeypatch.setattr(optax_sam._means, "PAIRED_BYTES", 1 << 40)  # "auto" is two at a time
    options = {"strategy": strategy, "ascent_per": ascent_per}
    here = temporary(SAM, num_micro_batches=num_micro_batches, **options)
    assert here <= temporary(PLAIN) + 3
    assert here <= 1.01 * temporary(SAM, num_micro_batches=4, **options)


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", ["scan", "auto"])
def test_program_of_a_loop_does_not_grow_with_micro_batches(monkeypatch, strategy):
    monkeypatch.setattr(optax_sam._means, "PAIRED_BYTES", 1 << 40)  # "auto" is two at a time

    def num_instructions(num_micro_batches):
        return compiled(SAM, strategy=strategy, num_micro_batches=num_micro_batches).as_text().count(" = ")

    assert num_instructions(32) < 1.1 * num_instructions(4)


@pytest.fixture
def compilations():
    """The names of what is compiled, as it happens."""
    jax.clear_caches()
    events = []
    listener = lambda event, duration, **details: events.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield events
    jax.monitoring.unregister_event_duration_listener(listener)


def test_without_jit_a_second_call_compiles_nothing(compilations):
    params, batch = {"w": jnp.ones(3)}, jnp.ones((4, 3))
    function = optax_sam.value_and_grad(lambda w, x: jnp.mean((x @ w["w"]) ** 2), SAM, num_micro_batches=4)
    function(params, batch)
    assert compilations
    compilations.clear()
    function(params, batch)
    assert not compilations


@pytest.mark.parametrize(
    "link",
    [
        SAM,
        optax_sam.late(SAM, 3),
        optax_sam.late(optax_sam.late(SAM, 1), 2),
        optax_sam.switch_at({0: PLAIN, 1: optax_sam.asam(0.1), 3: optax_sam.stable_sam(optax.constant_schedule(0.1))}),
        optax_sam.switch_by(lambda step: step % 2, [PLAIN, SAM]),
        optax_sam.measured(optax_sam.late(SAM, 3)),
    ],
    ids=["sam", "late", "nested", "three phases", "alternating", "measured"],
)
def test_without_jit_switches_compile_nothing_after_each_link_has_run(compilations, link):
    loss_fn = lambda w, x: jnp.mean((x @ w["w"]) ** 2)  # noqa: E731
    tx, params, batch = optax.chain(link, optax.sgd(0.1, momentum=0.9)), {"w": jnp.ones(3)}, jnp.ones((4, 3)) / 4
    state, counts = tx.init(params), []
    for _ in range(8):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(
            grads, state, params, grad_fn=jax.grad(loss_fn), batch=batch, value=loss, value_fn=loss_fn
        )
        params = optax.apply_updates(params, updates)
        counts.append(len(compilations))
        compilations.clear()
    assert counts[0] > 0
    assert counts[5:] == [0, 0, 0]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("link", "options", "unread"),
    [(SAM, {}, 0), (SAM, {"num_micro_batches": 8}, 0), (optax_sam.late(SAM, 5), {}, 4)],
    ids=["sam", "scan", "late"],
)
def test_donated_state_is_updated_in_place(link, options, unread):
    """But for the phase of the last update, one int32 that a switch writes and does not read."""
    state, _ = step_cost.make_step(TASK, link, OPTIMIZER, **options)
    memory = compiled(link, **options).memory_analysis()
    assert memory.alias_size_in_bytes == num_bytes(state) - unread
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024


@pytest.mark.heavy
@pytest.mark.parametrize(
    "link",
    [
        optax_sam.late(SAM, 2),
        optax_sam.stable_sam(optax.linear_schedule(0.0, 0.1, 5)),
        optax_sam.switch_by(lambda step: step % 2, [PLAIN, SAM]),
    ],
    ids=["late", "schedule", "alternating"],
)
def test_steps_neither_recompile_nor_touch_the_host(link):
    task = networks.Task(networks.MLP(), (8, 28, 28, 1))
    state, step = step_cost.make_step(task, link, OPTIMIZER, num_micro_batches=2)
    step, batch = jax.jit(step, donate_argnums=0), jax.device_put(task.batch())
    state = step(jax.device_put(state), batch)
    with jax.transfer_guard("disallow"):
        for _ in range(4):
            state = step(state, batch)
    assert step._cache_size() == 1
    text = step.lower(state, batch).compile().as_text()
    assert not any(word in text for word in ("callback", "infeed", "outfeed", "host-transfer"))


@pytest.mark.heavy
@pytest.mark.parametrize("link", [SAM, optax_sam.asam(0.5), optax_sam.stable_sam(0.05)], ids=["sam", "asam", "stable"])
def test_program_grows_linearly_with_the_number_of_leaves(link):
    def num_instructions(num_leaves):
        params = {f"{index}": jnp.full(10, index / num_leaves) for index in range(num_leaves)}
        program = jax.jit(functools.partial(overhead.update, link)).lower(params).compile()
        return program.as_text().count(" = ")

    assert num_instructions(128) < 2.2 * num_instructions(64)
