"""Sums of outer products against the arrays that they stand for."""

import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam._lazy import grams
from optax_sam._lazy import outer as sums
from optax_sam._lazy.outer import MICRO_BATCH, Base, Lazy, Outer

M, K, SHAPE = 3, 2, (4, 5, 6)
RNG = np.random.default_rng(0)
SCALES = np.array([0.5, -2.0, 3.0], np.float32)
SHARES = np.array([0.25, 0.0, 0.75], np.float32)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def outer(axes, scale=None):
    others = tuple(axis for axis in range(3) if axis not in axes)
    left, right = (normal(M, K, *(SHAPE[axis] for axis in part)) for part in (axes, others))
    return Outer(left, right, axes, others, scale)


def lazy(bases, outers):
    return Lazy(tuple(bases), tuple(outers), SHAPE, np.dtype(np.float32))


def dense(value):
    """(M, *shape) in float64, by NumPy."""
    total = np.zeros((M, *SHAPE))
    for base in value.bases:
        scale = np.ones(M) if base.scale is None else np.broadcast_to(np.asarray(base.scale, float), (M,))
        total += scale[:, None, None, None] * np.asarray(base.array, float)
    for term in value.outers:
        scale = np.ones(M) if term.scale is None else np.broadcast_to(np.asarray(term.scale, float), (M,))
        product = np.einsum("mka,mkb->mab", *(np.asarray(x, float).reshape(M, K, -1) for x in (term.left, term.right)))
        product = product.reshape(M, *(SHAPE[axis] for axis in (*term.axes, *term.others)))
        total += scale[:, None, None, None] * np.moveaxis(
            product, (1, 2, 3), (1 + np.array((*term.axes, *term.others)))
        )
    return total


SUMS = {
    "one": lazy([], [outer((0,))]),
    "scaled": lazy([], [outer((2, 0), SCALES)]),
    "two": lazy([], [outer((0, 1)), outer((0, 1), SCALES)]),
    "other side": lazy([], [outer((2,)), outer((0, 1), SCALES)]),
    "with arrays": lazy([Base(normal(*SHAPE)), Base(normal(*SHAPE), SCALES)], [outer((1,), 2.0)]),
    "arrays alone": lazy([Base(normal(*SHAPE), SCALES)], []),
}
each_sum = pytest.mark.parametrize("value", SUMS.values(), ids=SUMS)


def cancelling(value, part):
    """The sum less nearly all of what it is, as terms of their own."""
    opposite = sums.scaled(value, part - 1)
    bases = [Base(base.array + 0, base.scale) for base in opposite.bases]
    outers = [Outer(x.left + 0, x.right + 0, x.axes, x.others, x.scale) for x in opposite.outers]
    return value.with_terms([*value.bases, *bases], [*value.outers, *outers])


@each_sum
@pytest.mark.parametrize("part", [None, 1e-1, 1e-3])
def test_squared_norms(value, part):
    value = value if part is None else cancelling(value, part)
    found, expected = grams.inner_product(value, value, M), np.sum(dense(value) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-5 if part is None else 3e-6 / part)


@pytest.mark.parametrize(
    ("one", "other"), [("one", "scaled"), ("scaled", "one"), ("two", "other side"), ("with arrays", "arrays alone")]
)
@pytest.mark.parametrize("part", [None, 1e-3])
def test_inner_products(one, other, part):
    first, second = SUMS[one], SUMS[other] if part is None else cancelling(SUMS[other], part)
    found, expected = grams.inner_product(first, second, M), np.sum(dense(first) * dense(second), axis=(1, 2, 3))
    if (one, other) in {("one", "scaled"), ("scaled", "one")}:
        assert found is None  # no Gram matrices: the axes are split in another way
    else:
        lengths = np.sqrt([np.sum(dense(x) ** 2, axis=(1, 2, 3)) for x in (first, second)]).prod(axis=0)
        np.testing.assert_array_less(abs(found - expected), 1e-3 * lengths)


@each_sum
@pytest.mark.parametrize("shares", [None, SHARES])
def test_means(value, shares):
    weights = np.full(M, 1 / M) if shares is None else shares
    expected = np.einsum("m...,m->...", dense(value), weights)
    np.testing.assert_allclose(sums.mean(value, shares, M), expected, rtol=1e-5, atol=1e-5)


def test_what_has_no_share_may_be_anything():
    value = SUMS["with arrays"]
    [term] = value.outers
    spoilt = Outer(term.left.at[1].set(jnp.nan), term.right.at[1].set(jnp.inf), term.axes, term.others, term.scale)
    bases = [value.bases[0], Base(value.bases[1].array, jnp.asarray(SCALES).at[1].set(jnp.nan))]
    found = sums.mean(value.with_terms(bases, [spoilt]), SHARES, M)
    np.testing.assert_allclose(found, sums.mean(value, SHARES, M), rtol=1e-6)


@pytest.mark.parametrize(
    ("axes", "contracted", "is_known"),
    [((0,), (0,), True), ((1, 2), (0,), True), ((0, 1), (1, 0), True), ((0, 1), (0,), False), ((0,), (0, 1), False)],
)
def test_products_with_rows(axes, contracted, is_known):
    term = outer(axes, SCALES)
    x = normal(M, 7, *(SHAPE[axis] for axis in contracted))
    free = tuple(axis for axis in range(3) if axis not in contracted)
    found = sums.applied(term, x, (MICRO_BATCH, 10, *contracted), (MICRO_BATCH, 10, *free), jnp.float32, None)
    assert (found is not None) == is_known
    if found is not None:
        labels = [9, 10, *contracted], [9, 0, 1, 2], [9, 10, *free]
        expected = np.einsum(np.asarray(x, float), labels[0], dense(lazy([], [term])), labels[1], labels[2])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_sums_and_differences_have_one_term_for_the_same_arrays():
    w, term = Base(normal(*SHAPE)), outer((0,), SCALES)
    point, step = lazy([w], [term]), lazy([], [term])
    left = sums.difference(point, lazy([w], []))
    assert (len(left.bases), len(left.outers)) == (0, 1)
    np.testing.assert_allclose(dense(left), dense(step))
    both = sums.total(point, step)
    assert (len(both.bases), len(both.outers)) == (1, 1)
    np.testing.assert_allclose(dense(both), dense(point) + dense(step), rtol=1e-6)
    turned = Outer(term.left, term.right, (2,), (0, 1), term.scale)  # the same arrays, and another value
    assert len(sums.total(step, lazy([], [turned])).outers) == 2


@pytest.mark.parametrize("index", [jnp.array([0, 1, 1]), jnp.array([True, False, True]), jnp.int32(1)])
def test_selections_hold_nothing_of_what_was_not_selected(index):
    w, shared, own = Base(normal(*SHAPE)), outer((0,), SCALES), outer((0,))
    cases = lazy([w], [shared]), lazy([], [sums.scaled(lazy([], [shared]), 3.0).outers[0], own])
    found = sums.selected(index, cases)
    chosen = np.broadcast_to(np.asarray(index, int), (M,))
    expected = np.stack([dense(cases[case])[number] for number, case in enumerate(chosen)])
    np.testing.assert_allclose(dense(found), expected, rtol=1e-5, atol=1e-6)
    infinite = Outer(own.left * jnp.inf, own.right, own.axes, own.others)
    spoilt = sums.selected(index, (cases[0], cases[1].with_terms([], [cases[1].outers[0], infinite])))
    kept = dense(spoilt)[chosen == 0]
    np.testing.assert_allclose(kept, expected[chosen == 0], rtol=1e-5, atol=1e-6)


def test_units_are_powers_of_two_whose_inverses_are_finite():
    units = sums.unit_of(jnp.array([[1e-45], [3e-38], [3.0], [3e38]], jnp.float32))
    assert np.all(np.isfinite(1 / units))
    np.testing.assert_array_equal(np.log2(units), np.round(np.log2(units)))
    assert 0.4 < 3 / units[2] < 1.1
