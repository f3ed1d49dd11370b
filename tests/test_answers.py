"""What users type that cannot work gets an answer that helps; what can work, works."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_sam
from tests.helpers.problems import assert_close, mlp_batch, mlp_loss, mlp_params

PARAMS, BATCH = mlp_params(), mlp_batch()
SAM, GRAD_FN = optax_sam.sam(0.1), jax.grad(mlp_loss)
GRADS = jax.jit(GRAD_FN)(PARAMS, BATCH)


def matrices(params):
    return jax.tree.map(lambda w: w.ndim > 1, params)


def update(tx, **keywords):
    return tx.update(GRADS, tx.init(PARAMS), PARAMS, **({"grad_fn": GRAD_FN, "batch": BATCH} | keywords))[0]


@pytest.mark.parametrize("num_micro_batches", [1, 4])
@pytest.mark.parametrize("link", [optax_sam.msam(0.1), optax_sam.micro_batched(optax_sam.late(SAM, 3))])
def test_micro_batches_inside_of_the_estimator(link, num_micro_batches):
    function = optax_sam.gradient_estimator(mlp_loss, link, num_micro_batches=num_micro_batches)
    with pytest.raises(ValueError, match=r"the estimator splits the batch itself, and wants sam\(rho\)"):
        function.value_and_grad(PARAMS, function.init(PARAMS), BATCH)


def test_train_states_of_linen_are_told_of_the_estimator():
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=optax.chain(SAM, optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"TrainState.apply_gradients, use `gradient_estimator"):
        state.apply_gradients(grads=GRADS, grad_fn=GRAD_FN, batch=BATCH)
    _, grads = optax_sam.value_and_grad(mlp_loss, SAM)(PARAMS, BATCH)  # and that works
    trained = TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1)).apply_gradients(grads=grads)
    assert_close(trained.params, jax.tree.map(lambda w, g: w - 0.1 * g, PARAMS, update(SAM)))


@pytest.mark.parametrize(
    ("recipe", "jit"),
    [(optax_sam.sam, jax.jit)]
    + [(recipe, lambda function: function) for recipe in (optax_sam.usam, optax_sam.asam, optax_sam.stable_sam)],
)
def test_masks_under_inject_hyperparams(recipe, jit):
    expected = update(recipe(0.1, mask=matrices))
    whole = jax.tree.map(lambda _: True, PARAMS)
    assert not np.allclose(expected["output"], update(recipe(0.1))["output"], rtol=1e-3)
    injected = optax.inject_hyperparams(recipe)
    for mask in (matrices, lambda params: jax.tree.map(lambda w: True, params)):
        with pytest.raises(
            TypeError, match=r"as inject_hyperparams makes of a function. Pass static_args='mask' there"
        ):
            jit(lambda mask=mask: update(injected(rho=0.1, mask=mask)))()
    static = optax.inject_hyperparams(recipe, static_args="mask")
    assert_close(jit(lambda: update(static(rho=0.1, mask=matrices)))(), expected)
    for tree, result in ((matrices(PARAMS), expected), (whole, update(recipe(0.1)))):
        arrays = jax.tree.map(jnp.asarray, tree)
        assert_close(jit(lambda tree=tree: update(injected(rho=0.1, mask=tree)))(), result)
        assert_close(jit(lambda mask: update(injected(rho=0.1, mask=mask)))(arrays), result)
        assert_close(jit(lambda mask: update(recipe(0.1, mask=mask)))(arrays), result)


def test_other_functions_under_inject_hyperparams():
    with pytest.raises(TypeError, match=r"Under optax.inject_hyperparams name it in static_args"):
        optax.inject_hyperparams(optax_sam.late)(inner=SAM, start=3).init(PARAMS)
    with pytest.raises(TypeError, match=r"Under optax.inject_hyperparams name it in static_args"):
        optax.inject_hyperparams(optax_sam.switch_by)(index_fn=lambda step: step % 2, links=[SAM, SAM]).init(PARAMS)
    tx = optax.inject_hyperparams(optax_sam.late, static_args="start")(inner=SAM, start=0)
    assert_close(update(tx), update(SAM))


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(3, 1, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize("num_micro_batches", [1, 4])
@pytest.mark.parametrize("closed_over", [True, False])
def test_nnx_objects_that_the_loss_would_change(closed_over, num_micro_batches):
    rngs = nnx.Rngs(0)
    loss_fn = lambda w, batch, rngs=rngs: mlp_loss(w, batch) * jax.random.uniform(rngs.dropout())  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, SAM, num_micro_batches=num_micro_batches)
    with pytest.raises(Exception, match="Cannot mutate RngCount") as caught:
        function(PARAMS, BATCH, *(() if closed_over else (rngs,)))
    assert any("loss_fn changes a Flax NNX object from outside" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("strategy", ["auto", "vmap"])
def test_states_of_nnx_come_out_as_aux(strategy):
    """Keys and counts are those of the first micro-batch."""
    rngs = nnx.Rngs(3)

    def loss_fn(params, batch):
        return mlp_loss(params, batch), (nnx.state(rngs), rngs)

    function = optax_sam.value_and_grad(loss_fn, SAM, has_aux=True, num_micro_batches=4, strategy=strategy)
    (_, (state, whole)), _ = jax.jit(function)(PARAMS, BATCH)
    for found in (state, nnx.state(whole)):
        assert jax.tree.structure(found) == jax.tree.structure(nnx.state(rngs))
        assert jax.random.key_data(found["default"]["key"][...]).tolist() == [0, 3]


@pytest.mark.parametrize("strategy", ["auto", "vmap"])
def test_static_aux_is_named(strategy):
    loss_fn = lambda w, batch: (mlp_loss(w, batch), {"name": "text", "mean": jnp.mean(batch["x"])})  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, SAM, has_aux=True, num_micro_batches=4, strategy=strategy)
    with pytest.raises(TypeError, match="'text'"):
        function(PARAMS, BATCH)
    whole = optax_sam.value_and_grad(loss_fn, SAM, has_aux=True)
    assert whole(PARAMS, BATCH)[0][1]["name"] == "text"  # as jax.value_and_grad without jit


def test_flattened_params_are_told_of_the_place_in_front():
    around = optax.flatten(optax.chain(SAM, optax.sgd(0.1)))
    with pytest.raises(TypeError, match="string indexing") as caught:
        update(around)
    assert any("`optax.chain(sam(rho), optax.flatten(...))`" in note for note in caught.value.__notes__)
    assert_close(update(optax.chain(SAM, optax.flatten(optax.sgd(0.1)))), update(optax.chain(SAM, optax.sgd(0.1))))


def test_lookahead_is_told_of_the_estimator():
    lookahead = optax.lookahead(optax.sgd(0.1), sync_period=5, slow_step_size=0.5)
    params, tx = optax.LookaheadParams.init_synced(PARAMS), optax.chain(SAM, lookahead)
    with pytest.raises(ValueError, match=r"updates must have the tree structure of params, .*LookaheadParams"):
        tx.update(GRADS, tx.init(params), params, grad_fn=GRAD_FN, batch=BATCH)
    _, grads = optax_sam.value_and_grad(mlp_loss, SAM)(params.fast, BATCH)  # and that works
    updates, _ = lookahead.update(grads, lookahead.init(params), params)
    assert_close(updates.fast, jax.tree.map(lambda g: -0.1 * g, update(SAM)))
