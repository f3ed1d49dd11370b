"""Every recipe and combinator with arguments: what the tests of the contract and of the laws run over."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam
from tests.helpers.problems import clean_gradient, mlp_batch, mlp_loss, mlp_params, split

MICRO_BATCHES = 4
SWITCH = 2


class Member(NamedTuple):
    """One member of the family.

    Attributes:
        name: id of its tests.
        make: from rho (a scalar or a schedule) to the link.
        extra_gradients: gradients that an update evaluates besides the clean one, at steps 0, 1, 2 and 3.
        stacked: whether updates and batch carry a leading axis of micro-batches.
        renormalizes: whether what comes out is as long as the clean gradient.
        moved: steps in which something else than the clean gradient comes out; None: those with extra gradients.
    """

    name: str
    make: Callable[[optax.ScalarOrSchedule], optax.GradientTransformationExtraArgs]
    extra_gradients: tuple[int, int, int, int] = (1, 1, 1, 1)
    stacked: bool = False
    renormalizes: bool = False
    moved: tuple[int, ...] | None = None


def _matrices(params):
    return jax.tree.map(lambda w: jnp.ndim(w) > 1, params)


def _multi_step(rho):
    projection = functools.partial(optax.projections.projection_l2_ball, scale=0.15)
    return optax_sam.sharpness_aware(optax_sam.normalized_ascent(rho), steps=3, projection=projection)


def _momentum_ascent(rho):
    return optax_sam.sharpness_aware(optax.chain(optax.ema(0.9), optax_sam.normalized_ascent(rho)))


def _phases(rho):
    return optax_sam.switch_at({0: optax.identity(), 1: optax_sam.usam(rho), SWITCH: optax_sam.stable_sam(rho)})


def _every_other(rho):
    return optax_sam.switch_by(lambda step: step % 2 == 1, [optax.identity(), optax_sam.asam(rho)])


MEMBERS = [
    Member("sam", optax_sam.sam),
    Member("sam-masked", lambda rho: optax_sam.sam(rho, mask=_matrices)),
    Member("usam", optax_sam.usam),
    Member("asam", optax_sam.asam),
    Member("asam-eta0", lambda rho: optax_sam.asam(rho, eta=0.0)),
    Member("stable_sam", optax_sam.stable_sam, renormalizes=True),
    Member("stable_sam-truncated", lambda rho: optax_sam.stable_sam(rho, max_scale=1.0)),
    Member("renormalized-asam", lambda rho: optax_sam.renormalized(optax_sam.asam(rho)), renormalizes=True),
    Member("multi-step", _multi_step, extra_gradients=(3, 3, 3, 3)),
    Member("momentum-ascent", _momentum_ascent),
    Member("msam", optax_sam.msam, stacked=True),
    Member("micro_batched-stable", lambda rho: optax_sam.micro_batched(optax_sam.stable_sam(rho)), stacked=True),
    Member("late-sam", lambda rho: optax_sam.late(optax_sam.sam(rho), SWITCH), extra_gradients=(0, 0, 1, 1)),
    Member(
        "late-msam",
        lambda rho: optax_sam.micro_batched(optax_sam.late(optax_sam.sam(rho), SWITCH)),
        extra_gradients=(0, 0, 1, 1),
        stacked=True,
    ),
    Member("late-momentum-ascent", lambda rho: optax_sam.late(_momentum_ascent(rho), SWITCH), (0, 0, 1, 1)),
    Member("switch_at", _phases, extra_gradients=(0, 1, 1, 1)),
    Member("switch_by", _every_other, extra_gradients=(0, 1, 0, 1)),
    Member("gsam", lambda rho: optax_sam.gsam(rho, alpha=0.3)),
    Member("wsam", lambda rho: optax_sam.wsam(rho, gamma=0.7)),
    Member("friendly_sam", lambda rho: optax_sam.friendly_sam(rho, sigma=0.7)),
    Member("vasso", optax_sam.vasso),
    Member("look_sam", lambda rho: optax_sam.look_sam(rho, period=2), (1, 0, 1, 0), moved=(0, 1, 2, 3)),
    Member("sam_every", lambda rho: optax_sam.sam_every(rho, period=2), (1, 0, 1, 0)),
    Member("ae_sam", lambda rho: optax_sam.ae_sam(rho, threshold=lambda step: 10 * (step % 2)), (1, 0, 1, 0)),
    Member("momentum_sam", optax_sam.momentum_sam, moved=(1, 2, 3)),
    Member("lagged_sam", optax_sam.lagged_sam, moved=(1, 2, 3)),
    Member("random_sam", lambda rho: optax_sam.random_sam(rho, key=0)),
]

# What takes a link and returns one. ``measured`` reads the loss from ``value`` and ``value_fn``; its axis is mapped by
# nobody, and no leaf sharded over it.
COMBINATORS: dict[str, Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]] = {
    "sharpness_aware": optax_sam.sharpness_aware,
    "renormalized": optax_sam.renormalized,
    "combined": lambda inner: optax_sam.combined(inner, lambda g, s, shards: s),
    "one_gradient": optax_sam.one_gradient,
    "on_momentum": lambda inner: optax_sam.on_momentum(inner, decay=0.9),
    "switch_on": lambda inner: optax_sam.switch_on(optax.stateless(lambda updates, params: 0), [inner]),
    "switch_at": lambda inner: optax_sam.switch_at({0: inner}),
    "switch_by": lambda inner: optax_sam.switch_by(lambda step: 0, [inner]),
    "late": lambda inner: optax_sam.late(inner, 0),
    "micro_batched": optax_sam.micro_batched,
    "measured": optax_sam.measured,
    "sharded": lambda inner: optax_sam.sharded(inner, "model", mask=False),
}

RHO, STEPS = 0.1, 4


def members(*names, heavy=()):
    """Parametrizes a test over some members: those in which the code that it is about differs."""
    by_name = {member.name: member for member in MEMBERS}
    marks = [[pytest.mark.heavy] if name in heavy else [] for name in names]
    params = [pytest.param(by_name[name], id=name, marks=mark) for name, mark in zip(names, marks, strict=True)]
    return pytest.mark.parametrize("member", params)


# Compositions of what others are made of too: tried with the heavy tests.
ALIKE = ("asam-eta0", "stable_sam-truncated", "wsam", "friendly_sam", "vasso", "sam_every", "lagged_sam")
every_member = members(*(member.name for member in MEMBERS), heavy=ALIKE)
every_ascent = members("sam-masked", "usam", "renormalized-asam", "multi-step", "momentum-ascent")
every_combination = members(
    "multi-step",
    "renormalized-asam",
    "late-msam",
    "late-momentum-ascent",
    "switch_at",
    "look_sam",
    "ae_sam",
    "random_sam",
)


def batch_for(member, batch=None, num_micro_batches=MICRO_BATCHES):
    batch = mlp_batch() if batch is None else batch
    return split(batch, num_micro_batches) if member.stacked else batch


def optimizer(link):
    return optax.chain(link, optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9))


def gradients_by_step(member, rho, loss_fn=mlp_loss, params=None, batch=None):
    """What the link returns in each of its first updates at the same params, stacked."""
    link, params = member.make(rho), mlp_params() if params is None else params
    batch = batch_for(member) if batch is None else batch

    @jax.jit
    def run(params, batch):
        def body(state, _):
            grads = clean_gradient(loss_fn, params, batch, member.stacked)
            outputs, state = link.update(grads, state, params, grad_fn=jax.grad(loss_fn), batch=batch, unknown=1)
            return state, outputs

        return jax.lax.scan(body, link.init(params), length=STEPS)[1]

    return run(params, batch)


@functools.cache
def plain_gradients_by_step(member, rho=RHO):
    return gradients_by_step(member, rho)
