"""Every recipe lowers for CPUs, GPUs and TPUs, on a machine that need not have them."""

import jax
import pytest
from jax import export

import optax_sam
from tests.helpers.problems import assert_close, clean_gradient, mlp_batch, mlp_loss, mlp_params
from tests.helpers.registry import MEMBERS, RHO, batch_for

pytestmark = pytest.mark.heavy
PLATFORMS = ("cpu", "cuda", "tpu")


def in_chains(params):
    """The first two updates of every member."""
    outputs = {}
    for member in MEMBERS:
        link, batch, state = member.make(RHO), batch_for(member), member.make(RHO).init(params)
        for step in range(2):
            grads = clean_gradient(mlp_loss, params, batch, member.stacked)
            grads, state = link.update(grads, state, params, grad_fn=jax.grad(mlp_loss), batch=batch)
            outputs[f"{member.name} {step}"] = grads
    return outputs


def in_the_estimator(params):
    """An estimate by every member, in a loop."""
    outputs = {}
    for member in MEMBERS:
        if not member.stacked:
            estimator = optax_sam.gradient_estimator(mlp_loss, member.make(RHO), num_micro_batches=4)
            outputs[member.name] = estimator.value_and_grad(params, estimator.init(params), mlp_batch())
    return outputs


@pytest.mark.parametrize("program", [in_chains, in_the_estimator])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_every_recipe_lowers_for_every_platform(program, backend, monkeypatch):
    params = mlp_params()
    expected = jax.jit(program)(params)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # norms and loops are written differently for GPUs
    jax.clear_caches()
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(params)
    assert exported.platforms == PLATFORMS
    assert_close(jax.jit(exported.call)(params), expected)
