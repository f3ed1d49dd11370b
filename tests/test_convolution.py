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


def kernel_layouts(program):
    """The dimension labels of all convolutions in a compiled program."""
    return set(re.findall(r"dim_labels=(\S+?)[,\s]", program.as_text() or ""))


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
    expected = jnp.stack(list(map(jax.jit(function), kernels)))
    np.testing.assert_allclose(jax.vmap(canonicalized(function))(kernels), expected, rtol=1e-4, atol=1e-3)


FAST = {"b01f_01io->b01f"}


@pytest.mark.parametrize("wrap", [lambda function: function, jax.checkpoint, jax.jit], ids=["plain", "remat", "jit"])
def test_gradients_in_loops_are_in_the_fast_layout(wrap):
    x, kernel = problem({})
    batch = jnp.concatenate([x] * 4)
    loss_fn = lambda kernel, x: jnp.mean(wrap(lambda x, k: jax.nn.relu(convolve(x, k, {})))(x, kernel) ** 2)  # noqa: E731
    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(0.1), num_micro_batches=4, strategy="scan")
    assert kernel_layouts(jax.jit(function).lower(kernel, batch).compile()) == FAST


def test_gradients_in_loops_of_others_are_not():
    x, kernel = problem({})
    gradient = jax.grad(lambda kernel: jnp.mean(convolve(x, kernel, {}) ** 2))
    loop = jax.jit(lambda kernel: jax.lax.fori_loop(0, 4, lambda _, kernel: kernel - gradient(kernel), kernel))
    assert kernel_layouts(loop.lower(kernel).compile()) != FAST, "XLA does it itself by now: drop the rewriting"


def test_branches_of_a_switch_are_right_and_in_the_fast_layout():
    x, kernel = problem({})
    grad_fn = jax.grad(lambda kernel: jnp.mean(convolve(x, kernel, {}) ** 2))
    tx = optax.chain(optax_sam.late(optax_sam.sam(0.1), 1), optax.sgd(0.1))

    def update(params, state):
        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

    state = tx.init(kernel)
    program = jax.jit(update).lower(kernel, state).compile()
    assert kernel_layouts(program) == FAST
    clean = jax.jit(grad_fn)(kernel)
    perturbed = jax.jit(grad_fn)(kernel + 0.1 * clean / np.linalg.norm(clean))
    for gradient in (clean, perturbed):
        updates, state = program(kernel, state)
        np.testing.assert_allclose(updates, -0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_other_backends_get_the_function_itself(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert canonicalized(convolve) is convolve
