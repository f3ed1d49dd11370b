"""The side-by-side table of faults: ours is right in every row, and the checks can fail."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from benchmarks import fault_checks as checks
from benchmarks import faults

pytestmark = pytest.mark.heavy

RECORDED = json.loads((faults.RESULTS / "faults.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: str(fault.number))
def test_ours_is_right(fault):
    outcome = fault.ours()
    assert outcome.is_right, outcome.text


def test_recorded_rows_are_those_of_the_faults_and_ours_are_right():
    assert [row["number"] for row in RECORDED] == list(range(1, 16))
    assert [(row["number"], row["asked"]) for row in RECORDED] == [(f.number, f.asked) for f in faults.FAULTS]
    for row in RECORDED:
        assert row["ours_is_right"] is True
        assert row["contrib_is_right"] is row["contrib"].startswith("does not reproduce")


def test_tables_have_a_row_for_each_fault_and_fit():
    text = faults.table(RECORDED)
    assert max(map(len, text.splitlines())) <= 120
    assert [line.split()[0] for line in text.splitlines() if line[:1].isdigit()] == [str(n) for n in range(1, 16)]
    lines = faults.markdown(RECORDED).splitlines()
    assert len(lines) == 17
    assert {line.count("|") for line in lines} == {5}


# Links with one fault each, which the checks must find.


def textbook(rho, base):
    """SAM with a norm in the dtype of the gradient, no guard, and a plain sum."""

    def update(updates, state, params, *, grad_fn, **extra_args):
        norm = optax.tree.norm(updates)
        return grad_fn(jax.tree.map(lambda w, g: w + rho * g / norm, params, updates)), state

    return optax.chain(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update), base)


def added_guard(rho, base):
    """Finite at zero, and too short everywhere."""
    ascent = optax.stateless(lambda g, _: jax.tree.map(lambda x: rho * x / (optax.tree.norm(g) + 1e-3), g))
    return optax.chain(optax_sam.sharpness_aware(ascent), base)


def without_sam(rho, base):
    del rho
    return optax.with_extra_args_support(base)


def donated_twice(rho, base):
    """Init returns the params themselves."""
    tx = optax.chain(optax_sam.sam(rho), base)
    update = lambda g, state, w, **kwargs: (tx.update(g, state[0], w, **kwargs)[0], state)  # noqa: E731
    return optax.GradientTransformationExtraArgs(lambda w: (tx.init(w), w), update)


def trusting(rho, base):
    """Takes whatever grad_fn returns for the gradient."""
    del rho, base
    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda g, state, w, *, grad_fn: (grad_fn(w), state)
    )


def every_leaf():
    return optax.chain(optax_sam.sam(checks.RHO), optax.sgd(0.1))


@pytest.mark.parametrize(
    ("check", "shown"),
    [
        (lambda: checks.zero_gradient(textbook), "by nan"),
        (lambda: checks.perturbation_length(textbook, checks.small_gradient()), "inf ρ"),
        (lambda: checks.perturbation_length(textbook, checks.many_leaves()), "1.40"),
        (lambda: checks.moved_params(textbook, np.full(1000, 1.5), np.ones(1000)), "0 of 1,000"),
        (lambda: checks.accumulated("", checks.outside(textbook)), "only the last of 4"),
        (lambda: checks.accumulated("", checks.inside(textbook)), "as it is mSAM"),
        (lambda: checks.switched_off(checks.chained(0.1, optax.sgd(0.5))), "go 2"),
        (lambda: checks.scheduled("", checks.chained(0.1, optax.sgd(0.1))), "0.10, 0.10, 0.10"),
        (lambda: checks.donated("", donated_twice, 2), "JaxRuntimeError"),
        (lambda: checks.donated("", without_sam, 2), "off by"),
        (lambda: checks.looped("", without_sam, optax.identity(), 2), "off by"),
        (lambda: checks.clipped_and_decayed("", checks.in_front(checks.chained)), "decay 0.00"),
        (lambda: checks.only_first(every_leaf()), "the second by 0."),
        (lambda: checks.grouped("", lambda base: checks.partition(textbook(0.5, base))), "TypeError"),
        (lambda: checks.grouped("", lambda base: without_sam(0.5, checks.partition(base))), "off by"),
        (lambda: checks.tupled(trusting), "tuple of 2"),
        (lambda: checks.seen_params(checks.transparent_tallied, 4), "2 of 4"),
        (lambda: checks.one_step(without_sam), "off by"),
        (lambda: checks.one_step(added_guard), "off by"),
    ],
)
def test_checks_find_a_broken_link(check, shown):
    outcome = check()
    assert not outcome.is_right
    assert shown in outcome.text


def test_an_arithmetic_switch_loses_the_momentum():
    def init(params):
        return {"trace": jnp.zeros_like(params), "odd": jnp.zeros([])}

    def update(updates, state, params, *, grad_fn):
        odd = state["odd"]
        return updates, {"trace": odd * grad_fn(params) + (1 - odd) * state["trace"], "odd": 1 - odd}

    outcome = checks.momentum_after_inf(optax.GradientTransformationExtraArgs(init, update))
    assert not outcome.is_right
    assert "nan" in outcome.text


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.number)
def test_contrib_breaks_as_recorded(fault):
    rows = json.loads((faults.RESULTS / "faults.json").read_text())["rows"]
    assert fault.contrib().is_right == rows[fault.number - 1]["contrib_is_right"]


def test_the_readme_has_the_table():
    rows = json.loads((faults.RESULTS / "faults.json").read_text())["rows"]
    assert faults.markdown(rows) in (faults.RESULTS.parent / "README.md").read_text(encoding="utf-8")
