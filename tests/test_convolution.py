"""Convolutions inside loops and branches: the same numbers, in the layout that XLA's CPU backend runs fast."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam._convolution import canonicalized

CASES = {
    "plain": {},
    "strided": {"window_strides": (2, 1)},
    "dilated": {"rhs_dilation": (2, 2), "lhs_dilation": (1, 2), "padding": ((2, 1), (0, 3))},
    "grouped": {"feature_group_count": 2},
    "channels first": {"dimension_numbers": ("NCHW", "OIHW", "NHWC")},
}


def convolve(x, kernel, case):
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | case
    return jax.lax.conv_general_dilated(x, kernel, **options)


def problem(case):
    x_key, kernel_key = jax.random.split(jax.random.key(0))
    channels, groups = 4, case.get("feature_group_count", 1)
    x = jax.random.normal(x_key, (3, 8, 6, channels))
    kernel = jax.random.normal(kernel_key, (3, 2, channels // groups, 6))
    if "dimension_numbers" in case:
        x, kernel = x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
    return x, kernel


def kernel_layouts(function, *args):
    """The dimension labels of all convolutions in the compiled program."""
    program = jax.jit(function).lower(*args).compile().as_text() or ""
    return set(re.findall(r"dim_labels=(\S+?)[,\s]", program))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_function(case):
    x, kernel = problem(case)

    def function(x, kernel):
        loss = lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, case)))  # noqa: E731
        return jax.value_and_grad(jax.jit(loss), argnums=(0, 1))(x, kernel)

    expected, actual = jax.jit(function)(x, kernel), jax.jit(canonicalized(function))(x, kernel)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # 144-term sums in another order


def test_function_that_is_a_convolution_is_made_canonical():
    x, kernel = problem(CASES["channels first"])
    function = canonicalized(lambda x, kernel: convolve(x, kernel, CASES["channels first"]))
    primitives = [eqn.primitive.name for eqn in jax.make_jaxpr(function)(x, kernel).eqns]
    assert primitives.count("transpose") >= 2


def test_functions_without_convolutions_keep_their_values_and_structure():
    function = lambda x, y: {"sum": x + y, "pair": (x * 2, None)}  # noqa: E731
    x, y = jnp.arange(3.0), jnp.ones(3)
    assert jax.tree.structure(canonicalized(function)(x, y)) == jax.tree.structure(function(x, y))
    assert np.array_equal(canonicalized(function)(x, y)["sum"], x + y)


def test_batch_of_maps_over_a_convolution():
    x, kernel = problem({})
    function = lambda kernel: jax.grad(lambda kernel: jnp.sum(convolve(x, kernel, {}) ** 2))(kernel)  # noqa: E731
    kernels = jnp.stack([kernel, 2 * kernel])
    expected = jnp.stack([function(one) for one in kernels])
    np.testing.assert_allclose(jax.vmap(canonicalized(function))(kernels), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPU programs are rewritten")
@pytest.mark.parametrize("wrap", [lambda function: function, jax.checkpoint, jax.jit], ids=["plain", "remat", "jit"])
@pytest.mark.parametrize("where", ["branch", "loop"])
def test_gradients_in_branches_and_loops_are_in_the_fast_layout(where, wrap):
    x, kernel = problem({})
    batch = jnp.concatenate([x] * 4)

    def loss_fn(kernel, batch):
        return jnp.mean(wrap(lambda x, k: jax.nn.relu(convolve(x, k, {})))(batch, kernel) ** 2)

    link = optax_sam.sam(0.1)
    if where == "branch":
        link = optax_sam.late(link, 1)
    estimator = optax_sam.gradient_estimator(loss_fn, link, num_micro_batches=4, strategy="scan")
    state = estimator.init(kernel)
    assert kernel_layouts(estimator.value_and_grad, kernel, state, batch) == {"b01f_01io->b01f"}

    in_a_loop = lambda kernel: jax.lax.fori_loop(0, 4, lambda _, k: k - jax.grad(loss_fn)(k, batch), kernel)  # noqa: E731
    assert kernel_layouts(in_a_loop, kernel) != {"b01f_01io->b01f"}, "XLA does it itself by now: drop the rewriting"


def test_optimizer_chain_switches_between_convolutional_steps():
    x, kernel = problem({})
    loss_fn = lambda kernel: jnp.mean(convolve(x, kernel, {}) ** 2)  # noqa: E731
    tx = optax.chain(optax_sam.late(optax_sam.sam(0.1), 1), optax.sgd(0.1))
    state, params = tx.init(kernel), kernel
    for link in (optax.identity(), optax_sam.sam(0.1)):
        grads = jax.grad(loss_fn)(params)
        link = optax.with_extra_args_support(link)
        expected, _ = link.update(grads, link.init(params), params, grad_fn=jax.grad(loss_fn))
        updates, state = jax.jit(lambda g, s, p: tx.update(g, s, p, grad_fn=jax.grad(loss_fn)))(grads, state, params)
        np.testing.assert_allclose(updates, optax.tree.scale(-0.1, expected), rtol=1e-4, atol=1e-6)
        params = optax.apply_updates(params, updates)


def test_other_backends_get_the_function_itself(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert canonicalized(convolve) is convolve
