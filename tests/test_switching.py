"""Switching: the active link and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_sam
from tests.helpers.problems import (
    BATCH_SIZE,
    GradientCounter,
    assert_close,
    assert_identical,
    mlp_batch,
    mlp_loss,
    mlp_params,
    training_step,
)

LAST = np.iinfo(np.int32).max


def times(factor):
    return optax.stateless(lambda g, _: jax.tree.map(lambda x: factor * x, g))


def factors(link, steps):
    """What the link makes of a gradient of one, at each step, in one compiled loop."""

    def body(state, _):
        updates, state = link.update(jnp.ones([]), state, jnp.ones([]))
        return state, updates

    return jax.jit(lambda: jax.lax.scan(body, link.init(jnp.ones([])), length=steps)[1])().tolist()


def test_phases_begin_at_their_keys():
    link = optax_sam.switch_at({0: times(1.0), 2: times(2.0), 3: times(3.0)})
    assert factors(link, 5) == [1, 1, 2, 3, 3]


def test_late_is_identity_then_inner():
    assert factors(optax_sam.late(times(5.0), 2), 4) == [1, 1, 5, 5]
    assert factors(optax_sam.late(times(5.0), 0), 2) == [5, 5]


def test_switch_by_alternates_and_clips_its_index():
    links = [times(1.0), times(2.0)]
    assert factors(optax_sam.switch_by(lambda step: step % 2, links), 4) == [1, 2, 1, 2]
    assert factors(optax_sam.switch_by(lambda step: (step >= 1) & (step < 3), links), 4) == [1, 2, 2, 1]
    assert factors(optax_sam.switch_by(lambda step: step, links), 4) == [1, 2, 2, 2]


def test_state_tells_the_link_of_the_last_update():
    by_step = optax_sam.switch_by(lambda step: step - 1, [times(1.0), times(2.0)])
    for link, phases in (
        (optax_sam.switch_at({0: times(1.0), 2: times(2.0), 3: times(3.0)}), [0, 0, 0, 1, 2, 2]),
        (by_step, [0, 0, 0, 1, 1, 1]),
        (optax_sam.switch_by(lambda step: 9 * step - 9, [times(1.0), times(2.0)]), [0, 0, 0, 1, 1, 1]),
    ):
        tx = optax.chain(link, optax.sgd(0.1))
        state, found = tx.init(jnp.ones([])), []
        for _ in phases:
            found.append(optax.tree.get(state, "phase"))
            _, state = tx.update(jnp.ones([]), state, jnp.ones([]))
        assert_identical(found, [jnp.int32(phase) for phase in phases])


def test_schedules_in_a_link_count_its_active_steps():
    scheduled = optax.scale_by_schedule(lambda step: 10.0 * (step + 1))
    assert factors(optax_sam.switch_at({0: optax.identity(), 2: scheduled}), 4) == [1, 1, 10, 20]


def test_switches_nest():
    inner = optax_sam.switch_by(lambda step: step % 2, [times(1.0), times(2.0)])
    assert factors(optax_sam.late(inner, 1), 4) == [1, 1, 2, 1]


def test_momentum_behind_the_switch_is_carried_and_in_the_phases_starts_afresh():
    carried = optax.chain(optax_sam.late(times(1.0), 2), optax.trace(0.5))
    fresh = optax_sam.switch_at({0: optax.trace(0.5), 2: optax.trace(0.5)})
    assert factors(carried, 3) == [1, 1.5, 1.75]
    assert factors(fresh, 3) == [1, 1.5, 1]


def test_inactive_links_execute_no_gradient_and_nothing_recompiles():
    counter = GradientCounter()
    three_ascents = optax_sam.sharpness_aware(optax_sam.normalized_ascent(0.1), steps=3)
    tx = optax.chain(optax_sam.switch_at({0: optax.identity(), 1: three_ascents}), optax.sgd(0.1))
    step = jax.jit(training_step(tx, counter.counted(mlp_loss, num_examples=1)))
    params = mlp_params()
    state = tx.init(params)
    for executed in (1, 4, 4, 4):
        params, state = step(params, state, mlp_batch())
        assert counter.take() == executed
    assert step._cache_size() == 1


def test_before_the_switch_every_matrix_product_of_sam_is_in_the_branch_that_does_not_run():
    """XLA counts the FLOPs of both branches; what is executed are those outside of the branches."""

    def products(link):
        tx = optax.chain(link, optax.sgd(0.1))
        params = mlp_params()
        program = jax.make_jaxpr(training_step(tx))(params, tx.init(params), mlp_batch())
        names = [eqn.primitive.name for eqn in _outside_branches(program.jaxpr)]
        return names.count("dot_general"), names.count("cond")

    plain, _ = products(optax.with_extra_args_support(optax.identity()))
    assert products(optax_sam.late(optax_sam.sam(0.1), 10)) == (plain, 1)
    assert products(optax_sam.sam(0.1))[0] == 2 * plain


def _outside_branches(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != "cond":
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", None)
                if inner is not None:
                    yield from _outside_branches(getattr(inner, "jaxpr", inner))


def test_resumed_run_equals_the_unbroken_run_bit_for_bit(tmp_path):
    rho = optax.linear_schedule(0.05, 0.2, 4)
    tx = optax.chain(optax_sam.late(optax_sam.sam(rho), 2), optax.sgd(0.1, momentum=0.9))
    step = jax.jit(training_step(tx))
    start = mlp_params(), tx.init(mlp_params())
    carries = [start]
    for seed in range(5):
        carries.append(step(*carries[-1], mlp_batch(seed)))
    with ocp.StandardCheckpointer() as checkpointer:
        for stop in (1, 2, 3):
            checkpointer.save(tmp_path / str(stop), carries[stop])
            checkpointer.wait_until_finished()
            carry = checkpointer.restore(tmp_path / str(stop), jax.tree.map(ocp.utils.to_shape_dtype_struct, start))
            for seed in range(stop, 5):
                carry = step(*carry, mlp_batch(seed))
            assert_identical(carry, carries[-1])


def test_half_precision_outputs_that_differ_in_dtype_are_named():
    narrow = optax.stateless(lambda g, _: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g))
    link = optax_sam.switch_at({0: optax.identity(), 5: narrow})
    with pytest.raises(TypeError, match=r"(?s)the phase from step 0.*the phase from step 5.*'w'.*float32.*bfloat16"):
        link.update({"w": jnp.ones(2)}, link.init({"w": jnp.ones(2)}))


def test_averaging_in_one_phase_only_is_named_with_its_cure():
    link = optax_sam.late(optax_sam.msam(0.1), 3)
    grads, params = jnp.ones((4, 2)), jnp.ones(2)
    with pytest.raises(ValueError, match=r"the phase from step 3 averages over .*`micro_batched\(switch_at"):
        link.update(grads, link.init(params), params, grad_fn=lambda p, b: p, batch=jnp.ones(4))


def test_outputs_of_other_structure_are_named():
    link = optax_sam.switch_by(lambda step: 0, [optax.identity(), optax.stateless(lambda g, _: [g])])
    with pytest.raises(TypeError, match=r"(?s)link 0.*link 1.*structure"):
        link.update(jnp.ones(2), link.init(jnp.ones(2)))


def test_type_error_of_a_link_is_passed_on():
    link = optax_sam.late(optax_sam.sam(0.1), 1)
    with pytest.raises(TypeError, match="'int' object is not callable"):
        link.update(jnp.ones(2), link.init(jnp.ones(2)), jnp.ones(2), grad_fn=3)


@pytest.mark.parametrize("start", [1, LAST])
def test_counter_saturates_instead_of_wrapping(start):
    link = optax_sam.late(times(2.0), start)
    state = link.init(jnp.ones([]))._replace(switch_step=jnp.int32(LAST))
    updates, state = link.update(jnp.ones([]), state)
    assert float(updates) == 2.0
    assert int(state.switch_step) == LAST


@pytest.mark.parametrize("at_start", [True, False], ids=["from the start", "after steps in jit"])
def test_without_jit_the_steps_are_the_same_and_inactive_links_execute_nothing(at_start):
    counter = GradientCounter()
    loss_fn = counter.counted(mlp_loss, num_examples=BATCH_SIZE)
    link = optax_sam.switch_at({0: optax.identity(), 2: optax_sam.stable_sam(optax.constant_schedule(0.1))})
    tx = optax.chain(link, optax.sgd(0.1, momentum=0.9))
    step, batch, params = training_step(tx, loss_fn), mlp_batch(), mlp_params()
    expected = params, tx.init(params)
    eager = jax.jit(step)(*expected, batch) if not at_start else expected
    counter.take()
    for index in range(4):
        if index or at_start:
            eager = step(*eager, batch)
            assert counter.take() == BATCH_SIZE * (1 + (index >= 2))
        expected = jax.jit(step)(*expected, batch)
        counter.take()
    assert_close(eager, expected)


def test_without_jit_phases_that_differ_are_refused_before_they_begin():
    stacks, batch, params = jnp.ones((4, 2)), jnp.ones((4, 3)), jnp.ones(2)
    keywords = {"grad_fn": lambda w, x: w, "batch": batch}
    averages = optax_sam.late(optax_sam.msam(0.1), 5)
    with pytest.raises(
        ValueError, match=r"the phase from step 5 averages over .*'a leading axis'.*the phase from step 0 over nothing"
    ):
        averages.update(stacks, averages.init(params), params, **keywords)
    halves = optax_sam.late(optax.stateless(lambda g, _: g.astype(jnp.float16)), 5)
    with pytest.raises(TypeError, match=r"float32\[2\] but .*float16"):
        halves.update(params, halves.init(params), params)


def test_a_concrete_step_calls_its_link_inside_of_vmap_and_derivatives():
    link = optax_sam.late(optax_sam.sam(0.5), 0)
    w, grad_fn = jnp.array([3.0, 4.0]), lambda w: w
    update = lambda w: link.update(w, link.init(w), w, grad_fn=grad_fn)[0]  # noqa: E731
    assert_close(jax.vmap(update)(w[None])[0], jnp.array([3.3, 4.4]))

    def total(rho):
        link = optax_sam.late(optax_sam.sam(rho), 0)
        return jnp.sum(link.update(w, link.init(w), w, grad_fn=grad_fn)[0])

    assert_close(jax.grad(total)(0.5), jnp.float32(7 / 5))
