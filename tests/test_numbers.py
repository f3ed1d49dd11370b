"""Numbers: random inputs, all dtypes and sizes of gradients, what is not finite, and NumPy over many steps."""

import bisect
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_sam
from optax_sam._micro_batches import mean_over_micro_batches
from tests.helpers import references
from tests.helpers.problems import assert_identical
from tests.helpers.registry import RHO, SWITCH, members

STEPS, START = 50, 20  # of the comparison with NumPy, and its switch
BALL = functools.partial(optax.projections.projection_l2_ball, scale=0.12)
RECIPES = {
    references.sam: optax_sam.sam,
    references.sam_of_first_four: lambda rho: optax_sam.sam(rho, mask={"a": True, "b": False}),
    references.usam: optax_sam.usam,
    references.asam: optax_sam.asam,
    references.stable_sam: optax_sam.stable_sam,
    references.truncated: lambda rho: optax_sam.stable_sam(rho, max_scale=1.0),
    references.msam: optax_sam.sam,
    references.stable_msam: optax_sam.stable_sam,
    references.three_ascents_in_a_ball: lambda rho: optax_sam.sharpness_aware(
        optax_sam.normalized_ascent(rho), steps=3, projection=BALL
    ),
}


@pytest.mark.parametrize(
    ("reference", "nesterov"),
    [*((reference, False) for reference in RECIPES), (references.sam, True)],
    ids=[*(reference.__name__ for reference in RECIPES), "sam before nesterov"],
)
def test_numpy_agrees_over_fifty_steps(reference, nesterov):
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(4, 3, 7)), rng.normal(size=(4, 3)), rng.normal(size=7)
    rho, averages = (lambda step: 0.05 + 0.002 * step), "msam" in reference.__name__

    def gradient_of(x, y):
        def gradient(w):
            prediction = np.tanh(x @ w)
            return 2 / 3 * x.T @ ((prediction - y) * (1 - prediction**2)) + 0.1 * w**3

        return gradient

    def loss_fn(params, batch):
        w = jnp.concatenate([params["a"].ravel(), params["b"]])
        return jnp.mean((jnp.tanh(batch["x"] @ w) - batch["y"]) ** 2) + 0.025 * jnp.sum(w**4)

    with jax.enable_x64(True):
        link = optax_sam.late(RECIPES[reference](rho), START)
        estimator = optax_sam.gradient_estimator(loss_fn, link, num_micro_batches=4 if averages else 1)
        learning_rate = lambda step: 0.1 - 0.1 / STEPS * step  # noqa: E731 those of Optax are in float32
        sgd = optax.sgd(learning_rate, momentum=0.9, nesterov=nesterov)
        tx = optax.chain(optax.clip_by_global_norm(0.8), optax.add_decayed_weights(0.01), sgd)
        batch = {"x": jnp.asarray(x.reshape(12, 7)), "y": jnp.asarray(y.reshape(12))}
        params = {"a": jnp.asarray(w[:4].reshape(2, 2)), "b": jnp.asarray(w[4:])}

        @jax.jit
        def step(params, states):
            _, grads, link_state = estimator.value_and_grad(params, states[0], batch)
            updates, state = tx.update(grads, states[1], params)
            return optax.apply_updates(params, updates), (link_state, state)

        states, optimizer = (estimator.init(params), tx.init(params)), references.Optimizer(STEPS, nesterov)
        gradients = [gradient_of(*shard) for shard in zip(x, y, strict=True)]
        for index in range(STEPS):
            late = index >= START
            s = reference(gradients, w, rho(index - START)) if late else references.mean(gradients, w)
            w = optimizer.step(w, s, index)
            params, states = step(params, states)
            np.testing.assert_allclose(np.append(params["a"], params["b"]), w, rtol=1e-9, atol=1e-12)


# A leaf is its shape, its dtype and the power of ten its elements are near; elements are never zero or subnormal.
SHAPES = [(), (1,), (3,), (2, 3), (0,)]
EXPONENTS = {"float16": (-4, 4), "bfloat16": (-30, 30), "float32": (-30, 30), "complex64": (-30, 30)}


@st.composite
def leaves(draw, exponents=None):
    dtype = draw(st.sampled_from(sorted(EXPONENTS)))
    low, high = exponents or EXPONENTS[dtype]
    rng, shape = np.random.default_rng(draw(st.integers(0, 99))), draw(st.sampled_from(SHAPES))
    elements = rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape) * 10.0 ** draw(st.integers(low, high))
    return jnp.asarray(elements * (np.exp(1j * rng.uniform(0, 6, shape)) if dtype == "complex64" else 1), dtype)


def trees(exponents=None):
    return st.lists(leaves(exponents), min_size=1, max_size=4).filter(lambda tree: any(leaf.size for leaf in tree))


few_examples = settings(max_examples=20)  # each of them compiles; test_norms.py has the edges


def flat(tree):
    """All elements in float64, real and imaginary parts apart."""
    parts = [np.asarray(leaf).astype(np.complex128).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate([half for part in parts for half in (part.real, part.imag)])


def perturbation(ascent, gradient, params=None):
    return ascent.update(gradient, ascent.init(params), params)[0]


@few_examples
@given(trees())
def test_norms_of_anything(tree):
    np.testing.assert_allclose(float(optax_sam.norm(tree)), np.linalg.norm(flat(tree)), rtol=1e-5)


@few_examples
@given(trees(), st.sampled_from([1e-3, 0.5, 20.0]))
def test_normalized_ascents_have_length_rho_and_the_direction_of_the_gradient(tree, rho):
    epsilon = perturbation(optax_sam.normalized_ascent(rho), tree)
    assert [leaf.dtype for leaf in epsilon] == [leaf.dtype for leaf in tree]
    # What float16 cannot hold is less than 1e-7 for each element.
    expected = rho * flat(tree) / np.linalg.norm(flat(tree))
    np.testing.assert_allclose(flat(epsilon), expected, rtol=0.01, atol=1e-7)


@few_examples
@given(trees((-3, 3)), st.integers(-3, 3))
def test_scaling_the_gradient_leaves_normalized_perturbations_as_they_are(tree, power):
    scaled = [leaf * np.asarray(2.0**power, leaf.dtype) for leaf in tree]
    params = [jnp.ones_like(leaf) for leaf in tree]
    for ascent in (optax_sam.normalized_ascent(0.1), optax_sam.adaptive_ascent(0.1)):
        expected, actual = perturbation(ascent, tree, params), perturbation(ascent, scaled, params)
        np.testing.assert_allclose(flat(actual), flat(expected), rtol=0.01, atol=1e-6)


@few_examples
@given(trees((-3, 3)), st.integers(0, 99))
def test_adaptive_ascents_are_the_formula(gradient, seed):
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(rng.normal(size=g.shape), g.dtype) for g in gradient]
    epsilon = perturbation(optax_sam.adaptive_ascent(0.5), gradient, params)
    widths = flat([np.abs(w) * (1 + (1j if jnp.iscomplexobj(w) else 0)) for w in params]) + 0.01
    expected = 0.5 * widths**2 * flat(gradient) / np.linalg.norm(widths * flat(gradient))
    np.testing.assert_allclose(flat(epsilon), expected, rtol=0.02, atol=1e-5)


@few_examples
@given(trees((-3, 3)), st.integers(-2, 2))
def test_renormalized_outputs_are_as_long_as_the_inputs(tree, power):
    inner = optax.stateless(lambda g, _: [jnp.flip(x) * np.asarray(10.0**power, x.dtype) for x in g])
    link = optax_sam.renormalized(inner)
    outputs, _ = link.update(tree, link.init(tree))
    np.testing.assert_allclose(np.linalg.norm(flat(outputs)), np.linalg.norm(flat(tree)), rtol=0.01)


@few_examples
@given(st.sets(st.integers(1, 12), max_size=4))
def test_any_mapping_switches_at_its_keys(later):
    keys = [0, *sorted(later)]
    phases = {key: optax.stateless(lambda g, _, factor=factor: factor * g) for factor, key in enumerate(keys)}
    link = optax_sam.switch_at(phases)
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: link.update(jnp.ones([]), s)[::-1], state, length=14)[1])
    assert run(link.init(None)).tolist() == [bisect.bisect_right(keys, step) - 1 for step in range(14)]


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll", "auto"])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 6])
def test_means_over_any_number_of_micro_batches(num_micro_batches, strategy):
    batch = np.random.default_rng(0).normal(size=(num_micro_batches * 3, 2)).astype(np.float32)
    evaluate = lambda index, micro_batch: jnp.max(micro_batch, axis=0)  # noqa: E731
    mean = jax.jit(lambda batch: mean_over_micro_batches(evaluate, batch, num_micro_batches, strategy))(batch)
    expected = batch.reshape(num_micro_batches, 3, 2).max(axis=1).mean(axis=0)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "reference", [references.sam, references.asam, references.stable_sam], ids=lambda reference: reference.__name__
)
def test_hundreds_of_small_arrays_are_one_vector(reference):
    w = np.random.default_rng(0).normal(size=1_000_000)
    params, link = [jnp.asarray(piece, jnp.float32) for piece in np.split(w, 200)], RECIPES[reference](0.1)
    grad_fn = lambda params: jax.tree.map(jnp.sin, params)  # noqa: E731
    outputs, _ = link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(np.concatenate(outputs), reference([np.sin], w, 0.1), rtol=1e-5, atol=1e-6)


KINDS = {
    "16 bits": ["float16", "float16"],
    "16 and 32 bits": ["bfloat16", "complex64", "float32"],
    "16 to 64 bits": ["bfloat16", "complex64", "float32", "float64"],
}


@members(
    "sam-masked",
    "asam-eta0",
    "stable_sam-truncated",
    "renormalized-asam",
    "multi-step",
    "momentum-ascent",
    "micro_batched-stable",
    "late-msam",
    "switch_at",
    "gsam",
    "friendly_sam",
    "look_sam",
    "ae_sam",
    "lagged_sam",
    "random_sam",
    heavy=("micro_batched-stable", "gsam", "friendly_sam", "ae_sam", "random_sam"),
)
@pytest.mark.parametrize("dtypes", KINDS.values(), ids=KINDS)
def test_gradients_of_any_size_stay_finite_and_keep_their_dtype(member, dtypes):
    with jax.enable_x64("float64" in dtypes):
        params = {"none": None, "leaves": [jnp.full((2, index), index % 2, d) for index, d in enumerate(dtypes, 1)]}
        link = member.make(RHO)

        @jax.jit
        def update(size, state):
            grads = jax.tree.map(lambda w: jnp.full(w.shape, size, w.dtype), params)
            given = jax.tree.map(lambda g: jnp.stack([g] * 2), grads) if member.stacked else grads
            grad_fn = lambda p, _: jax.tree.map(lambda g, w: jnp.where(jnp.isfinite(w), g, jnp.nan), grads, p)  # noqa: E731
            return link.update(given, state, params, grad_fn=grad_fn, batch=jnp.zeros(2))

        tiny, huge = (1e-7, 6e4) if "float16" in dtypes else (1e-30, 1e30)
        for size in (0.0, tiny, 1.0, huge):
            state = link.init(params)
            for _ in range(SWITCH + 1):
                outputs, state = update(jnp.float32(size), state)
            assert jax.tree.structure(outputs) == jax.tree.structure(params)
            for leaf, dtype in zip(outputs["leaves"], dtypes, strict=True):
                assert leaf.dtype == dtype
                np.testing.assert_allclose(np.asarray(leaf, complex), complex(jnp.asarray(size, dtype)), rtol=0.01)


@members("sam-masked", "asam", "stable_sam-truncated", "multi-step", "micro_batched-stable", "switch_at")
def test_what_is_not_finite_stays_visible_and_can_be_skipped(member):
    params = {"a": jnp.ones(3), "b": jnp.full((2, 2), 2.0)}
    tx = optax.chain(member.make(RHO), optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 9))

    @jax.jit
    def update(clean, perturbed, state):
        """Of two micro-batches the second is bad."""
        sizes = jnp.array([1.0, clean]) if member.stacked else clean
        grads = jax.tree.map(lambda w: jnp.multiply.outer(sizes, w), params)
        batch = jnp.array([1.0, perturbed]) if member.stacked else perturbed
        return tx.update(grads, state, params, grad_fn=lambda w, size: jax.tree.map(lambda x: x * size, w), batch=batch)

    state = tx.init(params)
    for _ in range(SWITCH + 1):
        updates, state = update(1.0, 1.0, state)
    assert np.any(flat(updates))
    for bad in (np.nan, np.inf):
        for sizes in ((bad, 1.0), (1.0, bad)):
            skipped, after = update(*sizes, state)
            assert after[1].notfinite_count == 1
            assert not np.any(flat(skipped))
            assert_identical(after[1].inner_state, state[1].inner_state)
            assert not [leaf for leaf in jax.tree.leaves(after[0]) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def test_an_ascent_along_an_average_keeps_it_behind_apply_if_finite():
    climb = optax.apply_if_finite(optax.chain(optax.ema(0.9), optax_sam.normalized_ascent(0.1)), 5)
    link, params = optax_sam.sharpness_aware(climb), jnp.ones(3)
    _, state = link.update(params, link.init(params), params, grad_fn=lambda w: w)
    outputs, after = link.update(params * jnp.nan, state, params, grad_fn=lambda w: w * jnp.nan)
    assert np.all(np.isnan(outputs))
    assert_identical(after.ascent_state.inner_state, state.ascent_state.inner_state)


def complex_loss(z, batch=1.0):
    return batch * jnp.sum(jnp.abs(jnp.sin(z) - (0.3 + 0.7j)) ** 2 * jnp.array([1.0, 2.0, 3.0]))


def conjugated_gradient(z):
    return jnp.conj(jax.grad(complex_loss)(z))


@pytest.mark.parametrize("recipe", [optax_sam.sam, optax_sam.usam, optax_sam.stable_sam], ids=lambda r: r.__name__)
def test_a_complex_param_is_a_pair_of_real_ones(recipe):
    z, link = jnp.array([1.0 + 0.5j, -0.2j, 0.3 + 0.1j]), recipe(0.2)
    pair = {"real": z.real, "imaginary": z.imag}
    _, real = optax_sam.value_and_grad(lambda p: complex_loss(jax.lax.complex(p["real"], p["imaginary"])), link)(pair)
    ascent_direction = real["real"] + 1j * real["imaginary"]
    _, gradient = optax_sam.value_and_grad(complex_loss, link)(z)  # conjugated, as that of jax.grad
    np.testing.assert_allclose(jnp.conj(gradient), ascent_direction, rtol=1e-4)
    for keywords in ({"grad_fn": conjugated_gradient}, {"value_fn": complex_loss}):
        outputs, _ = link.update(conjugated_gradient(z), link.init(z), z, **keywords)
        np.testing.assert_allclose(outputs, ascent_direction, rtol=1e-4)
    link = optax_sam.measured(link)
    keywords = {"value": complex_loss(z), "value_fn": complex_loss}
    outputs, _ = link.update(conjugated_gradient(z), link.init(z), z, **keywords)
    np.testing.assert_allclose(outputs, ascent_direction, rtol=1e-4)
