"""The checks for a link of one's own: every member of the family passes them, and each of them can fail."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam
from optax_sam.testing import CHECKS, check_link
from tests.helpers.registry import MEMBERS, RHO

ALONE = {member.name: member.make(RHO) for member in MEMBERS if not member.stacked}


QUICK = ("look_sam", "random_sam")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.heavy) for name in ALONE]
)
def test_members_of_the_family_pass(name):
    check_link(ALONE[name], skip=("shards",) if name in ("random_sam", "multi-step") else ())


def transformation(update, init=lambda params: ()):
    return optax.GradientTransformationExtraArgs(init, update)


def halves(updates, state, params=None, **_):
    return jax.tree.map(lambda g: g.astype(jnp.float16), updates), state


def strict(updates, state, params=None, *, grad_fn, batch, value_fn, value):
    return updates, state


def growing(updates, state, params=None, **_):
    return updates, state + 1.0


def of_this_call(updates, state, params=None, **_):
    """What is traced and what is not differ."""
    is_traced = isinstance(jax.tree.leaves(updates)[0], jax.core.Tracer)
    return jax.tree.map(lambda g: g * (2.0 if is_traced else 1.0), updates), state


def of_the_loop(updates, state, params=None, *, grad_fn=None, batch=None, micro_batch=(), **_):
    """Other numbers in straight-line code, where the index of a micro-batch is known."""
    factor = 2.0 if micro_batch and not isinstance(micro_batch[0], jax.core.Tracer) else 1.0
    return jax.tree.map(lambda g: g * factor, updates), state


def of_this_shard(updates, state, params=None, **_):
    return jax.tree.map(lambda g: g / optax.tree.norm(updates), updates), state


def unguarded(updates, state, params=None, **_):
    length = sum(jnp.sum(g**2) for g in jax.tree.leaves(updates))
    return jax.tree.map(lambda g: g / length, updates), state


def climbing(updates, state, params=None, *, grad_fn, batch=None, **_):
    length = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(updates)))
    point = jax.tree.map(lambda w, g: w + 0.1 * g / length, params, updates)
    return grad_fn(point) if batch is None else grad_fn(point, batch), state


def remembering(updates, state, params=None, **_):
    return updates, state / optax_sam.norm(updates)


BROKEN = {
    "dtypes": (transformation(halves), "types", "what update returns must have the types"),
    "state": (transformation(growing, lambda params: jnp.int32(0)), "types", "the state after an update"),
    "jit": (transformation(of_this_call), "types", "without jax.jit"),
    "strategies": (transformation(of_the_loop), "micro_batches", 'strategy="unroll"'),
    "norms": (transformation(of_this_shard), "shards", "sharded"),
    "zero": (transformation(unguarded), "sizes", r"for gradients of 0\.0 there is NaN or inf at"),
    "zero in the ascent": (transformation(climbing), "sizes", r"for gradients of 0\.0"),
    "state that overflows": (
        transformation(remembering, lambda params: jnp.float32(1)),
        "sizes",
        r"for gradients of 0\.0 there is NaN or inf at \['the state'\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_promise_can_fail(name):
    link, check, words = BROKEN[name]
    with pytest.raises(AssertionError, match=f'"{check}": .*{words}'):
        check_link(link, skip=[other for other in CHECKS if other != check])


def test_unknown_keywords_must_be_accepted():
    with pytest.raises(AssertionError, match=r"types.: TypeError: .*unexpected keyword argument 'unknown'"):
        check_link(transformation(strict))


def test_what_init_makes_must_be_buffers_of_its_own():
    def twice(params):
        return (zero := jnp.zeros([]), zero)

    with pytest.raises(AssertionError, match="donate the same buffer twice"):
        check_link(transformation(lambda updates, state, params=None, **_: (updates, state), twice))


def test_only_promises_can_be_skipped():
    with pytest.raises(ValueError, match=r"'types', 'micro_batches', .* got \['norms'\]"):
        check_link(optax_sam.sam(RHO), skip=["norms"])
    with pytest.raises(TypeError, match=r"must be an optax\.GradientTransformation"):
        check_link(optax_sam.sam)
